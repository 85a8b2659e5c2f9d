"""The layouts that products multiply with, written from rows of float32 or bf16 values.

A packed operand W of out = x W^T is [outputs / 16, inputs / 2, 16, 2] bf16, filled up with zeros: of 16 outputs, input pair
by input pair, the two weights of each. Its source holds it as rows of outputs (pairs lie along a row) or as rows of inputs
(pairs lie in two rows, one above the other). Addresses are int64, steps count bytes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from mint.engine.kernels.compiling import exported
from mint.engine.kernels.simd import (
    F32S,
    HALVES,
    I32S,
    WIDTH,
    broadcast,
    call,
    load_from,
    splat_of,
    store_to,
    word,
)

BLOCK_BYTES = 4 * WIDTH  # of one input pair of a block of outputs, and of a block of float32 results

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_MASK = ir.VectorType(_I1, WIDTH)


def _below(b: Any, count: Any) -> Any:
    """Which lanes are below `count`."""
    lanes = ir.Constant(I32S, list(range(WIDTH)))
    return b.icmp_signed("<", lanes, broadcast(b, b.trunc(count, _I32), WIDTH))


def _load_some(b: Any, address: Any, mask: Any) -> Any:
    """16 float32, 0 where the mask is not set; nothing is read there."""
    pointer = b.inttoptr(address, F32S.as_pointer())
    return call(b, "llvm.masked.load.v16f32.p0", F32S, pointer, _I32(4), mask, splat_of(F32S, 0.0))


def _store_some(b: Any, value: Any, address: Any, mask: Any) -> None:
    """16 float32; nothing is written where the mask is not set."""
    pointer = b.inttoptr(address, F32S.as_pointer())
    call(b, "llvm.masked.store.v16f32.p0", ir.VoidType(), value, pointer, _I32(4), mask)


def transposed(b: Any, rows: list[Any]) -> list[Any]:
    """Of 16 vectors of 16, by interleaving the halves four times."""
    low = ir.Constant(ir.VectorType(_I32, WIDTH), [i // 2 + WIDTH * (i % 2) for i in range(WIDTH)])
    high = ir.Constant(ir.VectorType(_I32, WIDTH), [WIDTH // 2 + i // 2 + WIDTH * (i % 2) for i in range(WIDTH)])
    for _ in range(4):
        pairs = [(rows[i], rows[i + WIDTH // 2]) for i in range(WIDTH // 2)]
        rows = [b.shuffle_vector(x, y, order) for x, y in pairs for order in (low, high)]
    return rows


def _interleaved(b: Any, x: Any, y: Any) -> Any:
    """32 bf16 of two times 16, in turn."""
    order = [i // 2 + WIDTH * (i % 2) for i in range(2 * WIDTH)]
    return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, 2 * WIDTH), order))


def _pack_rows(b: Any, source: Any, step: Any, rows: Any, columns: Any, scale: Any, out: Any) -> None:
    """16 pairs of 16 outputs: float32 [rows <= 16, columns <= 32] -> pairs along a row. Writes the pairs that there are."""
    factor = broadcast(b, scale, WIDTH)
    left, right = _below(b, columns), _below(b, b.sub(columns, _I64(WIDTH)))
    vectors = []
    for m in range(WIDTH):
        there = broadcast(b, b.icmp_signed("<", _I64(m), rows), WIDTH)
        at = b.add(source, b.mul(step, _I64(m)))
        halves = [
            b.fptrunc(b.fmul(_load_some(b, b.add(at, _I64(offset)), b.and_(mask, there)), factor), HALVES)
            for offset, mask in ((0, left), (4 * WIDTH, right))
        ]
        both = b.shuffle_vector(*halves, ir.Constant(ir.VectorType(_I32, 2 * WIDTH), list(range(2 * WIDTH))))
        vectors.append(b.bitcast(both, I32S))
    _store_pairs(b, transposed(b, vectors), columns, out)


def _store_pairs(b: Any, vectors: list[Any], columns: Any, out: Any) -> None:
    for pair, vector in enumerate(vectors):
        with b.if_then(b.icmp_signed("<", _I64(2 * pair), columns)):
            store_to(b, b.add(out, _I64(BLOCK_BYTES * pair)), vector, 4)


def _pack_bf16_rows(b: Any, source: Any, step: Any, rows: Any, out: Any) -> None:
    """16 pairs of 16 outputs: bf16 [rows <= 16, 32]."""
    vectors = []
    for m in range(WIDTH):
        at = b.add(source, b.mul(step, _I64(m)))
        at = b.select(b.icmp_signed("<", _I64(m), rows), at, source)  # a row that is there, then zeroed
        value = load_from(b, at, I32S)
        vectors.append(b.select(b.icmp_signed("<", _I64(m), rows), value, splat_of(I32S, 0)))
    for pair, vector in enumerate(transposed(b, vectors)):
        store_to(b, b.add(out, _I64(BLOCK_BYTES * pair)), vector, 4)


def _pack_columns(b: Any, first: Any, second: Any, has_second: Any, columns: Any, scale: Any, out: Any) -> None:
    """One pair of 16 outputs from two rows of inputs, float32 [columns <= 16]; without the second, zeros."""
    factor, mask = broadcast(b, scale, WIDTH), _below(b, columns)
    there = broadcast(b, b.icmp_signed(">", has_second, _I64(0)), WIDTH)
    x = b.fptrunc(b.fmul(_load_some(b, first, mask), factor), HALVES)
    y = b.fptrunc(b.fmul(_load_some(b, second, b.and_(mask, there)), factor), HALVES)
    store_to(b, out, _interleaved(b, x, y), 4)


def _pair_bf16(b: Any, first: Any, second: Any, has_second: Any, out: Any) -> None:
    """The same from bf16 rows of 16."""
    x, y = load_from(b, first, HALVES), load_from(b, second, HALVES)
    y = b.select(broadcast(b, b.icmp_signed(">", has_second, _I64(0)), WIDTH), y, splat_of(HALVES, 0.0))
    store_to(b, out, _interleaved(b, x, y), 4)


def _transpose(b: Any, source: Any, step: Any, out: Any, out_step: Any) -> None:
    """float32 [16, 16] -> its transpose in bf16."""
    vectors = [load_from(b, b.add(source, b.mul(step, _I64(m))), F32S, 4) for m in range(WIDTH)]
    for m, vector in enumerate(transposed(b, vectors)):
        store_to(b, b.add(out, b.mul(out_step, _I64(m))), b.fptrunc(vector, HALVES))


def _add_transpose(
    b: Any, source: Any, step: Any, rows: Any, columns: Any, scale: Any, out: Any, out_step: Any
) -> None:
    """Adds scale times the transpose of float32 [rows <= 16, columns <= 16]. 16 rows of 16 are read."""
    factor, mask = broadcast(b, scale, WIDTH), _below(b, rows)
    vectors = [load_from(b, b.add(source, b.mul(step, _I64(m))), F32S, 4) for m in range(WIDTH)]
    for m, vector in enumerate(transposed(b, vectors)):
        with b.if_then(b.icmp_signed("<", _I64(m), columns)):
            at = b.add(out, b.mul(out_step, _I64(m)))
            _store_some(b, b.fadd(_load_some(b, at, mask), b.fmul(vector, factor)), at, mask)


_i64, _f32 = types.int64, types.float32
_rows_word = word(types.void, (_i64, _i64, _i64, _i64, _f32, _i64), _pack_rows)
_bf16_rows_word = word(types.void, (_i64, _i64, _i64, _i64), _pack_bf16_rows)
_columns_word = word(types.void, (_i64, _i64, _i64, _i64, _f32, _i64), _pack_columns)
pair_bf16 = word(types.void, (_i64, _i64, _i64, _i64), _pair_bf16)
_transpose_word = word(types.void, (_i64, _i64, _i64, _i64), _transpose)
_add_transpose_word = word(types.void, (_i64, _i64, _i64, _i64, _f32, _i64, _i64), _add_transpose)


@exported(types.void, (_i64,) * 4)
def transpose_to_bf16(source: int, step: int, out: int, out_step: int) -> None:
    """float32 [16, 16] -> its transpose in bf16."""
    _transpose_word(source, step, out, out_step)


@exported(types.void, (_i64, _i64, _i64, _i64, _f32, _i64))
def add_transposed(source: int, step: int, rows: int, columns: int, scale: float, out: int) -> None:
    """out [columns, rows] += scale times the transpose of float32 [rows, columns], which has whole blocks of 16 x 16 in
    memory."""
    for row in range(0, rows, WIDTH):
        for column in range(0, columns, WIDTH):
            _add_transpose_word(
                source + step * row + 4 * column, step, rows - row, columns - column, scale,
                out + 4 * (rows * column + row), 4 * rows,
            )  # fmt: skip


@exported(types.void, (_i64, _i64, _i64, _i64, _f32, _i64))
def pack_output_rows(source: int, step: int, outputs: int, inputs: int, scale: float, out: int) -> None:
    """scale times W given as float32 rows of outputs, [outputs, inputs]."""
    pairs = (inputs + 1) // 2
    for block in range(0, (outputs + WIDTH - 1) // WIDTH):
        for first in range(0, inputs, 2 * WIDTH):
            _rows_word(
                source + step * WIDTH * block + 4 * first, step, outputs - WIDTH * block, inputs - first, scale,
                out + BLOCK_BYTES * (pairs * block + first // 2),
            )  # fmt: skip


@exported(types.void, (_i64, _i64, _i64, _i64, _f32, _i64, _i64))
def pack_input_rows(source: int, step: int, inputs: int, outputs: int, scale: float, pairs: int, out: int) -> None:
    """scale times W given as float32 rows of inputs, [inputs, outputs]; a block of the result has room for `pairs`."""
    for pair in range((inputs + 1) // 2):
        at = source + step * 2 * pair
        for block in range((outputs + WIDTH - 1) // WIDTH):
            first = at + BLOCK_BYTES * block
            _columns_word(
                first, first + step, inputs - 2 * pair - 1, outputs - WIDTH * block, scale,
                out + BLOCK_BYTES * (pairs * block + pair),
            )  # fmt: skip


@exported(types.void, (_i64,) * 5)
def pack_bf16_output_rows(source: int, step: int, outputs: int, inputs: int, out: int) -> None:
    """From bf16 rows of outputs; inputs are a multiple of 32."""
    for block in range(0, (outputs + WIDTH - 1) // WIDTH):
        for first in range(0, inputs, 2 * WIDTH):
            _bf16_rows_word(
                source + step * WIDTH * block + 2 * first, step, outputs - WIDTH * block,
                out + BLOCK_BYTES * (inputs // 2 * block + first // 2),
            )  # fmt: skip


@exported(types.void, (_i64,) * 6)
def pack_bf16_input_rows(source: int, step: int, inputs: int, outputs: int, pairs: int, out: int) -> None:
    """From bf16 rows of inputs; outputs are a multiple of 16. `pairs`: of inputs a block of the result has room for; the partner
    of an odd last row is 0."""
    for block in range(outputs // WIDTH):
        at, to = source + 2 * WIDTH * block, out + BLOCK_BYTES * pairs * block
        for pair in range((inputs + 1) // 2):
            first = at + step * 2 * pair
            more = inputs - 2 * pair - 1
            pair_bf16(first, first + step if more > 0 else first, more, to + BLOCK_BYTES * pair)
