"""Training passes over packed rows: many runs, one base pass, planned micro-batches.

Shape letters: T tokens of a packed row, D hidden, P (row, target) pairs, N tokens of a datum, K targets per token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint.engine.backend import CustomLoss, FloatArray, Part, PartResult
from mint.engine.lora import UNEMBED_SITE, Segment
from mint.engine.models.decoder import Decoder, LayerActivations, PackedRow
from mint.engine.models.head import Derivative, Head, Targets
from mint.engine.plan import split_into_passes
from mint.engine.runs import TrainingRun, as_cross_entropy, part_result, settle_gradient, surrogate
from mint.losses import LOSSES
from mint.types.requests import PreparedDatum


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

    def run_pass(self, parts: Sequence[Part], *, backward: bool) -> Generator[None, None, list[PartResult]]:
        """forward or forward_backward of all parts; micro-batches as the tightest plan among the runs says."""
        scorings = yield from self._micro_batches(parts, self._loss_derivative(parts) if backward else None)
        return self._finish(parts, scorings, backward=backward)

    def _finish(self, parts: Sequence[Part], scorings: list[_Scoring], *, backward: bool) -> list[PartResult]:
        results = []
        for i, part in enumerate(parts):
            own = [scoring for scoring in scorings if scoring.part == i]
            result = part_result(part, _split_logprobs(part.input.data, own))
            results.append(settle_gradient(self.runs[part.run_id], part, result) if backward else result)
        return results

    def run_custom(self, part: Part, loss: CustomLoss) -> Generator[None, None, PartResult]:
        """All logprobs first, then the caller's loss and its gradient, then backward.

        Where one pass holds the batch, its activations are kept and used; a larger batch is run forward once more.
        """
        data = part.input.data
        scored = as_cross_entropy(part)
        items = [_Item(0, i) for i in range(len(data))]
        fits = sum(d.length for d in data) <= self.runs[part.run_id].plan.max_tokens_per_pass
        state = None
        if fits:
            state = yield from self._forward([scored], items, with_gradient=True)
            yield from self._score(state, None)
            logprobs = _split_logprobs(data, state.scorings)
        else:
            logprobs = _split_logprobs(data, (yield from self._micro_batches([scored], None)))
        weighted, metrics = surrogate(part, loss, logprobs)
        if state is None:
            result = (yield from self.run_pass([weighted], backward=True))[0]
        else:
            state.scorings = [_scoring(0, s.segment, weighted.input.data, "cross_entropy") for s in state.scorings]
            yield from self._score(state, self._loss_derivative([weighted]))
            yield from self._backward(state)
            result = self._finish([weighted], state.scorings, backward=True)[0]
        return result if result.error is not None else PartResult(result.logprobs, metrics)

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
