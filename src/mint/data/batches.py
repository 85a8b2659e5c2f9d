"""Seeded batches that can be taken up again: the cursor says everything about where one is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from mint.data.orders import Order, epoch_order
from mint.errors import DataError, InputError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next row to look at is number `position` in the order of epoch `epoch`. In a checkpoint it is JSON text."""

    epoch: int = 0
    position: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Cursor:
        try:
            return cls(**{key: int(value) for key, value in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"data cursor {text!r}: expected JSON such as {Cursor(0, 3).to_json()!r}") from None


class Batches(Generic[T]):
    """Endless batches of `batch_size` rows each, every epoch in an order of its own that (seed, epoch) alone decides.

    `prepare(number, row)` makes what a row contributes to its batch, when its turn comes: a list, empty where the row
    cannot be used; the next row takes its place. Without it a row is taken as it is. `next(batches)` is one flat list.
    shuffle_buffer: shuffle blocks of so many rows instead of all, for rows that are streamed (see `epoch_order`).
    A batch holds no row twice: rows that do not fill the last batch of an epoch sit it out, others each time.

    Raises InputError where there are fewer rows than a batch takes, DataError where a whole epoch does not fill a batch.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        batch_size: int,
        seed: int = 0,
        cursor: Cursor | None = None,
        *,
        prepare: Callable[[int, Any], list[T]] | None = None,
        shuffle_buffer: int | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(rows):
            raise InputError(f"batch_size={batch_size}: must lie in 1..{len(rows)}, the number of rows")
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._prepare: Callable[[int, Any], list[T]] = prepare or _as_it_is
        self._shuffle_buffer = shuffle_buffer
        self.cursor = cursor or Cursor()
        epoch = self.cursor.epoch
        self._order: tuple[int, Order] = epoch, epoch_order(len(rows), seed, epoch, shuffle_buffer)

    @property
    def batches_per_epoch(self) -> int:
        """Where every row can be used."""
        return len(self._rows) // self._batch_size

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        cursor = self.cursor
        if cursor.position + self._batch_size > len(self._rows):
            cursor = Cursor(cursor.epoch + 1, 0)
        whole_epochs = 0
        while whole_epochs < 2:  # the first may have begun in its middle
            batch, cursor = self._take(cursor)
            if batch is not None:
                self.cursor = cursor
                return batch
            whole_epochs += 1
        raise DataError(
            f"fewer than batch_size={self._batch_size} of the {len(self._rows)} rows can be used; see the report for "
            "the reasons, and lower the batch size or mend the data"
        )

    def _take(self, cursor: Cursor) -> tuple[list[T] | None, Cursor]:
        """The batch that begins at `cursor` and where the next one does; None where the epoch ends before it is full."""
        order = self._epoch_order(cursor.epoch)
        batch: list[T] = []
        found = 0
        for position in range(cursor.position, len(order)):
            number = int(order[position])
            made = self._prepare(number, self._rows[number])
            batch += made
            found += bool(made)
            if found == self._batch_size:
                return batch, Cursor(cursor.epoch, position + 1)
        return None, Cursor(cursor.epoch + 1, 0)

    def _epoch_order(self, epoch: int) -> Order:
        if self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self._rows), self._seed, epoch, self._shuffle_buffer)
        return self._order[1]


def _as_it_is(_: int, row: Any) -> list[Any]:
    return [row]
