"""Where and in what precision to compute: a rule on what the processor reports, never a timing."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mint.errors import InputError
from mint.settings import Settings

# processor flags that mean bf16 products in hardware: AMX, AVX-512 and (on ARM) NEON
BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})

# glibc's `mallopt`: two of its parameters, and thresholds that blocks of a pass do not reach
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP_TOP, MMAP = (1 << 31) - 1, 1 << 30


@dataclass(frozen=True, slots=True)
class Device:
    """memory_bytes: what may be planned with, in all."""

    torch_device: torch.device
    dtype: torch.dtype
    num_threads: int
    memory_bytes: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def processor_flags() -> frozenset[str]:
    """Feature flags of the processor in Linux's spelling; empty where the system does not tell."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() in ("flags", "features"):
                return frozenset(value.split())
    if sys.platform == "darwin" and platform.machine() == "arm64":
        libc = ctypes.CDLL(None)
        value, size = ctypes.c_int(0), ctypes.c_size_t(4)
        if libc.sysctlbyname(b"hw.optional.arm.FEAT_BF16", ctypes.byref(value), ctypes.byref(size), None, 0) == 0:
            return frozenset({"bf16"}) if value.value else frozenset()
    return frozenset()


def default_dtype(device: torch.device, flags: frozenset[str]) -> torch.dtype:
    """bf16 on accelerators and where the processor multiplies it in hardware, else float32."""
    return torch.bfloat16 if device.type != "cpu" or flags & BF16_FLAGS else torch.float32


def choose_device(settings: Settings) -> Device:
    """Raises InputError where MINT_DEVICE names what torch does not have."""
    asked = settings.device
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"MINT_DEVICE={asked!r}: torch cannot use it ({str(error).splitlines()[0]}); try cpu, cuda or mps"
        ) from None
    dtype = getattr(torch, settings.dtype) if settings.dtype else default_dtype(device, processor_flags())
    memory = settings.memory_gb * 10**9 if settings.memory_gb is not None else memory_limit(device)
    return Device(device, dtype, settings.num_threads or usable_cores(), memory)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit(device: torch.device) -> int:
    """Bytes of the machine or cgroup (CPU) or of the accelerator: not what happens to be free, so that plans repeat."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limit = int(psutil.virtual_memory().total)
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            limit = min(limit, int(text))
    return limit


@contextmanager
def returning_freed_memory(device: torch.device) -> Iterator[None]:
    """For when a model comes or goes: give the system back what is freed inside and what was kept before.

    Afterwards glibc keeps freed blocks for the next pass: faulting them in again costs more than the kernels. Affects the
    whole process; does nothing where the C library is another.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    glibc = libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    if glibc:
        glibc.mallopt(M_MMAP_THRESHOLD, MMAP)
        # `malloc_trim` leaves the free end of every arena but the main one: there it goes when a block is freed
        glibc.mallopt(M_TRIM_THRESHOLD, 0)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if glibc:
            glibc.malloc_trim(0)
            glibc.mallopt(M_TRIM_THRESHOLD, KEEP_TOP)
