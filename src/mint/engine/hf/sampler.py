"""Sampling without batching: every sequence is decoded by itself, so that no kernel's choice ties it to its neighbours.

Shape letter: V vocabulary.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mint.engine.backend import GenerateRequest, Generation
from mint.engine.hf.model import CausalModel
from mint.engine.lora import AdapterWeights
from mint.engine.sampling.choose import choose, top_logprobs
from mint.engine.sampling.sequence import GrowingSequence, new_sequence, not_finite
from mint.engine.sampling.waiting import WaitingRequests
from mint.errors import NumericsError

MAX_SEQUENCES = 64  # growing at once; further requests wait, so that caches stay bounded


@dataclass(slots=True, repr=False)
class _Request:
    number: int
    given: GenerateRequest
    weights: AdapterWeights  # held here, so that a snapshot may be dropped while it is in use
    sequences: list[GrowingSequence[Any]] = field(default_factory=list)  # they start when the prompt is prefilled
    error: NumericsError | None = None

    def growing(self) -> list[GrowingSequence[Any]]:
        return [s for s in self.sequences if s.stop_reason is None and self.error is None]

    def extend(self, sequence: GrowingSequence[Any], logits_1V: Tensor) -> None:
        """The next token, with its logprob at temperature 1."""
        (token,), normaliser_1 = choose(logits_1V, [sequence.choice()])
        logprob = float(logits_1V[0, token].double() - normaliser_1[0])
        if not math.isfinite(logprob):
            self.error = not_finite(self.given)
            return
        num_topk = self.given.num_topk
        sequence.extend(token, logprob, top_logprobs(logits_1V, num_topk)[0] if num_topk else None)

    def generation(self) -> Generation:
        sequences = [s.finished() for s in self.sequences] if self.error is None else []
        return Generation(self.number, sequences, 0, self.error)


class SequenceSampler:
    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._waiting: WaitingRequests[_Request] = WaitingRequests()
        self._growing: dict[int, _Request] = {}
        self._next = 0

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._growing)

    def add(self, given: GenerateRequest, weights: AdapterWeights) -> int:
        self._next += 1
        self._waiting.add(given.tenant, self._next, _Request(self._next, given, weights))
        return self._next

    def cancel(self, number: int) -> None:
        self._waiting.remove(number)
        self._growing.pop(number, None)

    @torch.no_grad()  # not inference mode: what a model keeps from here must not break a later backward
    def step(self) -> list[Generation]:
        """One whole prompt where one waits and there is room, else a token for every sequence."""
        growing = [(r, s) for r in self._growing.values() for s in r.growing()]
        waiting = self._waiting.first() if self._waiting else None
        if waiting is not None and (not growing or len(growing) + waiting.given.num_samples <= MAX_SEQUENCES):
            self._prefill(waiting)
            self._waiting.take_first()
            self._growing[waiting.number] = waiting
        else:
            for request, sequence in growing:
                if request.error is None:
                    logits_1V, _ = self._model.forward(sequence.tokens[-1:], request.weights, cache=sequence.cache)
                    request.extend(sequence, logits_1V)
        done = [r for r in self._growing.values() if not r.growing()]
        for request in done:
            del self._growing[request.number]
        return [request.generation() for request in done]

    def _prefill(self, request: _Request) -> None:
        """Whole, because not every model's cache can take a prompt in pieces."""
        given = request.given
        logits_1V, cache = self._model.forward(list(given.prompt), request.weights, keep_cache=True, last_only=True)
        for i in range(given.num_samples):
            own = cache if i == given.num_samples - 1 else copy.deepcopy(cache)
            request.sequences.append(new_sequence(given, i, own))
            request.extend(request.sequences[-1], logits_1V)
