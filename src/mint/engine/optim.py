"""AdamW on one flat float32 vector. Source: decoupled weight decay (arXiv 1711.05101); defaults are the Tinker protocol's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from mint.types.params import AdamParams


@dataclass(slots=True, repr=False)
class AdamState:
    """First and second moments and the number of steps taken."""

    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    step: int = 0


def new_adam_state(params_P: Tensor) -> AdamState:
    return AdamState(torch.zeros_like(params_P), torch.zeros_like(params_P))


BLOCK = 2**18  # values updated at a time: every intermediate stays in the processor's cache


def global_norm(vector_P: Tensor) -> float:
    """Euclidean norm in float64, in blocks that stay in the cache."""
    return math.sqrt(sum(_sum_of_squares(block) for block in torch.split(vector_P, BLOCK)))


def _sum_of_squares(block: Tensor) -> float:
    values = block.double()
    return float(torch.dot(values, values))


def is_finite(vector_P: Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(torch.aminmax(vector_P))).all())


def clip_factor(hyper: AdamParams, grad_norm: float) -> float:
    return hyper.grad_clip_norm / grad_norm if 0 < hyper.grad_clip_norm < grad_norm else 1.0


def adam_step(params_P: Tensor, grad_P: Tensor, state: AdamState, hyper: AdamParams, grad_norm: float) -> float:
    """One update in place by torch's AdamW; returns the update's norm. `grad_norm` is the global norm of `grad_P`, for
    clipping; the gradient is 0 afterwards."""
    clip = clip_factor(hyper, grad_norm)
    taken = torch.tensor(float(state.step), device=params_P.device)
    squares = 0.0
    parts = (torch.split(t, BLOCK) for t in (params_P, grad_P, state.exp_avg_P, state.exp_avg_sq_P))
    for param, grad, exp_avg, exp_avg_sq in zip(*parts, strict=True):
        if clip != 1.0:
            grad.mul_(clip)
        before = param.clone()
        adamw(
            [param], [grad], [exp_avg], [exp_avg_sq], [], [taken.clone()],
            lr=hyper.learning_rate, beta1=hyper.beta1, beta2=hyper.beta2, eps=hyper.eps, weight_decay=hyper.weight_decay,
            fused=True, amsgrad=False, maximize=False,
        )  # fmt: skip
        squares += _sum_of_squares(before.sub_(param))
        grad.zero_()
    state.step += 1
    return math.sqrt(squares)


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What updates runs: `global_norm` and `adam_step` as above."""

    global_norm: Callable[[Tensor], float]
    adam_step: Callable[[Tensor, Tensor, AdamState, AdamParams, float], float]


TORCH_OPTIMIZER = Optimizer(global_norm, adam_step)
