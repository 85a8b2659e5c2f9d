"""Buffers that are allocated once and reused by every pass: fresh tensors in the hot loop cost more than kernels.

Freed blocks of this size go back to the system and are faulted in again; see docs/architecture.md, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_SPARE_BYTES = 2**26  # of one buffer; what does not grow with the pass would get far too much


class Workspace:
    """Named scratch tensors. A name's storage grows to the largest size asked for; contents are whatever was left."""

    def __init__(self, device: torch.device, expected_tokens: int = 0) -> None:
        self._device = device
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}
        self._expected = expected_tokens if device.type == "cpu" else 0
        self._largest = self._expected  # tokens of a pass
        self._room = 1.0

    @property
    def device(self) -> torch.device:
        return self._device

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; asking again for the same name hands out the same memory."""
        size = math.prod(shape)
        flat = self._storage.get((name, dtype))
        if flat is None or flat.numel() < size:
            self._storage.pop((name, dtype), None)  # free before allocating the larger one
            most = size + MOST_SPARE_BYTES // dtype.itemsize
            flat = torch.empty(min(math.ceil(size * self._room), most), dtype=dtype, device=self._device)
            self._storage[name, dtype] = flat
        return flat[:size].view(shape)

    def reserve(self, name: str, size: int, dtype: torch.dtype) -> None:
        """Room for `size` values under this name. Growing step by step would leave holes of every size behind."""
        self.get(name, (size,), dtype)

    def begin(self, num_tokens: int) -> None:
        """Before a pass. What it allocates has room for `expected_tokens`: memory of the processor costs nothing until it is
        written to. One that is larger yet starts with nothing, so that no holes are left behind."""
        if num_tokens > self._largest:
            self.clear()
            self._largest = num_tokens
        self._room = max(self._expected / num_tokens, 1.0)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._storage.values())

    def clear(self) -> None:
        self._storage.clear()
