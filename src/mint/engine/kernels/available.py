"""Whether compiled kernels can be used. Imports numba only to find out."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Set

import torch

PROCESSOR_FLAG = "avx512_bf16"
OPENMP = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
EXTRA = "fast"


def missing(device: torch.device, dtype: torch.dtype, flags: Set[str]) -> str | None:
    """What compiled kernels lack here; None: nothing. `flags`: of the processor, in Linux's spelling."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"they compute in bfloat16 on a processor, this is {str(dtype).removeprefix('torch.')} on {device.type}"
    if PROCESSOR_FLAG not in flags:
        return f"the processor does not report {PROCESSOR_FLAG}"
    if importlib.util.find_spec("numba") is None:
        return f"numba is not installed: pip install 'mint-toolkit[{EXTRA}]'"
    if not all(hasattr(ctypes.CDLL(None), name) for name in OPENMP):
        return "torch's OpenMP runtime is not GNU's"
    return None


def kernels_version() -> str:
    """What compiles them; part of what decides a run's bits."""
    import numba

    return f"numba {numba.__version__}"
