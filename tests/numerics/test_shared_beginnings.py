"""Datums that begin alike share the rows of what they begin with: less is computed, and the numbers are those of each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.backend import drain
from mint.engine.models import packed_attention
from mint.engine.packing import MIN_SHARED
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    VOCAB,
    add_random_run,
    both_kernels,
    cross_entropy_loss,
    forward,
    forward_backward,
    gradient,
    in_passes,
    largest_difference,
    make_datum,
    open_backend,
    part,
    peft_model,
    policy_datums,
    record_passes,
    reference_gradient,
    relative_error,
    weighted_datums,
)
from tests.support.tiny_models import FAMILIES

LORA = types.LoraConfig(rank=4)
# how many tokens of the first of them each takes, and how many it has
GROUPS = [(0, 60), (50, 75), (50, 51), (50, 110), (0, 20), (16, 40), (15, 30)]
ROWS = 60 + 25 + 1 + 60 + 20 + 24 + 30


def grouped(seed: int = 0) -> list[types.Datum]:
    """A prompt with four answers, two more datums with as many tokens in common as are shared at least, one with fewer."""
    generator = np.random.default_rng(seed)
    data = weighted_datums(generator, [length for _, length in GROUPS])
    first = data[0].model_input.to_ints()
    changed = []
    for i, ((common, length), datum) in enumerate(zip(GROUPS, data, strict=True)):
        tokens, inputs = datum.model_input.to_ints(), dict(datum.loss_fn_inputs)
        if common:  # another token follows than in the others, whatever was drawn
            tokens[: common + 1] = [*first[:common], (first[common] + i) % VOCAB]
        assert len(tokens) == length
        changed.append(make_datum(tokens, inputs.pop("target_tokens"), **inputs))
    return changed


def each_alone(folder: Path, data: Sequence[types.Datum], **options: Any) -> tuple[list[np.ndarray], torch.Tensor]:
    """Logprobs, and the gradients added up, of passes of one datum."""
    backend = open_backend(folder, max_tokens_per_pass=1)
    add_random_run(backend, "run", LORA)
    result = forward_backward(backend, "run", data, **options)
    return result.logprobs, gradient(backend, "run")


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradient_are_pefts(
    tiny: Callable[..., Path], family: str, recomputed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = tiny(family), grouped()
    backend = open_backend(folder, recompute_layers=recomputed)
    tensors = add_random_run(backend, "run", LORA)
    passes = record_passes(backend, monkeypatch)
    result = forward_backward(backend, "run", data)
    assert passes == [ROWS]
    expected, expected_gradient = reference_gradient(*peft_model(folder, tensors, 4), data, cross_entropy_loss(data))
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT


def test_forward_scores_what_forward_backward_does(tiny: Callable[..., Path]) -> None:
    for dtype in ("float32", "bfloat16"):
        backend = open_backend(tiny("llama"), dtype)
        add_random_run(backend, "run", LORA)
        scored, trained = (f(backend, "run", grouped()).logprobs for f in (forward, forward_backward))
        assert all(np.array_equal(a, b) for a, b in zip(scored, trained, strict=True))


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_every_loss_takes_its_own_terms_on_rows_that_are_shared(tiny: Callable[..., Path], loss_fn: str) -> None:
    """Advantages differ between datums, on the prompt too."""
    folder, data = tiny("llama"), grouped()
    logprobs, _ = each_alone(folder, data)
    policy = policy_datums(np.random.default_rng(1), data, logprobs)
    expected, expected_gradient = each_alone(folder, policy, loss_fn=loss_fn)
    backend = open_backend(folder)
    add_random_run(backend, "run", LORA)
    result = forward_backward(backend, "run", policy, loss_fn)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT


@pytest.mark.parametrize(("cap", "rows"), [(4096, [3 * 95]), (110, [95] * 3 * 2), (80, [70, 85] * 3 * 2)])
def test_a_custom_loss_reads_and_differentiates_every_datum(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cap: int, rows: list[int]
) -> None:
    """A preference loss of pairs with one prompt each, against PEFT under torch's autograd: all in one pass, a pair in
    each, a datum in each. Several passes are made twice."""
    folder, generator = tiny("qwen3"), np.random.default_rng(2)
    data = [d for _ in range(3) for d in weighted_datums(generator, [70, 85], common=60)]

    def loss(logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        totals = torch.stack([p.sum() for p in logprobs]).view(3, 2)
        return -torch.nn.functional.logsigmoid(0.1 * (totals[:, 0] - totals[:, 1])).sum(), {}

    backend = open_backend(folder, max_tokens_per_pass=cap)
    tensors = add_random_run(backend, "run", LORA)
    passes = record_passes(backend, monkeypatch)
    result = drain(backend.forward_backward_custom(part("run", data), loss))
    expected, expected_gradient = reference_gradient(
        *peft_model(folder, tensors, 4), data, lambda logprobs: loss(logprobs)[0]
    )
    assert passes == rows
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT


def test_datums_of_the_same_tokens_keep_their_own_targets_and_weights(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several targets for a token, different ones for each datum; only the last token is computed for each."""
    folder, generator = tiny("llama"), np.random.default_rng(3)
    tokens = generator.integers(0, VOCAB, 40)
    data = [
        make_datum(tokens, generator.integers(0, VOCAB, (40, 3)), weights=generator.standard_normal((40, 3)))
        for _ in range(5)
    ]
    expected, expected_gradient = each_alone(folder, data)
    backend = open_backend(folder)
    add_random_run(backend, "run", LORA)
    passes = record_passes(backend, monkeypatch)
    result = forward_backward(backend, "run", data)
    assert passes == [40 + 4]
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT


def test_rows_that_are_shared_are_scored_in_several_chunks(tiny: Callable[..., Path]) -> None:
    """As many pairs as there are datums for some rows of the first chunk; two more chunks."""
    folder, data = tiny("llama"), weighted_datums(np.random.default_rng(4), [40] * 300, common=32)
    expected, expected_gradient = each_alone(folder, data)
    backend = open_backend(folder, max_tokens_per_pass=10**4)
    add_random_run(backend, "run", LORA)
    result = forward_backward(backend, "run", data)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT


@both_kernels
def test_many_answers_to_one_prompt_in_bf16_keep_the_gradient(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """What hundreds give to the prompt's keys and values is summed in float32, some at a time: in bf16 the sums would be off
    by more than the rounding of each datum alone."""
    folder = tiny("llama", head_dim=32)
    data = weighted_datums(np.random.default_rng(4), [40] * 300, common=32)
    exact = each_alone(folder, data)[1]
    errors = []
    for cap, at_once in ((1, 2**13), (10**4, 2**13), (10**4, 1000)):
        monkeypatch.setattr(packed_attention, "SHARED_AT_ONCE", at_once)
        backend = open_backend(folder, "bfloat16", max_tokens_per_pass=cap, kernels=kernels)
        add_random_run(backend, "run", LORA)
        forward_backward(backend, "run", data)
        errors.append(relative_error(gradient(backend, "run"), exact))
    assert max(errors[1:]) <= 1.5 * errors[0]


def test_runs_share_no_rows(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their adapters make other numbers of the same tokens."""
    folder, data = tiny("llama"), grouped()
    backend, alone = open_backend(folder), open_backend(folder)
    for seed, name in enumerate("ab"):
        for one in (backend, alone):
            add_random_run(one, name, LORA, seed=seed)
    passes = record_passes(backend, monkeypatch)
    results = in_passes(backend, "forward_backward", [part("a", data), part("b", data)])
    assert passes == [2 * ROWS]
    for name, result in zip("ab", results, strict=True):
        expected = forward_backward(alone, name, data)
        assert largest_difference(result.logprobs, expected.logprobs) <= FP32_LOGPROB
        assert relative_error(gradient(backend, name), gradient(alone, name)) <= FP32_GRADIENT


def test_a_pass_holds_more_datums_that_begin_alike(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its cap in rows, and a sixteenth of what attention holds beside them."""
    backend = open_backend(tiny("llama"), max_tokens_per_pass=100)
    add_random_run(backend, "run", LORA)
    passes = record_passes(backend, monkeypatch)
    forward_backward(backend, "run", weighted_datums(np.random.default_rng(0), [50] * 10, common=32))
    assert passes == [50 + 2 * 18] * 3 + [50]
    forward_backward(backend, "run", weighted_datums(np.random.default_rng(0), [50] * 4, common=MIN_SHARED - 1))
    assert passes[4:] == [100, 100]
