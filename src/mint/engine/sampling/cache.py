"""Keys and values of sequences in flight, and of prompt prefixes that may come again.

Shape letters: L layers, K key/value heads, n positions, E head_dim.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from mint.engine.models.config import DecoderConfig

GROWTH = 256


class SequenceCache:
    """One sequence's keys and values, grown in steps; `length` positions are filled."""

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (config.num_layers, config.num_kv_heads, config.head_dim)
        self._dtype, self._device = dtype, device
        self.length = 0
        self.keys = self.values = torch.empty(0, dtype=dtype, device=device)
        self.reserve(capacity)

    def reserve(self, capacity: int) -> None:
        layers, heads, head_dim = self._shape
        held = self.keys.shape[2] if self.keys.dim() == 4 else 0
        if capacity <= held:
            return
        capacity = -(-capacity // GROWTH) * GROWTH
        fresh = [
            torch.empty(layers, heads, capacity, head_dim, dtype=self._dtype, device=self._device) for _ in range(2)
        ]
        for new, old in zip(fresh, (self.keys, self.values), strict=True):
            if held:
                new[:, :, : self.length] = old[:, :, : self.length]
        self.keys, self.values = fresh

    def fork(self, config: DecoderConfig) -> SequenceCache:
        """An independent copy of the filled positions."""
        twin = SequenceCache(config, self.length + 1, self._dtype, self._device)
        twin.extend(self.keys[:, :, : self.length], self.values[:, :, : self.length])
        return twin

    def extend(self, keys_LKnE: Tensor, values_LKnE: Tensor) -> None:
        end = self.length + keys_LKnE.shape[2]
        self.reserve(end)
        self.keys[:, :, self.length : end] = keys_LKnE
        self.values[:, :, self.length : end] = values_LKnE
        self.length = end


class PrefixCache:
    """Prefill chunks by (adapter, everything up to the chunk's end); the least recently used go first.

    Chunks end on fixed borders counted from the sequence's start, so a hit and a fresh prefill have the same bits.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._chunks: OrderedDict[tuple[int | None, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, adapter: int | None, prefix: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        found = self._chunks.get((adapter, prefix))
        if found is not None:
            self._chunks.move_to_end((adapter, prefix))
        return found

    def put(self, adapter: int | None, prefix: tuple[int, ...], keys_LKnE: Tensor, values_LKnE: Tensor) -> None:
        size = 2 * keys_LKnE.numel() * keys_LKnE.element_size()
        if size > self._max_bytes or (adapter, prefix) in self._chunks:
            return
        self._chunks[adapter, prefix] = keys_LKnE.clone(), values_LKnE.clone()
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._chunks)))

    def forget_adapter(self, adapter: int) -> None:
        for key in [key for key in self._chunks if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: tuple[int | None, tuple[int, ...]]) -> None:
        keys, _ = self._chunks.pop(key)
        self._bytes -= 2 * keys.numel() * keys.element_size()
