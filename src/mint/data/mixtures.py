"""Several sets as one: how a mixture is written, and which rows of each set it takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from mint.data.rows import ChosenRows, JoinedRows
from mint.errors import InputError

_SHARE = re.compile(r"(?P<name>.*)=(?P<share>\d+(?:\.\d*)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """A set of a mixture, and its share; None: whatever the others leave."""

    name: str
    share: Fraction | None = None

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name}={float(self.share):g}"


def parse_part(text: str) -> Part:
    """`NAME` or `NAME=SHARE`. What follows the last `=` is a share where it reads as a number, so a name that ends like
    that needs a share: `a=2=1` is the set `a=2`. Raises InputError for a share of zero."""
    match = _SHARE.fullmatch(text)
    if match is None:
        return Part(text)
    share = Fraction(match["share"])
    if not share or not match["name"]:
        raise InputError(f"dataset {text!r}: expected NAME or NAME=SHARE with a share above 0, e.g. chats.jsonl=0.3")
    return Part(match["name"], share)


def shares(parts: Sequence[Part], sizes: Sequence[int]) -> list[Fraction]:
    """The share of every part in the mixture's rows; they add up to 1. sizes: rows of each part.

    Without any share, those of the sizes: all rows of all parts. Where all have one, their ratio counts. Where some
    have, theirs are fractions of the whole, and the rest is divided among the others by size.
    Raises InputError where nothing is left for those.
    """
    said = sum((part.share for part in parts if part.share is not None), Fraction(0))
    without = sum(size for part, size in zip(parts, sizes, strict=True) if part.share is None)
    if all(part.share is not None for part in parts):
        return [part.share / said for part in parts if part.share is not None]
    if said >= 1:
        names = ", ".join(part.name for part in parts if part.share is None)
        raise InputError(f"the shares of the data sets add up to {float(said):g}, so nothing is left for {names}; "
                         "give every data set a share, or smaller ones")  # fmt: skip
    return [
        (1 - said) * size / without if part.share is None else part.share
        for part, size in zip(parts, sizes, strict=True)
    ]


def row_counts(wanted: Sequence[Fraction], sizes: Sequence[int]) -> list[int]:
    """Rows to take of each part, at least one: as many in all as the shares allow without taking a row twice; rounded so
    that the sum is right (largest remainders)."""
    total = min(int(size / share) for size, share in zip(sizes, wanted, strict=True))
    exact = [total * share for share in wanted]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda which: counts[which] - exact[which])
    for which in by_remainder[: total - sum(counts)]:
        counts[which] += 1
    return [max(1, count) for count in counts]


def mix(parts: Sequence[Part], rows: Sequence[Sequence[Any]], seed: int) -> ChosenRows:
    """The mixture's rows in an order of `seed`; which rows of a part, where not all are taken, is chosen by it, too."""
    sizes = [len(part_rows) for part_rows in rows]
    empty = [part.name for part, size in zip(parts, sizes, strict=True) if size == 0]
    if empty:
        raise InputError(f"{', '.join(empty)}: no rows to mix")
    counts = row_counts(shares(parts, sizes), sizes)
    # a stream of its own, so that the choice is not the order in which batches take the rows
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, 2**64 - 1], np.uint64)))
    begins = np.cumsum([0, *sizes[:-1]])
    chosen = [
        begin + (generator.permutation(size)[:count]) for begin, size, count in zip(begins, sizes, counts, strict=True)
    ]
    return ChosenRows(JoinedRows(rows), generator.permutation(np.concatenate(chosen)))
