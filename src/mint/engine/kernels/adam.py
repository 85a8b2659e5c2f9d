"""AdamW and norms of flat float32 vectors through compiled kernels; see engine/optim.py, which does the same with torch.

An update reads every vector once. Squares are summed in float64, block by block, so no sum depends on the number of threads.
Kernels take multiples of 16; torch's operations take the few values that are left.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from mint.engine import optim
from mint.engine.kernels.compiling import device
from mint.engine.kernels.simd import (
    WIDTH,
    fma,
    load,
    load_scalar,
    root,
    splat,
    squares,
    store,
    store_double,
    zeros,
)
from mint.engine.kernels.threads import Kernel, share_of, thread_count, thread_number
from mint.engine.optim import AdamState, Optimizer
from mint.types.params import AdamParams

BLOCK = 2**14  # values of one sum

PARAMS, GRADS, EXP_AVG, EXP_AVG_SQ, SIZE, FACTORS, SUMS = range(7)
CLIP, KEPT, RATE, BETA1, NEW1, BETA2, NEW2, CORRECTION, EPS = range(9)  # factors, float32


@device
def squares_of(x: int, size: int) -> float:
    summed = 0.0
    for i in range(0, size, WIDTH):
        summed += squares(load(x + 4 * i))
    return summed


def _norm(a: Any) -> None:
    vector, size, sums = a[0], a[1], a[2]
    first, end = share_of((size + BLOCK - 1) // BLOCK, thread_number(), thread_count(), 1)
    for block in range(first, end):
        begin = BLOCK * block
        store_double(sums + 8 * block, squares_of(vector + 4 * begin, min(BLOCK, size - begin)))


@device
def factor(a: Any, index: int) -> Any:
    return splat(load_scalar(a[FACTORS] + 4 * index))


@device
def updated(a: Any, begin: int, end: int) -> float:
    """Updates the values [begin, end) and makes their gradient 0; the sum of the squares of what they moved by."""
    clip, kept, rate, correction, eps = (
        factor(a, CLIP),
        factor(a, KEPT),
        factor(a, RATE),
        factor(a, CORRECTION),
        factor(a, EPS),
    )
    beta1, new1, beta2, new2 = factor(a, BETA1), factor(a, NEW1), factor(a, BETA2), factor(a, NEW2)
    summed = 0.0
    for i in range(begin, end, WIDTH):
        param, exp_avg, exp_avg_sq = a[PARAMS] + 4 * i, a[EXP_AVG] + 4 * i, a[EXP_AVG_SQ] + 4 * i
        before, grad = load(param), load(a[GRADS] + 4 * i) * clip
        mean = fma(load(exp_avg), beta1, grad * new1)
        square = fma(load(exp_avg_sq), beta2, grad * new2 * grad)
        after = before * kept - rate * mean / (root(square) / correction + eps)
        store(param, after)
        store(exp_avg, mean)
        store(exp_avg_sq, square)
        store(a[GRADS] + 4 * i, zeros())
        summed += squares(after - before)
    return summed


def _step(a: Any) -> None:
    size = a[SIZE]
    first, end = share_of((size + BLOCK - 1) // BLOCK, thread_number(), thread_count(), 1)
    for block in range(first, end):
        moved = updated(a, BLOCK * block, min(size, BLOCK * (block + 1)))
        store_double(a[SUMS] + 8 * block, moved)


_norm_kernel, _step_kernel = Kernel(_norm), Kernel(_step)


def global_norm(vector_P: Tensor) -> float:
    """See `optim.global_norm`."""
    whole = len(vector_P) // WIDTH * WIDTH
    sums = np.empty(-(-whole // BLOCK))
    _norm_kernel(vector_P.data_ptr(), whole, sums.ctypes.data)
    return math.sqrt(float(sums.sum()) + optim.global_norm(vector_P[whole:]) ** 2)


def adam_step(params_P: Tensor, grad_P: Tensor, state: AdamState, hyper: AdamParams, grad_norm: float) -> float:
    """See `optim.adam_step`."""
    whole, step = len(params_P) // WIDTH * WIDTH, state.step + 1
    rest = [vector_P[whole:] for vector_P in (params_P, grad_P, state.exp_avg_P, state.exp_avg_sq_P)]
    factors = np.empty(9, np.float32)
    factors[[CLIP, KEPT, RATE, CORRECTION, EPS]] = [
        optim.clip_factor(hyper, grad_norm), 1 - hyper.learning_rate * hyper.weight_decay,
        hyper.learning_rate / (1 - hyper.beta1**step), math.sqrt(1 - hyper.beta2**step), hyper.eps,
    ]  # fmt: skip
    factors[[BETA1, NEW1, BETA2, NEW2]] = [hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2]
    sums = np.empty(-(-whole // BLOCK))
    _step_kernel(
        params_P.data_ptr(), grad_P.data_ptr(), state.exp_avg_P.data_ptr(), state.exp_avg_sq_P.data_ptr(), whole,
        factors.ctypes.data, sums.ctypes.data,
    )  # fmt: skip
    rest_state = AdamState(rest[2], rest[3], state.step)
    rest_norm = optim.adam_step(rest[0], rest[1], rest_state, hyper, grad_norm) if len(rest[0]) else 0.0
    state.step = step
    return math.sqrt(float(sums.sum()) + rest_norm**2)


OPTIMIZER = Optimizer(global_norm, adam_step)
