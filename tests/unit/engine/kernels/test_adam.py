"""Compiled AdamW and norms against torch.optim and float64, for vectors of any length."""

from __future__ import annotations

import pytest
import torch
from tests.unit.engine.kernels.calling import threads
from torch import Tensor

from mint.engine import optim
from mint.engine.kernels import adam
from mint.engine.optim import AdamState, new_adam_state
from mint.types.params import AdamParams

# alone, below a vector, whole vectors, groups of 64, a block and more, and what is left of each
LENGTHS = [1, 15, 16, 17, 63, 64, 80, 127, adam.BLOCK, adam.BLOCK + 16, 3 * adam.BLOCK + 100]
HYPER = AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.99, eps=1e-3, weight_decay=0.3, grad_clip_norm=0.5)


def _vectors(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, AdamState]:
    params, grad, exp_avg, exp_avg_sq = (torch.randn(length, generator=generator) for _ in range(4))
    return params, grad, AdamState(exp_avg, exp_avg_sq.square(), step=7)


@pytest.mark.parametrize("length", LENGTHS)
def test_norms(length: int, generator: torch.Generator) -> None:
    vector = torch.randn(length + 5, generator=generator)
    vector[length:] = torch.nan  # behind it
    expected = float(vector[:length].double().norm())
    assert adam.global_norm(vector[:length]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [3e38, 1e25, 1e-30, 1e-38, 0.0])
def test_norms_of_numbers_whose_squares_float32_does_not_have(value: float) -> None:
    vector = torch.full((100,), value)
    vector[50] /= 2
    assert adam.global_norm(vector) == pytest.approx(float(vector.double().norm()), rel=1e-12, abs=0)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_norms_of_what_is_not_finite(value: float, place: int) -> None:
    vector = torch.ones(100)
    vector[place] = value
    assert not torch.isfinite(torch.tensor(adam.global_norm(vector)))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_step_is_torchs(length: int, generator: torch.Generator) -> None:
    """In place, with what lies behind untouched; and the gradient is used up."""
    params, grad, state = _vectors(length + 5, generator)
    whole = (params, grad, state.exp_avg_P, state.exp_avg_sq_P)
    behind = [vector[length:].clone() for vector in whole]
    mine = [vector[:length] for vector in whole]
    theirs = torch.nn.Parameter(mine[0].clone())
    optimizer = torch.optim.AdamW(
        [theirs],
        lr=HYPER.learning_rate,
        betas=(HYPER.beta1, HYPER.beta2),
        eps=HYPER.eps,
        weight_decay=HYPER.weight_decay,
    )
    optimizer.state[theirs] = {"step": torch.tensor(7.0), "exp_avg": mine[2].clone(), "exp_avg_sq": mine[3].clone()}
    norm = float(mine[1].double().norm())
    theirs.grad = mine[1] * min(1.0, HYPER.grad_clip_norm / norm)
    optimizer.step()
    before, given = mine[0].clone(), AdamState(mine[2], mine[3], state.step)
    moved = adam.adam_step(mine[0], mine[1], given, HYPER, norm)
    for found, expected in zip(
        mine,
        (theirs.detach(), torch.zeros(length), *(optimizer.state[theirs][name] for name in ("exp_avg", "exp_avg_sq"))),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=4e-7, atol=2**-22)  # ulps of numbers up to 4
    assert given.step == 8
    assert moved == pytest.approx(float((theirs.detach() - before).double().norm()), rel=1e-4)
    for vector, kept in zip(whole, behind, strict=True):
        assert torch.equal(vector[length:], kept)


def test_defaults_move_a_first_step_by_the_learning_rate(generator: torch.Generator) -> None:
    """Also where the gradient is tiny, and not at all where it is 0: eps is 1e-12."""
    grad = torch.randn(64, generator=generator) * 1e-6
    grad[10] = 0.0
    params = torch.zeros(64)
    sign = grad.sign()
    adam.adam_step(params, grad, new_adam_state(params), AdamParams(learning_rate=0.5), 1.0)
    torch.testing.assert_close(params, -0.5 * sign, rtol=1e-4, atol=0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_bits_do_not_depend_on_the_number_of_threads(count: int) -> None:
    found = []
    for number in (1, count):
        params, grad, state = _vectors(LENGTHS[-1], torch.Generator().manual_seed(3))
        with threads(number):
            norm = adam.global_norm(grad)
            moved = adam.adam_step(params, grad, state, HYPER, norm)
        found.append((norm, moved, params, state.exp_avg_P, state.exp_avg_sq_P))
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_torchs_uses_the_gradient_up_as_well(generator: torch.Generator) -> None:
    params, grad, state = _vectors(100, generator)
    optim.adam_step(params, grad, state, HYPER, 1.0)
    assert not grad.any() and state.step == 8
