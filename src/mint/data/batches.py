"""Seeded batches that can be taken up again: the cursor says everything about where one is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar, cast

from mint.data.orders import Order, epoch_order, require_shuffle_buffer
from mint.data.workers import Preparation, Workers, successful
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
    A batch holds no row twice: rows that do not fill the last batch of an epoch sit it out, others each time.

    shuffle_buffer: shuffle blocks of so many rows instead of all, for rows that are streamed (see `epoch_order`).
    workers: processes that prepare rows ahead of their turn, about four batches of them; 0 prepares them here. Batches,
    cursors and what `prepare` counts are the same for every number. They need a `prepare` in two halves, such as
    `mint.chat.Converter`, and end with `close()` or with this object.

    Raises InputError where there are fewer rows than a batch takes, DataError where a whole epoch does not fill a batch,
    OperationError where a worker died.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        batch_size: int,
        seed: int = 0,
        cursor: Cursor | None = None,
        *,
        prepare: Callable[[int, Any], list[T]] | None = None,
        workers: int = 0,
        shuffle_buffer: int | None = None,
    ) -> None:
        if not 1 <= batch_size <= len(rows):
            raise InputError(f"batch_size={batch_size}: must lie in 1..{len(rows)}, the number of rows")
        if workers < 0:
            raise InputError(f"workers={workers}: must be 0 (rows are prepared in this process) or more")
        self._rows, self._batch_size = _Ordered(rows, seed, shuffle_buffer), batch_size
        self._prepare: Callable[[int, Any], list[T]] = prepare or _as_it_is
        self.cursor = cursor or Cursor()
        self._ahead = _Ahead(self._rows, batch_size, workers, self._prepare, self.cursor) if workers else None

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

    def close(self) -> None:
        """Ends the worker processes, if there are any."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> Batches[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, cursor: Cursor) -> tuple[list[T] | None, Cursor]:
        """The batch that begins at `cursor` and where the next one does; None where the epoch ends before it is full."""
        batch: list[T] = []
        found = 0
        for position in range(cursor.position, len(self._rows)):
            made = self._made_at(Cursor(cursor.epoch, position))
            batch += made
            found += bool(made)
            if found == self._batch_size:
                return batch, Cursor(cursor.epoch, position + 1)
        return None, Cursor(cursor.epoch + 1, 0)

    def _made_at(self, place: Cursor) -> list[T]:
        return self._prepare(*self._rows.at(place)) if self._ahead is None else self._ahead.made_at(place)


class _Ordered:
    """Rows in the order of every epoch."""

    def __init__(self, rows: Sequence[Any], seed: int, shuffle_buffer: int | None) -> None:
        require_shuffle_buffer(shuffle_buffer)
        self._rows, self._seed, self._shuffle_buffer = rows, seed, shuffle_buffer
        self._orders: dict[int, Order] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, place: Cursor) -> tuple[int, Any]:
        """The row at that place, and its number."""
        number = int(self._order(place.epoch)[place.position])
        return number, self._rows[number]

    def after(self, place: Cursor) -> Cursor:
        last = place.position + 1 == len(self._rows)
        return Cursor(place.epoch + 1, 0) if last else Cursor(place.epoch, place.position + 1)

    def starting_at(self, place: Cursor) -> Iterator[tuple[int, Any]]:
        while True:
            yield self.at(place)
            place = self.after(place)

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            # two epochs are in use where rows are prepared ahead of their turn
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = epoch_order(len(self._rows), self._seed, epoch, self._shuffle_buffer)
        return self._orders[epoch]


class _Ahead(Generic[T]):
    """Rows prepared by workers before their turn. Whoever asks for another place than the next ones starts it anew."""

    def __init__(
        self, rows: _Ordered, batch_size: int, workers: int, prepare: Callable[[int, Any], list[T]], start: Cursor
    ) -> None:
        if not (hasattr(prepare, "outcomes") and hasattr(prepare, "take")):
            raise InputError(
                f"workers={workers}: prepare must come in two halves, outcomes(rows) and take(outcome), as "
                "mint.chat.Converter does; use workers=0 with any other function"
            )
        self._rows, self._batch_size = rows, batch_size
        self._preparation = cast("Preparation[Any, T]", prepare)
        # a training step hands nothing out, so what the workers have by then is to last for two batches
        self._workers = Workers(self._preparation.outcomes, workers, chunk_rows=-(-2 * batch_size // workers))
        self._next = start if start.position + batch_size <= len(rows) else Cursor(start.epoch + 1, 0)
        self._outcomes = self._workers.outcomes(rows.starting_at(self._next))

    def made_at(self, place: Cursor) -> list[T]:
        if not self._comes_to(place):
            self._begin(place)
        while True:
            # first the place, so that an interrupt anywhere here makes the next call begin anew
            found, self._next = self._next, self._rows.after(self._next)
            try:
                outcome = next(self._outcomes)
            except StopIteration:  # an error has ended the stream before
                self._begin(place)
                continue
            if found == place:
                return self._preparation.take(successful(outcome))

    def close(self) -> None:
        self._workers.close()

    def _begin(self, place: Cursor) -> None:
        self._next = place
        self._outcomes = self._workers.outcomes(self._rows.starting_at(place))

    def _comes_to(self, place: Cursor) -> bool:
        """At once, or after the rows that are left over at the end of an epoch."""
        left = len(self._rows) - self._next.position
        return place == self._next or (place == Cursor(self._next.epoch + 1, 0) and left < self._batch_size)


def _as_it_is(_: int, row: Any) -> list[Any]:
    return [row]
