"""The words of the kernels: what one register of values goes through, against float64 and torch's own operators."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.unit.engine.kernels.calling import WIDTH, half, whole
from torch import Tensor

from mint.engine.kernels import simd
from mint.engine.kernels.compiling import device

EDGES = [-math.inf, -1e30, -88.0, -87.0, -86.99, -1.0, -0.0, 0.0, 1e-20, 1.0, 87.9, 88.0]


@device
def exponentials(x: int, count: int, out: int) -> None:
    for i in range(0, count, WIDTH):
        simd.store(out + 4 * i, simd.exp(simd.load(x + 4 * i)))


@device
def halves(x: int, count: int, out: int) -> None:
    for i in range(0, count, WIDTH):
        simd.store_bf16(out + 2 * i, simd.load(x + 4 * i))


@device
def widened(x: int, count: int, out: int) -> None:
    for i in range(0, count, WIDTH):
        simd.store(out + 4 * i, simd.load_bf16(x + 2 * i))


@device
def one_by_one(x: int, count: int, out: int) -> None:
    for i in range(count):
        simd.store_half(out + 2 * i, simd.load_scalar(x + 4 * i))


@device
def arithmetic(x: int, y: int, z: int, out: int) -> None:
    a, b, c = simd.load(x), simd.load(y), simd.load(z)
    simd.store(out, a + b)
    simd.store(out + 64, a - b)
    simd.store(out + 128, a * b)
    simd.store(out + 192, a / b)
    simd.store(out + 256, simd.fma(a, b, c))
    simd.store(out + 320, simd.maximum(a, b))
    simd.store(out + 384, simd.splat(simd.load_scalar(z)))
    simd.store(out + 448, simd.zeros())


@device
def reduced(x: int, out: int) -> None:
    simd.store_scalar(out, simd.total(simd.load(x)))
    simd.store_scalar(out + 4, simd.largest(simd.load(x)))


@device
def paired(a: int, b: int, sums: int, copy: int) -> None:
    x, y = simd.load_pairs(a), simd.load_pairs(b)
    simd.store(sums, simd.dot(simd.load(sums), x, y))
    simd.store_pairs(copy, x)


@device
def copied(ints: int, doubles: int, to_ints: int, to_doubles: int) -> None:
    simd.store_int(to_ints, simd.load_int(ints))
    simd.store_double(to_doubles, simd.load_double(doubles))


def exp_of(x: Tensor) -> Tensor:
    filled = torch.zeros(-(-len(x) // WIDTH) * WIDTH)
    filled[: len(x)] = x
    out = torch.full_like(filled, math.nan)
    exponentials(filled.data_ptr(), len(filled), out.data_ptr())
    return out[: len(x)]


def bf16_of(x: Tensor) -> Tensor:
    out = torch.empty(len(x), dtype=torch.bfloat16)
    halves(x.data_ptr(), len(x), out.data_ptr())
    return out


def test_exp_is_within_two_units_in_the_last_place(generator: torch.Generator) -> None:
    steps = torch.linspace(-87, 88, 200_000)
    near_zero = torch.cat([torch.randn(5_000, generator=generator) * 10.0**-k for k in range(8)])
    for x in (steps, near_zero):
        exact = x.double().exp()
        unit = 2.0 ** (torch.frexp(exact).exponent.double() - 24)
        assert ((exp_of(x).double() - exact).abs() / unit).max() <= 2
    assert exp_of(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_exp_at_the_ends() -> None:
    """0 below -87, as for 88 above, no number for none."""
    below = torch.tensor([-87.001, -88.0, -104.0, -1e4, -3e38, -math.inf])
    assert exp_of(below).tolist() == [0.0] * len(below)
    above, end = exp_of(torch.tensor([88.001, 89.0, 1e4, 3e38, math.inf])), exp_of(torch.tensor([88.0]))
    assert torch.equal(above, end.expand(5)) and end.item() == pytest.approx(math.exp(88), rel=1e-6)
    mixed = exp_of(torch.tensor([math.nan, 1.0, math.nan, -math.inf]))
    assert mixed.isnan().tolist() == [True, False, True, False]
    assert exp_of(torch.tensor([-87.0])).item() == pytest.approx(math.exp(-87), rel=1e-6)


def test_exp_never_falls() -> None:
    """Of arguments that rise by many units each, at the ends of the range too."""
    values = exp_of(torch.linspace(-90, 90, 50_000))
    assert (values[1:] >= values[:-1]).all()


def test_rounding_to_bf16_is_torchs(generator: torch.Generator) -> None:
    """To the nearest, ties to even, beyond the largest to infinity, on all numbers but subnormal ones."""
    bits = torch.randint(0, 2**31, (2**16,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[x.isfinite() & (x >= 2.0**-126)]
    x = torch.cat([x, -x])[: (2 * len(x)) // WIDTH * WIDTH].contiguous()
    assert torch.equal(bf16_of(x), x.bfloat16())
    ends = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 3.4e38, -3.4e38, 2.0**-126, 1.0] * 2)
    assert torch.equal(bf16_of(ends).view(torch.int16), ends.bfloat16().view(torch.int16))
    assert bf16_of(torch.full((WIDTH,), math.nan)).isnan().all()


def test_ties_go_to_the_even_neighbour() -> None:
    base = 1 + torch.arange(WIDTH) / 128  # ulp is 1/128: halfway to the next
    tie = base + 1 / 256
    expected = torch.where(torch.arange(WIDTH) % 2 == 0, base, base + 1 / 128)
    assert torch.equal(bf16_of(tie).float(), expected)
    assert torch.equal(bf16_of(tie + 2.0**-20).float(), base + 1 / 128)
    assert torch.equal(bf16_of(tie - 2.0**-20).float(), base)


def test_subnormal_numbers_are_at_most_lost() -> None:
    tiny = torch.arange(1, 17) * 2.0**-130
    assert (bf16_of(tiny).double() - tiny.double()).abs().max() <= 2.0**-126


def test_bf16_is_widened_exactly() -> None:
    every = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    out = torch.full((2**16,), 7.0)
    widened(every.data_ptr(), len(every), out.data_ptr())
    assert torch.equal(out.view(torch.int32), every.view(torch.int16).to(torch.int32) << 16)


def test_single_values_are_rounded_as_registers_are(generator: torch.Generator) -> None:
    x = torch.cat([torch.randn(500, generator=generator), torch.tensor([1 + 1 / 256, 1 + 3 / 256, math.inf, -0.0])])
    out = torch.empty(len(x), dtype=torch.bfloat16)
    one_by_one(x.data_ptr(), len(x), out.data_ptr())
    assert torch.equal(out, x.bfloat16())


def test_arithmetic_has_the_bits_of_float32(generator: torch.Generator) -> None:
    a, b, c = (torch.randn(WIDTH, generator=generator) for _ in range(3))
    out = torch.full((8, WIDTH), math.nan)
    arithmetic(a.data_ptr(), b.data_ptr(), c.data_ptr(), out.data_ptr())
    fused = (a.double() * b.double() + c.double()).float()
    expected = [a + b, a - b, a * b, a / b, fused, torch.maximum(a, b), c[:1].expand(WIDTH), torch.zeros(WIDTH)]
    assert torch.equal(out, torch.stack(expected))


def test_a_fused_product_is_rounded_once() -> None:
    a, c = torch.full((WIDTH,), 1 + 2.0**-12), torch.full((WIDTH,), -(1 + 2.0**-11))
    out = torch.full((8, WIDTH), math.nan)
    arithmetic(a.data_ptr(), a.data_ptr(), c.data_ptr(), out.data_ptr())
    assert torch.equal(out[4], torch.full((WIDTH,), 2.0**-24))  # 0 if the product were rounded first


def test_total_and_largest_are_over_all_lanes(generator: torch.Generator) -> None:
    for place in range(WIDTH):
        x = torch.full((WIDTH,), -5.0)
        x[place] = 100.0
        found = torch.empty(2)
        reduced(x.data_ptr(), found.data_ptr())
        assert found.tolist() == [25.0, 100.0]
    x, found = torch.randn(WIDTH, generator=generator), torch.empty(2)
    reduced(x.data_ptr(), found.data_ptr())
    assert abs(found[0].item() - x.double().sum().item()) <= 2.0**-23 * x.abs().sum().item()
    assert found[1] == x.max()
    x = torch.full((WIDTH,), -math.inf)
    reduced(x.data_ptr(), found.data_ptr())
    assert found.tolist() == [-math.inf, -math.inf]


def test_dot_adds_both_products_of_every_lane(generator: torch.Generator) -> None:
    a, b = whole(generator, 2 * WIDTH, most=100), whole(generator, 2 * WIDTH, most=100)
    sums, copy = whole(generator, WIDTH, dtype=torch.float32), torch.empty(2 * WIDTH, dtype=torch.bfloat16)
    expected = sums + (a.float() * b.float()).view(WIDTH, 2).sum(-1)
    paired(a.data_ptr(), b.data_ptr(), sums.data_ptr(), copy.data_ptr())
    assert torch.equal(sums, expected) and torch.equal(copy, a)


def test_addresses_need_no_more_than_two_bytes_alignment(generator: torch.Generator) -> None:
    """Heads and panels begin anywhere in a row."""
    x = half(generator, 2 * WIDTH + 1)
    for start in (0, 1):
        out = torch.empty(WIDTH + 1)
        widened(x.data_ptr() + 2 * start, WIDTH, out.data_ptr() + 4 * start)
        assert torch.equal(out[start : start + WIDTH], x[start : start + WIDTH].float())


def test_whole_and_double_numbers_are_copied_as_they_are() -> None:
    ints, doubles = np.array([-(2**62) - 1]), np.array([math.pi * 1e300])
    to_ints, to_doubles = np.zeros(1, np.int64), np.zeros(1)
    copied(ints.ctypes.data, doubles.ctypes.data, to_ints.ctypes.data, to_doubles.ctypes.data)
    assert np.array_equal(ints, to_ints) and np.array_equal(doubles, to_doubles)


def test_exp_of_every_edge_is_what_float64_says_it_rounds_to() -> None:
    exact = torch.tensor(EDGES).double().exp()
    exact[torch.tensor(EDGES) < -87] = 0
    torch.testing.assert_close(exp_of(torch.tensor(EDGES)).double(), exact, rtol=2.0**-22, atol=0)
