"""Losses and their derivatives: the pure functions against float64 formulas, and through the engine against PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.losses import LOSSES
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    cross_entropy_loss,
    forward,
    forward_backward,
    gradient,
    largest_difference,
    make_datum,
    open_backend,
    peft_model,
    policy_datums,
    reference_gradient,
    relative_error,
    set_tensors,
    weighted_datums,
)

Formula = Callable[[Tensor, dict[str, Tensor], dict[str, float]], Tensor]
LORA = types.LoraConfig(rank=4)
LENGTHS = (20, 1, 130, 45)


# the protocol's formulas, written again: sums over positions, autograd takes the derivative


def cross_entropy(p: Tensor, given: dict[str, Tensor], config: dict[str, float]) -> Tensor:
    return -(given["weights"] * p).sum()


def importance_sampling(p: Tensor, given: dict[str, Tensor], config: dict[str, float]) -> Tensor:
    kept = given["advantages"] != 0
    return -((p[kept] - given["logprobs"][kept]).exp() * given["advantages"][kept]).sum()


def ppo(p: Tensor, given: dict[str, Tensor], config: dict[str, float]) -> Tensor:
    kept = given["advantages"] != 0
    ratio, advantage = (p[kept] - given["logprobs"][kept]).exp(), given["advantages"][kept]
    clipped = ratio.clamp(config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.minimum(ratio * advantage, clipped * advantage).sum()


FORMULAS: dict[str, Formula] = {"cross_entropy": cross_entropy, "importance_sampling": importance_sampling, "ppo": ppo}
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
NARROW = {"clip_low_threshold": 0.95, "clip_high_threshold": 1.5}
CONFIGS: list[tuple[str, dict[str, float]]] = [
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", CLIP),
    ("ppo", NARROW),
]


def _inputs(loss_fn: str, shape: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """p, and inputs of either sign with some zeros; p - q reaches both sides of every clip threshold."""
    generator = np.random.default_rng(0)
    p = -generator.exponential(2.0, shape)
    active = generator.random(shape) < 0.8
    if loss_fn == "cross_entropy":
        return p, {"weights": 3 * generator.standard_normal(shape) * active}
    q = p + 0.5 * generator.standard_normal(shape)
    return p, {"logprobs": q, "advantages": generator.standard_normal(shape) * active}


def _terms(loss_fn: str, xp: Any, p: Any, inputs: dict[str, Any], config: dict[str, float]) -> tuple[Any, Any]:
    return LOSSES[loss_fn].terms(xp, p, inputs, config)


@pytest.mark.parametrize(("loss_fn", "config"), CONFIGS)
def test_value_and_derivative_equal_the_formula(loss_fn: str, config: dict[str, float]) -> None:
    p, inputs = _inputs(loss_fn, (500,))
    leaf = torch.from_numpy(p).requires_grad_()
    expected = FORMULAS[loss_fn](leaf, {k: torch.from_numpy(v) for k, v in inputs.items()}, config)
    (slope,) = torch.autograd.grad(expected, leaf)
    tensors = {k: torch.from_numpy(v) for k, v in inputs.items()}
    for xp, own_p, own_inputs in ((np, p, inputs), (torch, torch.from_numpy(p), tensors)):
        value, derivative = _terms(loss_fn, xp, own_p, own_inputs, config)
        # the same float64 arithmetic in another order
        assert float(value.sum()) == pytest.approx(float(expected.detach()), rel=1e-12)
        np.testing.assert_allclose(np.asarray(derivative), slope.numpy(), rtol=1e-12, atol=0)


def test_defaults_of_the_clip_thresholds() -> None:
    assert dict(LOSSES["ppo"].config) == CLIP


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),  # inside
        (1.5, 2.0, -2.4, 0.0),  # better than allowed: clipped, no gradient
        (0.5, 2.0, -1.0, -1.0),  # worse: the unclipped term is the smaller
        (0.5, -2.0, 1.6, 0.0),  # better than allowed on the other side
        (1.5, -2.0, 3.0, 3.0),  # worse
    ],
)
def test_ppo_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    p = np.array([-1.0])
    inputs = {"logprobs": p - np.log(ratio), "advantages": np.array([advantage])}
    value, derivative = _terms("ppo", np, p, inputs, CLIP)
    assert value[0] == pytest.approx(loss)
    assert derivative[0] == pytest.approx(slope)


def test_a_clipped_position_has_no_slope_however_large_its_ratio() -> None:
    """The loss is -high x A, a constant: the position must not turn the gradient into NaN."""
    p, inputs = torch.tensor([-1.0]), {"logprobs": torch.tensor([-1e30]), "advantages": torch.tensor([1.0])}
    value, derivative = _terms("ppo", torch, p, inputs, CLIP)
    assert value.item() == pytest.approx(-1.2)
    assert derivative.item() == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("q", [0.0, -1e30, 1e30])
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_a_zero_advantage_contributes_exactly_nothing(loss_fn: str, q: float, dtype: Any) -> None:
    """Prompt positions carry whatever q the caller padded with."""
    p = np.array([-2.0, -50.0, 0.0], dtype)
    inputs = {"logprobs": np.full(3, q, dtype), "advantages": np.zeros(3, dtype)}
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    for xp, own_p, own_inputs in ((np, p, inputs), (torch, torch.from_numpy(p), tensors)):
        value, derivative = _terms(loss_fn, xp, own_p, own_inputs, CLIP)
        assert not np.asarray(value).any()
        assert not np.asarray(derivative).any()


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_masked_positions_leave_no_trace_in_the_engine(tiny: Callable[..., Path], loss_fn: str) -> None:
    """The same sum and gradient, whatever q stands where the advantage is 0."""
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "run", LORA)
    results = []
    for padding in (0.0, -1e30):
        tokens = np.arange(21)
        q, advantages = np.full(20, padding), np.zeros(20)
        q[12:], advantages[12:] = -5.0, 0.5
        datum = make_datum(tokens[:-1], tokens[1:], logprobs=q, advantages=advantages)
        result = forward_backward(backend, "run", [datum], loss_fn)
        results.append((result.metrics, gradient(backend, "run")))
        backend.discard_gradient("run")
    assert results[0][0] == results[1][0]
    assert np.isfinite(results[0][0]["loss:sum"])
    assert results[0][0]["active_positions:sum"] == 8
    assert results[0][1].any()
    assert torch.equal(results[0][1], results[1][1])


def _negative_weights(data: Sequence[types.Datum]) -> list[types.Datum]:
    generator = np.random.default_rng(7)
    changed = []
    for datum in data:
        weights = 5 * generator.standard_normal(datum.model_input.length)
        changed.append(make_datum(datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"], weights=weights))
    return changed


def _many_targets(data: Sequence[types.Datum], width: int = 3) -> list[types.Datum]:
    """N x K targets; rows with no weight at all, with one weighted target of three, and with a target twice."""
    generator = np.random.default_rng(8)
    wide = []
    for datum in data:
        shape = (datum.model_input.length, width)
        targets = generator.integers(0, 384, shape)
        targets[::4, 1] = targets[::4, 0]
        weights = generator.standard_normal(shape) * (generator.random(shape) < 0.5)
        weights[0, 0] = 1.0
        wide.append(make_datum(datum.model_input.to_ints(), targets, weights=weights))
    return wide


@pytest.mark.parametrize("form", [_negative_weights, _many_targets])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cross_entropy_of_any_weights_equals_peft(
    tiny: Callable[..., Path], family: str, form: Callable[[Sequence[types.Datum]], list[types.Datum]]
) -> None:
    backend = open_backend(tiny(family))
    tensors = add_random_run(backend, "run", LORA)
    data = form(weighted_datums(np.random.default_rng(1), LENGTHS))
    result = forward_backward(backend, "run", data)
    model, named = peft_model(tiny(family), tensors, LORA.rank)
    expected, expected_gradient = reference_gradient(model, named, data, cross_entropy_loss(data))
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
    weights = [datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64) for datum in data]
    total = -sum(float((w * p).sum()) for w, p in zip(weights, expected, strict=True))
    # every logprob may be off by FP32_LOGPROB
    assert abs(result.metrics["loss:sum"] - total) <= FP32_LOGPROB * sum(np.abs(w).sum() for w in weights)
    assert result.metrics["positions:sum"] == sum(w.size for w in weights)
    assert result.metrics["active_positions:sum"] == sum(np.count_nonzero(w) for w in weights)


@pytest.mark.parametrize(("loss_fn", "config"), CONFIGS[1:])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_policy_gradient_losses_equal_peft(
    tiny: Callable[..., Path], family: str, loss_fn: str, config: dict[str, float]
) -> None:
    backend = open_backend(tiny(family))
    tensors = add_random_run(backend, "run", LORA)
    plain = weighted_datums(np.random.default_rng(2), LENGTHS)
    data = policy_datums(np.random.default_rng(3), plain, forward(backend, "run", plain).logprobs)
    result = forward_backward(backend, "run", data, loss_fn, config if config != CLIP else None)

    def loss(logprobs: list[Tensor]) -> Tensor:
        given = [{k: d.loss_fn_inputs[k].to_torch() for k in ("logprobs", "advantages")} for d in data]
        return torch.stack([FORMULAS[loss_fn](p, g, config) for p, g in zip(logprobs, given, strict=True)]).sum()

    model, named = peft_model(tiny(family), tensors, LORA.rank)
    expected, expected_gradient = reference_gradient(model, named, data, loss)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
    total = float(loss([torch.from_numpy(p).double() for p in expected]))
    # ratios are near 1, so a logprob's error moves its term by about as much
    size = sum(float(np.abs(d.loss_fn_inputs["advantages"].to_numpy()).sum()) for d in data)
    assert abs(result.metrics["loss:sum"] - total) <= 3 * FP32_LOGPROB * size


def test_gradient_is_the_slope_of_the_loss(tiny: Callable[..., Path]) -> None:
    """Finite differences at the largest gradient entry: no reference implementation is involved."""
    backend = open_backend(tiny("qwen3"))
    tensors = add_random_run(backend, "run", LORA)
    data = weighted_datums(np.random.default_rng(4), LENGTHS)
    forward_backward(backend, "run", data)
    names = sorted(tensors)
    flat = gradient(backend, "run")
    largest = int(flat.abs().argmax())
    sizes = np.cumsum([tensors[name].size for name in names])
    which = int(np.searchsorted(sizes, largest, side="right"))
    inside = largest - (int(sizes[which - 1]) if which else 0)
    losses, step = [], 1e-3
    for sign in (1, -1):
        moved = {name: array.copy() for name, array in tensors.items()}
        moved[names[which]].ravel()[inside] += sign * step
        set_tensors(backend, "run", moved)
        losses.append(forward(backend, "run", data).metrics["loss:sum"])
    # float32 logprobs of 200 tokens leave 1e-4 in the sum, the step's square leaves the curvature: 1 % covers both
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(flat[largest]), rel=0.01)
