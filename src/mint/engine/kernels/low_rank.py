"""The low-rank part of a projection, forward and backward, for the rows of every adapter of a pass.

The modules of a site have their ranks side by side, each filled up with zeros to whole blocks of 16. Shape letters: T rows,
I inputs and O outputs of a site, R ranks of its modules together as they are filled up, r of one module as it is.
"""

from __future__ import annotations

from numba import float32

from mint.engine.kernels.compiling import INT64, NOTHING, device, exported
from mint.engine.kernels.packing import (
    BLOCK_BYTES,
    add_transposed,
    pack_bf16_input_rows,
    pack_input_rows,
    pack_output_rows,
    transpose_to_bf16,
)
from mint.engine.kernels.products import TILE_BLOCKS, multiply
from mint.engine.kernels.simd import WIDTH, load_int, load_scalar, store_half
from mint.engine.kernels.tables import INT, cell
from mint.engine.kernels.vectors import to_bf16

# a row for each adapter of a pass: its rows [start, end), its sites' table, where its flat gradient is, or 0, and that of
# the factor that B has been multiplied with (float32)
ADAPTED_WIDTH = 5
START, END, TABLE, GRADIENT, SCALE = range(ADAPTED_WIDTH)

# a row for each site; A as [R, I] and as [I, R], both packed. A is 0 where the site is not adapted
A, A_BACK, RANKS, RANK, PADDED, INPUTS, MODULES = range(7)
# and for each of its modules: blocks of outputs [first, end), B as [O, r] and as [r, O], both packed, and where the
# parameters of A and B begin in the flat vector
MODULE_WIDTH, MOST_MODULES = 7, 3
FIRST, LAST, B, B_BACK, A_AT, B_AT, OUTPUTS = range(MODULE_WIDTH)
SITE_WIDTH = 7 + MODULE_WIDTH * MOST_MODULES

CHUNK_ROWS = 64  # rows of x A^T that a thread takes at a time
GAP = 2 * WIDTH  # columns between the transposed ranks of one adapter and the next


@device
def module_cell(site: int, module: int, column: int) -> int:
    return load_int(site + INT * (7 + MODULE_WIDTH * module + column))


@device
def site_of(adapted: int, index: int, number: int) -> int:
    """The entry of site `number` of one adapter."""
    return cell(adapted, ADAPTED_WIDTH, index, TABLE) + INT * SITE_WIDTH * number


@device
def is_adapted(adapted: int, count: int, number: int) -> bool:
    found = False
    for index in range(count):
        found = found or load_int(site_of(adapted, index, number)) != 0
    return found


@exported(NOTHING, (INT64,) * 9)
def low_rank_inputs(
    part: int, parts: int, adapted: int, count: int, number: int, x: int, wide: int, narrow: int, ranks: int
) -> None:
    """u = x A^T of the adapted rows, [T, ranks]: in float32 to `wide`, in bf16 to `narrow`."""
    turn = 0
    for index in range(count):
        site = site_of(adapted, index, number)
        a = load_int(site)
        if a == 0:
            continue
        start, end = cell(adapted, ADAPTED_WIDTH, index, START), cell(adapted, ADAPTED_WIDTH, index, END)
        pairs = load_int(site + INT * INPUTS) // 2
        for begin in range(start, end, CHUNK_ROWS):
            many = min(CHUNK_ROWS, end - begin)
            for block in range(load_int(site + INT * RANKS) // WIDTH):
                turn += 1
                if turn % parts != part:
                    continue
                x_at, at = x + 4 * pairs * begin, ranks * begin
                multiply(
                    x_at, 4 * pairs, many, a, BLOCK_BYTES * pairs, pairs, block, block + 1, wide + 4 * at, 4 * ranks, 0
                )
                for row in range(many):
                    here = at + ranks * row + WIDTH * block
                    to_bf16(wide + 4 * here, WIDTH, narrow + 2 * here)


@exported(NOTHING, (INT64,) * 9)
def add_low_rank(
    adapted: int, count: int, number: int, narrow: int, ranks: int, first: int, end: int, out: int, out_step: int
) -> None:
    """out += u B^T, blocks [first, end) of all rows."""
    for index in range(count):
        site = site_of(adapted, index, number)
        if load_int(site) == 0:
            continue
        start, pairs = cell(adapted, ADAPTED_WIDTH, index, START), (load_int(site + INT * RANK) + 1) // 2
        many, padded = cell(adapted, ADAPTED_WIDTH, index, END) - start, load_int(site + INT * PADDED)
        for module in range(load_int(site + INT * MODULES)):
            own = module_cell(site, module, FIRST)
            begin, last = max(first, own), min(end, module_cell(site, module, LAST))
            if begin < last:
                b = module_cell(site, module, B) - BLOCK_BYTES * pairs * own
                u = narrow + 2 * (ranks * start + padded * module)
                multiply(
                    u, 2 * ranks, many, b, BLOCK_BYTES * pairs, pairs, begin, last, out + out_step * start, out_step, 1
                )


@exported(NOTHING, (INT64,) * 10)
def low_rank_back(
    part: int,
    parts: int,
    adapted: int,
    count: int,
    number: int,
    grad: int,
    grad_step: int,
    wide: int,
    narrow: int,
    ranks: int,
) -> None:
    """Gradient by u, grad B, [T, ranks]: in float32 to `wide`, in bf16 to `narrow`."""
    turn = 0
    for index in range(count):
        site = site_of(adapted, index, number)
        if load_int(site) == 0:
            continue
        start, end = cell(adapted, ADAPTED_WIDTH, index, START), cell(adapted, ADAPTED_WIDTH, index, END)
        padded = load_int(site + INT * PADDED)
        for begin in range(start, end, CHUNK_ROWS):
            many = min(CHUNK_ROWS, end - begin)
            for module in range(load_int(site + INT * MODULES)):
                turn += 1
                if turn % parts != part:
                    continue
                own, pairs = module_cell(site, module, FIRST), (module_cell(site, module, OUTPUTS) + 1) // 2
                g, at = grad + grad_step * begin + 2 * WIDTH * own, ranks * begin + padded * module
                back = module_cell(site, module, B_BACK)
                multiply(
                    g,
                    grad_step,
                    many,
                    back,
                    BLOCK_BYTES * pairs,
                    pairs,
                    0,
                    padded // WIDTH,
                    wide + 4 * at,
                    4 * ranks,
                    0,
                )
                for row in range(many):
                    to_bf16(wide + 4 * (at + ranks * row), padded, narrow + 2 * (at + ranks * row))


@exported(NOTHING, (INT64,) * 9)
def add_low_rank_back(
    adapted: int, count: int, number: int, narrow: int, ranks: int, first: int, end: int, out: int, out_step: int
) -> None:
    """out += (gradient by u) A, blocks [first, end) of all rows."""
    for index in range(count):
        site = site_of(adapted, index, number)
        if load_int(site) != 0:
            start, pairs = cell(adapted, ADAPTED_WIDTH, index, START), load_int(site + INT * RANKS) // 2
            many, back = cell(adapted, ADAPTED_WIDTH, index, END) - start, load_int(site + INT * A_BACK)
            u = narrow + 2 * ranks * start
            multiply(
                u, 2 * ranks, many, back, BLOCK_BYTES * pairs, pairs, first, end, out + out_step * start, out_step, 1
            )


@device
def transposed_at(start: int, index: int) -> int:
    """The column where an adapter's rows begin in transposed ranks."""
    return (start + WIDTH - 1) // WIDTH * WIDTH + GAP * index


@exported(NOTHING, (INT64,) * 9)
def transpose_ranks(
    part: int, parts: int, adapted: int, count: int, number: int, wide: int, ranks: int, out: int, out_step: int
) -> None:
    """[T, ranks] float32 -> [ranks, columns] bf16 for each adapter with a gradient; a last odd row gets a partner of 0."""
    for index in range(count):
        site = site_of(adapted, index, number)
        if load_int(site) == 0 or cell(adapted, ADAPTED_WIDTH, index, GRADIENT) == 0:
            continue
        start, end = cell(adapted, ADAPTED_WIDTH, index, START), cell(adapted, ADAPTED_WIDTH, index, END)
        column, size = transposed_at(start, index), load_int(site + INT * RANKS)
        for begin in range(part * WIDTH, end - start, parts * WIDTH):
            for block in range(0, size, WIDTH):
                to = out + out_step * block + 2 * (column + begin)
                transpose_to_bf16(wide + 4 * (ranks * (start + begin) + block), 4 * ranks, to, out_step)
                if begin + WIDTH > end - start:
                    for rank in range(WIDTH):
                        store_half(to + out_step * rank + 2 * (end - start - begin), float32(0))


@exported(NOTHING, (INT64,) * 13)
def add_gradients(
    part: int, parts: int, adapted: int, count: int, number: int, x: int, u_back: int, grad: int, grad_step: int, u: int,
    u_step: int, packed: int, block: int,
) -> None:  # fmt: skip
    """A's and B's gradients, (gradient by u)^T x and u^T grad, added to the adapters'.

    u_back, u: transposed ranks [R, columns], u_step bytes apart. packed: [T / 2 pairs, 3 blocks] of scratch for every
    thread, block: its bytes; the last 3 x R x 16 float32 of it hold B's part, of which rows beyond the rank are not used.
    """
    turn, mine = 0, packed + block * part
    for index in range(count):
        site, gradient = site_of(adapted, index, number), cell(adapted, ADAPTED_WIDTH, index, GRADIENT)
        if load_int(site) == 0 or gradient == 0:
            continue
        start, rank, padded = (
            cell(adapted, ADAPTED_WIDTH, index, START),
            load_int(site + INT * RANK),
            load_int(site + INT * PADDED),
        )
        rows, inputs = cell(adapted, ADAPTED_WIDTH, index, END) - start, load_int(site + INT * INPUTS)
        pairs, offset = (rows + 1) // 2, 2 * transposed_at(start, index)
        blocks = (inputs + WIDTH - 1) // WIDTH
        for first in range(0, blocks, TILE_BLOCKS):
            turn += 1
            if turn % parts != part:
                continue
            many = min(TILE_BLOCKS, blocks - first)
            pack_bf16_input_rows(
                x + 2 * inputs * start + 2 * WIDTH * first, 2 * inputs, rows, many * WIDTH, pairs, mine
            )
            for module in range(load_int(site + INT * MODULES)):
                out = gradient + 4 * (module_cell(site, module, A_AT) + WIDTH * first)
                left = u_back + u_step * padded * module + offset
                multiply(left, u_step, rank, mine, BLOCK_BYTES * pairs, pairs, 0, many, out, 4 * inputs, 1)
        for module in range(load_int(site + INT * MODULES)):
            own, outputs = module_cell(site, module, FIRST), module_cell(site, module, OUTPUTS)
            out = gradient + 4 * module_cell(site, module, B_AT)
            sums = mine + block - 4 * TILE_BLOCKS * WIDTH * padded
            blocks = (outputs + WIDTH - 1) // WIDTH
            for first in range(0, blocks, TILE_BLOCKS):
                turn += 1
                if turn % parts != part:
                    continue
                many = min(TILE_BLOCKS, blocks - first)
                at = grad + grad_step * start + 2 * WIDTH * (own + first)
                pack_bf16_input_rows(at, grad_step, rows, many * WIDTH, pairs, mine)
                left = u + u_step * padded * module + offset
                multiply(
                    left, u_step, rank, mine, BLOCK_BYTES * pairs, pairs, 0, many, sums, BLOCK_BYTES * TILE_BLOCKS, 0
                )
                scale = load_scalar(cell(adapted, ADAPTED_WIDTH, index, SCALE))
                columns = min(many * WIDTH, outputs - WIDTH * first)
                add_transposed(sums, BLOCK_BYTES * TILE_BLOCKS, rank, columns, scale, out + 4 * rank * WIDTH * first)


@device
def pack_sites(part: int, parts: int, sites: int, count: int, flat: int, scale: float, back: bool) -> None:
    """Packed A and B, times scale, of every site from the flat parameters; for backward too where `back`."""
    turn = 0
    for number in range(count):
        site = sites + INT * SITE_WIDTH * number
        if load_int(site) == 0:
            continue
        inputs, rank, padded = load_int(site + INT * INPUTS), load_int(site + INT * RANK), load_int(site + INT * PADDED)
        ranks = load_int(site + INT * RANKS)
        for module in range(load_int(site + INT * MODULES)):
            turn += 1
            if turn % parts != part:
                continue
            a, b = flat + 4 * module_cell(site, module, A_AT), flat + 4 * module_cell(site, module, B_AT)
            outputs, one = module_cell(site, module, OUTPUTS), float32(1)
            pack_output_rows(a, 4 * inputs, rank, inputs, one, load_int(site) + 2 * inputs * padded * module)
            pack_output_rows(b, 4 * rank, outputs, rank, scale, module_cell(site, module, B))
            if back:
                to = load_int(site + INT * A_BACK) + BLOCK_BYTES // 2 * padded * module
                pack_input_rows(a, 4 * inputs, rank, inputs, one, ranks // 2, to)
                pack_input_rows(
                    b, 4 * rank, outputs, rank, scale, (outputs + 1) // 2, module_cell(site, module, B_BACK)
                )
