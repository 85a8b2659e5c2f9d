"""Causal attention within the sequences of a packed row, forward and backward, over blocks of query rows.

Keys and values are gathered and packed once for each sequence and head, so sequences may share rows; all products are those
of products.py, probabilities are bf16 where they are multiplied. Shape letters: T rows of the pass, P positions of all
sequences, each filled up to a multiple of 16, H query and K key/value heads, E head_dim, b rows of a block, n keys it sees.
"""

from __future__ import annotations

import math

from numba import float32

from mint.engine.kernels.compiling import INT64, NOTHING, device, exported
from mint.engine.kernels.packing import (
    BLOCK_BYTES,
    pack_bf16_input_rows,
    pack_bf16_output_rows,
    pair_bf16,
    transpose_to_bf16,
)
from mint.engine.kernels.products import multiply
from mint.engine.kernels.simd import (
    WIDTH,
    fma,
    load,
    load_int,
    load_pairs,
    splat,
    store,
    store_bf16,
    store_pairs,
    total,
    zeros,
)
from mint.engine.kernels.tables import INT, cell
from mint.engine.kernels.vectors import fill, softmax, to_bf16

# a row for each sequence: its length, how many positions others have computed, the address of its positions' rows (int64),
# and where its positions begin among all
SEQUENCE_WIDTH = 4
LENGTH, SHARED, ROWS, AT = range(SEQUENCE_WIDTH)

QUERY_ROWS = 32


@device
def _up(count: int) -> int:
    return (count + WIDTH - 1) // WIDTH * WIDTH


@device
def pack_outputs(heads: int, rows: int, length: int, size: int, gathered: int, out: int) -> None:
    """One head of a sequence, rows of `heads` [T, E] bf16, as a packed operand with positions as outputs."""
    for first in range(0, length, WIDTH):
        many = min(WIDTH, length - first)
        for i in range(many):
            source = heads + 2 * size * load_int(rows + INT * (first + i))
            for j in range(0, size, 2 * WIDTH):
                store_pairs(gathered + 2 * (size * i + j), load_pairs(source + 2 * j))
        pack_bf16_output_rows(gathered, 2 * size, many, size, out + 2 * size * first)


@device
def pack_inputs(heads: int, rows: int, length: int, size: int, out: int) -> None:
    """The same with positions as inputs, filled up with zeros to a multiple of 16."""
    pairs = _up(length) // 2
    for pair in range(pairs):
        more = length - 2 * pair
        first = heads + 2 * size * load_int(rows + INT * min(2 * pair, length - 1))
        second = heads + 2 * size * load_int(rows + INT * min(2 * pair + 1, length - 1))
        for block in range(size // WIDTH):
            to = out + BLOCK_BYTES * (pairs * block + pair)
            if more > 0:
                pair_bf16(first + 2 * WIDTH * block, second + 2 * WIDTH * block, more - 1, to)
            else:
                fill(to, WIDTH, float32(0))


@exported(NOTHING, (INT64,) * 15)
def pack_heads(
    part: int, parts: int, sequences: int, count: int, positions: int, kv_heads: int, size: int, rows: int,
    keys: int, values: int, gathered: int, key_out: int, key_in: int, value_out: int, value_in: int,
) -> None:  # fmt: skip
    """Keys and values [K, T, E] of all sequences in the layouts that are asked for (not 0), [K, P, E] values each."""
    mine = gathered + 2 * WIDTH * size * part
    for index in range(count):
        length, places = cell(sequences, SEQUENCE_WIDTH, index, LENGTH), cell(sequences, SEQUENCE_WIDTH, index, ROWS)
        for head in range(kv_heads):
            if (index * kv_heads + head) % parts != part:
                continue
            at = 2 * size * (positions * head + cell(sequences, SEQUENCE_WIDTH, index, AT))
            k, v = keys + 2 * size * rows * head, values + 2 * size * rows * head
            if key_out != 0:
                pack_outputs(k, places, length, size, mine, key_out + at)
            if value_out != 0:
                pack_outputs(v, places, length, size, mine, value_out + at)
            if key_in != 0:
                pack_inputs(k, places, length, size, key_in + at)
            if value_in != 0:
                pack_inputs(v, places, length, size, value_in + at)


@device
def seen_keys(length: int, shared: int) -> int:
    """What the positions from `shared` on see together."""
    return (length * (length + 1) - shared * (shared + 1)) // 2


@exported(NOTHING, (INT64,) * 13)
def attend_rows(
    q: int, count: int, first: int, keys: int, values: int, filled: int, size: int, scores: int, room: int, probs: int,
    result: int, out: int, out_step: int,
) -> None:  # fmt: skip
    """Attention of positions [first, first + count) of one head; scores, probs: [count, room], result: [count, E]."""
    scale, end = float32(1 / math.sqrt(size)), _up(first + count)
    multiply(q, 2 * size, count, keys, 2 * WIDTH * size, size // 2, 0, end // WIDTH, scores, 4 * room, 0)
    for i in range(count):
        factor = splat(softmax(scores + 4 * room * i, first + i + 1, end, scale))
        for j in range(0, end, WIDTH):
            store_bf16(probs + 2 * (room * i + j), load(scores + 4 * (room * i + j)) * factor)
    multiply(probs, 2 * room, count, values, 2 * WIDTH * filled, end // 2, 0, size // WIDTH, result, 4 * size, 0)
    for i in range(count):
        to_bf16(result + 4 * size * i, size, out + out_step * i)


@exported(NOTHING, (INT64,) * 16)
def attention_forward(
    part: int, parts: int, sequences: int, count: int, positions: int, heads: int, kv_heads: int, size: int, rows: int,
    q: int, keys: int, values: int, scratch: int, block: int, room: int, out: int,
) -> None:  # fmt: skip
    """Queries [H, T, E] over packed keys (positions as outputs) and values (as inputs), to `out` [T, H, E], bf16.

    scratch: `block` bytes for every thread, see `scratch_bytes`.
    """
    work = 0
    for index in range(count):
        work += heads * seen_keys(
            cell(sequences, SEQUENCE_WIDTH, index, LENGTH), cell(sequences, SEQUENCE_WIDTH, index, SHARED)
        )
    begin, end, done = work * part // parts, work * (part + 1) // parts, 0
    scores = scratch + block * part
    probs = scores + 4 * QUERY_ROWS * room
    result = probs + 2 * QUERY_ROWS * room
    for index in range(count):
        length, shared = cell(sequences, SEQUENCE_WIDTH, index, LENGTH), cell(sequences, SEQUENCE_WIDTH, index, SHARED)
        places, at = cell(sequences, SEQUENCE_WIDTH, index, ROWS), cell(sequences, SEQUENCE_WIDTH, index, AT)
        for head in range(heads):
            packed = 2 * size * (positions * (head * kv_heads // heads) + at)
            first = shared
            while first < length:
                many = min(length, first // QUERY_ROWS * QUERY_ROWS + QUERY_ROWS) - first
                if begin <= done < end:
                    row = load_int(places + INT * first)
                    attend_rows(
                        q + 2 * size * (rows * head + row), many, first, keys + packed, values + packed, _up(length), size,
                        scores, room, probs, result, out + 2 * size * (heads * row + head), 2 * size * heads,
                    )  # fmt: skip
                done += seen_keys(first + many, first)
                first += many


@device
def score_gradients(probs: int, grads: int, room: int, count: int, end: int, scale: float, out: int) -> None:
    """P (dP - sum P dP) scale in place of dP, float32, and in bf16 to `out`, [count, room] all."""
    factor = splat(scale)
    for i in range(count):
        p, g, products = probs + 4 * room * i, grads + 4 * room * i, zeros()
        for j in range(0, end, WIDTH):
            products = fma(load(p + 4 * j), load(g + 4 * j), products)
        mean = splat(total(products))
        for j in range(0, end, WIDTH):
            value = load(p + 4 * j) * (load(g + 4 * j) - mean) * factor
            store(g + 4 * j, value)
            store_bf16(out + 2 * (room * i + j), value)


@device
def add_turned(
    weights: int, room: int, filled_rows: int, end: int, turned: int, rows: int, step: int, count: int, size: int,
    packed: int, out: int,
) -> None:  # fmt: skip
    """out [end, E] += weights^T [end, count] rows [count, E]."""
    for i in range(0, filled_rows, WIDTH):
        for j in range(0, end, WIDTH):
            transpose_to_bf16(weights + 4 * (room * i + j), 4 * room, turned + 2 * (QUERY_ROWS * j + i), 2 * QUERY_ROWS)
    pack_bf16_input_rows(rows, step, count, size, QUERY_ROWS // 2, packed)
    multiply(
        turned,
        2 * QUERY_ROWS,
        end,
        packed,
        BLOCK_BYTES * QUERY_ROWS // 2,
        (count + 1) // 2,
        0,
        size // WIDTH,
        out,
        4 * size,
        1,
    )


@exported(NOTHING, (INT64,) * 15)
def attend_rows_back(
    q: int, grad: int, grad_step: int, count: int, first: int, key_out: int, key_in: int, value_out: int, filled: int,
    size: int, scratch: int, room: int, grad_q: int, grad_k: int, grad_v: int,
) -> None:  # fmt: skip
    """Gradients of `attend_rows`: writes grad_q [count, E], adds to grad_k and grad_v [n, E], float32."""
    scale, end, filled_rows = float32(1 / math.sqrt(size)), _up(first + count), _up(count)
    probs = scratch
    grads = probs + 4 * QUERY_ROWS * room
    half = grads + 4 * QUERY_ROWS * room
    turned = half + 2 * QUERY_ROWS * room
    packed = turned + 2 * QUERY_ROWS * room
    multiply(q, 2 * size, count, key_out, 2 * WIDTH * size, size // 2, 0, end // WIDTH, probs, 4 * room, 0)
    multiply(grad, grad_step, count, value_out, 2 * WIDTH * size, size // 2, 0, end // WIDTH, grads, 4 * room, 0)
    for i in range(count):
        factor = splat(softmax(probs + 4 * room * i, first + i + 1, end, scale))
        for j in range(0, end, WIDTH):
            at = probs + 4 * (room * i + j)
            store(at, load(at) * factor)
    score_gradients(probs, grads, room, count, end, scale, half)
    for i in range(count, filled_rows):
        fill(probs + 4 * room * i, end, float32(0))
        fill(grads + 4 * room * i, end, float32(0))
    multiply(half, 2 * room, count, key_in, 2 * WIDTH * filled, end // 2, 0, size // WIDTH, grad_q, 4 * size, 0)
    add_turned(probs, room, filled_rows, end, turned, grad, grad_step, count, size, packed, grad_v)
    add_turned(grads, room, filled_rows, end, turned, q, 2 * size, count, size, packed, grad_k)


@exported(NOTHING, (INT64,) * 20)
def attention_back(
    part: int, parts: int, sequences: int, count: int, positions: int, heads: int, kv_heads: int, size: int, rows: int,
    q: int, grad: int, key_out: int, key_in: int, value_out: int, scratch: int, block: int, room: int, grad_q: int,
    grad_k: int, grad_v: int,
) -> None:  # fmt: skip
    """From the gradient [T, H, E] bf16: grad_q [H, T, E] float32, and what every query head adds to its keys and values, grad_k
    and grad_v [H, P, E] bf16."""
    k_sums = scratch + block * (part + 1) - 8 * size * room  # at the end of the thread's scratch
    v_sums = k_sums + 4 * size * room
    work = 0
    for index in range(count):
        work += heads * seen_keys(
            cell(sequences, SEQUENCE_WIDTH, index, LENGTH), cell(sequences, SEQUENCE_WIDTH, index, SHARED)
        )
    begin, end, done = work * part // parts, work * (part + 1) // parts, 0
    for index in range(count):
        length, shared = cell(sequences, SEQUENCE_WIDTH, index, LENGTH), cell(sequences, SEQUENCE_WIDTH, index, SHARED)
        places, at = cell(sequences, SEQUENCE_WIDTH, index, ROWS), cell(sequences, SEQUENCE_WIDTH, index, AT)
        for head in range(heads):
            if begin <= done < end:
                packed = 2 * size * (positions * (head * kv_heads // heads) + at)
                mine = 2 * size * (positions * head + at)
                fill(k_sums, _up(length) * size, float32(0))
                fill(v_sums, _up(length) * size, float32(0))
                first = shared
                while first < length:
                    many = min(length, first // QUERY_ROWS * QUERY_ROWS + QUERY_ROWS) - first
                    row = load_int(places + INT * first)
                    attend_rows_back(
                        q + 2 * size * (rows * head + row), grad + 2 * size * (heads * row + head), 2 * size * heads, many,
                        first, key_out + packed, key_in + packed, value_out + packed, _up(length), size,
                        scratch + block * part, room, grad_q + 4 * size * (rows * head + row), k_sums, v_sums,
                    )  # fmt: skip
                    first += many
                to_bf16(k_sums, length * size, grad_k + mine)
                to_bf16(v_sums, length * size, grad_v + mine)
            done += seen_keys(length, shared)


def scratch_bytes(room: int, size: int) -> int:
    """Of one thread. room: positions of the longest sequence, filled up."""
    return QUERY_ROWS * (room * (4 + 4 + 2 + 2) + size * 4) + 8 * size * room
