"""The batch-invariant mode: a datum's and a sequence's bits are the same whatever stands beside them, in both dtypes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.engine.backend import drain
from mint.engine.decoder_backend import DecoderBackend
from mint.settings import Settings
from tests.support.engine import (
    COMPILED,
    add_random_run,
    forward_backward,
    generate,
    gradient,
    in_passes,
    part,
    random_prompt,
    request,
    weighted_datums,
)

# (dtype, kernels)
DTYPES = [("float32", "torch"), ("bfloat16", "torch"), pytest.param(("bfloat16", "compiled"), marks=COMPILED)]
LENGTHS = (7, 130, 16, 1, 64, 200, 33)
# sizes at which kernels sum few rows in another order than many
WIDE = {"hidden": 192, "intermediate": 1536}
LORA = types.LoraConfig(rank=5)


def _open(folder: Path, dtype: tuple[str, str], *, invariant: bool = True) -> DecoderBackend:
    settings = Settings(folder, None, dtype[0], 1, batch_invariant=invariant, kernels=dtype[1])
    backend = DecoderBackend(folder, folder.name, settings)
    add_random_run(backend, "run", LORA)
    add_random_run(backend, "other", types.LoraConfig(rank=3), seed=1)
    return backend


def _numbers(backend: DecoderBackend, *calls: list[types.Datum], beside: bool = False) -> tuple[list[Any], Tensor]:
    """Logprobs of every datum and the gradient, over some calls; `beside`: another run takes part in them."""
    backend.discard_gradient("run")
    others = weighted_datums(np.random.default_rng(9), (50, 20))
    logprobs: list[Any] = []
    for call in calls:
        parts = [part("other", others), part("run", call)] if beside else [part("run", call)]
        logprobs += in_passes(backend, "forward_backward", parts)[-1].logprobs
    return logprobs, gradient(backend, "run").clone()


def _equal(a: tuple[list[Any], Tensor], b: tuple[list[Any], Tensor]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_no_packing_changes_a_bit(tiny: Callable[..., Path], family: str, dtype: tuple[str, str]) -> None:
    """One call, a call for each datum, calls in between, and a pass that another run would share."""
    folder, data = tiny(family, **WIDE, head_dim=64), weighted_datums(np.random.default_rng(0), LENGTHS)
    backend = _open(folder, dtype)
    whole = _numbers(backend, data)
    assert _equal(_numbers(backend, *([datum] for datum in data)), whole)
    assert _equal(_numbers(backend, data[:3], data[3:]), whole)
    assert _equal(_numbers(backend, data, beside=True), whole)
    default = _open(folder, dtype, invariant=False)  # or this test could not fail
    assert not _equal(_numbers(default, *([datum] for datum in data)), _numbers(default, data))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_datum_has_its_bits_in_every_company(tiny: Callable[..., Path], dtype: tuple[str, str]) -> None:
    backend = _open(tiny("llama", **WIDE, head_dim=64), dtype)
    data = weighted_datums(np.random.default_rng(0), LENGTHS)
    for i, datum in enumerate(data):
        (alone,) = _numbers(backend, [datum])[0]
        among = _numbers(backend, [*data[i:], *data[:i]])[0][0]
        assert np.array_equal(among, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_of_the_callers_own_does_not_see_the_packing_either(
    tiny: Callable[..., Path], dtype: tuple[str, str]
) -> None:
    backend = _open(tiny("llama", **WIDE, head_dim=64), dtype)
    data = weighted_datums(np.random.default_rng(0), LENGTHS)

    def loss(logprobs: Any) -> tuple[Any, dict[str, float]]:
        return sum((p * p).sum() for p in logprobs), {}

    def numbers(*calls: list[types.Datum]) -> tuple[list[Any], Tensor]:
        backend.discard_gradient("run")
        results = [drain(backend.forward_backward_custom(part("run", call), loss)) for call in calls]
        return [p for result in results for p in result.logprobs], gradient(backend, "run").clone()

    assert _equal(numbers(*([datum] for datum in data)), numbers(data))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_change_no_bit_of_a_sequence(tiny: Callable[..., Path], dtype: tuple[str, str]) -> None:
    backend = _open(tiny("llama", **WIDE, head_dim=64), dtype)
    adapter = backend.snapshot("run")
    options: dict[str, Any] = {"adapter": adapter, "num_topk": 20, "max_new": 24}
    given = request(random_prompt(20), seed=7, **options)
    (alone,) = generate(backend, given)
    for count in (1, 6, 40):
        others = [request(random_prompt(5 + 3 * i, seed=1), seed=i, **options) for i in range(count)]
        found = generate(backend, *others[: count // 2], given, *others[count // 2 :])[count // 2]
        assert found.sequences == alone.sequences


def test_a_checkpoint_of_the_other_mode_goes_on_in_this_one(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama")
    packed = _open(folder, ("float32", "torch"), invariant=False).add_run("new", LORA, 0).plan
    assert packed.max_tokens_per_pass > 1
    assert _open(folder, ("float32", "torch")).use_plan("run", packed).plan.max_tokens_per_pass == 1


def test_a_resumed_run_of_this_mode_keeps_it(tiny: Callable[..., Path]) -> None:
    folder, data = tiny("llama", **WIDE, head_dim=64), weighted_datums(np.random.default_rng(0), LENGTHS)
    plan = _open(folder, ("float32", "torch")).add_run("new", LORA, 0).plan
    backend = _open(folder, ("float32", "torch"), invariant=False)
    backend.use_plan("run", plan)
    assert len(backend.micro_batches("run", part("run", data).input)) == len(data)
    assert forward_backward(backend, "run", data).error is None
