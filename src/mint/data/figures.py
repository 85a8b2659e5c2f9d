"""Counts and means over rows that are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mint.chat import ShownRow, ShownToken


@dataclass(frozen=True, slots=True)
class Figures:
    """What some rows come to.

    examples: those that are trained. tokens: those that the model sees; a row of several examples counts what they share
    as often. trained: of these, with a loss weight. cut: tokens that were left out, also of dropped rows. nll,
    nll_before: mean negative log-probability of the trained tokens in nats, weighted as in the loss, given by the
    checkpoint and by the base model; None where none is known.
    """

    rows: int
    dropped: int
    examples: int
    tokens: int
    trained: int
    cut: int
    nll: float | None
    nll_before: float | None

    @property
    def change(self) -> float | None:
        """nll - nll_before; below zero the checkpoint knows the rows better."""
        return None if self.nll is None or self.nll_before is None else self.nll - self.nll_before


def figures(rows: Iterable[ShownRow]) -> Figures:
    rows = list(rows)
    seen = [token for row in rows for token in _tokens(row) if token.kind != "truncated"]
    trained = [token for token in seen if token.weight]
    return Figures(
        rows=len(rows),
        dropped=sum(row.dropped is not None for row in rows),
        examples=sum(len(row.examples) for row in rows if row.dropped is None),
        tokens=len(seen),
        trained=len(trained),
        cut=sum(token.kind == "truncated" for row in rows for token in _tokens(row)),
        nll=_mean([(token.nll, token.weight) for token in trained]),
        nll_before=_mean([(token.nll_before, token.weight) for token in trained]),
    )


def _tokens(row: ShownRow) -> Iterator[ShownToken]:
    return (token for example in row.examples for token in example)


def _mean(weighted: list[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in weighted if value is not None]
    weights = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / weights if weights else None
