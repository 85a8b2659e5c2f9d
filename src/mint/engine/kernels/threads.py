"""Compiled kernels on the OpenMP threads that torch computes with: two pools on the same cores would wait for each other.

The calls are those that compilers make for `#pragma omp parallel` and `barrier` with GNU's OpenMP runtime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import torch
from numba import types

from mint.engine.kernels.compiling import NOTHING, NUMBERS, compile_function, device

_process = ctypes.CDLL(None)  # torch loads its OpenMP runtime for all
for _name in ("GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
    llvm.add_symbol(_name, ctypes.cast(getattr(_process, _name), ctypes.c_void_p).value)
_parallel = _process.GOMP_parallel
_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_parallel.restype = None


def _runtime(name: str, result: Any) -> Callable[[], Any]:
    function: Callable[[], Any] = types.ExternalFunction(name, result())
    return function


wait_for_others = _runtime("GOMP_barrier", types.void)
thread_number = _runtime("omp_get_thread_num", types.int32)
thread_count = _runtime("omp_get_num_threads", types.int32)


class Kernel:
    """What every thread of the pool runs, with the same numbers: addresses and sizes.

    `function` takes a pointer to them. It asks which thread it is and takes its part of the work.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._address = compile_function(function, NOTHING, (NUMBERS,))

    def __call__(self, *numbers: int, threads: int | None = None) -> None:
        """Returns when all threads are done. `threads`: at most so many, as scratch was made for; by default torch's number."""
        given = (ctypes.c_int64 * len(numbers))(*numbers)
        self.run(ctypes.addressof(given), torch.get_num_threads() if threads is None else threads)

    def run(self, address: int, threads: int) -> None:
        """The same with the numbers (int64) at this address."""
        _parallel(self._address, address, threads, 0)


@device
def share_of(count: int, part: int, parts: int, unit: int) -> tuple[int, int]:
    """First and end of one thread's part of `count` things, in whole units but at the end."""
    units = (count + unit - 1) // unit
    return min(count, units * part // parts * unit), min(count, units * (part + 1) // parts * unit)
