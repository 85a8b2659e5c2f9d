"""What every Backend keeps of a run, and how it answers for a run's part of a pass. Knows no model.

Shape letters: P all parameters of an adapter, N tokens of a datum, K targets per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mint.engine.backend import (
    PAUSE,
    AdapterState,
    Backend,
    BackendLimits,
    CustomLoss,
    FloatArray,
    Metrics,
    Part,
    PartResult,
    PausingWork,
    RunPlan,
    RunReport,
    join_results,
)
from mint.engine.lora import (
    AdapterGradient,
    AdapterLayout,
    AnyAdapter,
    flat_from_named,
    initial_parameters,
    named_tensors,
)
from mint.engine.optim import TORCH_OPTIMIZER, AdamState, Optimizer, is_finite, new_adam_state
from mint.engine.plan import Plan
from mint.errors import InputError, NumericsError
from mint.losses import LOSSES
from mint.types.params import AdamParams
from mint.types.requests import PreparedDatum, TrainingInput

logger = logging.getLogger("mint")


class TrainingRun:
    """One run's adapter, gradient and optimizer on the device."""

    def __init__(
        self,
        layout: AdapterLayout,
        seed: int,
        plan: Plan,
        device: torch.device,
        weights_of: Callable[[Tensor], AnyAdapter],
        optimizer: Optimizer = TORCH_OPTIMIZER,
    ) -> None:
        """weights_of: what passes multiply with, from the parameters."""
        self.layout = layout
        self.params_P = initial_parameters(layout, seed).to(device)
        self.plan = plan
        self.adam: AdamState = new_adam_state(self.params_P)
        self.gradient = AdapterGradient(layout, device)
        self.has_gradient = False
        self._weights_of, self._optimizer = weights_of, optimizer
        self._weights: AnyAdapter | None = None

    def weights(self) -> AnyAdapter:
        """What passes multiply with, rebuilt after the parameters changed."""
        if self._weights is None:
            self._weights = self._weights_of(self.params_P)
        return self._weights

    def report(self, limits: BackendLimits) -> RunReport:
        plan = RunPlan(
            self.plan.max_tokens_per_pass, self.plan.max_tokens, limits.dtype, limits.num_threads, limits.torch_version,
            limits.kernels,
        )  # fmt: skip
        return RunReport(tuple(module.name for module in self.layout.modules), self.layout.size, plan)

    def follow(self, plan: RunPlan, limits: BackendLimits) -> None:
        """Take over a checkpoint's plan; says so where this machine cannot repeat its bits."""
        changed = [
            f"{key} {getattr(plan, key)} -> {getattr(limits, key)}"
            for key in ("dtype", "num_threads", "torch_version", "kernels")
            if getattr(plan, key) != getattr(limits, key)
        ]
        if changed:
            logger.warning(
                "this run was trained with other settings (%s): it goes on, but not bit for bit", ", ".join(changed)
            )
        self.plan = Plan(plan.max_tokens_per_pass, plan.max_tokens)

    def check(self, training_input: TrainingInput, limits: BackendLimits) -> None:
        """Raises InputError on what the model or the memory cannot take."""
        most = self.plan.max_tokens
        for i, datum in enumerate(training_input.data):
            largest = max(int(datum.tokens_N.max()), int(datum.targets_NK.max(initial=0)))
            if largest >= limits.vocab_size:
                raise InputError(
                    f"data[{i}]: token id {largest} is outside the model's vocabulary of {limits.vocab_size}; "
                    "was it tokenized for another model?"
                )
            if datum.length > most:
                reason = "context" if most == limits.max_context else "memory"
                raise InputError(f"data[{i}]: {datum.length} tokens; the {reason} allows {most}. Shorten or drop it")

    def clear_gradient(self) -> None:
        self.gradient.flat_P.zero_()
        self.has_gradient = False

    def optim_step(self, hyper: AdamParams) -> Metrics:
        """Raises NumericsError, with the gradient cleared and nothing else changed, where a number is not finite."""
        metrics = {"step": float(self.adam.step), "learning_rate": hyper.learning_rate}
        if not self.has_gradient:
            return {**metrics, "grad_norm": 0.0, "update_norm": 0.0, "no_gradient": 1.0}
        grad_norm = self._optimizer.global_norm(self.gradient.flat_P)
        if not np.isfinite(grad_norm):
            self.clear_gradient()
            raise NumericsError(
                f"optim_step: the gradient norm is {grad_norm}; nothing was changed and the gradient was cleared. "
                "Look for extreme weights, advantages or logprobs in the data since the last step"
            )
        first_P = self.params_P.clone() if self.adam.step == 0 else None
        update_norm = self._optimizer.adam_step(self.params_P, self.gradient.flat_P, self.adam, hyper, grad_norm)
        self.has_gradient = False
        if first_P is not None and hyper.learning_rate > 0 and grad_norm > 0 and update_norm == 0:
            self.params_P, self.adam = first_P, new_adam_state(first_P)
            raise NumericsError(
                f"optim_step: gradient norm {grad_norm:g} moved no weight at learning rate {hyper.learning_rate:g}; "
                "raise the learning rate"
            )
        self._weights = None
        return {**metrics, "step": float(self.adam.step), "grad_norm": grad_norm, "update_norm": update_norm}

    def export_state(self) -> AdapterState:
        tensors, exp_avg, exp_avg_sq = (
            {name: tensor.numpy() for name, tensor in named_tensors(self.layout, flat_P).items()}
            for flat_P in (self.params_P, self.adam.exp_avg_P, self.adam.exp_avg_sq_P)
        )
        return AdapterState(tensors, exp_avg, exp_avg_sq, self.adam.step)

    def import_state(self, state: AdapterState, *, optimizer: bool) -> None:
        """Weights, and moments with `optimizer` (else they start anew); the gradient is cleared. Raises CheckpointError."""
        params_P = self._flat(state.tensors)
        adam = new_adam_state(params_P)
        if optimizer:
            adam = AdamState(self._flat(state.exp_avg), self._flat(state.exp_avg_sq), state.step)
        self.params_P, self.adam, self._weights = params_P, adam, None
        self.clear_gradient()

    def _flat(self, tensors: Mapping[str, FloatArray]) -> Tensor:
        return flat_parameters(self.layout, tensors).to(self.params_P.device)


def flat_parameters(layout: AdapterLayout, tensors: Mapping[str, FloatArray]) -> Tensor:
    """All parameters of an adapter, in the layout's order, from saved ones. Raises CheckpointError."""
    return flat_from_named(layout, {name: torch.from_numpy(array) for name, array in tensors.items()})


def part_result(part: Part, logprobs: list[FloatArray]) -> PartResult:
    """The part's loss and counts from the logprobs of its datums; an error in place of what is not finite."""
    data, loss = part.input.data, LOSSES[part.input.loss_fn]
    inputs = {name: np.concatenate([d.inputs[name].ravel() for d in data]) for name in data[0].inputs}
    logprob_P = np.concatenate([array.ravel() for array in logprobs]).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported below
        total = float(loss.terms(np, logprob_P, inputs, part.input.loss_fn_config)[0].sum())
    if not np.isfinite(total) or not np.isfinite(logprob_P).all():
        return PartResult([], {}, _not_finite(f"{part.input.loss_fn}: the loss is {total},"))
    num_active = np.count_nonzero(inputs[loss.weight_input])
    metrics = {
        "loss:sum": total,
        "positions:sum": float(len(logprob_P)),
        "active_positions:sum": float(num_active),
    }
    return PartResult(logprobs, metrics)


def settle_gradient(run: TrainingRun, part: Part, result: PartResult) -> PartResult:
    """After a backward: the run keeps its gradient, or loses it where the part failed or a number is not finite."""
    if result.error is None and not is_finite(run.gradient.flat_P):
        result = PartResult([], {}, _not_finite(f"{part.input.loss_fn}: the gradient is"))
    if result.error is None:
        run.has_gradient = True
    else:
        run.clear_gradient()
    return result


def _not_finite(what: str) -> NumericsError:
    return NumericsError(
        f"{what} not a finite number; the run's gradient is discarded. "
        "Look for extreme weights, advantages or logprobs, or lower the learning rate"
    )


def as_cross_entropy(part: Part, weights: Sequence[FloatArray] | None = None) -> Part:
    """The part with the loss -sum w p; no weights: 0 everywhere. It has the gradient of a loss C(p) where w = -dC/dp."""
    if weights is None:
        weights = [np.zeros(d.targets_NK.shape, np.float32) for d in part.input.data]
    weighted = tuple(
        PreparedDatum(d.tokens_N, d.targets_NK, {"weights": w.astype(np.float32)}, d.flat)
        for d, w in zip(part.input.data, weights, strict=True)
    )
    return Part(part.run_id, TrainingInput(weighted, "cross_entropy", {}))


def surrogate(part: Part, loss: CustomLoss, logprobs: list[FloatArray]) -> tuple[Part, Metrics]:
    """A cross-entropy part with the gradient of a caller's loss at `logprobs`, and the metrics of that loss."""
    value, gradients, metrics = _custom_gradient(loss, logprobs)
    weights = [-g.reshape(d.targets_NK.shape) for g, d in zip(gradients, part.input.data, strict=True)]
    return as_cross_entropy(part, weights), {**metrics, "loss:sum": value}


def custom_in_passes(backend: Backend, part: Part, loss: CustomLoss) -> PausingWork[PartResult]:
    """The logprobs of every micro-batch, then the caller's loss and its gradient, then every micro-batch with backward."""
    results = []
    for share in backend.micro_batches(part.run_id, as_cross_entropy(part).input):
        results += yield from backend.forward([Part(part.run_id, share.input)])
        yield PAUSE
    scored = join_results(results)
    if scored.error is not None:
        return scored
    weighted, metrics = surrogate(part, loss, scored.logprobs)
    for share in backend.micro_batches(part.run_id, weighted.input):
        (result,) = yield from backend.forward_backward([Part(part.run_id, share.input)])
        if result.error is not None:
            return result
        yield PAUSE
    return PartResult(scored.logprobs, metrics)


def _custom_gradient(loss: CustomLoss, logprobs: list[FloatArray]) -> tuple[float, list[FloatArray], Metrics]:
    """The caller's loss by real autograd: its value, its gradient by every datum's logprobs, its metrics."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [torch.from_numpy(array.copy()).requires_grad_() for array in logprobs]
        value, metrics = loss(leaves)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise InputError(
                "forward_backward_custom: the loss function must return (loss, metrics) with loss a torch scalar "
                f"computed from the given logprobs, got {type(value).__name__}"
            )
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    arrays = [
        np.zeros_like(array) if gradient is None else gradient.numpy()
        for gradient, array in zip(gradients, logprobs, strict=True)
    ]
    if not all(np.isfinite(array).all() for array in arrays) or not np.isfinite(float(value.detach())):
        raise NumericsError("forward_backward_custom: the loss or its gradient by the logprobs is not finite")
    return float(value.detach()), arrays, metrics
