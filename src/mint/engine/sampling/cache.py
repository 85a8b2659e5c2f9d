"""Keys and values of prompts that are being prefilled, and of prompt prefixes that may come again.

Shape letters: L layers, K key/value heads, n positions, E head_dim.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from mint.engine.models.config import DecoderConfig

GRANULE = 256


def position_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Of one position's keys and values in all layers."""
    return config.num_layers * 2 * config.kv_size * dtype.itemsize


def prompt_capacity(length: int) -> int:
    """Positions in the cache of a prompt of `length` tokens."""
    return -(-length // GRANULE) * GRANULE


class SequenceCache:
    """One prompt's keys and values, [L, 2, K, capacity, E]; `length` positions are filled."""

    def __init__(self, config: DecoderConfig, length: int, dtype: torch.dtype, device: torch.device) -> None:
        """For a prompt of `length` tokens."""
        self.length = 0
        shape = config.num_layers, 2, config.num_kv_heads, prompt_capacity(length), config.head_dim
        self.kv = torch.empty(shape, dtype=dtype, device=device)

    def extend(self, kv_L2KnE: Tensor) -> None:
        end = self.length + kv_L2KnE.shape[3]
        self.kv[:, :, :, self.length : end] = kv_L2KnE
        self.length = end

    def num_bytes(self) -> int:
        return self.kv.nbytes


class PrefixCache:
    """Prefill chunks by (adapter, everything up to the chunk's end); the least recently used go first.

    Chunks end on fixed borders counted from the sequence's start, so a hit and a fresh prefill have the same bits.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._chunks: OrderedDict[tuple[int | None, tuple[int, ...]], Tensor] = OrderedDict()

    def num_bytes(self) -> int:
        return self._bytes

    def get(self, adapter: int | None, prefix: tuple[int, ...]) -> Tensor | None:
        found = self._chunks.get((adapter, prefix))
        if found is not None:
            self._chunks.move_to_end((adapter, prefix))
        return found

    def put(self, adapter: int | None, prefix: tuple[int, ...], kv_L2KnE: Tensor) -> None:
        size = kv_L2KnE.nbytes
        if size > self._max_bytes or (adapter, prefix) in self._chunks:
            return
        self._chunks[adapter, prefix] = kv_L2KnE.clone()
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._chunks)))

    def forget_adapter(self, adapter: int) -> None:
        for key in [key for key in self._chunks if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: tuple[int | None, tuple[int, ...]]) -> None:
        self._bytes -= self._chunks.pop(key).nbytes
