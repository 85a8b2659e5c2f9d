"""Where and in what precision to compute: a rule on what the processor reports, never a timing."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from mint.errors import InputError
from mint.settings import Settings

# processor flags that mean bf16 products in hardware: AMX, AVX-512 and (on ARM) NEON
BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


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


def keep_freed_memory() -> bool:
    """Ask glibc not to return freed blocks to the system at once: faulting them in again costs more than the kernels.

    Answers whether the C library knows the setting. Affects the whole process.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def return_freed_memory(device: torch.device) -> None:
    """Give the system back what was freed and kept for the next pass: for when a model goes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)
