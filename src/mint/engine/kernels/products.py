"""Products x W^T of bf16 rows with packed weights, summed in float32, each sum in one fixed order whatever the rows.

A packed weight holds blocks of 16 outputs; a block holds, input pair by input pair, the two weights of each output. Shape
letters: T rows, I inputs, O outputs, both filled up with zeros to whole blocks and pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from torch import Tensor
from torch.nn.functional import pad

from mint.engine.kernels.compiling import exported
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.simd import (
    F32S,
    PAIRS,
    WIDTH,
    broadcast,
    dot_pairs,
    load_from,
    prefetch,
    splat_of,
    store_to,
    word,
)

PART_PAIRS = 1024
TILE_ROWS, TILE_BLOCKS = 8, 3  # 24 sums in registers, three for weights


def pack(weight_OI: Tensor) -> Tensor:
    """[O / 16, I / 2, 16, 2] bfloat16."""
    num_out, num_in = weight_OI.shape
    if num_out % WIDTH or num_in % 2:
        weight_OI = pad(weight_OI, (0, num_in % 2, 0, -num_out % WIDTH))
    blocks = weight_OI.view(-(-num_out // WIDTH), WIDTH, -1, 2)
    return blocks.permute(0, 2, 1, 3).to(torch.bfloat16, copy=True, memory_format=torch.contiguous_format)


def _tile(
    b: Any,
    rows: int,
    blocks: int,
    end: Any,
    x: Any,
    x_step: Any,
    w: Any,
    w_step: Any,
    pairs: Any,
    out: Any,
    out_step: Any,
    add: Any,
) -> None:
    """Writes the loop for so many rows and blocks; goes on at `end`."""
    i64, i32 = ir.IntType(64), ir.IntType(32)
    out_at = [
        [b.add(b.add(out, b.mul(out_step, i64(m))), i64(n * BLOCK_BYTES)) for n in range(blocks)] for m in range(rows)
    ]
    x_at = [b.add(x, b.mul(x_step, i64(m))) for m in range(rows)]
    w_at = [b.add(w, b.mul(w_step, i64(n))) for n in range(blocks)]
    before, there, loop, done = b.block, *(b.append_basic_block(name) for name in ("there", "loop", "done"))
    b.cbranch(b.icmp_signed("!=", add, i64(0)), there, loop)
    b.position_at_end(there)
    given = [[load_from(b, at, F32S, 4) for at in row] for row in out_at]
    b.branch(loop)
    b.position_at_end(loop)
    pair = b.phi(i64)
    sums = [[b.phi(F32S) for _ in range(blocks)] for _ in range(rows)]
    for block in (before, there):
        pair.add_incoming(i64(0), block)
    weights = [load_from(b, b.add(at, b.mul(pair, i64(BLOCK_BYTES))), PAIRS, 4) for at in w_at]
    ahead = b.add(b.mul(w_step, i64(blocks)), b.mul(pair, i64(BLOCK_BYTES)))
    for at in w_at:
        prefetch(b, b.add(at, ahead))
    results = []
    for m in range(rows):
        both = load_from(b, b.add(x_at[m], b.mul(pair, i64(4))), i32, 4)
        values = b.bitcast(broadcast(b, both, WIDTH), PAIRS)
        results.append([dot_pairs(b, sums[m][n], values, weights[n]) for n in range(blocks)])
    following = b.add(pair, i64(1))
    pair.add_incoming(following, loop)
    for m in range(rows):
        for n in range(blocks):
            sums[m][n].add_incoming(splat_of(F32S, 0.0), before)
            sums[m][n].add_incoming(given[m][n], there)
            sums[m][n].add_incoming(results[m][n], loop)
    b.cbranch(b.icmp_signed("<", following, pairs), loop, done)
    b.position_at_end(done)
    for m in range(rows):
        for n in range(blocks):
            store_to(b, out_at[m][n], results[m][n], 4)
    b.branch(end)


def _tiles(blocks: int) -> Any:
    """out [rows, 16 blocks] (float32) = x w, or that added to what is there where `add` is not 0; 1 to TILE_ROWS rows.

    Arguments: rows, address of x and bytes from row to row, address of w and bytes from block to block, input pairs,
    address of out and bytes from row to row, add.
    """

    def build(b: Any, rows: Any, *values: Any) -> None:
        cases = {count: b.append_basic_block(f"rows{count}") for count in range(1, TILE_ROWS + 1)}
        end = b.append_basic_block("end")
        switch = b.switch(rows, cases[TILE_ROWS])
        for count, block in cases.items():
            switch.add_case(ir.IntType(64)(count), block)
            b.position_at_end(block)
            _tile(b, count, blocks, end, *values)
        b.position_at_end(end)

    return word(types.void, (types.int64,) * 9, build)


_narrow, _wide = _tiles(1), _tiles(TILE_BLOCKS)


@exported(types.void, (types.int64,) * 11)
def multiply(
    x: int,
    x_step: int,
    rows: int,
    w: int,
    w_step: int,
    pairs: int,
    first: int,
    end: int,
    out: int,
    out_step: int,
    add: int,
) -> None:
    """Blocks [first, end) of out = x w (float32), or that added to what is there. x_step and out_step: bytes from row to row,
    w_step: from block to block.

    Long sums are taken part by part, so that the weights of a tile stay in the cache for all rows.
    """
    for start in range(0, pairs, PART_PAIRS):
        many = min(PART_PAIRS, pairs - start)
        x_part, w_part, adds = x + 4 * start, w + BLOCK_BYTES * start, add if start == 0 else 1
        block = first
        while block < end:
            wide = end - block >= TILE_BLOCKS
            w_at, out_at, done = w_part + block * w_step, out + block * BLOCK_BYTES, 0
            for left in range((rows + TILE_ROWS - 1) // TILE_ROWS, 0, -1):
                count = (rows - done + left - 1) // left
                x_at, to = x_part + done * x_step, out_at + done * out_step
                if wide:
                    _wide(count, x_at, x_step, w_at, w_step, many, to, out_step, adds)
                else:
                    _narrow(count, x_at, x_step, w_at, w_step, many, to, out_step, adds)
                done += count
            block += TILE_BLOCKS if wide else 1
