"""A decoder layer's backward over a packed row of tokens: one call, in which threads wait for one another. See layer.py."""

from __future__ import annotations

from typing import Any

from mint.engine.kernels.attention import attention_back
from mint.engine.kernels.compiling import INT64, NOTHING, NUMBERS, device, exported
from mint.engine.kernels.layer import (
    ACT,
    ADAPTED,
    ATTN,
    BLOCK,
    BLOCK_SIZE,
    COS,
    EPS,
    GRAD,
    GRAD_ATTN,
    GRAD_INNER,
    GRAD_K,
    GRAD_NORMED,
    GRAD_OUT,
    GRAD_Q,
    GRAD_RAW,
    GRAD_V,
    HEAD,
    HEAD_DIM,
    HEADS,
    HEADS_OUT,
    HIDDEN,
    INNER,
    KEY_IN,
    KEY_OUT,
    KV_HEADS,
    MID,
    MLP,
    NARROW,
    NARROW_BACK,
    NORMED,
    NUM_ADAPTED,
    NUM_SEQUENCES,
    PANEL,
    PANEL_BYTES,
    POSITIONS,
    RANKS,
    RAW,
    ROOM,
    SEQUENCES,
    SIN,
    SITE,
    TO_ATTENTION,
    TO_INPUT,
    TOKENS,
    TURNED,
    TURNED_BACK,
    TURNED_STEP,
    USED,
    USES,
    VALUE_OUT,
    WIDE,
    WIDE_BACK,
    X,
    back_weight,
    norm_rows,
    pack_layer_heads,
    weight,
)  # fmt: skip
from mint.engine.kernels.low_rank import (
    add_gradients,
    add_low_rank_back,
    is_adapted,
    low_rank_back,
    low_rank_inputs,
    transpose_ranks,
)
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS, multiply
from mint.engine.kernels.simd import WIDTH, load_bf16, load_int, load_scalar, store, zeros
from mint.engine.kernels.tables import (
    DOWN_SITE,
    GATE_UP_SITE,
    INPUT_NORM,
    INT,
    K_NORM,
    MLP_NORM,
    O_SITE,
    Q_NORM,
    QKV_SITE,
)  # fmt: skip
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number, wait_for_others
from mint.engine.kernels.vectors import (
    norm_back,
    norm_bf16,
    rotate_back,
    swiglu_back,
    swiglu_bf16,
    to_bf16,
)


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64, INT64, INT64))
def gradients_of(a: Any, part: int, parts: int, site: int, x: int, grad: int, grad_step: int) -> None:
    """The site's low-rank gradients from its input and the gradient by its output; NARROW_BACK is then that by u."""
    if not is_adapted(a[ADAPTED], a[NUM_ADAPTED], site):
        return
    adapted, count, ranks = a[ADAPTED], a[NUM_ADAPTED], a[RANKS]
    low_rank_inputs(part, parts, adapted, count, site, x, a[WIDE], a[NARROW], ranks)
    low_rank_back(part, parts, adapted, count, site, grad, grad_step, a[WIDE_BACK], a[NARROW_BACK], ranks)
    wait_for_others()
    transpose_ranks(part, parts, adapted, count, site, a[WIDE], ranks, a[TURNED], a[TURNED_STEP])
    transpose_ranks(part, parts, adapted, count, site, a[WIDE_BACK], ranks, a[TURNED_BACK], a[TURNED_STEP])
    wait_for_others()
    add_gradients(
        part, parts, adapted, count, site, x, a[TURNED_BACK], grad, grad_step, a[TURNED], a[TURNED_STEP], a[PANEL],
        a[PANEL_BYTES],
    )  # fmt: skip


@device
def back_panel(a: Any, site: int, grad: int, w: int, pairs: int, first: int, end: int, out: int, out_step: int) -> None:
    """Blocks [first, end) of the gradient by a site's input for all rows, float32."""
    multiply(grad, 4 * pairs, a[TOKENS], w, BLOCK_BYTES * pairs, pairs, first, end, out, out_step, 0)
    add_low_rank_back(a[ADAPTED], a[NUM_ADAPTED], site, a[NARROW_BACK], a[RANKS], first, end, out, out_step)


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64, INT64, INT64))
def back_to_normed(a: Any, part: int, parts: int, site: int, grad: int, w: int, pairs: int) -> None:
    """The gradient by a norm's output, float32 [T, D]."""
    first, end = share_of(a[HIDDEN] // WIDTH, part, parts, TILE_BLOCKS)
    while first < end:  # panel by panel: its rows are still near when the low-rank part is added
        last = min(end, first + TILE_BLOCKS)
        back_panel(a, site, grad, w, pairs, first, last, a[GRAD_NORMED], 4 * a[HIDDEN])
        first = last


@exported(NOTHING, (NUMBERS, INT64, INT64, INT64, INT64))
def back_through_norm(a: Any, part: int, parts: int, x: int, weight: int) -> None:
    """Adds to the residual stream's gradient, and rounds it for the next product."""
    first, end = share_of(a[TOKENS], part, parts, 1)
    size, eps = a[HIDDEN], load_scalar(a[EPS])
    for row in range(first, end):
        grad = a[GRAD] + 4 * size * row
        norm_back(a[GRAD_NORMED] + 4 * size * row, x + 2 * size * row, weight, size, eps, grad, True)
        to_bf16(grad, size, a[GRAD_OUT] + 2 * size * row)


@exported(NOTHING, (NUMBERS, INT64, INT64))
def back_mlp(a: Any, part: int, parts: int) -> None:
    rows, size, width = a[TOKENS], a[HIDDEN], a[MLP]
    mine, my_end = share_of(rows, part, parts, 1)
    for row in range(mine, my_end):
        to_bf16(a[GRAD] + 4 * size * row, size, a[GRAD_OUT] + 2 * size * row)
        gate = a[ACT] + 4 * width * row
        swiglu_bf16(gate, gate + 2 * width, width, a[INNER] + 2 * width * row)
        norm_bf16(a[MID] + 2 * size * row, weight(a, MLP_NORM), size, load_scalar(a[EPS]), a[NORMED] + 2 * size * row)
    wait_for_others()
    gradients_of(a, part, parts, a[SITE] + DOWN_SITE, a[INNER], a[GRAD_OUT], 2 * size)
    first, end = share_of(width // WIDTH, part, parts, TILE_BLOCKS)
    panel, step = a[PANEL] + a[PANEL_BYTES] * part, TILE_BLOCKS * BLOCK_BYTES
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        back_panel(
            a,
            a[SITE] + DOWN_SITE,
            a[GRAD_OUT],
            back_weight(a, DOWN_SITE),
            size // 2,
            first,
            last,
            panel - BLOCK_BYTES * first,
            step,
        )
        for row in range(rows):
            at = 2 * (2 * width * row + WIDTH * first)
            gate, grad_gate = a[ACT] + at, a[GRAD_INNER] + at
            swiglu_back(
                panel + step * row, gate, gate + 2 * width, WIDTH * (last - first), grad_gate, grad_gate + 2 * width
            )
        first = last
    wait_for_others()
    gradients_of(a, part, parts, a[SITE] + GATE_UP_SITE, a[NORMED], a[GRAD_INNER], 4 * width)
    if a[TO_ATTENTION] != 0:
        back_to_normed(a, part, parts, a[SITE] + GATE_UP_SITE, a[GRAD_INNER], back_weight(a, GATE_UP_SITE), width)
        wait_for_others()
        back_through_norm(a, part, parts, a[MID], weight(a, MLP_NORM))
    wait_for_others()


@device
def sum_head(a: Any, grads: int, row: int, kv_head: int, out: int) -> None:
    """What all query heads and all sequences that use the row add to one key or value."""
    size, group = a[HEAD_DIM], a[HEADS] // a[KV_HEADS]
    first, end = load_int(a[USES] + INT * row), load_int(a[USES] + INT * (row + 1))
    for i in range(0, size, WIDTH):
        value = zeros()
        for use in range(first, end):
            position = load_int(a[USED] + INT * use)
            for head in range(kv_head * group, (kv_head + 1) * group):
                value = value + load_bf16(grads + 2 * (size * (a[POSITIONS] * head + position) + i))
        store(out + 4 * i, value)


@exported(NOTHING, (NUMBERS, INT64, INT64))
def join_heads(a: Any, part: int, parts: int) -> None:
    """From gradients by rotated heads to that by the projection [T, O], bf16."""
    first, end = share_of(a[TOKENS], part, parts, 1)
    heads, kv_heads, size, rows, eps = a[HEADS], a[KV_HEADS], a[HEAD_DIM], a[TOKENS], load_scalar(a[EPS])
    mine, width = a[HEAD] + 4 * size * part, (heads + 2 * kv_heads) * size
    for row in range(first, end):
        angle = 2 * size * row
        for head in range(heads + 2 * kv_heads):
            at, raw = mine, 2 * (width * row + size * head)
            if head < heads:
                at = a[GRAD_Q] + 4 * size * (rows * head + row)
            elif head < heads + kv_heads:
                sum_head(a, a[GRAD_K], row, head - heads, mine)
            else:
                sum_head(a, a[GRAD_V], row, head - heads - kv_heads, mine)
            if head < heads + kv_heads:
                rotate_back(at, a[COS] + angle, a[SIN] + angle, size)
                norm = weight(a, Q_NORM) if head < heads else weight(a, K_NORM)
                if norm != 0:
                    norm_back(at, a[RAW] + raw, norm, size, eps, at, False)
            to_bf16(at, size, a[GRAD_RAW] + raw)


@exported(NOTHING, (NUMBERS, INT64, INT64))
def back_attention(a: Any, part: int, parts: int) -> None:
    size, rows, q_size = a[HIDDEN], a[TOKENS], a[HEADS] * a[HEAD_DIM]
    gradients_of(a, part, parts, a[SITE] + O_SITE, a[ATTN], a[GRAD_OUT], 2 * size)
    first, end = share_of(q_size // WIDTH, part, parts, TILE_BLOCKS)
    panel, step = a[PANEL] + a[PANEL_BYTES] * part, TILE_BLOCKS * BLOCK_BYTES
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        back_panel(
            a,
            a[SITE] + O_SITE,
            a[GRAD_OUT],
            back_weight(a, O_SITE),
            size // 2,
            first,
            last,
            panel - BLOCK_BYTES * first,
            step,
        )
        for row in range(rows):
            to_bf16(panel + step * row, WIDTH * (last - first), a[GRAD_ATTN] + 2 * (q_size * row + WIDTH * first))
        first = last
    pack_layer_heads(a, part, parts, True)
    wait_for_others()
    attention_back(
        part, parts, a[SEQUENCES], a[NUM_SEQUENCES], a[POSITIONS], a[HEADS], a[KV_HEADS], a[HEAD_DIM], rows, a[HEADS_OUT],
        a[GRAD_ATTN], a[KEY_OUT], a[KEY_IN], a[VALUE_OUT], a[BLOCK], a[BLOCK_SIZE], a[ROOM], a[GRAD_Q], a[GRAD_K], a[GRAD_V],
    )  # fmt: skip
    wait_for_others()
    join_heads(a, part, parts)
    norm_rows(a, part, parts, a[X], weight(a, INPUT_NORM))
    wait_for_others()
    outputs = q_size + 2 * a[KV_HEADS] * a[HEAD_DIM]
    gradients_of(a, part, parts, a[SITE], a[NORMED], a[GRAD_RAW], 2 * outputs)
    if a[TO_INPUT] != 0:
        back_to_normed(a, part, parts, a[SITE], a[GRAD_RAW], back_weight(a, QKV_SITE), outputs // 2)
        wait_for_others()
        back_through_norm(a, part, parts, a[X], weight(a, INPUT_NORM))
    wait_for_others()


def _back(a: Any) -> None:
    part, parts = thread_number(), thread_count()
    back_mlp(a, part, parts)
    if a[TO_ATTENTION] != 0:
        back_attention(a, part, parts)


back_kernel = Kernel(_back)
