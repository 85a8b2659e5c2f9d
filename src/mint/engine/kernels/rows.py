"""`RowsModel`: the calls of the kernels that sample. See decoder_rows.py for the letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint.engine.kernels.adapter import adapted_table
from mint.engine.kernels.decoder_rows import COPY_WIDTH, ROW_WIDTH, rows_kernel
from mint.engine.kernels.products import TILE_BLOCKS
from mint.engine.kernels.simd import WIDTH
from mint.engine.kernels.softmax import normed_logits_kernel
from mint.engine.kernels.weights import PackedWeights
from mint.engine.lora import AnyAdapter
from mint.engine.models.config import DecoderConfig
from mint.engine.models.ops import rope_table
from mint.engine.workspace import Workspace

Adapted = Sequence[tuple[int, int, AnyAdapter | None]]  # first row, end, adapter


@dataclass(frozen=True, slots=True)
class CacheRow:
    """A row's position, the address of its sequence's first key, and the bytes to the next layer's, to the values and to the
    next head's."""

    position: int
    address: int
    next_layer: int
    to_values: int
    next_head: int


class RowsModel:
    def __init__(self, config: DecoderConfig, embed_VD: Tensor, packed: PackedWeights, workspace: Workspace) -> None:
        self.config, self.dtype, self.device = config, embed_VD.dtype, embed_VD.device
        self._embed_VD, self._packed, self._ws = embed_VD, packed, workspace

    def _scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._ws.get(f"rows.{name}", shape, dtype)

    def _adapted(self, adapted: Adapted, rows: int) -> tuple[np.ndarray, int, list[int]]:
        """The adapters' table; float32 and bf16 scratch for their low ranks, and how many a row of it has."""
        table, count, ranks = adapted_table([(start, end, adapter, None) for start, end, adapter in adapted])
        wide = self._scratch("wide", rows, ranks)
        narrow = self._scratch("narrow", rows, ranks, dtype=torch.bfloat16)
        return table, count, [wide.data_ptr(), narrow.data_ptr(), ranks]

    def forward(
        self,
        tokens: list[int],
        rows: Sequence[CacheRow],
        adapted: Adapted,
        copies: Sequence[tuple[int, int, int, int]] = (),
    ) -> Tensor:
        """The residual stream after the last layer, float32 [T, D], in scratch; keys and values of every row enter its cache.

        copies: (row of the source, row of the target, first position, end), for sequences that begin alike.
        """
        c, count, threads = self.config, len(tokens), torch.get_num_threads()
        row_table = np.array([(r.position, r.address, r.next_layer, r.to_values, r.next_head) for r in rows], np.int64)
        copy_table = np.array(copies, np.int64).reshape(-1, COPY_WIDTH)
        assert row_table.shape == (count, ROW_WIDTH)
        rope = rope_table(c.rope, torch.from_numpy(row_table[:, 0].copy()), torch.float32)
        x = self._scratch("x", count, c.hidden_size)
        x.copy_(self._embed_VD.index_select(0, torch.tensor(tokens)))
        table, num_adapted, low_ranks = self._adapted(adapted, count)
        room = -(-(int(row_table[:, 0].max()) + 1) // WIDTH) * WIDTH
        rows_kernel(
            c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size, self._packed.eps,
            self._packed.forward_table.ctypes.data, row_table.ctypes.data, count, copy_table.ctypes.data, len(copies),
            table.ctypes.data, num_adapted, rope.cos.data_ptr(), rope.sin.data_ptr(), x.data_ptr(),
            self._scratch("normed", count, c.hidden_size, dtype=torch.bfloat16).data_ptr(),
            self._scratch("qkv", count, c.qkv_size).data_ptr(),
            self._scratch("q", count, c.q_size, dtype=torch.bfloat16).data_ptr(),
            self._scratch("scores", threads, room).data_ptr(), room,
            self._scratch("gate_up", threads, count, 2 * TILE_BLOCKS * WIDTH).data_ptr(),
            self._scratch("hidden", count, c.intermediate_size, dtype=torch.bfloat16).data_ptr(),
            *low_ranks, threads=threads,
        )  # fmt: skip
        return x

    def logits(self, x_TD: Tensor, adapted: Adapted) -> Tensor:
        """Float32 [T, V], in scratch that the next call reuses."""
        count, size = x_TD.shape
        table, num_adapted, (wide, narrow, ranks) = self._adapted(adapted, count)
        logits = self._scratch("logits", count, self._packed.vocab_blocks * WIDTH)
        normed_logits_kernel(
            table.ctypes.data, num_adapted, self._packed.unembed_site,
            self._scratch("normed", count, size, dtype=torch.bfloat16).data_ptr(), count, size // 2, self._packed.unembed,
            self._packed.vocab_blocks, wide, narrow, ranks, logits.data_ptr(), x_TD.data_ptr(),
            self._packed.final_norm_D.data_ptr(), self._packed.eps,
        )  # fmt: skip
        return logits[:, : self.config.vocab_size]
