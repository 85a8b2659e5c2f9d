"""Buffers are handed out again and give way to a larger pass."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from mint.engine.workspace import Workspace

CPU = torch.device("cpu")


def test_a_name_is_the_same_memory_until_more_is_asked_for() -> None:
    ws = Workspace(CPU)
    first = ws.get("a", (4, 6), torch.float32)
    assert first.shape == (4, 6) and first.is_contiguous()
    assert ws.get("a", (3, 5), torch.float32).data_ptr() == first.data_ptr()
    assert ws.get("a", (4, 6), torch.bfloat16).data_ptr() != first.data_ptr()
    assert ws.get("b", (4, 6), torch.float32).data_ptr() != first.data_ptr()
    assert ws.get("a", (5, 6), torch.float32).numel() == 30
    assert ws.num_bytes() == 4 * 30 + 2 * 24 + 4 * 24


def test_the_same_shape_again_is_the_same_tensor() -> None:
    ws = Workspace(CPU)
    first = ws.get("a", (4, 6), torch.float32)
    assert ws.get("a", (4, 6), torch.float32) is first
    assert ws.get("a", (6, 4), torch.float32).shape == (6, 4)
    grown = ws.get("a", (8, 6), torch.float32)
    again = ws.get("a", (4, 6), torch.float32)
    assert again.data_ptr() == grown.data_ptr()  # not what was handed out before it grew


def test_the_smaller_one_is_gone_before_the_larger_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    ws = Workspace(CPU)
    smaller = weakref.ref(ws.get("a", (4,), torch.float32).untyped_storage())
    allocate = torch.empty

    def allocate_alone(*args: Any, **options: Any) -> torch.Tensor:
        assert smaller() is None
        return allocate(*args, **options)

    monkeypatch.setattr(torch, "empty", allocate_alone)
    assert ws.get("a", (8,), torch.float32).shape == (8,)


def test_reserving_makes_room_once() -> None:
    ws = Workspace(CPU)
    ws.reserve("a", 100, torch.float32)
    assert ws.num_bytes() == 400
    pointer = ws.get("a", (10, 10), torch.float32).data_ptr()
    ws.reserve("a", 50, torch.float32)
    assert ws.num_bytes() == 400 and ws.get("a", (100,), torch.float32).data_ptr() == pointer


def test_a_larger_pass_starts_with_nothing() -> None:
    ws = Workspace(CPU)
    ws.begin(100)
    ws.get("a", (100,), torch.float32)
    ws.begin(101)
    assert ws.num_bytes() == 0
    ws.get("a", (101,), torch.float32)
    ws.begin(50)
    assert ws.num_bytes() == 4 * 101  # kept, also for what is smaller


def test_a_scalar_is_made_once() -> None:
    ws = Workspace(CPU)
    eps = ws.scalar(1e-5)
    assert eps.dtype == torch.float32 and eps.item() == torch.tensor(1e-5).item() and ws.scalar(1e-5) is eps
    assert ws.scalar(1e-6) is not eps
