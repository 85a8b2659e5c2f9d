"""Kernels on torch's threads: who takes which part, and that all wait for one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tests.unit.engine.kernels.calling import threads

from mint.engine.kernels import compiling
from mint.engine.kernels.compiling import device
from mint.engine.kernels.simd import load_int, store_int
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number, wait_for_others


@device
def shares(count: int, parts: int, unit: int, out: int) -> None:
    for part in range(parts):
        first, end = share_of(count, part, parts, unit)
        store_int(out + 16 * part, first)
        store_int(out + 16 * part + 8, end)


def _meet(a: Any) -> None:
    """Everyone writes a number; then everyone adds up what all have written."""
    part, parts, written, sums = thread_number(), thread_count(), a[0], a[1]
    store_int(written + 8 * part, a[2] + part)
    wait_for_others()
    found = 0
    for other in range(parts):
        found += load_int(written + 8 * other)
    store_int(sums + 8 * part, found)


@pytest.fixture
def uncached() -> Iterator[None]:
    """What tests compile is not kept on the disk."""
    from numba.core.caching import NullCache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "_Cache", lambda function: NullCache())
        yield


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 48, 100])
def test_parts_follow_one_another_in_whole_units(count: int, unit: int) -> None:
    """And differ by a unit at most."""
    for parts in (1, 2, 3, 5, 64):
        found = np.full((parts, 2), -1)
        shares(count, parts, unit, found.ctypes.data)
        assert found[0, 0] == 0 and found[-1, 1] == count and (found[1:, 0] == found[:-1, 1]).all()
        assert all(first % unit == 0 or first == count for first in found[:, 0].tolist())
        units = -(-(found[:, 1] - found[:, 0]) // unit)
        assert units.min() >= 0 and units.max() - units.min() <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_thread_takes_part_and_waits_for_the_others(count: int, uncached: None) -> None:
    kernel = Kernel(_meet)
    for start in (0, 5, 1000):
        written, sums = np.full(10, -1), np.full(10, -1)
        with threads(count):
            kernel(written.ctypes.data, sums.ctypes.data, start)
        numbers = list(range(start, start + count))
        assert written.tolist() == numbers + [-1] * (10 - count)
        assert sums.tolist() == [sum(numbers)] * count + [-1] * (10 - count)


def test_numbers_may_lie_in_memory(uncached: None) -> None:
    kernel, written, sums = Kernel(_meet), np.zeros(1, np.int64), np.zeros(1, np.int64)
    numbers = np.array([written.ctypes.data, sums.ctypes.data, -(2**40)])
    kernel.run(numbers.ctypes.data, 1)
    assert written.tolist() == sums.tolist() == [-(2**40)]
