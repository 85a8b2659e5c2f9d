"""One sequence in flight, whatever computes it: its random stream, its tokens, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from mint.engine.backend import GenerateRequest, StopCheck
from mint.engine.sampling.choose import Choice
from mint.errors import NumericsError
from mint.types.results import SampledSequence, StopReason

C = TypeVar("C")


@dataclass(slots=True, repr=False)
class GrowingSequence(Generic[C]):
    """A sequence of a request with its cache, which does not hold the last token yet."""

    given: GenerateRequest
    cache: C
    random: np.random.Generator
    stop_check: StopCheck | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]] | None] = field(default_factory=list)
    stop_reason: StopReason | None = None

    def choice(self) -> Choice:
        """The request's options and the next number of the sequence's own random stream."""
        given = self.given
        return Choice(given.temperature, given.top_k, given.top_p, self.random.random())

    def extend(self, token: int, logprob: float, topk: list[tuple[int, float]] | None) -> None:
        """One more token; topk: None where none is asked for."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if topk is not None:
            self.topk.append(topk)
        complete = self.stop_check is not None and self.stop_check(token)
        if token in self.given.stop_tokens or complete:
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.given.max_new:
            self.stop_reason = "length"

    def finished(self) -> SampledSequence:
        assert self.stop_reason is not None
        return SampledSequence(
            stop_reason=self.stop_reason,
            tokens=self.tokens,
            logprobs=self.logprobs,
            topk_logprobs=self.topk or None,
        )


def not_finite(given: GenerateRequest) -> NumericsError:
    who = "the base model" if given.adapter is None else "this adapter"
    return NumericsError(
        f"sample: {who} gives logits that are not finite numbers for this prompt, so no token can be chosen. "
        "Sample an earlier checkpoint, and look for a learning rate that is too high"
    )


def new_sequence(given: GenerateRequest, index: int, cache: C) -> GrowingSequence[C]:
    """Sequence `index` of the request, whose random stream is (seed, index)."""
    key = np.array([given.seed % 2**64, index], np.uint64)
    check = given.new_stop_check() if given.new_stop_check is not None else None
    return GrowingSequence(given, cache, np.random.Generator(np.random.Philox(key=key)), check)
