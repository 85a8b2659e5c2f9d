"""Choosing tokens from float32 logits through a compiled kernel; see sampling/choose.py, which does the same with torch.

A row's token depends on its logits, its temperature and one uniform number alone: sums are over blocks of 64 values in
float32, over the blocks in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import float32
from torch import Tensor

from mint.engine.kernels.compiling import device
from mint.engine.kernels.simd import (
    WIDTH,
    exp,
    load,
    load_double,
    load_scalar,
    splat,
    store,
    store_double,
    store_int,
    total,
    zeros,
)
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number
from mint.engine.kernels.vectors import masked_largest
from mint.engine.sampling.choose import Choice, choose

BLOCK = 64
LARGEST = 1e38  # what a logit's distance is multiplied with: float32


@device
def block_sums(logits: int, size: int, best: float, factor: float, sums: int) -> float:
    """Of e^((logit - best) factor) over each block of 64 to `sums` (float64); their total."""
    highest, scale, summed = splat(best), splat(factor), 0.0
    for begin in range(0, size, BLOCK):
        part = zeros()
        for i in range(begin, min(size, begin + BLOCK), WIDTH):
            part = part + exp((load(logits + 4 * i) - highest) * scale)
        store_double(sums + 8 * (begin // BLOCK), total(part))
        summed += total(part)
    return summed


@device
def place_in_block(logits: int, count: int, best: float, factor: float, wanted: float, weights: int) -> int:
    """The first of `count` <= 64 entries at which the sum of the weights is above `wanted`; the last with a weight where
    rounding leaves none. Never one of weight 0."""
    highest, scale = splat(best), splat(factor)
    for i in range(0, count, WIDTH):
        store(weights + 4 * i, exp((load(logits + 4 * i) - highest) * scale))
    summed, found, last = 0.0, -1, 0
    for i in range(count):
        weight = load_scalar(weights + 4 * i)
        if weight > 0:
            last = i
            summed += weight
            if found < 0 and summed > wanted:
                found = i
    return found if found >= 0 else last


@device
def first_largest(logits: int, size: int, best: float) -> int:
    for i in range(size):
        if load_scalar(logits + 4 * i) == best:
            return i
    return 0


@device
def drawn(logits: int, size: int, best: float, factor: float, uniform: float, sums: int, weights: int) -> int:
    """The token at `uniform` of the cumulative distribution."""
    wanted = uniform * block_sums(logits, size, best, factor, sums)
    before, block = 0.0, 0
    for i in range((size + BLOCK - 1) // BLOCK):
        one = load_double(sums + 8 * i)
        if one > 0:
            block = i
            if before + one > wanted:
                break
            before += one
    at = BLOCK * block
    return at + place_in_block(logits + 4 * at, min(BLOCK, size - at), best, factor, wanted - before, weights)


def _choose(a: Any) -> None:
    logits, rows, step, size, options, sums, weights, most, exponentials, tokens = (
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
    )  # fmt: skip
    part = thread_number()
    first, end = share_of(rows, part, thread_count(), 1)
    blocks = (step + BLOCK - 1) // BLOCK
    for row in range(first, end):
        at = logits + 4 * step * row
        highest, mine = masked_largest(at, size, step), sums + 8 * blocks * part
        store_double(most + 8 * row, highest)
        store_double(exponentials + 8 * row, block_sums(at, step, highest, float32(1), mine))
        temperature = load_double(options + 16 * row)
        if temperature > 0:
            factor, uniform = float32(min(1 / temperature, LARGEST)), load_double(options + 16 * row + 8)
            store_int(tokens + 8 * row, drawn(at, step, highest, factor, uniform, mine, weights + 4 * BLOCK * part))
        else:
            store_int(tokens + 8 * row, first_largest(at, size, highest))


_kernel = Kernel(_choose)


def choose_compiled(logits_BV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], Tensor]:
    """See `choose`. The rows of logits_BV are filled up to a multiple of 16 in memory."""
    rows, size = logits_BV.shape
    step, threads = logits_BV.stride(0), torch.get_num_threads()
    assert logits_BV.dtype == torch.float32 and step % WIDTH == 0
    options = np.array([(choice.temperature, choice.uniform) for choice in choices], np.float64)
    tokens, most, sums = np.empty(rows, np.int64), torch.empty(rows, dtype=torch.float64), np.empty(rows)
    scratch, weights = np.empty((threads, -(-step // BLOCK))), np.empty((threads, BLOCK), np.float32)
    _kernel(
        logits_BV.data_ptr(), rows, step, size, options.ctypes.data, scratch.ctypes.data, weights.ctypes.data,
        most.data_ptr(), sums.ctypes.data, tokens.ctypes.data, threads=threads,
    )  # fmt: skip
    chosen: list[int] = tokens.tolist()
    filtered = [i for i, c in enumerate(choices) if c.temperature > 0 and (c.top_k > 0 or c.top_p < 1)]
    if filtered:
        for i, token in zip(filtered, choose(logits_BV[filtered], [choices[i] for i in filtered])[0], strict=True):
            chosen[i] = token
    return chosen, torch.from_numpy(sums).log_() + most
