"""The compiled decoder and head on whole models: as close to float32 as torch's in bf16, and the same bits however called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import engine as e
from tests.support.tiny_models import Family, write_tiny_model
from tests.unit.engine.kernels.calling import threads
from torch import Tensor

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.kernels.decoder import CompiledDecoder
from mint.engine.lora import named_tensors

LORA = types.LoraConfig(rank=5)
LENGTHS = [1, 5, 40, 33, 64, 2]
RATIO = 1.25  # of errors, as bf16's contract has it
VOCAB = 391  # not a multiple of 16


Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    family: Family
    tied: bool
    sizes: dict[str, int]


SMALL = {"heads": 2, "kv_heads": 1, "intermediate": 160, "vocab_size": VOCAB}
MODELS = {
    "llama": Model("llama", False, {**SMALL, "heads": 4, "kv_heads": 2, "head_dim": 32}),
    "llama, tied": Model("llama", True, SMALL),
    "qwen2": Model("qwen2", False, {**SMALL, "hidden": 128, "heads": 4, "kv_heads": 2}),
    "qwen2, tied": Model("qwen2", True, SMALL),
    "qwen3": Model("qwen3", False, {**SMALL, "layers": 3}),
    "qwen3, tied": Model("qwen3", True, {**SMALL, "heads": 3, "kv_heads": 3, "head_dim": 32}),
    "mistral": Model("mistral", False, {**SMALL, "heads": 8, "kv_heads": 2, "head_dim": 32}),
}
ONE, TIED = "llama", "qwen3"  # where one will do


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model, path = MODELS[name], tmp_path_factory.mktemp("model")
            made[name] = write_tiny_model(path, model.family, tied=model.tied, tokenizer=False, **model.sizes)
        return made[name]

    return make


def opened(
    path: Path, kernels: str | None = "compiled", lora: types.LoraConfig = LORA, **options: int
) -> DecoderBackend:
    """With a run whose adapter matters; kernels None: in float32."""
    dtype = "float32" if kernels is None else "bfloat16"
    backend = e.open_backend(path, dtype, kernels=kernels, **options)
    e.add_random_run(backend, "run", lora, seed=3)
    return backend


def datums(common: int = 0, seed: int = 0, lengths: list[int] = LENGTHS) -> list[types.Datum]:
    return e.weighted_datums(np.random.default_rng(seed), lengths, VOCAB, common=common)


def trained(backend: DecoderBackend, data: list[types.Datum]) -> tuple[Tensor, Gradient]:
    """Logprobs one after the other, and the gradient by names, which is cleared."""
    logprobs = e.forward_backward(backend, "run", data).logprobs
    run = backend._trainer.runs["run"]
    found = torch.from_numpy(np.concatenate(logprobs)).double(), named_tensors(run.layout, run.gradient.flat_P)
    backend.discard_gradient("run")
    return found


def assert_gradient_is_close(found: Gradient, torchs: Gradient, exact: Gradient) -> None:
    """As close to `exact` as torch's, all together and, less strictly, each matrix."""
    ours, theirs, expected = (e.flatten(gradient) for gradient in (found, torchs, exact))
    assert 0 < e.relative_error(ours, expected) <= RATIO * e.relative_error(theirs, expected)
    assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 0.99
    for name, matrix in exact.items():
        error, other = (e.relative_error(gradient[name], matrix) for gradient in (found, torchs))
        assert 0 < error <= 2 * other + 0.01, name


def same(found: tuple[Tensor, Gradient], other: tuple[Tensor, Gradient]) -> bool:
    return torch.equal(found[0], other[0]) and torch.equal(e.flatten(found[1]), e.flatten(other[1]))


@pytest.mark.parametrize("name", MODELS)
def test_errors_are_no_larger_than_torchs(name: str, folder: Callable[[str], Path]) -> None:
    """Of logprobs and of the gradient in bf16, against float32."""
    data = datums()
    exact, compiled, torchs = (trained(opened(folder(name), kernels), data) for kernels in (None, "compiled", "torch"))
    ours, theirs = ((found[0] - exact[0]).abs() for found in (compiled, torchs))
    assert 0 < ours.mean() <= RATIO * theirs.mean() and ours.max() <= 2 * theirs.max()
    assert_gradient_is_close(compiled[1], torchs[1], exact[1])


@pytest.mark.parametrize("lora", [
    types.LoraConfig(rank=1, train_mlp=False, train_unembed=False),
    types.LoraConfig(rank=16, train_attn=False, train_unembed=False),
    types.LoraConfig(rank=33, train_attn=False, train_mlp=False),
    types.LoraConfig(rank=16),
], ids=["attention", "mlp", "unembedding", "all"])  # fmt: skip
def test_any_modules_may_be_trained(lora: types.LoraConfig, folder: Callable[[str], Path]) -> None:
    """What is not trained costs no backward, and what is has the gradient of float32."""
    data = datums()
    exact, compiled, torchs = (
        trained(opened(folder(TIED), kernels, lora), data) for kernels in (None, "compiled", "torch")
    )
    assert_gradient_is_close(compiled[1], torchs[1], exact[1])


@pytest.mark.parametrize("name", [ONE, TIED])
@pytest.mark.parametrize("common", [0, 20])
def test_forward_has_the_logprobs_of_forward_backward(name: str, common: int, folder: Callable[[str], Path]) -> None:
    """With shared beginnings, too."""
    backend, data = opened(folder(name)), datums(common, lengths=[40, 33, 64, 21])
    scored = np.concatenate(e.forward(backend, "run", data).logprobs)
    assert np.array_equal(scored, np.concatenate(e.forward_backward(backend, "run", data).logprobs))


@pytest.mark.parametrize("name", [ONE, TIED])
def test_one_thread_and_two_have_the_same_bits(name: str, folder: Callable[[str], Path]) -> None:
    backend, data = opened(folder(name)), datums(20, lengths=[40, 33, 64, 21])
    one = trained(backend, data)
    for count in (2, 3):
        with threads(count):
            several = trained(backend, data)
        assert same(several, one)


def test_a_datums_logprobs_depend_neither_on_its_neighbours_nor_on_what_it_shares(
    folder: Callable[[str], Path],
) -> None:
    backend, data = opened(folder(ONE)), datums(20, lengths=[40, 33, 64, 21])
    together = e.forward(backend, "run", data).logprobs
    for datum, logprobs in zip(data, together, strict=True):
        assert np.array_equal(e.forward(backend, "run", [datum]).logprobs[0], logprobs)


@pytest.mark.parametrize("recomputed", [1, 3])
def test_layers_that_are_recomputed_have_the_same_bits(recomputed: int, folder: Callable[[str], Path]) -> None:
    data = datums()
    kept = trained(opened(folder(TIED), recompute_layers=0), data)
    again = trained(opened(folder(TIED), recompute_layers=recomputed), data)
    assert same(again, kept)


def test_runs_of_a_pass_have_the_bits_they_have_alone(folder: Callable[[str], Path]) -> None:
    """Of other ranks and of other modules: neither logprobs nor gradients know of the neighbours."""
    ranks = {
        "a": types.LoraConfig(rank=5),
        "b": types.LoraConfig(rank=33, train_attn=False),
        "c": types.LoraConfig(rank=16),
    }
    backend = e.open_backend(folder(ONE), "bfloat16", kernels="compiled")
    parts = []
    for seed, (run, lora) in enumerate(ranks.items()):
        e.add_random_run(backend, run, lora, seed=seed)
        parts.append(e.part(run, datums(seed=seed, lengths=[17 + seed, 9])))
    passes = e.record_passes(backend, patch := pytest.MonkeyPatch())
    together = e.in_passes(backend, "forward_backward", parts)
    assert passes == [26 + 27 + 28]
    gradients = [e.gradient(backend, run) for run in ranks]
    patch.undo()
    for run, part, result, gradient in zip(ranks, parts, together, gradients, strict=True):
        backend.discard_gradient(run)
        (alone,) = e.in_passes(backend, "forward_backward", [part])
        assert all(np.array_equal(x, y) for x, y in zip(alone.logprobs, result.logprobs, strict=True))
        assert gradient.any() and torch.equal(e.gradient(backend, run), gradient)


def test_gradients_add_up_over_passes(folder: Callable[[str], Path]) -> None:
    backend, (first, second) = opened(folder(ONE)), (datums(seed=1), datums(seed=2))
    apart = sum(e.flatten(trained(backend, data)[1]) for data in (first, second))
    e.forward_backward(backend, "run", first)
    e.forward_backward(backend, "run", second)
    assert e.relative_error(e.gradient(backend, "run"), apart) < 1e-6


def test_sharing_a_beginning_changes_no_gradient_much(folder: Callable[[str], Path]) -> None:
    """The sum over datums that share their first rows, against each by itself."""
    backend, data = opened(folder(ONE)), datums(24, lengths=[40, 33, 64])
    apart = sum(e.flatten(trained(backend, [datum])[1]) for datum in data)
    assert e.relative_error(e.flatten(trained(backend, data)[1]), apart) < 0.02


def test_it_is_the_compiled_decoder_that_is_tested(folder: Callable[[str], Path]) -> None:
    backend = opened(folder(ONE))
    assert isinstance(backend._trainer.decoder, CompiledDecoder) and backend.limits.kernels.startswith("numba ")
    assert not isinstance(opened(folder(ONE), "torch")._trainer.decoder, CompiledDecoder)
