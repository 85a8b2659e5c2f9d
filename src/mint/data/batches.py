"""Seeded batches that can be taken up again: the cursor says everything about where one is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import numpy as np

from mint.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next batch is number `batch` of epoch `epoch`. Stored in a checkpoint as JSON text."""

    epoch: int = 0
    batch: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        try:
            return cls(**{key: int(value) for key, value in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"data cursor {text!r}: expected JSON such as {Cursor(0, 3).to_json()!r}") from None


class Batches(Generic[T]):
    """Endless batches of `rows`, every epoch in an order of its own that depends on (seed, epoch) alone.

    A batch never holds a row twice: rows that do not fill a last batch sit the epoch out (`left_out` of them, others
    each time). Raises InputError where there are fewer rows than a batch takes.
    """

    def __init__(self, rows: Sequence[T], batch_size: int, seed: int = 0, cursor: Cursor | None = None) -> None:
        if not 1 <= batch_size <= len(rows):
            raise InputError(f"batch_size={batch_size}: must lie in 1..{len(rows)}, the number of rows")
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self.batches_per_epoch = len(rows) // batch_size
        self.left_out = len(rows) % batch_size
        self.cursor = cursor or Cursor()

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        epoch, batch = self.cursor.epoch, self.cursor.batch
        key = np.array([self._seed % 2**64, epoch], np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self._rows))
        chosen = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        last = batch + 1 == self.batches_per_epoch
        self.cursor = Cursor(epoch + 1, 0) if last else Cursor(epoch, batch + 1)
        return [self._rows[i] for i in chosen]
