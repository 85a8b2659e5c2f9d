"""Training passes over packed rows: many runs, one base pass, planned micro-batches.

Shape letters: T tokens of a packed row, D hidden, P (row, target) pairs, N tokens of a datum, K targets per token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint.engine.backend import CustomLoss, FloatArray, Metrics, Part, PartResult
from mint.engine.lora import UNEMBED_SITE, AdapterGradient, AdapterLayout, AdapterWeights, Segment, adapter_weights
from mint.engine.models.decoder import Decoder, LayerActivations, PackedRow
from mint.engine.models.head import Derivative, Head, Targets
from mint.engine.optim import AdamState, adam_step, global_norm, is_finite, new_adam_state
from mint.engine.plan import Plan, split_into_passes
from mint.errors import InputError, NumericsError
from mint.losses import LOSSES
from mint.types.params import AdamParams
from mint.types.requests import PreparedDatum, TrainingInput


class TrainingRun:
    """One run's adapter, gradient and optimizer on the device."""

    def __init__(self, layout: AdapterLayout, params_P: Tensor, plan: Plan, dtype: torch.dtype) -> None:
        self.layout = layout
        self.params_P = params_P
        self.plan = plan
        self.adam: AdamState = new_adam_state(params_P)
        self.gradient = AdapterGradient(layout, params_P.device)
        self.has_gradient = False
        self._dtype = dtype
        self._weights: AdapterWeights | None = None

    def weights(self) -> AdapterWeights:
        """What passes multiply with, rebuilt after the parameters changed."""
        if self._weights is None:
            self._weights = adapter_weights(self.layout, self.params_P, self._dtype)
        return self._weights

    def replace(self, params_P: Tensor, adam: AdamState) -> None:
        self.params_P, self.adam, self._weights = params_P, adam, None
        self.clear_gradient()

    def clear_gradient(self) -> None:
        self.gradient.flat_P.zero_()
        self.has_gradient = False

    def optim_step(self, hyper: AdamParams) -> Metrics:
        """Raises NumericsError, with the gradient cleared and nothing else changed, where a number is not finite."""
        metrics = {"step": float(self.adam.step), "learning_rate": hyper.learning_rate}
        if not self.has_gradient:
            return {**metrics, "grad_norm": 0.0, "update_norm": 0.0, "no_gradient": 1.0}
        grad_norm = global_norm(self.gradient.flat_P)
        if not np.isfinite(grad_norm):
            self.clear_gradient()
            raise NumericsError(
                f"optim_step: the gradient norm is {grad_norm}; nothing was changed and the gradient was cleared. "
                "Look for extreme weights, advantages or logprobs in the data since the last step"
            )
        first_P = self.params_P.clone() if self.adam.step == 0 else None
        update_norm = adam_step(self.params_P, self.gradient.flat_P, self.adam, hyper, grad_norm)
        self.clear_gradient()
        if first_P is not None and hyper.learning_rate > 0 and grad_norm > 0 and update_norm == 0:
            self.params_P, self.adam = first_P, new_adam_state(first_P)
            raise NumericsError(
                f"optim_step: gradient norm {grad_norm:g} moved no weight at learning rate {hyper.learning_rate:g}; "
                "raise the learning rate"
            )
        self._weights = None
        return {**metrics, "step": float(self.adam.step), "grad_norm": grad_norm, "update_norm": update_norm}


@dataclass(frozen=True, slots=True, repr=False)
class _Item:
    """One datum of one part."""

    part: int
    datum: int


@dataclass(slots=True, repr=False)
class _Scoring:
    """The pairs of one segment and what the loss reads; pairs stand in datum order."""

    part: int
    segment: Segment
    row_P: np.ndarray
    token_P: np.ndarray
    inputs: dict[str, np.ndarray]
    active_P: np.ndarray  # pairs of rows in which some pair has a loss term
    logprob_P: Tensor | None = None


DerivativeOf = Callable[[_Scoring, np.ndarray], Derivative]


@dataclass(slots=True, repr=False)
class _PassState:
    """One micro-batch between its forward and its backward."""

    row: PackedRow
    scorings: list[_Scoring]
    final_TD: Tensor
    kept: list[LayerActivations]
    normed_TD: Tensor
    rstd: Tensor
    grad_normed_TD: Tensor | None


class Trainer:
    """Runs on one decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.head = Head(decoder)
        self.runs: dict[str, TrainingRun] = {}

    def check(self, run_id: str, training_input: TrainingInput) -> None:
        config, most = self.decoder.config, self.runs[run_id].plan.max_tokens
        for i, datum in enumerate(training_input.data):
            largest = max(int(datum.tokens_N.max()), int(datum.targets_NK.max(initial=0)))
            if largest >= config.vocab_size:
                raise InputError(
                    f"data[{i}]: token id {largest} is outside the model's vocabulary of {config.vocab_size}; "
                    "was it tokenized for another model?"
                )
            if datum.length > most:
                reason = "context" if most == config.max_context else "memory"
                raise InputError(f"data[{i}]: {datum.length} tokens; the {reason} allows {most}. Shorten or drop it")

    def run_pass(self, parts: Sequence[Part], *, backward: bool) -> Generator[None, None, list[PartResult]]:
        """forward or forward_backward of all parts; micro-batches as the tightest plan among the runs says."""
        scorings = yield from self._micro_batches(parts, self._loss_derivative(parts) if backward else None)
        return self._finish(parts, scorings, backward=backward)

    def _finish(self, parts: Sequence[Part], scorings: list[_Scoring], *, backward: bool) -> list[PartResult]:
        results = [self._result(i, part, scorings) for i, part in enumerate(parts)]
        for i, part in enumerate(parts) if backward else ():
            run = self.runs[part.run_id]
            if results[i].error is None and not is_finite(run.gradient.flat_P):
                results[i] = PartResult([], {}, _not_finite(f"{part.input.loss_fn}: the gradient is"))
            if results[i].error is None:
                run.has_gradient = True
            else:
                run.clear_gradient()
        return results

    def run_custom(self, part: Part, loss: CustomLoss) -> Generator[None, None, PartResult]:
        """All logprobs first, then the caller's loss and its gradient, then backward.

        Where one pass holds the batch, its activations are kept and used; a larger batch is run forward once more.
        """
        data = part.input.data
        scored = Part(part.run_id, _as_cross_entropy(data, [np.zeros(d.targets_NK.shape) for d in data]))
        items = [_Item(0, i) for i in range(len(data))]
        fits = sum(d.length for d in data) <= self.runs[part.run_id].plan.max_tokens_per_pass
        state = None
        if fits:
            state = yield from self._forward([scored], items, with_gradient=True)
            yield from self._score(state, None)
            logprobs = _split_logprobs(data, state.scorings)
        else:
            logprobs = _split_logprobs(data, (yield from self._micro_batches([scored], None)))
        value, gradients, metrics = _custom_gradient(loss, logprobs)
        weights = [-g.reshape(d.targets_NK.shape) for g, d in zip(gradients, data, strict=True)]
        surrogate = Part(part.run_id, _as_cross_entropy(data, weights))
        if state is None:
            result = (yield from self.run_pass([surrogate], backward=True))[0]
        else:
            state.scorings = [_scoring(0, s.segment, surrogate.input.data, "cross_entropy") for s in state.scorings]
            yield from self._score(state, self._loss_derivative([surrogate]))
            yield from self._backward(state)
            result = self._finish([surrogate], state.scorings, backward=True)[0]
        return result if result.error is not None else PartResult(result.logprobs, {**metrics, "loss:sum": value})

    def _micro_batches(
        self, parts: Sequence[Part], derivative_of: DerivativeOf | None
    ) -> Generator[None, None, list[_Scoring]]:
        items = [_Item(p, d) for p, part in enumerate(parts) for d in range(len(part.input.data))]
        lengths = [parts[item.part].input.data[item.datum].length for item in items]
        cap = min(self.runs[part.run_id].plan.max_tokens_per_pass for part in parts)
        scorings: list[_Scoring] = []
        for indices in split_into_passes(lengths, cap):
            scorings += yield from self._micro_batch(parts, items[indices.start : indices.stop], derivative_of)
        return scorings

    def _micro_batch(
        self, parts: Sequence[Part], items: list[_Item], derivative_of: DerivativeOf | None
    ) -> Generator[None, None, list[_Scoring]]:
        state = yield from self._forward(parts, items, with_gradient=derivative_of is not None)
        yield from self._score(state, derivative_of)
        if derivative_of is not None:
            yield from self._backward(state)
        return state.scorings

    def _forward(
        self, parts: Sequence[Part], items: list[_Item], *, with_gradient: bool
    ) -> Generator[None, None, _PassState]:
        row, scorings = self._pack(parts, items, with_gradient=with_gradient)
        sites = {site for segment in row.segments for site in segment.weights or ()}
        keep = with_gradient and sites != {UNEMBED_SITE}
        final_TD, kept = yield from self.decoder.forward(row, keep=keep)
        normed_TD, rstd = self.head.normalise(final_TD)
        grad_normed_TD = torch.zeros_like(normed_TD) if keep else None
        return _PassState(row, scorings, final_TD, kept, normed_TD, rstd, grad_normed_TD)

    def _backward(self, state: _PassState) -> Generator[None, None, None]:
        if state.grad_normed_TD is not None:
            grad_TD = self.head.backward_norm(state.grad_normed_TD, state.final_TD, state.rstd)
            yield from self.decoder.backward(state.row, grad_TD, state.kept)

    def _score(self, state: _PassState, derivative_of: DerivativeOf | None) -> Generator[None, None, None]:
        """Rows with a loss term first and by themselves, so that the others cost no backward; forward splits alike."""
        device = state.normed_TD.device
        for scoring in state.scorings:
            logprob_P = torch.empty(len(scoring.token_P), device=device)
            for active in (True, False):
                (chosen,) = np.nonzero(scoring.active_P == active)
                if not len(chosen):
                    continue
                rows, row_P = np.unique(scoring.row_P[chosen], return_inverse=True)
                targets = Targets(*(torch.from_numpy(a).to(device) for a in (rows, row_P, scoring.token_P[chosen])))
                derivative = derivative_of(scoring, chosen) if derivative_of is not None and active else None
                scores = yield from self.head.score(
                    state.normed_TD, targets, scoring.segment, derivative, state.grad_normed_TD
                )
                logprob_P[torch.from_numpy(chosen).to(device)] = scores
            scoring.logprob_P = logprob_P

    def _loss_derivative(self, parts: Sequence[Part]) -> DerivativeOf:
        def derivative_of(scoring: _Scoring, chosen: np.ndarray) -> Derivative:
            part = parts[scoring.part]
            terms, config = LOSSES[part.input.loss_fn].terms, part.input.loss_fn_config
            inputs = {k: torch.from_numpy(v[chosen]).to(self.decoder.device) for k, v in scoring.inputs.items()}

            def derivative(logprob_P: Tensor, where: slice) -> Tensor:
                gradient: Tensor = terms(torch, logprob_P, {k: v[where] for k, v in inputs.items()}, config)[1]
                return gradient

            return derivative

        return derivative_of

    def _pack(
        self, parts: Sequence[Part], items: list[_Item], *, with_gradient: bool
    ) -> tuple[PackedRow, list[_Scoring]]:
        tokens, positions, sequences, scorings, start = [], [], [], [], 0
        for number in dict.fromkeys(item.part for item in items):
            part, run, first = parts[number], self.runs[parts[number].run_id], start
            data = [part.input.data[item.datum] for item in items if item.part == number]
            for datum in data:
                tokens.append(datum.tokens_N)
                positions.append(np.arange(datum.length))
                sequences.append((start, start + datum.length))
                start += datum.length
            segment = Segment(first, start, run.weights(), run.gradient if with_gradient else None)
            scorings.append(_scoring(number, segment, data, part.input.loss_fn))
        device = self.decoder.device
        tokens_T, positions_T = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, positions))
        return PackedRow(tokens_T, positions_T, sequences, [s.segment for s in scorings]), scorings

    def _result(self, number: int, part: Part, scorings: list[_Scoring]) -> PartResult:
        own = [s for s in scorings if s.part == number]
        loss = LOSSES[part.input.loss_fn]
        total, num_positions, num_active = 0.0, 0, 0
        for s in own:
            assert s.logprob_P is not None
            logprob_P = s.logprob_P.double().cpu().numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported below
                total += float(loss.terms(np, logprob_P, s.inputs, part.input.loss_fn_config)[0].sum())
            num_positions += len(s.token_P)
            num_active += int(np.count_nonzero(s.inputs[loss.weight_input]))
        logprobs = _split_logprobs(part.input.data, own)
        metrics = {"loss:sum": total, "positions:sum": float(num_positions), "active_positions:sum": float(num_active)}
        if np.isfinite(total) and all(np.isfinite(array).all() for array in logprobs):
            return PartResult(logprobs, metrics)
        return PartResult([], {}, _not_finite(f"{part.input.loss_fn}: the loss is {total},"))


def _not_finite(what: str) -> NumericsError:
    return NumericsError(
        f"{what} not a finite number; the run's gradient is discarded. "
        "Look for extreme weights, advantages or logprobs, or lower the learning rate"
    )


def _scoring(number: int, segment: Segment, data: Sequence[PreparedDatum], loss_fn: str) -> _Scoring:
    """The segment's pairs, datum after datum, row-major within one."""
    rows = np.arange(segment.start, segment.end)
    lengths = [datum.length for datum in data]
    row_P = np.concatenate(
        [
            np.repeat(r, d.targets_NK.shape[1])
            for r, d in zip(np.split(rows, np.cumsum(lengths)[:-1]), data, strict=True)
        ]
    )
    inputs = {name: np.concatenate([d.inputs[name].ravel() for d in data]) for name in data[0].inputs}
    weighted = inputs[LOSSES[loss_fn].weight_input] != 0
    has_term = np.zeros(segment.end, bool)
    np.logical_or.at(has_term, row_P, weighted)
    return _Scoring(
        number, segment, row_P, np.concatenate([d.targets_NK.ravel() for d in data]), inputs, has_term[row_P]
    )


def _split_logprobs(data: Sequence[PreparedDatum], scorings: list[_Scoring]) -> list[FloatArray]:
    """Per datum, in the shape its targets were given in."""
    tensors = [s.logprob_P.cpu().numpy() for s in scorings if s.logprob_P is not None]
    pieces = np.split(np.concatenate(tensors), np.cumsum([d.targets_NK.size for d in data])[:-1])
    return [piece if d.flat else piece.reshape(d.targets_NK.shape) for piece, d in zip(pieces, data, strict=True)]


def _as_cross_entropy(data: Sequence[PreparedDatum], weights: Sequence[np.ndarray]) -> TrainingInput:
    """-sum w p has the gradient of a loss C(p) where w = -dC/dp."""
    weighted = tuple(
        PreparedDatum(d.tokens_N, d.targets_NK, {"weights": w.astype(np.float32)}, d.flat)
        for d, w in zip(data, weights, strict=True)
    )
    return TrainingInput(weighted, "cross_entropy", {})


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
