"""One decoder layer over a packed row of tokens: one call, in which threads wait for one another. layer_back.py goes back.

Activations are bf16, sums, gradients of the residual stream and what lies between two products of a thread float32. The
kernels' numbers have names here. Shape letters: T rows, D hidden, O width of q, k, v, H query and K key/value heads, E
head_dim, F MLP width, P positions of all sequences, R low ranks.
"""

from __future__ import annotations

from typing import Any

from mint.engine.kernels.attention import attention_forward, pack_heads
from mint.engine.kernels.compiling import INT64, NOTHING, NUMBERS, device, exported
from mint.engine.kernels.low_rank import (
    add_low_rank,
    is_adapted,
    low_rank_inputs,
)
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS, multiply
from mint.engine.kernels.simd import WIDTH, load, load_bf16, load_int, load_scalar, store, store_bf16
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
    O_BIAS,
    O_PROJ,
    O_SITE,
    Q_NORM,
    QKV,
    QKV_BIAS,
)  # fmt: skip
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number, wait_for_others
from mint.engine.kernels.vectors import (
    bf16_to_float,
    norm_bf16,
    norm_bf16_to_float,
    rotate_to_bf16,
    swiglu_bf16,
    to_bf16,
)

# of the pass
(
    TOKENS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, EPS, COS, SIN, ADAPTED, NUM_ADAPTED, RANKS, SEQUENCES, NUM_SEQUENCES,
    POSITIONS, ROOM, USES, USED,
) = range(18)  # fmt: skip
# scratch
(
    NORMED, HEAD, PANEL, PANEL_BYTES, WIDE, NARROW, KEY_OUT, KEY_IN, VALUE_OUT, VALUE_IN, GATHERED, BLOCK, BLOCK_SIZE, INNER,
    WIDE_BACK, NARROW_BACK, TURNED, TURNED_BACK, TURNED_STEP, GRAD_OUT, GRAD_INNER, GRAD_NORMED, GRAD_ATTN, GRAD_Q, GRAD_K,
    GRAD_V, GRAD_RAW,
) = range(18, 45)  # fmt: skip
# of the layer: rows of its weights and of those for backward, activations, the number of its first site, what backward needs
(
    WEIGHTS, BACK, X, RAW, HEADS_OUT, ATTN, MID, ACT, OUT, SITE, GRAD, TO_ATTENTION, TO_INPUT,
) = range(45, 58)  # fmt: skip
NUM_VALUES = 58


@device
def weight(a: Any, column: int) -> int:
    return load_int(a[WEIGHTS] + INT * column)


@device
def back_weight(a: Any, site: int) -> int:
    return load_int(a[BACK] + INT * site)


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64))
def norm_rows(a: Any, part: int, parts: int, x: int, weight: int) -> None:
    first, end = share_of(a[TOKENS], part, parts, 1)
    size, eps = a[HIDDEN], load_scalar(a[EPS])
    for row in range(first, end):
        norm_bf16(x + 2 * size * row, weight, size, eps, a[NORMED] + 2 * size * row)


@device
def inputs_of(a: Any, part: int, parts: int, site: int, x: int) -> None:
    """The site's low-rank inputs, where some rows are adapted."""
    if is_adapted(a[ADAPTED], a[NUM_ADAPTED], site):
        low_rank_inputs(part, parts, a[ADAPTED], a[NUM_ADAPTED], site, x, a[WIDE], a[NARROW], a[RANKS])
        wait_for_others()


@device
def add_bias(out: int, out_step: int, rows: int, bias: int, first: int, end: int) -> None:
    for row in range(rows):
        for block in range(first, end):
            at = out + out_step * row + BLOCK_BYTES * block
            store(at, load(at) + load(bias + BLOCK_BYTES * block))


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64))
def project_panel(
    a: Any, site: int, x: int, w: int, pairs: int, bias: int, first: int, end: int, out: int, out_step: int
) -> None:
    """Blocks [first, end) of a site's outputs for all rows, float32."""
    rows = a[TOKENS]
    multiply(x, 4 * pairs, rows, w, BLOCK_BYTES * pairs, pairs, first, end, out, out_step, 0)
    add_low_rank(a[ADAPTED], a[NUM_ADAPTED], site, a[NARROW], a[RANKS], first, end, out, out_step)
    if bias != 0:
        add_bias(out, out_step, rows, bias, first, end)


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64, INT64))
def project(
    a: Any,
    part: int,
    parts: int,
    site: int,
    x: int,
    w: int,
    pairs: int,
    bias: int,
    outputs: int,
    residual: int,
    out: int,
) -> None:
    """[T, outputs] bf16, the residual added before rounding where there is one."""
    first, end = share_of(outputs // WIDTH, part, parts, TILE_BLOCKS)
    panel, step, rows = a[PANEL] + a[PANEL_BYTES] * part, TILE_BLOCKS * BLOCK_BYTES, a[TOKENS]
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        project_panel(a, site, x, w, pairs, bias, first, last, panel - BLOCK_BYTES * first, step)
        for row in range(rows):
            for block in range(last - first):
                at = 2 * (outputs * row + WIDTH * (first + block))
                value = load(panel + step * row + BLOCK_BYTES * block)
                if residual != 0:
                    value = value + load_bf16(residual + at)
                store_bf16(out + at, value)
        first = last


@exported(NOTHING, (NUMBERS, INT64, INT64))
def split_heads(a: Any, part: int, parts: int) -> None:
    """From the projection [T, O] to rotated heads [H + 2 K, T, E], normalised where the model does."""
    first, end = share_of(a[TOKENS], part, parts, 1)
    heads, kv_heads, size, rows, eps = a[HEADS], a[KV_HEADS], a[HEAD_DIM], a[TOKENS], load_scalar(a[EPS])
    mine, width = a[HEAD] + 4 * size * part, (heads + 2 * kv_heads) * size
    for row in range(first, end):
        raw = a[RAW] + 2 * width * row
        angle = 2 * size * row
        for head in range(heads + 2 * kv_heads):
            at, out = raw + 2 * size * head, a[HEADS_OUT] + 2 * size * (rows * head + row)
            norm = weight(a, Q_NORM) if head < heads else weight(a, K_NORM)
            if head >= heads + kv_heads or norm == 0:
                bf16_to_float(at, size, mine)
            else:
                norm_bf16_to_float(at, norm, size, eps, mine)
            if head < heads + kv_heads:
                rotate_to_bf16(mine, a[COS] + angle, a[SIN] + angle, size, out)
            else:
                to_bf16(mine, size, out)


@device
def pack_layer_heads(a: Any, part: int, parts: int, back: bool) -> None:
    size, rows = a[HEAD_DIM], a[TOKENS]
    keys = a[HEADS_OUT] + 2 * size * rows * a[HEADS]
    pack_heads(
        part, parts, a[SEQUENCES], a[NUM_SEQUENCES], a[POSITIONS], a[KV_HEADS], size, rows, keys,
        keys + 2 * size * rows * a[KV_HEADS], a[GATHERED], a[KEY_OUT], a[KEY_IN] if back else 0,
        a[VALUE_OUT] if back else 0, 0 if back else a[VALUE_IN],
    )  # fmt: skip


@exported(NOTHING, (NUMBERS, INT64, INT64))
def forward_to_attention(a: Any, part: int, parts: int) -> None:
    norm_rows(a, part, parts, a[X], weight(a, INPUT_NORM))
    wait_for_others()
    inputs_of(a, part, parts, a[SITE], a[NORMED])
    outputs = (a[HEADS] + 2 * a[KV_HEADS]) * a[HEAD_DIM]
    project(a, part, parts, a[SITE], a[NORMED], weight(a, QKV), a[HIDDEN] // 2, weight(a, QKV_BIAS), outputs, 0, a[RAW])
    wait_for_others()
    split_heads(a, part, parts)
    wait_for_others()
    pack_layer_heads(a, part, parts, False)
    wait_for_others()
    attention_forward(
        part, parts, a[SEQUENCES], a[NUM_SEQUENCES], a[POSITIONS], a[HEADS], a[KV_HEADS], a[HEAD_DIM], a[TOKENS], a[HEADS_OUT],
        a[KEY_OUT], a[VALUE_IN], a[BLOCK], a[BLOCK_SIZE], a[ROOM], a[ATTN],
    )  # fmt: skip
    wait_for_others()


@exported(NOTHING, (NUMBERS, INT64, INT64))
def forward_mlp(a: Any, part: int, parts: int) -> None:
    """gate and up [T, 2 F] are kept, silu(gate) up [T, F] is scratch."""
    width, rows, pairs = a[MLP], a[TOKENS], a[HIDDEN] // 2
    blocks, step = width // WIDTH, TILE_BLOCKS * BLOCK_BYTES
    first, end = share_of(blocks, part, parts, TILE_BLOCKS)
    panel = a[PANEL] + a[PANEL_BYTES] * part
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        for half in range(2):
            begin = first + blocks * half
            project_panel(
                a, a[SITE] + GATE_UP_SITE, a[NORMED], weight(a, GATE_UP), pairs, weight(a, GATE_UP_BIAS), begin,
                begin + last - first, panel - BLOCK_BYTES * begin, step,
            )  # fmt: skip
            for row in range(rows):
                to_bf16(panel + step * row, WIDTH * (last - first), a[ACT] + 2 * (2 * width * row + WIDTH * begin))
        for row in range(rows):
            gate = a[ACT] + 2 * (2 * width * row + WIDTH * first)
            swiglu_bf16(gate, gate + 2 * width, WIDTH * (last - first), a[INNER] + 2 * (width * row + WIDTH * first))
        first = last


def _forward(a: Any) -> None:
    part, parts = thread_number(), thread_count()
    forward_to_attention(a, part, parts)
    inputs_of(a, part, parts, a[SITE] + O_SITE, a[ATTN])
    q_pairs = a[HEADS] * a[HEAD_DIM] // 2
    project(
        a,
        part,
        parts,
        a[SITE] + O_SITE,
        a[ATTN],
        weight(a, O_PROJ),
        q_pairs,
        weight(a, O_BIAS),
        a[HIDDEN],
        a[X],
        a[MID],
    )
    wait_for_others()
    norm_rows(a, part, parts, a[MID], weight(a, MLP_NORM))
    wait_for_others()
    inputs_of(a, part, parts, a[SITE] + GATE_UP_SITE, a[NORMED])
    forward_mlp(a, part, parts)
    wait_for_others()
    if a[OUT] != 0:
        inputs_of(a, part, parts, a[SITE] + DOWN_SITE, a[INNER])
        project(
            a,
            part,
            parts,
            a[SITE] + DOWN_SITE,
            a[INNER],
            weight(a, DOWN),
            a[MLP] // 2,
            weight(a, DOWN_BIAS),
            a[HIDDEN],
            a[MID],
            a[OUT],
        )
        wait_for_others()


forward_kernel = Kernel(_forward)
