"""What a datum's logprobs and gradient do not depend on: its company in the pass, the split, calls that share a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    cross_entropy_loss,
    forward,
    forward_backward,
    gradient,
    in_passes,
    largest_difference,
    make_datum,
    open_backend,
    parameters,
    part,
    peft_model,
    policy_datums,
    record_passes,
    reference_gradient,
    relative_error,
    weighted_datums,
)

LORA = types.LoraConfig(rank=4)
LENGTHS = (7, 130, 16, 1, 64, 33, 17, 3)


def _alone(folder: Path, data: list[types.Datum]) -> tuple[list[np.ndarray], list[Tensor]]:
    """Logprobs and gradient of every datum in a pass of its own."""
    backend = open_backend(folder)
    add_random_run(backend, "run", LORA)
    logprobs, gradients = [], []
    for datum in data:
        logprobs += forward_backward(backend, "run", [datum]).logprobs
        gradients.append(gradient(backend, "run"))
        backend.discard_gradient("run")
    return logprobs, gradients


@pytest.mark.parametrize("cap", [16, 64, 4096])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_any_split_into_micro_batches_gives_the_same(tiny: Callable[..., Path], family: str, cap: int) -> None:
    """Two runs share the passes; some datums are longer than the two smaller caps."""
    folder = tiny(family)
    data = weighted_datums(np.random.default_rng(0), LENGTHS)
    logprobs, gradients = _alone(folder, data)
    backend = open_backend(folder, max_tokens_per_pass=cap)
    add_random_run(backend, "run", LORA)
    add_random_run(backend, "other", types.LoraConfig(rank=2), seed=1)
    other = weighted_datums(np.random.default_rng(1), [40, 5])
    result = in_passes(backend, "forward_backward", [part("other", other), part("run", data)])[1]
    assert largest_difference(result.logprobs, logprobs) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), torch.stack(gradients).sum(0)) <= FP32_GRADIENT


@pytest.mark.parametrize("index", range(len(LENGTHS)))
def test_a_datum_does_not_see_its_neighbours(tiny: Callable[..., Path], index: int) -> None:
    """Its own gradient, with all the others' weights 0."""
    folder = tiny("llama")
    data = weighted_datums(np.random.default_rng(0), LENGTHS)
    logprobs, gradients = _alone(folder, [data[index]])
    company = [datum if i == index else _without_weights(datum) for i, datum in enumerate(data)]
    backend = open_backend(folder)
    add_random_run(backend, "run", LORA)
    result = forward_backward(backend, "run", company)
    assert largest_difference([result.logprobs[index]], logprobs) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), gradients[0]) <= FP32_GRADIENT


@pytest.mark.parametrize(("cap", "passes"), [(4096, [271]), (140, [137, 134]), (16, [7, 130, 16, 1, 64, 33, 17, 3])])
def test_passes_hold_what_was_planned(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cap: int, passes: list[int]
) -> None:
    """Whole datums in order, evenly; one that is longer than the cap goes alone."""
    backend = open_backend(tiny("llama"), max_tokens_per_pass=cap)
    add_random_run(backend, "run", LORA)
    seen = record_passes(backend, monkeypatch)
    data = weighted_datums(np.random.default_rng(0), LENGTHS)
    forward_backward(backend, "run", data)
    forward(backend, "run", data)
    assert seen == passes * 2


def _without_weights(datum: types.Datum) -> types.Datum:
    inputs = datum.loss_fn_inputs
    return make_datum(datum.model_input.to_ints(), inputs["target_tokens"], weights=0 * inputs["weights"].to_numpy())


def test_gradients_of_several_calls_add_up(tiny: Callable[..., Path]) -> None:
    data = weighted_datums(np.random.default_rng(0), LENGTHS)
    backend = open_backend(tiny("qwen2"))
    add_random_run(backend, "run", LORA)
    forward_backward(backend, "run", data)
    whole = gradient(backend, "run")
    backend.discard_gradient("run")
    forward_backward(backend, "run", data[:3])
    forward_backward(backend, "run", data[3:])
    assert relative_error(gradient(backend, "run"), whole) <= FP32_GRADIENT


def test_rows_without_weight_are_scored_but_pull_nothing(tiny: Callable[..., Path]) -> None:
    """Like a chat's prompt: their logprobs come back; the gradient is that of the weighted rows alone."""
    folder = tiny("qwen3")
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", LORA)
    data = weighted_datums(np.random.default_rng(2), [200, 30])
    weights = [np.zeros(200), np.zeros(30)]
    weights[0][-20:] = 1.0
    data = [
        make_datum(d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"], weights=w)
        for d, w in zip(data, weights, strict=True)
    ]
    result = forward_backward(backend, "run", data)
    model, named = peft_model(folder, tensors, LORA.rank)

    def only_weighted(logprobs: list[Tensor]) -> Tensor:
        return -logprobs[0][-20:].sum()

    expected, expected_gradient = reference_gradient(model, named, data, only_weighted)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
    assert result.metrics["active_positions:sum"] == 20
    assert result.metrics["positions:sum"] == 230


def test_weights_of_zero_everywhere_leave_a_zero_gradient(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "run", LORA)
    data = [_without_weights(datum) for datum in weighted_datums(np.random.default_rng(3), LENGTHS)]
    result = forward_backward(backend, "run", data)
    assert result.metrics["loss:sum"] == 0
    assert not gradient(backend, "run").any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cap", [64, 4096])
@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling"])
def test_forward_has_the_bits_of_forward_backward(
    tiny: Callable[..., Path], dtype: str, cap: int, loss_fn: str
) -> None:
    """So that the ratio p / q of an unchanged policy is exactly 1. It touches no gradient."""
    backend = open_backend(tiny("qwen3"), dtype, max_tokens_per_pass=cap)
    add_random_run(backend, "run", LORA)
    data = weighted_datums(np.random.default_rng(4), LENGTHS)
    forward_backward(backend, "run", data)
    before = gradient(backend, "run"), parameters(backend, "run")
    if loss_fn != "cross_entropy":
        generator = np.random.default_rng(5)
        data = policy_datums(generator, data, forward(backend, "run", data).logprobs)
    seen = forward(backend, "run", data, loss_fn)
    assert torch.equal(gradient(backend, "run"), before[0])
    assert torch.equal(parameters(backend, "run"), before[1])
    again = forward_backward(backend, "run", data, loss_fn)
    assert all(np.array_equal(a, b) for a, b in zip(seen.logprobs, again.logprobs, strict=True))
    assert seen.metrics == again.metrics
    assert not torch.equal(gradient(backend, "run"), before[0])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_long_sequence_equals_peft_in_any_company(tiny: Callable[..., Path], family: str) -> None:
    """Longer than the 128 rows of an attention block, its gradient crossing blocks."""
    folder = tiny(family)
    data = weighted_datums(np.random.default_rng(6), [5, 400, 60])
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", LORA)
    result = forward_backward(backend, "run", data)
    model, named = peft_model(folder, tensors, LORA.rank)
    expected, expected_gradient = reference_gradient(model, named, data, cross_entropy_loss(data))
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
