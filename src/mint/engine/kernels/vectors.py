"""What kernels do with one row of values: norm, SwiGLU, rotation, attention. Addresses are int64; sizes count values and are
multiples of 16, of 32 where bf16 pairs are multiplied."""

from __future__ import annotations

import math

from numba import float32

from mint.engine.kernels.compiling import device
from mint.engine.kernels.simd import (
    WIDTH,
    dot,
    exp,
    fma,
    largest,
    load,
    load_bf16,
    load_pairs,
    load_scalar,
    maximum,
    splat,
    store,
    store_bf16,
    store_scalar,
    total,
    zeros,
)


@device
def rstd_of(x: int, size: int, eps: float) -> float:
    """1 / root of the mean square of float32 values."""
    squares = zeros()
    for i in range(0, size, WIDTH):
        value = load(x + 4 * i)
        squares = fma(value, value, squares)
    return float32(1) / math.sqrt(total(squares) / float32(size) + eps)


@device
def norm_to_bf16(x: int, weight: int, size: int, eps: float, out: int) -> None:
    rstd = splat(rstd_of(x, size, eps))
    for i in range(0, size, WIDTH):
        store_bf16(out + 2 * i, load(x + 4 * i) * rstd * load(weight + 4 * i))


@device
def norm_in_place(x: int, weight: int, size: int, eps: float) -> None:
    rstd = splat(rstd_of(x, size, eps))
    for i in range(0, size, WIDTH):
        store(x + 4 * i, load(x + 4 * i) * rstd * load(weight + 4 * i))


@device
def swiglu_to_bf16(gate: int, up: int, size: int, out: int) -> None:
    one = splat(float32(1))
    for i in range(0, size, WIDTH):
        value = load(gate + 4 * i)
        store_bf16(out + 2 * i, value / (one + exp(zeros() - value)) * load(up + 4 * i))


@device
def rotate_to_bf16(x: int, cos: int, sin: int, size: int, out: int) -> None:
    """Of one head: (a, b) -> (a cos - b sin, b cos + a sin) for its halves."""
    half = size // 2
    for i in range(0, half, WIDTH):
        a, b = load(x + 4 * i), load(x + 4 * (half + i))
        c, s = load(cos + 4 * i), load(sin + 4 * i)
        store_bf16(out + 2 * i, a * c - b * s)
        store_bf16(out + 2 * (half + i), b * c + a * s)


@device
def to_bf16(x: int, size: int, out: int) -> None:
    for i in range(0, size, WIDTH):
        store_bf16(out + 2 * i, load(x + 4 * i))


@device
def scores_of(q: int, keys: int, count: int, size: int, scale: float, out: int) -> float:
    """q . key, scaled, for each of `count` keys that lie one after the other; the largest. `out` is filled up to a multiple
    of 16 with what no exponential sees."""
    best = float32(-math.inf)
    for position in range(count):
        key, products = keys + 2 * size * position, zeros()
        for i in range(0, size, 2 * WIDTH):
            products = dot(products, load_pairs(q + 2 * i), load_pairs(key + 2 * i))
        score = total(products) * scale
        store_scalar(out + 4 * position, score)
        best = max(best, score)
    for position in range(count, (count + WIDTH - 1) // WIDTH * WIDTH):
        store_scalar(out + 4 * position, float32(-math.inf))
    return best


@device
def exponentials_of(scores: int, count: int, best: float) -> float:
    """e^(score - best) in place; their sum."""
    sums, highest = zeros(), splat(best)
    for i in range(0, count, WIDTH):
        value = exp(load(scores + 4 * i) - highest)
        store(scores + 4 * i, value)
        sums = sums + value
    return total(sums)


@device
def weighted_values(weights: int, values: int, count: int, size: int, factor: float, out: int) -> None:
    """factor times the sum of weight x value, in bf16."""
    scale = splat(factor)
    for i in range(0, size, 2 * WIDTH):
        left, right, at = zeros(), zeros(), values + 2 * i
        for position in range(count):
            weight = splat(load_scalar(weights + 4 * position))
            left = fma(weight, load_bf16(at), left)
            right = fma(weight, load_bf16(at + 2 * WIDTH), right)
            at += 2 * size
        store_bf16(out + 2 * i, left * scale)
        store_bf16(out + 2 * (i + WIDTH), right * scale)


@device
def attend_one(q: int, keys: int, values: int, count: int, size: int, scale: float, scores: int, out: int) -> None:
    """softmax(q k) v of one head over `count` positions, in bf16. scores: scratch."""
    best = scores_of(q, keys, count, size, scale, scores)
    summed = exponentials_of(scores, count, best)
    weighted_values(scores, values, count, size, float32(1) / summed, out)


@device
def rstd_of_bf16(x: int, size: int, eps: float) -> float:
    """1 / root of the mean square of bf16 values."""
    squares = zeros()
    for i in range(0, size, WIDTH):
        value = load_bf16(x + 2 * i)
        squares = fma(value, value, squares)
    return float32(1) / math.sqrt(total(squares) / float32(size) + eps)


@device
def norm_bf16(x: int, weight: int, size: int, eps: float, out: int) -> None:
    """bf16 in and out."""
    rstd = splat(rstd_of_bf16(x, size, eps))
    for i in range(0, size, WIDTH):
        store_bf16(out + 2 * i, load_bf16(x + 2 * i) * rstd * load(weight + 4 * i))


@device
def norm_bf16_to_float(x: int, weight: int, size: int, eps: float, out: int) -> None:
    rstd = splat(rstd_of_bf16(x, size, eps))
    for i in range(0, size, WIDTH):
        store(out + 4 * i, load_bf16(x + 2 * i) * rstd * load(weight + 4 * i))


@device
def bf16_to_float(x: int, size: int, out: int) -> None:
    for i in range(0, size, WIDTH):
        store(out + 4 * i, load_bf16(x + 2 * i))


@device
def norm_back(grad: int, x: int, weight: int, size: int, eps: float, out: int, add: bool) -> None:
    """Gradient by bf16 `x` from the float32 one by its norm: rstd (g w - x^ mean(g w x^)), x^ = x rstd; to float32 `out`."""
    rstd = splat(rstd_of_bf16(x, size, eps))
    products = zeros()
    for i in range(0, size, WIDTH):
        products = fma(load(grad + 4 * i) * load(weight + 4 * i), load_bf16(x + 2 * i) * rstd, products)
    mean = splat(total(products) / float32(size))
    for i in range(0, size, WIDTH):
        value = (load(grad + 4 * i) * load(weight + 4 * i) - load_bf16(x + 2 * i) * rstd * mean) * rstd
        if add:
            value = value + load(out + 4 * i)
        store(out + 4 * i, value)


@device
def swiglu_bf16(gate: int, up: int, size: int, out: int) -> None:
    one = splat(float32(1))
    for i in range(0, size, WIDTH):
        value = load_bf16(gate + 2 * i)
        store_bf16(out + 2 * i, value / (one + exp(zeros() - value)) * load_bf16(up + 2 * i))


@device
def swiglu_back(grad: int, gate: int, up: int, size: int, grad_gate: int, grad_up: int) -> None:
    """From float32 gradients by silu(gate) up, bf16 ones by gate and up."""
    one = splat(float32(1))
    for i in range(0, size, WIDTH):
        g, x = load(grad + 4 * i), load_bf16(gate + 2 * i)
        sigmoid = one / (one + exp(zeros() - x))
        store_bf16(grad_up + 2 * i, g * x * sigmoid)
        store_bf16(grad_gate + 2 * i, g * load_bf16(up + 2 * i) * sigmoid * (one + x * (one - sigmoid)))


@device
def rotate_back(x: int, cos: int, sin: int, size: int) -> None:
    """The inverse rotation of one head, float32, in place."""
    half = size // 2
    for i in range(0, half, WIDTH):
        a, b = load(x + 4 * i), load(x + 4 * (half + i))
        c, s = load(cos + 4 * i), load(sin + 4 * i)
        store(x + 4 * i, a * c + b * s)
        store(x + 4 * (half + i), b * c - a * s)


@device
def fill(x: int, size: int, value: float) -> None:
    """Float32 values; the size is a multiple of 16."""
    one = splat(value)
    for i in range(0, size, WIDTH):
        store(x + 4 * i, one)


@device
def mask_end(scores: int, seen: int, size: int, value: float) -> None:
    """The float32 values from `seen` on."""
    for i in range(seen, min(size, (seen + WIDTH - 1) // WIDTH * WIDTH)):
        store_scalar(scores + 4 * i, value)
    first = (seen + WIDTH - 1) // WIDTH * WIDTH
    if first < size:
        fill(scores + 4 * first, size - first, value)


@device
def masked_largest(scores: int, seen: int, size: int) -> float:
    """The largest of the first `seen` float32 values; the others become -inf. The size is a multiple of 16."""
    mask_end(scores, seen, size, float32(-math.inf))
    best = splat(float32(-math.inf))
    for i in range(0, size, WIDTH):
        best = maximum(best, load(scores + 4 * i))
    return largest(best)


@device
def softmax(scores: int, seen: int, size: int, scale: float) -> float:
    """e^(scale (score - largest)) in place, 0 from `seen` on; 1 / their sum. The size is a multiple of 16."""
    highest, factor, sums = splat(masked_largest(scores, seen, size)), splat(scale), zeros()
    for i in range(0, size, WIDTH):
        value = exp((load(scores + 4 * i) - highest) * factor)
        store(scores + 4 * i, value)
        sums = sums + value
    return float32(1) / total(sums)
