"""The layers of a decoder over rows of sequences that keep their keys and values: prompts, and steps of growing sequences.

One call computes all layers; threads wait for one another where a part needs what others have made. Every row is computed
by itself and in one fixed order, so its bits depend neither on its neighbours nor on where its prompt was cut. The residual
stream is float32, what is multiplied is bf16.

Kernels take addresses of scratch and of tables of int64, whose columns have names here. Shape letters: T rows, D hidden, O
width of q, k, v, H of the queries alone, F MLP width, R low ranks of an adapter, E head_dim.
"""

from __future__ import annotations

import math
from typing import Any

from numba import float32

from mint.engine.kernels.compiling import INT64, NOTHING, NUMBERS, device, exported
from mint.engine.kernels.low_rank import add_low_rank, is_adapted, low_rank_inputs
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS, multiply
from mint.engine.kernels.simd import WIDTH, load, load_int, load_pairs, load_scalar, store, store_pairs
from mint.engine.kernels.softmax import norm_rows
from mint.engine.kernels.tables import (
    DOWN,
    DOWN_BIAS,
    DOWN_SITE,
    GATE_UP,
    GATE_UP_BIAS,
    GATE_UP_SITE,
    INPUT_NORM,
    INT,
    K_NORM,
    MLP_NORM,
    NUM_SITES,
    O_BIAS,
    O_PROJ,
    O_SITE,
    Q_NORM,
    QKV,
    QKV_BIAS,
    WEIGHTS_WIDTH,
    cell,
)  # fmt: skip
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number, wait_for_others
from mint.engine.kernels.vectors import attend_one, norm_in_place, rotate_to_bf16, swiglu_to_bf16, to_bf16

# the kernel's numbers: sizes of the model, then tables, then scratch
(
    LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, EPS, LAYER_TABLE, ROW_TABLE, NUM_ROWS, COPY_TABLE, NUM_COPIES, ADAPTED,
    NUM_ADAPTED, COS, SIN, X, NORMED, QKV_OUT, Q, SCORES, ROOM, GATE_UP_OUT, INNER, WIDE, NARROW, RANKS,
) = range(27)  # fmt: skip

# a row for each row of the pass: its position, where its sequence's keys begin, and the bytes to the next layer's, to the
# values, and to the next head's
ROW_WIDTH = 5
POSITION, CACHE, NEXT_LAYER, TO_VALUES, NEXT_HEAD = range(ROW_WIDTH)

# a row for each beginning that a sequence takes from another of the pass, once a layer has it
COPY_WIDTH = 4
FROM_ROW, TO_ROW, FIRST_POSITION, END_POSITION = range(COPY_WIDTH)


@device
def cached(row: int, layer: int, head: int) -> int:
    """Where the keys of one layer and head of a row's sequence begin."""
    cache = load_int(row + INT * CACHE) + layer * load_int(row + INT * NEXT_LAYER)
    return cache + head * load_int(row + INT * NEXT_HEAD)


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64))
def inputs_of(a: Any, part: int, parts: int, site: int, x: int) -> None:
    """The site's low-rank inputs, where some rows are adapted."""
    if is_adapted(a[ADAPTED], a[NUM_ADAPTED], site):
        low_rank_inputs(part, parts, a[ADAPTED], a[NUM_ADAPTED], site, x, a[WIDE], a[NARROW], a[RANKS])
        wait_for_others()


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64))
def project(
    a: Any, site: int, x: int, w: int, pairs: int, bias: int, first: int, end: int, out: int, out_step: int, add: int
) -> None:
    """Blocks [first, end) of x W^T (+ bias) + (x A^T) B^T for all rows."""
    rows = a[NUM_ROWS]
    multiply(x, 4 * pairs, rows, w, BLOCK_BYTES * pairs, pairs, first, end, out, out_step, add)
    add_low_rank(a[ADAPTED], a[NUM_ADAPTED], site, a[NARROW], a[RANKS], first, end, out, out_step)
    if bias != 0:
        for row in range(rows):
            for block in range(first, end):
                at = out + out_step * row + BLOCK_BYTES * block
                store(at, load(at) + load(bias + BLOCK_BYTES * block))


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64))
def enter_heads(a: Any, index: int, layer: int, weights: int) -> None:
    """From one row's projection [O]: normalised and rotated queries, keys and values to the sequence's cache."""
    heads, kv_heads, size, eps = a[HEADS], a[KV_HEADS], a[HEAD_DIM], load_scalar(a[EPS])
    qkv, q = a[QKV_OUT] + 4 * size * (heads + 2 * kv_heads) * index, a[Q] + 2 * size * heads * index
    row, cos, sin = a[ROW_TABLE] + INT * ROW_WIDTH * index, a[COS] + 2 * size * index, a[SIN] + 2 * size * index
    here, to_values = 2 * size * load_int(row + INT * POSITION), load_int(row + INT * TO_VALUES)
    for head in range(heads + kv_heads):
        at = qkv + 4 * size * head
        norm = load_int(weights + INT * (Q_NORM if head < heads else K_NORM))
        if norm != 0:
            norm_in_place(at, norm, size, eps)
        out = q + 2 * size * head if head < heads else cached(row, layer, head - heads) + here
        rotate_to_bf16(at, cos, sin, size, out)
    for head in range(kv_heads):
        to_bf16(qkv + 4 * size * (heads + kv_heads + head), size, cached(row, layer, head) + to_values + here)


@device
def copy_positions(copy: int, rows: int, layer: int, head: int, size: int) -> None:
    """Keys and values of one head from one cache to another."""
    source = rows + INT * ROW_WIDTH * load_int(copy + INT * FROM_ROW)
    target = rows + INT * ROW_WIDTH * load_int(copy + INT * TO_ROW)
    first, end = load_int(copy + INT * FIRST_POSITION), load_int(copy + INT * END_POSITION)
    here, there = cached(source, layer, head), cached(target, layer, head)
    for _ in range(2):
        for i in range(first * size, end * size, 2 * WIDTH):
            store_pairs(there + 2 * i, load_pairs(here + 2 * i))
        here += load_int(source + INT * TO_VALUES)
        there += load_int(target + INT * TO_VALUES)


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64))
def attend(a: Any, part: int, parts: int, layer: int) -> None:
    """Every head of every row over its sequence up to its position, in the place of the query. Threads share the positions
    evenly."""
    heads, kv_heads, size = a[HEADS], a[KV_HEADS], a[HEAD_DIM]
    group, scale, scores, work = heads // kv_heads, float32(1 / math.sqrt(size)), a[SCORES] + 4 * a[ROOM] * part, 0
    for index in range(a[NUM_ROWS]):
        work += kv_heads * (cell(a[ROW_TABLE], ROW_WIDTH, index, POSITION) + 1)
    first, end, done = work * part // parts, work * (part + 1) // parts, 0
    for index in range(a[NUM_ROWS]):
        row = a[ROW_TABLE] + INT * ROW_WIDTH * index
        seen = load_int(row + INT * POSITION) + 1
        for kv_head in range(kv_heads):
            if first <= done < end:
                keys = cached(row, layer, kv_head)
                values = keys + load_int(row + INT * TO_VALUES)
                for head in range(kv_head * group, (kv_head + 1) * group):
                    at = a[Q] + 2 * size * (heads * index + head)
                    attend_one(at, keys, values, seen, size, scale, scores, at)
            done += seen


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64))
def mlp_rows(a: Any, part: int, parts: int, site: int, weights: int) -> None:
    """silu(gate) up in bf16; the scratch for gate and up is [threads, T, 2 x 48] float32."""
    rows, width, step = a[NUM_ROWS], a[MLP], 2 * TILE_BLOCKS * BLOCK_BYTES
    blocks, mine = width // WIDTH, a[GATE_UP_OUT] + part * rows * step
    w, bias, pairs = load_int(weights + INT * GATE_UP), load_int(weights + INT * GATE_UP_BIAS), a[HIDDEN] // 2
    first, end = share_of(blocks, part, parts, TILE_BLOCKS)
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        for half in range(2):
            begin = first + half * blocks
            out = mine + (half * TILE_BLOCKS - begin) * BLOCK_BYTES
            project(a, site, a[NORMED], w, pairs, bias, begin, begin + last - first, out, step, 0)
        for row in range(rows):
            at = mine + row * step
            to = a[INNER] + 2 * (row * width + first * WIDTH)
            swiglu_to_bf16(at, at + TILE_BLOCKS * BLOCK_BYTES, (last - first) * WIDTH, to)
        first = last


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64))
def add_to_residual(
    a: Any, part: int, parts: int, site: int, weights: int, name: int, bias: int, x: int, pairs: int
) -> None:
    """The residual stream plus the projection of this name."""
    inputs_of(a, part, parts, site, x)
    first, end = share_of(a[HIDDEN] // WIDTH, part, parts, TILE_BLOCKS)
    w, b = load_int(weights + INT * name), load_int(weights + INT * bias)
    project(a, site, x, w, pairs, b, first, end, a[X], 4 * a[HIDDEN], 1)
    wait_for_others()


@device
def norm(a: Any, part: int, parts: int, weight: int) -> None:
    norm_rows(part, parts, a[X], a[NUM_ROWS], a[HIDDEN], weight, load_scalar(a[EPS]), a[NORMED])
    wait_for_others()


@device
def attention_rows(a: Any, part: int, parts: int, layer: int, weights: int) -> None:
    """The heads' results in the place of the queries."""
    heads, kv_heads, size = a[HEADS], a[KV_HEADS], a[HEAD_DIM]
    norm(a, part, parts, load_int(weights + INT * INPUT_NORM))
    inputs_of(a, part, parts, NUM_SITES * layer, a[NORMED])
    qkv_size = (heads + 2 * kv_heads) * size
    first, end = share_of(qkv_size // WIDTH, part, parts, TILE_BLOCKS)
    w, bias = load_int(weights + INT * QKV), load_int(weights + INT * QKV_BIAS)
    project(a, NUM_SITES * layer, a[NORMED], w, a[HIDDEN] // 2, bias, first, end, a[QKV_OUT], 4 * qkv_size, 0)
    wait_for_others()
    first, end = share_of(a[NUM_ROWS], part, parts, 1)
    for row in range(first, end):
        enter_heads(a, row, layer, weights)
    wait_for_others()
    if a[NUM_COPIES] > 0:
        for head in range(part, kv_heads, parts):  # in their order: a copy may be the source of another
            for index in range(a[NUM_COPIES]):
                copy_positions(a[COPY_TABLE] + INT * COPY_WIDTH * index, a[ROW_TABLE], layer, head, size)
        wait_for_others()
    attend(a, part, parts, layer)
    wait_for_others()


def _rows(a: Any) -> None:
    part, parts = thread_number(), thread_count()
    q_pairs = a[HEADS] * a[HEAD_DIM] // 2
    for layer in range(a[LAYERS]):
        weights, site = a[LAYER_TABLE] + INT * WEIGHTS_WIDTH * layer, NUM_SITES * layer
        attention_rows(a, part, parts, layer, weights)
        add_to_residual(a, part, parts, site + O_SITE, weights, O_PROJ, O_BIAS, a[Q], q_pairs)
        norm(a, part, parts, load_int(weights + INT * MLP_NORM))
        inputs_of(a, part, parts, site + GATE_UP_SITE, a[NORMED])
        mlp_rows(a, part, parts, site + GATE_UP_SITE, weights)
        wait_for_others()
        add_to_residual(a, part, parts, site + DOWN_SITE, weights, DOWN, DOWN_BIAS, a[INNER], a[MLP] // 2)


rows_kernel = Kernel(_rows)
