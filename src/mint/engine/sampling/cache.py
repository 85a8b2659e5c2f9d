"""Keys and values of prompts that are being prefilled, and of prompt prefixes that may come again.

Shape letters: L layers, K key/value heads, n positions, E head_dim.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.engine.models.attention import STEP
from mint.engine.models.config import DecoderConfig


def position_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Of one position's keys and values in all layers."""
    return config.num_layers * 2 * config.kv_size * dtype.itemsize


def prompt_capacity(length: int) -> int:
    """Positions in the cache of a prompt of `length` tokens."""
    return -(-length // STEP) * STEP


class SequenceCache:
    """One prompt's keys and values, [L, 2, K, capacity, E]; `length` positions are filled, the others are 0."""

    def __init__(self, config: DecoderConfig, length: int, dtype: torch.dtype, device: torch.device) -> None:
        """For a prompt of `length` tokens."""
        self.length = 0
        shape = config.num_layers, 2, config.num_kv_heads, prompt_capacity(length), config.head_dim
        self.kv = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, kv_L2KnE: Tensor) -> None:
        end = self.length + kv_L2KnE.shape[3]
        self.kv[:, :, :, self.length : end] = kv_L2KnE
        self.length = end

    def num_bytes(self) -> int:
        return self.kv.nbytes


# (adapter, number of the block before or 0, the block's tokens)
_Key = tuple[int | None, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class _Block:
    number: int
    kv_L2KnE: Tensor


class PrefixCache:
    """Blocks of prompts that were prefilled; the least recently used go first, the end of a prompt before its beginning.

    A block hangs on the one before it, so it is found only where all tokens before it are the same.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._next = 0
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()

    def num_bytes(self) -> int:
        return self._bytes

    def find(self, adapter: int | None, prompt: tuple[int, ...], size: int) -> list[Tensor]:
        """Keys and values of the prompt's blocks of `size` tokens from the start, as many as are known. Never all of the
        prompt: its last token is computed for its logits."""
        path = self._path(adapter, prompt[:-1], size)
        self._touch(path)
        return [self._blocks[key].kv_L2KnE for key in path]

    def put(self, adapter: int | None, prompt: tuple[int, ...], size: int, kv_L2KnE: Tensor) -> None:
        """All blocks of `size` tokens that these keys and values fill, as far as there is room beside one another."""
        path = self._path(adapter, prompt, size)
        self._touch(path)
        for start in range(len(path) * size, len(prompt) - size + 1, size):
            kv = kv_L2KnE[:, :, :, start : start + size]
            if not self._make_room(kv.nbytes, path):
                break
            self._next += 1
            key = adapter, self._blocks[path[-1]].number if path else 0, prompt[start : start + size]
            self._blocks[key] = _Block(self._next, kv.clone())
            self._bytes += kv.nbytes
            path.append(key)
        self._touch(path)

    def _make_room(self, num_bytes: int, path: list[_Key]) -> bool:
        """At the expense of any block but those of `path`, which were used last."""
        while self._bytes + num_bytes > self._max_bytes:
            if len(self._blocks) == len(path):
                return False
            self._forget(next(iter(self._blocks)))
        return True

    def forget_adapter(self, adapter: int) -> None:
        for key in [key for key in self._blocks if key[0] == adapter]:
            self._forget(key)

    def _path(self, adapter: int | None, tokens: tuple[int, ...], size: int) -> list[_Key]:
        """The known blocks of this beginning, in order."""
        path: list[_Key] = []
        before = 0
        for start in range(0, len(tokens) - size + 1, size):
            key = adapter, before, tokens[start : start + size]
            if (block := self._blocks.get(key)) is None:
                break
            before = block.number
            path.append(key)
        return path

    def _touch(self, path: list[_Key]) -> None:
        for key in reversed(path):
            self._blocks.move_to_end(key)

    def _forget(self, key: _Key) -> None:
        self._bytes -= self._blocks.pop(key).kv_L2KnE.nbytes
