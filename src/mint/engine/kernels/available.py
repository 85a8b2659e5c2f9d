"""Whether compiled kernels can be used. Finds out without importing numba."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from collections.abc import Set

import torch

from mint.engine.models.config import DecoderConfig

PROCESSOR_FLAG = "avx512_bf16"
OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
NUMBA = (0, 68)  # what has been run; older ones lack parts that are used here
OTHER_CODE = (
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_DISABLE_JIT",
)  # with these numba compiles for another processor
STEP = 32  # values that a register multiplies


def missing(device: torch.device, dtype: torch.dtype, flags: Set[str]) -> str | None:
    """What compiled kernels lack here; None: nothing. `flags`: of the processor, in Linux's spelling."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"they compute in bfloat16 on a processor, this is {str(dtype).removeprefix('torch.')} on {device.type}"
    if PROCESSOR_FLAG not in flags:
        return f"the processor does not report {PROCESSOR_FLAG}"
    try:
        version = importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return "numba is not installed: pip install 'mint-toolkit[fast]'"
    if tuple(int(part) for part in version.split(".")[:2]) < NUMBA:
        return f"numba {version} is installed, they need {'.'.join(map(str, NUMBA))}: pip install 'mint-toolkit[fast]'"
    if names := [name for name in OTHER_CODE if os.environ.get(name)]:
        return f"{names[0]} is set, with which numba compiles for another processor"
    if not all(hasattr(ctypes.CDLL(None), name) for name in OPENMP):
        return "torch's OpenMP runtime is not GNU's"
    return None


def unfit(config: DecoderConfig) -> str | None:
    """Which of the model's sizes the kernels' registers do not divide; None: all fit."""
    names = ("hidden_size", "intermediate_size", "head_dim")
    found = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) % STEP]
    return f"they compute in steps of {STEP}, the model has {', '.join(found)}" if found else None


def kernels_version() -> str:
    """What compiles them; part of what decides a run's bits."""
    return f"numba {importlib.metadata.version('numba')}"
