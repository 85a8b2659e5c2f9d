"""`RowsModel`: rows of sequences that keep their keys and values, the same bits however a prompt is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import engine as e
from tests.support.tiny_models import write_tiny_model
from tests.unit.engine.kernels.calling import threads
from torch import Tensor

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.kernels.rows import RowsModel
from mint.engine.lora import AnyAdapter
from mint.engine.sampling.compiled_passes import CompiledPasses, cache_rows

RATIO = 1.25  # of errors
LAYERS, KV_HEADS, SIZE, ROOM, VOCAB = 3, 2, 32, 64, 391
PROMPT = e.random_prompt(45, vocab_size=VOCAB)


@dataclass
class Cached:
    """A cache of its own, whose keys and values are no numbers until they are written."""

    kv: Tensor = field(
        default_factory=lambda: torch.full((LAYERS, 2, KV_HEADS, ROOM, SIZE), float("nan"), dtype=torch.bfloat16)
    )


@dataclass(frozen=True)
class Opened:
    """A model's rows and its adapter, and the same model with it in float32 and through torch in bf16."""

    model: RowsModel
    adapter: AnyAdapter
    exact: DecoderBackend
    torchs: DecoderBackend

    def scored(self, backend: DecoderBackend, adapted: bool) -> np.ndarray:
        """The prompt's logprobs."""
        if adapted:
            return e.forward(backend, "run", [e.continuation(PROMPT[:1], PROMPT[1:])]).logprobs[0]
        return np.array(e.drain(backend.score_prompt(tuple(PROMPT), None, 0)).logprobs[1:])


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    sizes = {"layers": LAYERS, "kv_heads": KV_HEADS, "vocab_size": VOCAB, "hidden": 128}
    more = {} if request.param == "qwen2" else {"head_dim": SIZE, "heads": 8}
    folder: Path = write_tiny_model(
        tmp_path_factory.mktemp("model"), request.param, tokenizer=False, **{**sizes, **more}
    )
    exact = e.open_backend(folder)
    torchs, compiled = (e.open_backend(folder, "bfloat16", kernels=kernels) for kernels in ("torch", "compiled"))
    for backend in (exact, torchs, compiled):
        e.add_random_run(backend, "run", types.LoraConfig(rank=5), seed=1)
    passes = compiled._compute.passes
    assert isinstance(passes, CompiledPasses)
    return Opened(passes._model, compiled._adapters[compiled.snapshot("run")], exact, torchs)


def forward(given: Opened, sequence: Cached, start: int, end: int, *, adapted: bool = True) -> tuple[Tensor, Tensor]:
    """Residual stream and logits of the prompt's rows [start, end)."""
    parts = [(0, end - start, given.adapter if adapted else None)]
    x_TD = given.model.forward(PROMPT[start:end], cache_rows(sequence.kv, range(start, end)), parts).clone()
    return x_TD, given.model.logits(x_TD, parts).clone()


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_logprobs_are_as_close_to_float32_as_torchs(given: Opened, adapted: bool) -> None:
    _, logits_TV = forward(given, Cached(), 0, len(PROMPT), adapted=adapted)
    assert logits_TV.shape == (len(PROMPT), VOCAB)
    logprob_TV = logits_TV.double().log_softmax(-1)[:-1]
    exact = given.scored(given.exact, adapted)
    ours = np.abs(logprob_TV[torch.arange(len(PROMPT) - 1), PROMPT[1:]].numpy() - exact)
    theirs = np.abs(given.scored(given.torchs, adapted) - exact)
    assert 0 < ours.mean() <= RATIO * theirs.mean() and ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("cuts", [[1] * 45, [20, 25], [7, 1, 37], [44, 1]], ids=["singly", "two", "three", "last"])
def test_where_a_prompt_is_cut_changes_no_bit(given: Opened, cuts: Sequence[int]) -> None:
    """Neither of the rows nor of what is kept; a single row is a step of decoding."""
    whole = Cached()
    x_TD, logits_TV = forward(given, whole, 0, len(PROMPT))
    cut, start, parts = Cached(), 0, []
    for length in cuts:
        parts.append(forward(given, cut, start, start + length))
        start += length
    assert torch.equal(torch.cat([x for x, _ in parts]), x_TD)
    assert torch.equal(torch.cat([logits for _, logits in parts]), logits_TV)
    assert torch.equal(cut.kv[..., : len(PROMPT), :], whole.kv[..., : len(PROMPT), :])
    assert whole.kv[..., len(PROMPT) :, :].isnan().all()


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_threads_has_the_same_bits(given: Opened, count: int) -> None:
    one, several = Cached(), Cached()
    x_TD, logits_TV = forward(given, one, 0, 30)
    with threads(count):
        again_TD, again_TV = forward(given, several, 0, 30)
    assert torch.equal(again_TD, x_TD) and torch.equal(again_TV, logits_TV)
    assert torch.equal(several.kv[..., :30, :], one.kv[..., :30, :])


def test_sequences_of_a_pass_do_not_see_one_another(given: Opened) -> None:
    """With and without an adapter, at other positions, in one call; those that begin alike take it from the first."""
    alone = [Cached() for _ in range(3)]
    first_TD, first_TV = forward(given, alone[0], 0, 40)
    forward(given, alone[1], 0, 24)
    step_TD, step_TV = forward(given, alone[1], 24, 25)
    base_TD, base_TV = forward(given, alone[2], 0, 9, adapted=False)
    one, two, three, copy = (Cached() for _ in range(4))
    forward(given, two, 0, 24)
    ranges = [(one, 0, 40), (two, 24, 25), (copy, 33, 40), (three, 0, 9)]
    rows = [row for sequence, start, end in ranges for row in cache_rows(sequence.kv, range(start, end))]
    tokens = [token for _, start, end in ranges for token in PROMPT[start:end]]
    parts = [(0, 48, given.adapter), (48, 57, None)]
    x_TD = given.model.forward(tokens, rows, parts, copies=[(0, 41, 0, 33)]).clone()
    logits_TV = given.model.logits(x_TD, parts)
    assert torch.equal(x_TD, torch.cat([first_TD, step_TD, first_TD[33:], base_TD]))
    assert torch.equal(logits_TV, torch.cat([first_TV, step_TV, first_TV[33:], base_TV]))
    for found, expected, length in (
        (one, alone[0], 40),
        (two, alone[1], 25),
        (three, alone[2], 9),
        (copy, alone[0], 40),
    ):
        assert torch.equal(found.kv[..., :length, :], expected.kv[..., :length, :])


def test_rows_lie_where_the_caches_strides_say() -> None:
    """Of a slot of a larger tensor."""
    slab = torch.zeros(LAYERS, 2, 5, KV_HEADS, ROOM, SIZE, dtype=torch.bfloat16)
    kv = slab[:, :, 3]
    (row,) = cache_rows(kv, [7])
    assert row.position == 7 and row.address == kv.data_ptr()
    for name, index in (("next_layer", (1, 0, 0)), ("to_values", (0, 1, 0)), ("next_head", (0, 0, 1))):
        assert getattr(row, name) == kv[index].data_ptr() - kv.data_ptr()
