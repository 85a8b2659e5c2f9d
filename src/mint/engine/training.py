"""Training passes over packed rows: many runs, one base pass, planned micro-batches.

Shape letters: T tokens of a packed row, D hidden, P (row, target) pairs, N tokens of a datum, K targets per token.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint.engine.backend import CustomLoss, FloatArray, MicroBatch, Part, PartResult
from mint.engine.compute import AnyDecoder, AnyHead
from mint.engine.lora import UNEMBED_SITE, Segment
from mint.engine.models.decoder import PackedRow
from mint.engine.models.head import Derivative, Targets
from mint.engine.models.packed_attention import PackedSequence
from mint.engine.packing import counted_tokens, num_shareable, pack_sequences, split_into_passes
from mint.engine.runs import TrainingRun, as_cross_entropy, part_result, settle_gradient, surrogate
from mint.losses import LOSSES
from mint.types.requests import PreparedDatum, TrainingInput


@dataclass(slots=True, repr=False)
class _Scoring:
    """The pairs of one part and what its loss reads; pairs stand in datum order."""

    given: TrainingInput
    segment: Segment
    sequences: list[PackedSequence]  # of the datums
    row_P: np.ndarray
    token_P: np.ndarray
    inputs: dict[str, np.ndarray]
    active_P: np.ndarray  # pairs of rows in which some pair has a loss term
    logprob_P: Tensor | None = None


@dataclass(slots=True, repr=False)
class _PassState:
    """One micro-batch between its forward and its backward."""

    row: PackedRow
    attention: Any  # the decoder's
    scorings: list[_Scoring]
    final_TD: Tensor
    kept: list[Any]
    normed_TD: Tensor
    rstd: Tensor
    grad_normed_TD: Tensor | None


class Trainer:
    """Runs on one decoder."""

    def __init__(
        self, decoder: AnyDecoder, head: AnyHead, recomputed_layers: Callable[[int], int], copies_per_token: int
    ) -> None:
        """`recomputed_layers`: of a pass of so many tokens, as they count; `copies_per_token`: see `counted_tokens`."""
        self._copies = copies_per_token
        self.decoder = decoder
        self._recomputed_layers = recomputed_layers
        self.head = head
        self.runs: dict[str, TrainingRun] = {}

    def micro_batches(self, run_id: str, given: TrainingInput) -> list[MicroBatch]:
        """See `Backend.micro_batches`. A datum longer than the plan's pass goes alone."""
        cap = self.runs[run_id].plan.max_tokens_per_pass
        tokens = [datum.tokens_N for datum in given.data]
        shared = [0, *(num_shareable(a, b) for a, b in pairwise(tokens))]
        shares = []
        for indices, num_tokens in split_into_passes([len(tokens_N) for tokens_N in tokens], shared, cap, self._copies):
            part = TrainingInput(given.data[indices.start : indices.stop], given.loss_fn, given.loss_fn_config)
            shares.append(MicroBatch(part, num_tokens, max(cap, num_tokens)))
        return shares

    def run_pass(self, parts: Sequence[Part], *, backward: bool) -> Generator[None, None, list[PartResult]]:
        """forward or forward_backward of all parts in one pass."""
        state = yield from self._forward(parts, with_gradient=backward)
        yield from self._score(state, backward=backward)
        if backward:
            yield from self._backward(state)
        return self._finish(parts, state.scorings, backward=backward)

    def _finish(self, parts: Sequence[Part], scorings: list[_Scoring], *, backward: bool) -> list[PartResult]:
        results = []
        for part, scoring in zip(parts, scorings, strict=True):
            result = part_result(part, _split_logprobs(part.input.data, scoring))
            results.append(settle_gradient(self.runs[part.run_id], part, result) if backward else result)
        return results

    def run_custom(self, part: Part, loss: CustomLoss) -> Generator[None, None, PartResult]:
        """One pass: all logprobs, then the caller's loss and its gradient, then backward from the activations kept."""
        state = yield from self._forward([as_cross_entropy(part)], with_gradient=True)
        yield from self._score(state, backward=False)
        weighted, metrics = surrogate(part, loss, _split_logprobs(part.input.data, state.scorings[0]))
        state.scorings = [_scoring(weighted.input, state.scorings[0].segment, state.scorings[0].sequences)]
        yield from self._score(state, backward=True)
        yield from self._backward(state)
        result = self._finish([weighted], state.scorings, backward=True)[0]
        return result if result.error is not None else PartResult(result.logprobs, metrics)

    def _forward(self, parts: Sequence[Part], *, with_gradient: bool) -> Generator[None, None, _PassState]:
        row, scorings = self._pack(parts, with_gradient=with_gradient)
        sequences = [sequence for scoring in scorings for sequence in scoring.sequences]
        attention = self.decoder.packed_attention(sequences)
        sites = {site for segment in row.segments for site in segment.weights or ()}
        keep = with_gradient and sites != {UNEMBED_SITE}
        num_tokens = sum(
            counted_tokens(len(sequence.rows_N), sequence.num_shared, self._copies) for sequence in sequences
        )
        recompute = self._recomputed_layers(num_tokens) if keep else 0
        final_TD, kept = yield from self.decoder.forward(row, attention, keep=keep, recompute=recompute)
        normed_TD, rstd = self.head.normalise(final_TD)
        grad_normed_TD = torch.zeros_like(normed_TD) if keep else None
        return _PassState(row, attention, scorings, final_TD, kept, normed_TD, rstd, grad_normed_TD)

    def _backward(self, state: _PassState) -> Generator[None, None, None]:
        if state.grad_normed_TD is not None:
            grad_TD = self.head.backward_norm(state.grad_normed_TD, state.final_TD, state.rstd)
            yield from self.decoder.backward(state.row, state.attention, grad_TD, state.kept)

    def _score(self, state: _PassState, *, backward: bool) -> Generator[None, None, None]:
        """Rows with a loss term first and by themselves, so that the others cost no backward; forward splits alike."""
        device = state.normed_TD.device
        for scoring in state.scorings:
            logprob_P = torch.empty(len(scoring.token_P), device=device)
            for active in (True, False):
                (chosen,) = np.nonzero(scoring.active_P == active)
                if not len(chosen):
                    continue
                chosen = chosen[np.argsort(scoring.row_P[chosen], kind="stable")]  # datums may share rows
                rows, row_P = np.unique(scoring.row_P[chosen], return_inverse=True)
                targets = Targets(*(torch.from_numpy(a).to(device) for a in (rows, row_P, scoring.token_P[chosen])))
                derivative = self._loss_derivative(scoring, chosen) if backward and active else None
                scores = yield from self.head.score(
                    state.normed_TD, targets, scoring.segment, derivative, state.grad_normed_TD
                )
                logprob_P[torch.from_numpy(chosen).to(device)] = scores
            scoring.logprob_P = logprob_P

    def _loss_derivative(self, scoring: _Scoring, chosen: np.ndarray) -> Derivative:
        terms, config = LOSSES[scoring.given.loss_fn].terms, scoring.given.loss_fn_config
        inputs = {k: torch.from_numpy(v[chosen]).to(self.decoder.device) for k, v in scoring.inputs.items()}

        def derivative(logprob_P: Tensor, where: slice) -> Tensor:
            gradient: Tensor = terms(torch, logprob_P, {k: v[where] for k, v in inputs.items()}, config)[1]
            return gradient

        return derivative

    def _pack(self, parts: Sequence[Part], *, with_gradient: bool) -> tuple[PackedRow, list[_Scoring]]:
        """The row, and what is scored of each part and where."""
        tokens, positions, scorings, start = [], [], [], 0
        for part in parts:
            run, first = self.runs[part.run_id], start
            sequences = pack_sequences([datum.tokens_N for datum in part.input.data], first)
            for datum, sequence in zip(part.input.data, sequences, strict=True):
                tokens.append(datum.tokens_N[sequence.num_shared :])
                positions.append(np.arange(sequence.num_shared, datum.length))
                start += len(tokens[-1])
            segment = Segment(first, start, run.weights(), run.gradient if with_gradient else None)
            scorings.append(_scoring(part.input, segment, sequences))
        device = self.decoder.device
        tokens_T, positions_T = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, positions))
        return PackedRow(tokens_T, positions_T, [s.segment for s in scorings]), scorings


def _scoring(given: TrainingInput, segment: Segment, sequences: list[PackedSequence]) -> _Scoring:
    """The part's pairs, datum after datum, row-major within one."""
    data = given.data
    row_P = np.concatenate([np.repeat(q.rows_N, d.targets_NK.shape[1]) for q, d in zip(sequences, data, strict=True)])
    inputs = {name: np.concatenate([d.inputs[name].ravel() for d in data]) for name in data[0].inputs}
    weighted = inputs[LOSSES[given.loss_fn].weight_input] != 0
    has_term = np.zeros(segment.end, bool)
    np.logical_or.at(has_term, row_P, weighted)
    token_P = np.concatenate([d.targets_NK.ravel() for d in data])
    return _Scoring(given, segment, sequences, row_P, token_P, inputs, has_term[row_P])


def _split_logprobs(data: Sequence[PreparedDatum], scoring: _Scoring) -> list[FloatArray]:
    """Per datum, in the shape its targets were given in."""
    assert scoring.logprob_P is not None
    pieces = np.split(scoring.logprob_P.cpu().numpy(), np.cumsum([d.targets_NK.size for d in data])[:-1])
    return [piece if d.flat else piece.reshape(d.targets_NK.shape) for piece, d in zip(pieces, data, strict=True)]
