"""What a checkpoint, and the base model before it, make of rows that are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from mint import types
from mint.chat import ShownRow, ShownToken
from mint.errors import NumericsError


class Pending(Protocol):
    def result(self) -> list[float | None]: ...


class Scorer(Protocol):
    """A `mint.SamplingClient`."""

    def compute_logprobs(self, prompt: types.ModelInput) -> Pending: ...


def scored_rows(rows: Iterable[ShownRow], tuned: Scorer, base: Scorer) -> Iterator[ShownRow]:
    """`rows` with the `nll` that `tuned` and the `nll_before` that `base` give to each token after those before it.

    Scored is what is trained on: a truncated token has no NLL, nor has the first of an example. All rows are asked for at
    once, so that they share passes. Raises InputError for an example longer than the model's context.
    """
    asked = [
        (row, [(_ask(tuned, example), _ask(base, example)) for example in row.examples])
        for row in rows
    ]  # fmt: skip
    for row, answers in asked:
        examples = [
            _with_nlls(row.number, example, _result(after), _result(before))
            for example, (after, before) in zip(row.examples, answers, strict=True)
        ]
        yield replace(row, examples=tuple(examples))


def _ask(scorer: Scorer, example: Sequence[ShownToken]) -> Pending | None:
    ids = [token.id for token in example if token.kind != "truncated"]
    return scorer.compute_logprobs(types.ModelInput.from_ints(ids)) if ids else None


def _result(pending: Pending | None) -> list[float | None]:
    return [] if pending is None else pending.result()


def _with_nlls(
    number: int, example: Sequence[ShownToken], after: list[float | None], before: list[float | None]
) -> tuple[ShownToken, ...]:
    pairs = iter(zip(after, before, strict=True))
    scored = []
    for token in example:
        if token.kind != "truncated":
            logprob, logprob_before = next(pairs)
            token = replace(token, nll=_nll(logprob, number), nll_before=_nll(logprob_before, number))
        scored.append(token)
    return tuple(scored)


def _nll(logprob: float | None, number: int) -> float | None:
    if logprob is not None and not math.isfinite(logprob):
        raise NumericsError(f"row {number}: a token has the log-probability {logprob}; the weights are damaged")
    return None if logprob is None else -logprob
