"""Tables of int64 that kernels read: rows of named columns. An address is 0 where there is nothing."""

from __future__ import annotations

from mint.engine.kernels.compiling import device
from mint.engine.kernels.simd import load_int

INT = 8  # bytes

# a decoder's weights, a row for each layer; matrices are packed, all else is float32
WEIGHTS_WIDTH = 12
(
    INPUT_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, O_PROJ, O_BIAS, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS,
) = range(WEIGHTS_WIDTH)  # fmt: skip

# the matrices packed for backward, a row for each layer; adapters number a layer's sites in the same order
NUM_SITES = 4
QKV_SITE, O_SITE, GATE_UP_SITE, DOWN_SITE = range(NUM_SITES)


@device
def cell(table: int, width: int, row: int, column: int) -> int:
    return load_int(table + INT * (width * row + column))
