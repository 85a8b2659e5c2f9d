"""Unembedding and softmax over float32 logits, row by row. Shape letters: C rows of a chunk, D hidden, V vocabulary (filled up
to a multiple of 16 in memory), P (row, target) pairs."""

from __future__ import annotations

from typing import Any

from numba import float32

from mint.engine.kernels.compiling import FLOAT32, INT64, NOTHING, device, exported
from mint.engine.kernels.low_rank import (
    add_gradients,
    add_low_rank,
    add_low_rank_back,
    is_adapted,
    low_rank_back,
    low_rank_inputs,
    transpose_ranks,
)
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS, multiply
from mint.engine.kernels.simd import (
    WIDTH,
    exp,
    load,
    load_int,
    load_scalar,
    splat,
    store,
    store_scalar,
    total,
    zeros,
)
from mint.engine.kernels.tables import INT
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number, wait_for_others
from mint.engine.kernels.vectors import masked_largest, norm_to_bf16, to_bf16

SUM_BLOCK = 64  # values of a row that are summed in float32; the sums of blocks are added in float64


@exported(NOTHING, (INT64, INT64, INT64, INT64, INT64, INT64, FLOAT32, INT64))
def norm_rows(part: int, parts: int, x: int, count: int, size: int, weight: int, eps: float, out: int) -> None:
    first, end = share_of(count, part, parts, 1)
    for row in range(first, end):
        norm_to_bf16(x + 4 * size * row, weight, size, eps, out + 2 * size * row)


@exported(NOTHING, (INT64,) * 14)
def unembed(
    part: int, parts: int, adapted: int, num_adapted: int, site: int, normed: int, rows: int, pairs: int, w: int, blocks: int,
    wide: int, narrow: int, ranks: int, logits: int,
) -> None:  # fmt: skip
    """logits [rows, 16 blocks] = normed W^T with the site's low-rank part."""
    if is_adapted(adapted, num_adapted, site):
        low_rank_inputs(part, parts, adapted, num_adapted, site, normed, wide, narrow, ranks)
        wait_for_others()
    first, end = share_of(blocks, part, parts, TILE_BLOCKS)
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        multiply(normed, 4 * pairs, rows, w, BLOCK_BYTES * pairs, pairs, first, last, logits, BLOCK_BYTES * blocks, 0)
        add_low_rank(adapted, num_adapted, site, narrow, ranks, first, last, logits, BLOCK_BYTES * blocks)
        first = last


def _logits(a: Any) -> None:
    """Of normed rows."""
    unembed(
        thread_number(), thread_count(), a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]
    )  # fmt: skip


def _normed_logits(a: Any) -> None:
    """Of float32 rows of the residual stream, whose norm goes to a[3]."""
    part, parts = thread_number(), thread_count()
    norm_rows(part, parts, a[12], a[4], 2 * a[5], a[13], load_scalar(a[14]), a[3])
    wait_for_others()
    unembed(part, parts, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11])


def _statistics(a: Any) -> None:
    """Largest logit and sum of e^(logit - largest) of every row; logits beyond the vocabulary become -inf."""
    logits, rows, size, step, most, sums = a[0], a[1], a[2], a[3], a[4], a[5]
    first, end = share_of(rows, thread_number(), thread_count(), 1)
    for row in range(first, end):
        at = logits + 4 * step * row
        highest = masked_largest(at, size, step)
        store_scalar(most + 4 * row, highest)
        store_scalar(sums + 4 * row, sum_of_exponentials(at, step, highest))


@device
def sum_of_exponentials(logits: int, size: int, best: float) -> float:
    """Of e^(logit - best): in float32 over blocks, in float64 over those."""
    highest, summed = splat(best), 0.0
    for begin in range(0, size, SUM_BLOCK):
        sums = zeros()
        for i in range(begin, min(size, begin + SUM_BLOCK), WIDTH):
            sums = sums + exp(load(logits + 4 * i) - highest)
        summed += total(sums)
    return float32(summed)


def _gradient(a: Any) -> None:
    """Of the loss by the logits, in bf16 to `out`: for every row factor x e^(logit - largest), plus what each of its pairs
    adds at its token. Overwrites the logits."""
    logits, rows, step, most, factors, borders, tokens, added, out = (
        a[0],
        a[1],
        a[2],
        a[3],
        a[4],
        a[5],
        a[6],
        a[7],
        a[8],
    )
    first, end = share_of(rows, thread_number(), thread_count(), 1)
    for row in range(first, end):
        at = logits + 4 * step * row
        highest, factor = splat(load_scalar(most + 4 * row)), splat(load_scalar(factors + 4 * row))
        for i in range(0, step, WIDTH):
            store(at + 4 * i, exp(load(at + 4 * i) - highest) * factor)
        for pair in range(load_int(borders + INT * row), load_int(borders + INT * (row + 1))):
            place = at + 4 * load_int(tokens + INT * pair)
            store_scalar(place, load_scalar(place) + load_scalar(added + 4 * pair))
        to_bf16(at, step, out + 2 * step * row)


def _back(a: Any) -> None:
    """The gradient by normed rows, float32 [C, D], from that by the logits, and the low-rank gradients."""
    adapted, num_adapted, site, normed, rows, grad, blocks, back, size, out = (
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
    )  # fmt: skip
    wide, narrow, wide_back, narrow_back, ranks, turned, turned_back, turned_step, panel, panel_bytes = (
        a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19]
    )  # fmt: skip
    part, parts = thread_number(), thread_count()
    step = 2 * WIDTH * blocks
    if is_adapted(adapted, num_adapted, site):
        low_rank_inputs(part, parts, adapted, num_adapted, site, normed, wide, narrow, ranks)
        low_rank_back(part, parts, adapted, num_adapted, site, grad, step, wide_back, narrow_back, ranks)
        wait_for_others()
        transpose_ranks(part, parts, adapted, num_adapted, site, wide, ranks, turned, turned_step)
        transpose_ranks(part, parts, adapted, num_adapted, site, wide_back, ranks, turned_back, turned_step)
        wait_for_others()
        add_gradients(
            part,
            parts,
            adapted,
            num_adapted,
            site,
            normed,
            turned_back,
            grad,
            step,
            turned,
            turned_step,
            panel,
            panel_bytes,
        )
    first, end = share_of(size // WIDTH, part, parts, TILE_BLOCKS)
    pairs = WIDTH // 2 * blocks
    multiply(grad, step, rows, back, BLOCK_BYTES * pairs, pairs, first, end, out, 4 * size, 0)
    add_low_rank_back(adapted, num_adapted, site, narrow_back, ranks, first, end, out, 4 * size)


logits_kernel, normed_logits_kernel = Kernel(_logits), Kernel(_normed_logits)
statistics_kernel, gradient_kernel, back_kernel = Kernel(_statistics), Kernel(_gradient), Kernel(_back)
