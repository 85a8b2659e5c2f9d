"""What is done with one row of values, forward and backward, against float64 formulas and torch's autograd on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.unit.engine.kernels.calling import assert_rounded, assert_within, half, native, up
from torch import Tensor
from torch.nn.functional import silu

from mint.engine.kernels import vectors
from mint.engine.kernels.softmax import norm_rows

EPS = np.float32(1e-5)
SIZES = [16, 64, 176]
CLOSE = 4e-6  # relative, of float32 sums


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + float(EPS)) * weight.double()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _angles(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    angles = 100 * torch.rand(size // 2, generator=generator)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("size", SIZES)
def test_norms_of_float_rows(size: int, generator: torch.Generator) -> None:
    x, weight = 3 * torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    exact = normed(x.double(), weight)
    out = _empty(size, dtype=torch.bfloat16)
    vectors.norm_to_bf16(x.data_ptr(), weight.data_ptr(), size, EPS, out.data_ptr())
    assert_rounded(out, exact)
    vectors.norm_in_place(x.data_ptr(), weight.data_ptr(), size, EPS)
    assert_within(x, exact, CLOSE * exact.abs())


@pytest.mark.parametrize("size", SIZES)
def test_norms_of_bf16_rows(size: int, generator: torch.Generator) -> None:
    x, weight = half(generator, size, scale=3), torch.randn(size, generator=generator)
    exact = normed(x.double(), weight)
    out, wide = _empty(size, dtype=torch.bfloat16), _empty(size)
    vectors.norm_bf16(x.data_ptr(), weight.data_ptr(), size, EPS, out.data_ptr())
    vectors.norm_bf16_to_float(x.data_ptr(), weight.data_ptr(), size, EPS, wide.data_ptr())
    assert_rounded(out, exact)
    assert_within(wide, exact, CLOSE * exact.abs())


def test_a_row_of_zeros_is_normed_to_zeros() -> None:
    x, weight, out = torch.zeros(32), torch.ones(32), _empty(32, dtype=torch.bfloat16)
    vectors.norm_to_bf16(x.data_ptr(), weight.data_ptr(), 32, EPS, out.data_ptr())
    assert torch.equal(out, torch.zeros(32).bfloat16())


def test_rows_are_normed_one_by_one_whoever_takes_them(generator: torch.Generator) -> None:
    x, weight = torch.randn(7, 64, generator=generator), torch.randn(64, generator=generator)
    out = _empty(7, 64, dtype=torch.bfloat16)
    for part in range(3):
        native(norm_rows)(part, 3, x.data_ptr(), 7, 64, weight.data_ptr(), float(EPS), out.data_ptr())
    assert_rounded(out, normed(x.double(), weight))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("added", [False, True], ids=["written", "added"])
def test_the_norms_gradient(size: int, added: bool, generator: torch.Generator) -> None:
    x, weight, grad = half(generator, size), *(torch.randn(size, generator=generator) for _ in range(2))
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(normed(leaf, weight), leaf, grad.double())
    out = torch.randn(size, generator=generator) if added else _empty(size)
    exact = exact + out.double() if added else exact
    vectors.norm_back(grad.data_ptr(), x.data_ptr(), weight.data_ptr(), size, EPS, out.data_ptr(), added)
    assert_within(out, exact, 2 * CLOSE * (1 + exact.abs()))


def test_the_norms_gradient_in_the_place_of_the_one_it_comes_from(generator: torch.Generator) -> None:
    """As heads are: no other row's values are there to be added."""
    x, weight, grad = half(generator, 64), *(torch.randn(64, generator=generator) for _ in range(2))
    out = _empty(64)
    vectors.norm_back(grad.data_ptr(), x.data_ptr(), weight.data_ptr(), 64, EPS, out.data_ptr(), False)
    vectors.norm_back(grad.data_ptr(), x.data_ptr(), weight.data_ptr(), 64, EPS, grad.data_ptr(), False)
    assert torch.equal(grad, out)


@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["usual", "large"])
def test_swiglu(spread: float, generator: torch.Generator) -> None:
    """Of large gates too, whose exponential is none in float32."""
    gate, up_ = (spread * torch.randn(160, generator=generator) for _ in range(2))
    gate[:4] = torch.tensor([-200.0, 200.0, 0.0, -88.5])
    out = _empty(160, dtype=torch.bfloat16)
    vectors.swiglu_to_bf16(gate.data_ptr(), up_.data_ptr(), 160, out.data_ptr())
    assert_rounded(out, silu(gate.double()) * up_.double())
    gate, up_ = gate.bfloat16(), up_.bfloat16()
    vectors.swiglu_bf16(gate.data_ptr(), up_.data_ptr(), 160, out.data_ptr())
    assert_rounded(out, silu(gate.double()) * up_.double())


@pytest.mark.parametrize("spread", [1.0, 40.0], ids=["usual", "large"])
def test_swiglus_gradient(spread: float, generator: torch.Generator) -> None:
    gate, up_ = (half(generator, 160, scale=spread) for _ in range(2))
    gate[:4] = torch.tensor([-200.0, 200.0, 0.0, -88.5])
    grad = torch.randn(160, generator=generator)
    leaves = [x.double().requires_grad_() for x in (gate, up_)]
    exact = torch.autograd.grad(silu(leaves[0]) * leaves[1], leaves, grad.double())
    found = [_empty(160, dtype=torch.bfloat16) for _ in range(2)]
    vectors.swiglu_back(grad.data_ptr(), gate.data_ptr(), up_.data_ptr(), 160, found[0].data_ptr(), found[1].data_ptr())
    for one, other in zip(found, exact, strict=True):
        assert_rounded(one, other, slack=1e-5 * spread)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_rotation_and_its_gradient(size: int, generator: torch.Generator) -> None:
    x, (cos, sin) = torch.randn(size, generator=generator), _angles(size, generator)
    leaf = x.double().requires_grad_()
    exact = rotated(leaf, cos.double(), sin.double())
    out = _empty(size, dtype=torch.bfloat16)
    vectors.rotate_to_bf16(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), size, out.data_ptr())
    assert_rounded(out, exact.detach())
    grad = torch.randn(size, generator=generator)
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad.double())
    vectors.rotate_back(grad.data_ptr(), cos.data_ptr(), sin.data_ptr(), size)
    assert_within(grad, exact_grad, 1e-6)


def test_conversions_and_fills(generator: torch.Generator) -> None:
    x, spare = torch.randn(64, generator=generator), 16
    out, back = _empty(48 + spare, dtype=torch.bfloat16), _empty(48 + spare)
    vectors.to_bf16(x.data_ptr(), 48, out.data_ptr())
    vectors.bf16_to_float(out.data_ptr(), 48, back.data_ptr())
    assert torch.equal(out[:48], x[:48].bfloat16()) and out[48:].isnan().all()
    assert torch.equal(back[:48], x[:48].bfloat16().float()) and back[48:].isnan().all()
    vectors.fill(x.data_ptr(), 32, np.float32(2.5))
    assert (x[:32] == 2.5).all() and (x[32:] != 2.5).all()


@pytest.mark.parametrize("seen", [0, 1, 15, 16, 17, 47, 48])
def test_the_end_of_a_row_is_masked(seen: int) -> None:
    row = torch.arange(64.0)
    vectors.mask_end(row.data_ptr(), seen, 48, np.float32(-math.inf))
    expected = torch.arange(64.0)
    expected[seen:48] = -math.inf
    assert torch.equal(row, expected)


@pytest.mark.parametrize("seen", [1, 15, 16, 17, 50, 80])
@pytest.mark.parametrize("spread", [1.0, 100.0], ids=["flat", "steep"])
def test_softmax_over_what_is_seen(seen: int, spread: float, generator: torch.Generator) -> None:
    """What lies behind is neither seen nor left: it becomes 0."""
    scores, scale = spread * torch.randn(80, generator=generator), np.float32(0.3)
    exact = (float(scale) * scores[:seen].double()).softmax(0)
    scores[seen:] = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).repeat(20)[: 80 - seen]
    factor = vectors.softmax(scores.data_ptr(), seen, 80, scale)
    assert torch.equal(scores[seen:], torch.zeros(80 - seen))
    probs = scores[:seen].double() * factor
    assert_within(probs, exact, 1e-6 * exact * (10 + spread) + 1e-37)
    assert scores[:seen].max() == 1


@pytest.mark.parametrize("count", [1, 5, 16, 33])
@pytest.mark.parametrize("size", [32, 96])
def test_one_query_attends_to_its_keys(count: int, size: int, generator: torch.Generator) -> None:
    q, keys, values = (half(generator, n, size) for n in (1, count, count))
    scale = np.float32(size**-0.5)
    probs = (keys.double() @ q[0].double() * float(scale)).softmax(0)
    scores, out = _empty(up(count)), _empty(size, dtype=torch.bfloat16)
    vectors.attend_one(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), count, size, scale, scores.data_ptr(), out.data_ptr()
    )
    assert_rounded(out, probs @ values.double(), slack=1e-5)
    vectors.attend_one(  # the result may take the query's place
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), count, size, scale, scores.data_ptr(), q.data_ptr()
    )
    assert torch.equal(q[0], out)


def test_scores_are_scaled_products_and_their_largest_is_known(generator: torch.Generator) -> None:
    q, keys = half(generator, 64), half(generator, 21, 64)
    exact = 0.125 * (keys.double() @ q.double())
    scores = _empty(48)
    best = vectors.scores_of(q.data_ptr(), keys.data_ptr(), 21, 64, np.float32(0.125), scores.data_ptr())
    assert_within(scores[:21], exact, 1e-5)
    assert (scores[21:32] == -math.inf).all() and scores[32:].isnan().all() and best == scores[:21].max()
    summed = vectors.exponentials_of(scores.data_ptr(), 21, np.float32(best))
    assert summed == pytest.approx((exact - exact.max()).exp().sum().item(), rel=1e-5)
    assert (scores[21:32] == 0).all()


def test_weighted_values_are_summed_and_scaled(generator: torch.Generator) -> None:
    weights, values = torch.rand(9, generator=generator), half(generator, 9, 64)
    out = _empty(64, dtype=torch.bfloat16)
    vectors.weighted_values(weights.data_ptr(), values.data_ptr(), 9, 64, np.float32(0.25), out.data_ptr())
    assert_rounded(out, 0.25 * weights.double() @ values.double())
