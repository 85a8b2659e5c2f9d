"""One decoder layer over a packed row of tokens, forward and backward: one call, in which threads wait for one another.

Activations are bf16, sums, gradients of the residual stream and what lies between two products of a thread float32. The
kernels' numbers have names here. Shape letters: T rows, D hidden, O width of q, k, v, H query and K key/value heads, E
head_dim, F MLP width, P positions of all sequences, R low ranks.
"""

from __future__ import annotations

from typing import Any

from mint.engine.kernels.attention import attention_back, attention_forward, pack_heads
from mint.engine.kernels.compiling import INT64, NOTHING, NUMBERS, device, exported
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
from mint.engine.kernels.simd import WIDTH, load, load_bf16, load_int, load_scalar, store, store_bf16, zeros
from mint.engine.kernels.tables import INT
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number, wait_for_others
from mint.engine.kernels.vectors import (
    bf16_to_float,
    norm_back,
    norm_bf16,
    norm_bf16_to_float,
    rotate_back,
    rotate_to_bf16,
    swiglu_back,
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
# of the layer: weights (matrices packed, `_BACK` for backward), activations, number of its first site, what backward needs
(
    INPUT_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, O_PROJ, O_BIAS, MLP_NORM, GATE_UP, GATE_UP_BIAS, DOWN, DOWN_BIAS, QKV_BACK, O_BACK,
    GATE_UP_BACK, DOWN_BACK, X, RAW, HEADS_OUT, ATTN, MID, ACT, OUT, SITE, GRAD, TO_ATTENTION, TO_INPUT,
) = range(45, 72)  # fmt: skip
NUM_VALUES = 72


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
            norm = a[Q_NORM] if head < heads else a[K_NORM]
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
    norm_rows(a, part, parts, a[X], a[INPUT_NORM])
    wait_for_others()
    inputs_of(a, part, parts, a[SITE], a[NORMED])
    outputs = (a[HEADS] + 2 * a[KV_HEADS]) * a[HEAD_DIM]
    project(a, part, parts, a[SITE], a[NORMED], a[QKV], a[HIDDEN] // 2, a[QKV_BIAS], outputs, 0, a[RAW])
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
                a, a[SITE] + 2, a[NORMED], a[GATE_UP], pairs, a[GATE_UP_BIAS], begin, begin + last - first,
                panel - BLOCK_BYTES * begin, step,
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
    inputs_of(a, part, parts, a[SITE] + 1, a[ATTN])
    q_pairs = a[HEADS] * a[HEAD_DIM] // 2
    project(a, part, parts, a[SITE] + 1, a[ATTN], a[O_PROJ], q_pairs, a[O_BIAS], a[HIDDEN], a[X], a[MID])
    wait_for_others()
    norm_rows(a, part, parts, a[MID], a[MLP_NORM])
    wait_for_others()
    inputs_of(a, part, parts, a[SITE] + 2, a[NORMED])
    forward_mlp(a, part, parts)
    wait_for_others()
    if a[OUT] != 0:
        inputs_of(a, part, parts, a[SITE] + 3, a[INNER])
        project(a, part, parts, a[SITE] + 3, a[INNER], a[DOWN], a[MLP] // 2, a[DOWN_BIAS], a[HIDDEN], a[MID], a[OUT])
        wait_for_others()


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
        norm_bf16(a[MID] + 2 * size * row, a[MLP_NORM], size, load_scalar(a[EPS]), a[NORMED] + 2 * size * row)
    wait_for_others()
    gradients_of(a, part, parts, a[SITE] + 3, a[INNER], a[GRAD_OUT], 2 * size)
    first, end = share_of(width // WIDTH, part, parts, TILE_BLOCKS)
    panel, step = a[PANEL] + a[PANEL_BYTES] * part, TILE_BLOCKS * BLOCK_BYTES
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        back_panel(a, a[SITE] + 3, a[GRAD_OUT], a[DOWN_BACK], size // 2, first, last, panel - BLOCK_BYTES * first, step)
        for row in range(rows):
            at = 2 * (2 * width * row + WIDTH * first)
            gate, grad_gate = a[ACT] + at, a[GRAD_INNER] + at
            swiglu_back(
                panel + step * row, gate, gate + 2 * width, WIDTH * (last - first), grad_gate, grad_gate + 2 * width
            )
        first = last
    wait_for_others()
    gradients_of(a, part, parts, a[SITE] + 2, a[NORMED], a[GRAD_INNER], 4 * width)
    if a[TO_ATTENTION] != 0:
        back_to_normed(a, part, parts, a[SITE] + 2, a[GRAD_INNER], a[GATE_UP_BACK], width)
        wait_for_others()
        back_through_norm(a, part, parts, a[MID], a[MLP_NORM])
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
                norm = a[Q_NORM] if head < heads else a[K_NORM]
                if norm != 0:
                    norm_back(at, a[RAW] + raw, norm, size, eps, at, False)
            to_bf16(at, size, a[GRAD_RAW] + raw)


@exported(NOTHING, (NUMBERS, INT64, INT64))
def back_attention(a: Any, part: int, parts: int) -> None:
    size, rows, q_size = a[HIDDEN], a[TOKENS], a[HEADS] * a[HEAD_DIM]
    gradients_of(a, part, parts, a[SITE] + 1, a[ATTN], a[GRAD_OUT], 2 * size)
    first, end = share_of(q_size // WIDTH, part, parts, TILE_BLOCKS)
    panel, step = a[PANEL] + a[PANEL_BYTES] * part, TILE_BLOCKS * BLOCK_BYTES
    while first < end:
        last = min(end, first + TILE_BLOCKS)
        back_panel(a, a[SITE] + 1, a[GRAD_OUT], a[O_BACK], size // 2, first, last, panel - BLOCK_BYTES * first, step)
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
    norm_rows(a, part, parts, a[X], a[INPUT_NORM])
    wait_for_others()
    outputs = q_size + 2 * a[KV_HEADS] * a[HEAD_DIM]
    gradients_of(a, part, parts, a[SITE], a[NORMED], a[GRAD_RAW], 2 * outputs)
    if a[TO_INPUT] != 0:
        back_to_normed(a, part, parts, a[SITE], a[GRAD_RAW], a[QKV_BACK], outputs // 2)
        wait_for_others()
        back_through_norm(a, part, parts, a[X], a[INPUT_NORM])
    wait_for_others()


def _back(a: Any) -> None:
    part, parts = thread_number(), thread_count()
    back_mlp(a, part, parts)
    if a[TO_ATTENTION] != 0:
        back_attention(a, part, parts)


forward_kernel, back_kernel = Kernel(_forward), Kernel(_back)
