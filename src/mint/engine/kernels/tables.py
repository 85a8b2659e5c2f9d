"""Tables of int64 that kernels read: rows of named columns. An address is 0 where there is nothing."""

from __future__ import annotations

from mint.engine.kernels.compiling import device
from mint.engine.kernels.simd import load_int

INT = 8  # bytes


@device
def cell(table: int, width: int, row: int, column: int) -> int:
    return load_int(table + INT * (width * row + column))
