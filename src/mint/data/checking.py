"""Looks at every row of a chat set once and writes its certificate; the memory for it is about 100 bytes a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import tee
from typing import Any, Final

import numpy as np

from mint.chat import Converter, Renderer, TrainOn, skip_reason
from mint.chat.examples import Conversion
from mint.chat.report import RowOutcome
from mint.data.cache import CachedConverter
from mint.data.certificate import MAX_LOSS, Certificate, DroppedRows, Lengths, ModelFacts, SplitCertificate
from mint.data.chat_sets import ChatSet
from mint.data.duplicates import DuplicateFinder, Split
from mint.data.rendered_hash import RenderedHash
from mint.data.rows import origin
from mint.errors import DataError, InputError

LISTED_SYSTEM_TEXTS: Final = 20
AUTO_LENGTH_ROWS: Final = 20_000  # looked at to propose a length
SHORTEST_AUTO_LENGTH: Final = 256
_NO_LIMIT: Final = 2**62


class DataCheck:
    """`for _ in check.steps(): ...` looks at a row a step, training rows first; `certificate()` tells what was seen so far.

    limit: of training and of test rows each, so many evenly spaced ones are looked at; None: all.
    """

    def __init__(
        self,
        chats: ChatSet,
        converter: Converter | CachedConverter,
        model: ModelFacts,
        *,
        mint_version: str,
        limit: int | None = None,
        max_loss: float = MAX_LOSS,
    ) -> None:
        if limit is not None and limit < 1:
            raise InputError(f"limit={limit}: must be at least 1 row")
        if not 0 <= max_loss <= 1:
            raise InputError(f"max_loss={max_loss}: must be a share between 0 and 1, e.g. 0.05 for 5 %")
        self._chats, self._converter, self._model = chats, converter, model
        self._mint_version, self._limit, self._max_loss = mint_version, limit, max_loss
        self._train, self._test = _SplitCounter(chats.train), _SplitCounter(chats.test)
        self._finder = DuplicateFinder()
        self.total_rows = sum(len(evenly_spaced(len(rows), limit)) for rows in (chats.train, chats.test))

    def steps(self) -> Iterator[None]:
        yield from self._look_at("train", self._chats.train, self._train)
        yield from self._look_at("test", self._chats.test, self._test)

    def certificate(self) -> Certificate:
        train, test = self._train.finish(), self._test.finish()
        return Certificate(
            mint_version=self._mint_version,
            dataset=self._chats.name,
            model=self._model,
            renderer=dict(self._converter.renderer.settings),
            rules=asdict(self._converter.rules),
            max_loss=self._max_loss,
            is_sample=self.total_rows < train.rows_in_set + test.rows_in_set,
            is_interrupted=train.rows + test.rows < self.total_rows,
            train=train,
            test=test,
            duplicates=self._finder.find(self._row_at),
        )

    def _look_at(self, split: Split, rows: Sequence[Any], counter: _SplitCounter) -> Iterator[None]:
        numbered = ((number, rows[number]) for number in evenly_spaced(len(rows), self._limit))
        looked_at, converted = tee(numbered)  # the converter is a chunk of rows ahead
        for (number, row), outcome in zip(looked_at, self._converter.outcomes(converted), strict=True):
            if outcome.digest is not None:
                self._finder.add(split, number, row, outcome.digest)
            counter.take(outcome)
            yield

    def _row_at(self, split: Split, number: int) -> Any:
        return (self._chats.train if split == "train" else self._chats.test)[number]


class _SplitCounter:
    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows, self._found = rows, SplitCertificate(len(rows))
        self._lengths, self._rendered = array("Q"), RenderedHash()

    def take(self, outcome: RowOutcome) -> None:
        found = self._found
        found.rows += 1
        if outcome.conversion is not None:
            self._count_turns(outcome.conversion)
        if outcome.error is not None:
            _drop(found, self._rows, outcome.number, outcome.error)
        elif outcome.conversion is not None:
            found.used_rows += 1
            self._count_examples(outcome.number, outcome.conversion)

    def finish(self) -> SplitCertificate:
        self._found.lengths = _percentiles(self._lengths)
        self._found.rendered_sha256 = self._rendered.hexdigest()
        return self._found

    def _count_turns(self, conversion: Conversion) -> None:
        found = self._found
        found.turns += conversion.turns
        found.dropped_turns += conversion.dropped_turns
        found.shortened_turns += conversion.shortened_turns
        found.cut_tokens += conversion.cut_tokens
        self._lengths.append(conversion.length)

    def _count_examples(self, number: int, conversion: Conversion) -> None:
        found = self._found
        found.trailing_messages += conversion.trailing_messages
        for example in conversion.examples:
            found.examples += 1
            found.tokens += len(example.tokens) - 1
            found.trained_tokens += int(np.count_nonzero(example.weights[1:]))
            self._rendered.add_example(example.tokens, example.weights)
        for rows, applies in (
            (found.truncated, conversion.shortened_turns > 0),
            (found.split, conversion.is_split),
            (found.control_text, conversion.has_control_text),
        ):
            if applies:
                rows.add(number)
        if conversion.injected_system is not None:
            _count_system_text(found, conversion.injected_system)


def check_chat_set(
    chats: ChatSet,
    converter: Converter | CachedConverter,
    model: ModelFacts,
    *,
    mint_version: str,
    limit: int | None = None,
    max_loss: float = MAX_LOSS,
) -> Certificate:
    """The certificate of a set. Arguments as `DataCheck`. Rows that cannot be used are in it; nothing is raised for them."""
    check = DataCheck(chats, converter, model, mint_version=mint_version, limit=limit, max_loss=max_loss)
    for _ in check.steps():
        pass
    return check.certificate()


@dataclass(frozen=True, slots=True)
class ProposedLength:
    """max_length, and the share of the rows that are longer."""

    max_length: int
    longer_share: float


def propose_max_length(
    chats: ChatSet, renderer: Renderer, train_on: TrainOn, *, max_loss: float = MAX_LOSS, context: int | None = None
) -> ProposedLength:
    """The smallest of 256, 384, 512, 768, 1024, 1536, ... tokens that less than `max_loss` of the rows exceed.

    It is never more than `context`, even where more rows are longer. Looked at are up to AUTO_LENGTH_ROWS evenly spaced
    rows of training and of test rows each. Raises DataError where no row can be read.
    """
    uncut = Converter(renderer, _NO_LIMIT, train_on)
    lengths = array("Q")
    for rows in (chats.train, chats.test):
        numbered = ((number, rows[number]) for number in evenly_spaced(len(rows), AUTO_LENGTH_ROWS))
        for outcome in uncut.outcomes(numbered):
            if outcome.conversion is not None:
                lengths.append(outcome.conversion.length)
    if not lengths:
        raise DataError(f"data set {chats.name}: no row can be read, so no length can be proposed; give --max-length N")
    return fitting_length(lengths, max_loss, context)


def fitting_length(lengths: Iterable[int], max_loss: float, context: int | None) -> ProposedLength:
    """See `propose_max_length`."""
    known = np.fromiter(lengths, np.int64)
    length, following = SHORTEST_AUTO_LENGTH, SHORTEST_AUTO_LENGTH * 3 // 2
    while True:
        length = length if context is None else min(length, context)
        longer = int((known > length).sum())
        if longer == 0 or longer < max_loss * len(known) or length == context:
            return ProposedLength(length, longer / len(known))
        length, following = following, 2 * length


def evenly_spaced(total: int, limit: int | None) -> range | list[int]:
    """All numbers below `total`, or `limit` of them in equal steps where there are more, from 0 on."""
    if limit is None or total <= limit:
        return range(total)
    return [place * total // limit for place in range(limit)]


def _drop(found: SplitCertificate, rows: Sequence[Any], number: int, error: DataError) -> None:
    reason = skip_reason(error)
    if reason not in found.dropped:
        place = origin(rows, number)  # rows count within train or test; the file's own numbers are others
        where = "" if place == f"row {number}" or place in str(error) else f" ({place})"
        found.dropped[reason] = DroppedRows(f"row {number}{where}: {error}")
    found.dropped[reason].rows.add(number)


def _count_system_text(found: SplitCertificate, text: str) -> None:
    if text in found.injected_system or len(found.injected_system) < LISTED_SYSTEM_TEXTS:
        found.injected_system[text] = found.injected_system.get(text, 0) + 1
    else:
        found.further_injected_system += 1


def _percentiles(lengths: array[int]) -> Lengths | None:
    if not lengths:
        return None
    known = np.frombuffer(lengths, np.uint64)
    return Lengths(*(int(np.percentile(known, share, method="inverted_cdf")) for share in (50, 90, 95, 99, 100)))
