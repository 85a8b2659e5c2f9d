"""`CompiledDecoder`: forward and backward of a frozen decoder through compiled kernels. See models/decoder.py, which computes
the same with torch, for what is kept and the letters."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mint.engine.kernels import layer as k
from mint.engine.kernels.adapter import adapted_table
from mint.engine.kernels.attention import SEQUENCE_WIDTH, scratch_bytes
from mint.engine.kernels.layer_back import back_kernel
from mint.engine.kernels.low_rank import GAP
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS
from mint.engine.kernels.simd import WIDTH
from mint.engine.kernels.tables import NUM_SITES
from mint.engine.kernels.weights import PackedWeights
from mint.engine.lora import DOWN, GATE_UP, QKV, O
from mint.engine.models.config import DecoderConfig
from mint.engine.models.decoder import PackedRow
from mint.engine.models.ops import rope_table
from mint.engine.models.packed_attention import PackedSequence
from mint.engine.workspace import Workspace


@dataclass(slots=True, repr=False)
class Activations:
    """What a layer's backward needs."""

    x_TD: Tensor
    raw_TO: Tensor
    heads_NTE: Tensor
    attn_TH: Tensor
    mid_TD: Tensor
    act_TF2: Tensor


class AttentionTables:
    """Of the sequences of a pass: rows of their positions, and for each row where it is used."""

    def __init__(self, sequences: Sequence[PackedSequence]) -> None:
        self._rows = [np.ascontiguousarray(s.rows_N, np.int64) for s in sequences]
        filled = [-(-len(rows) // WIDTH) * WIDTH for rows in self._rows]
        starts = [0, *accumulate(filled)]
        self.positions, self.longest = starts[-1], max(filled)
        self.table = np.array(
            [
                (len(r), s.num_shared, r.ctypes.data, at)
                for r, s, at in zip(self._rows, sequences, starts, strict=False)
            ],
            np.int64,
        ).reshape(-1, SEQUENCE_WIDTH)
        row = np.concatenate(self._rows)
        position = np.concatenate([at + np.arange(len(r)) for r, at in zip(self._rows, starts, strict=False)])
        order = np.argsort(row, kind="stable")
        self.used = position[order].astype(np.int64)
        self.uses = np.searchsorted(row[order], np.arange(int(row.max()) + 2)).astype(np.int64)


class CompiledDecoder:
    def __init__(self, config: DecoderConfig, embed_VD: Tensor, packed: PackedWeights, workspace: Workspace) -> None:
        self.config, self.ws = config, workspace
        self.dtype, self.device = embed_VD.dtype, embed_VD.device
        self._embed_VD, self._packed = embed_VD, packed

    def packed_attention(self, sequences: Sequence[PackedSequence]) -> AttentionTables:
        return AttentionTables(sequences)

    def _get(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return self.ws.get(name, shape, dtype)

    def _activations(self, tokens: int, x_TD: Tensor, slot: str) -> Activations:
        c = self.config
        return Activations(
            x_TD=x_TD,
            raw_TO=self._get(f"raw.{slot if c.qk_norm else 'shared'}", tokens, c.qkv_size),
            heads_NTE=self._get(f"qkv.{slot}", c.num_heads + 2 * c.num_kv_heads, tokens, c.head_dim),
            attn_TH=self._get(f"attn.{slot}", tokens, c.q_size),
            mid_TD=self._get(f"mid.{slot}", tokens, c.hidden_size),
            act_TF2=self._get(f"gate_up.{slot}", tokens, 2 * c.intermediate_size),
        )

    def _values(
        self, row: PackedRow, attention: AttentionTables, threads: int, *, back: bool
    ) -> tuple[np.ndarray, list[object]]:
        """The kernels' numbers but for the layer's, and what they point to."""
        c, tokens, f32 = self.config, len(row.tokens_T), torch.float32
        rope = rope_table(c.rope, row.positions_T, f32)
        parts = [
            (s.start, s.end, s.weights, s.gradient.flat_P if s.gradient is not None and back else None)
            for s in row.segments
        ]
        table, num_adapted, ranks = adapted_table(parts)
        room, positions = attention.longest, attention.positions
        values = np.zeros(k.NUM_VALUES, np.int64)
        values[: k.NORMED] = [
            tokens, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, self._packed.eps,
            rope.cos.data_ptr(), rope.sin.data_ptr(), table.ctypes.data, num_adapted, ranks, attention.table.ctypes.data,
            len(attention.table), positions, room, attention.uses.ctypes.data, attention.used.ctypes.data,
        ]  # fmt: skip

        def scratch(index: int, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
            values[index] = self._get(f"scratch.{name}", *shape, dtype=dtype).data_ptr()

        padded = tokens + WIDTH
        panel = TILE_BLOCKS * BLOCK_BYTES * padded + 4 * TILE_BLOCKS * WIDTH * ranks
        block = scratch_bytes(room, c.head_dim)
        values[k.PANEL_BYTES], values[k.BLOCK_SIZE] = panel, block
        scratch(k.NORMED, "normed", tokens, c.hidden_size)
        scratch(k.HEAD, "head", threads, c.head_dim, dtype=f32)
        scratch(k.PANEL, "panel", threads, panel, dtype=torch.uint8)
        scratch(k.WIDE, "wide", padded, ranks, dtype=f32)
        scratch(k.NARROW, "narrow", tokens, ranks)
        scratch(k.KEY_OUT, "key_out", c.kv_size, positions)
        scratch(k.VALUE_IN, "value", c.kv_size, positions)
        scratch(k.GATHERED, "gathered", threads, WIDTH, c.head_dim)
        scratch(k.BLOCK, "block", threads, block, dtype=torch.uint8)
        scratch(k.INNER, "inner", tokens, c.intermediate_size)
        if back:
            columns = -(-tokens // WIDTH) * WIDTH + (len(parts) + 2) * (GAP + WIDTH)
            values[k.TURNED_STEP] = 2 * columns
            values[k.VALUE_OUT] = values[k.VALUE_IN]
            scratch(k.KEY_IN, "key_in", c.kv_size, positions)
            scratch(k.WIDE_BACK, "wide_back", padded, ranks, dtype=f32)
            scratch(k.NARROW_BACK, "narrow_back", tokens, ranks)
            scratch(k.TURNED, "turned", ranks, columns)
            scratch(k.TURNED_BACK, "turned_back", ranks, columns)
            scratch(k.GRAD_OUT, "grad_out", tokens, c.hidden_size)
            scratch(k.GRAD_INNER, "grad_inner", tokens, 2 * c.intermediate_size)
            scratch(k.GRAD_NORMED, "grad_normed", tokens, c.hidden_size, dtype=f32)
            scratch(k.GRAD_ATTN, "grad_attn", tokens, c.q_size)
            scratch(k.GRAD_Q, "grad_q", tokens, c.q_size, dtype=f32)
            scratch(k.GRAD_K, "grad_k", positions, c.q_size)
            scratch(k.GRAD_V, "grad_v", positions, c.q_size)
            scratch(k.GRAD_RAW, "grad_raw", tokens, c.qkv_size)
        return values, [rope, table, attention, parts]

    def _set_layer(self, values: np.ndarray, index: int, act: Activations, out: Tensor | None) -> None:
        out_at = out.data_ptr() if out is not None else 0
        values[k.WEIGHTS : k.SITE + 1] = [
            self._packed.forward_table[index].ctypes.data, self._packed.back_table[index].ctypes.data, act.x_TD.data_ptr(),
            act.raw_TO.data_ptr(), act.heads_NTE.data_ptr(), act.attn_TH.data_ptr(), act.mid_TD.data_ptr(),
            act.act_TF2.data_ptr(), out_at, NUM_SITES * index,
        ]  # fmt: skip

    def _input(self, tokens: int, index: int, *, keep: bool) -> Tensor:
        return self._get(f"x.{index if keep else index % 2}", tokens, self.config.hidden_size)

    def forward(
        self, row: PackedRow, attention: AttentionTables, *, keep: bool, recompute: int = 0
    ) -> Generator[None, None, tuple[Tensor, list[Activations | Tensor]]]:
        tokens, layers = len(row.tokens_T), self.config.num_layers
        self.ws.begin(tokens)
        threads = torch.get_num_threads()  # of the whole pass, whatever becomes of the setting meanwhile
        values, _held = self._values(row, attention, threads, back=False)
        kept: list[Activations | Tensor] = []
        x_TD = self._input(tokens, 0, keep=keep)
        torch.index_select(self._embed_VD, 0, row.tokens_T, out=x_TD)
        for index in range(layers):
            shared = index < (recompute if keep else layers)
            act = self._activations(tokens, x_TD, "shared" if shared else str(index))
            if keep:
                kept.append(x_TD if index < recompute else act)
            x_TD = self._input(tokens, index + 1, keep=keep)
            self._set_layer(values, index, act, x_TD)
            k.forward_kernel.run(values.ctypes.data, threads)
            yield
        return x_TD, kept

    def backward(
        self, row: PackedRow, attention: AttentionTables, grad_TD: Tensor, kept: list[Activations | Tensor]
    ) -> Generator[None, None, None]:
        threads = torch.get_num_threads()  # of the whole pass, whatever becomes of the setting meanwhile
        values, _held = self._values(row, attention, threads, back=True)
        values[k.GRAD] = grad_TD.data_ptr()
        for index in range(self.config.num_layers - 1, -1, -1):
            act = kept[index]
            if isinstance(act, Tensor):
                act = self._activations(len(grad_TD), act, "shared")
                self._set_layer(values, index, act, None)
                k.forward_kernel.run(values.ctypes.data, threads)
                yield
            self._set_layer(values, index, act, None)
            values[k.TO_ATTENTION] = index > 0 or row.adapts(0, QKV, O)
            values[k.TO_INPUT] = index > 0
            if values[k.TO_ATTENTION] or row.adapts(0, GATE_UP, DOWN):
                back_kernel.run(values.ctypes.data, threads)
            yield
