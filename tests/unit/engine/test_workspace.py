"""Buffers are handed out again, have room for a full pass, and give way to a larger one."""

from __future__ import annotations

import torch

from mint.engine.workspace import MOST_SPARE_BYTES, Workspace

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


def test_a_short_pass_makes_room_for_the_expected_one() -> None:
    ws = Workspace(CPU, expected_tokens=100)
    ws.begin(10)
    short = ws.get("a", (10, 3), torch.float32)
    assert ws.num_bytes() == 4 * 100 * 3
    ws.begin(100)
    assert ws.get("a", (100, 3), torch.float32).data_ptr() == short.data_ptr()


def test_the_room_is_bounded() -> None:
    ws = Workspace(CPU, expected_tokens=10**9)
    ws.begin(1)
    ws.get("a", (8,), torch.float32)
    assert ws.num_bytes() == 4 * 8 + MOST_SPARE_BYTES


def test_a_larger_pass_than_expected_starts_with_nothing() -> None:
    ws = Workspace(CPU, expected_tokens=100)
    ws.begin(100)
    ws.get("a", (100,), torch.float32)
    ws.begin(101)
    assert ws.num_bytes() == 0
    ws.get("a", (101,), torch.float32)
    ws.begin(50)
    assert ws.num_bytes() == 4 * 101  # kept, also for what is smaller
