"""AdamW on one flat float32 vector. Source: decoupled weight decay (arXiv 1711.05101); defaults are the Tinker protocol's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.types.params import AdamParams


@dataclass(slots=True, repr=False)
class AdamState:
    """First and second moments and the number of steps taken."""

    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    step: int = 0


def new_adam_state(params_P: Tensor) -> AdamState:
    return AdamState(torch.zeros_like(params_P), torch.zeros_like(params_P))


def global_norm(vector_P: Tensor) -> float:
    """Euclidean norm, accumulated in float64 so that it does not depend on how the vector is split."""
    return float(torch.linalg.vector_norm(vector_P, dtype=torch.float64))


def adam_step(params_P: Tensor, grad_P: Tensor, state: AdamState, hyper: AdamParams, grad_norm: float) -> float:
    """One update in place; returns the update's norm. `grad_norm` is the global norm of `grad_P`, for clipping."""
    if 0 < hyper.grad_clip_norm < grad_norm:
        grad_P = grad_P * (hyper.grad_clip_norm / grad_norm)
    state.step += 1
    state.exp_avg_P.lerp_(grad_P, 1 - hyper.beta1)
    state.exp_avg_sq_P.mul_(hyper.beta2).addcmul_(grad_P, grad_P, value=1 - hyper.beta2)
    bias1 = 1 - hyper.beta1**state.step
    bias2 = 1 - hyper.beta2**state.step
    denominator = state.exp_avg_sq_P.sqrt().div_(math.sqrt(bias2)).add_(hyper.eps)
    before_P = params_P.clone()
    params_P.mul_(1 - hyper.learning_rate * hyper.weight_decay)
    params_P.addcdiv_(state.exp_avg_P, denominator, value=-hyper.learning_rate / bias1)
    return global_norm(before_P.sub_(params_P))
