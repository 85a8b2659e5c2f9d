"""Buffers that are allocated once and reused by every pass: fresh tensors in the hot loop cost more than kernels.

Freed blocks of this size go back to the system and are faulted in again; see docs/architecture.md, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """Named scratch tensors. A name's storage grows to the largest size asked for; contents are whatever was left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}
        # what was handed out last: making a view anew takes as long as a small operation of a decode step
        self._views: dict[tuple[str, torch.dtype], tuple[tuple[int, ...], Tensor]] = {}
        self._scalars: dict[float, Tensor] = {}
        self._largest = 0  # tokens of a pass

    @property
    def device(self) -> torch.device:
        return self._device

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; asking again for the same name hands out the same memory."""
        key = name, dtype
        last = self._views.get(key)
        if last is not None and last[0] == shape:
            return last[1]
        size = math.prod(shape)
        flat = self._storage.get(key)
        if flat is None or flat.numel() < size:
            flat = last = None  # nothing holds the smaller one while the larger one is allocated
            self._storage.pop(key, None)
            self._views.pop(key, None)
            flat = self._storage[key] = torch.empty(size, dtype=dtype, device=self._device)
        view = flat[:size].view(shape)
        self._views[key] = shape, view
        return view

    def scalar(self, value: float) -> Tensor:
        """`value` in float32, for operations that take a tensor."""
        found = self._scalars.get(value)
        if found is None:
            found = self._scalars[value] = torch.tensor(value, device=self._device)
        return found

    def reserve(self, name: str, size: int, dtype: torch.dtype) -> None:
        """Room for `size` values under this name. Growing step by step would leave holes of every size behind."""
        flat = self._storage.get((name, dtype))
        if flat is None or flat.numel() < size:
            self.get(name, (size,), dtype)

    def begin(self, num_tokens: int) -> None:
        """Before a pass. One that is larger than any so far starts with nothing, so that no holes are left behind."""
        if num_tokens > self._largest:
            self.clear()
            self._largest = num_tokens

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._storage.values())

    def clear(self) -> None:
        self._views.clear()
        self._storage.clear()
