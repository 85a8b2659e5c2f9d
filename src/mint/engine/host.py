"""How fast this host multiplies and reads memory, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from mint.engine.device import Device
from mint.engine.forecast import HostSpeed, Projection

ROWS = 1024  # of a pass; fewer are slower
MOST_WEIGHTS = 2**23  # of one measured product; a larger matrix is cut, which changes its speed little
PRODUCTS_SECONDS = 1.2
READ_VALUES = 2**26  # float32, 256 MiB: no processor's cache holds them
READ_REPEATS = 5


@torch.inference_mode()
def measure_host(device: Device, projections: Sequence[Projection]) -> HostSpeed:
    """With the device's threads and precision, at the shapes of `projections`. For the processor: nothing waits for an
    accelerator here."""
    torch.set_num_threads(device.num_threads)
    return HostSpeed(_flop_per_second(projections, device.dtype), _bytes_per_second())


def _flop_per_second(projections: Sequence[Projection], dtype: torch.dtype) -> float:
    """Products forward and backward, weighted as a step has them. Where time runs out, the later ones count as the
    earlier."""
    flop = seconds = 0.0
    end = time.perf_counter() + PRODUCTS_SECONDS
    for projection in projections:
        num_out = max(1, min(projection.num_out, MOST_WEIGHTS // projection.num_in))
        weight_OI = torch.full((num_out, projection.num_in), 0.01, dtype=dtype)
        taken = min(_product_seconds(weight_OI) for _ in range(3))
        times = projection.num_parameters / weight_OI.numel()
        flop += times * 4 * ROWS * weight_OI.numel()
        seconds += times * taken
        if time.perf_counter() > end:
            break
    return flop / seconds


def _product_seconds(weight_OI: torch.Tensor) -> float:
    """Of ROWS rows forward and backward, between buffers that are in memory already, as those of a pass are."""
    x_TI = torch.full((ROWS, weight_OI.shape[1]), 0.01, dtype=weight_OI.dtype)
    y_TO, grad_TI = x_TI.new_ones(ROWS, len(weight_OI)), x_TI.clone()
    return _seconds(lambda: torch.mm(torch.mm(x_TI, weight_OI.t(), out=y_TO), weight_OI, out=grad_TI))


def _bytes_per_second() -> float:
    values = torch.ones(READ_VALUES)
    return 4 * READ_VALUES / min(_seconds(values.sum) for _ in range(READ_REPEATS))


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
