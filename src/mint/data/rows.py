"""Rows of data sets as sequences that read a row when it is asked for, and that know where each comes from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from mint.chat import UnusableRow
from mint.data.records import Records
from mint.data.schemas import Schema
from mint.errors import DataError


class FileRows(Sequence[Any]):
    """The rows of one file. A record that does not fit its schema is an UnusableRow that says where it stands and why."""

    def __init__(self, records: Records, schema: Schema) -> None:
        self._records, self._schema = records, schema

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _sliced(self, index)
        number = _checked(index, len(self))
        try:
            record = self._records[number]
        except DataError as error:
            return UnusableRow(str(error))
        try:
            return self._schema.row(record)
        except DataError as error:
            return UnusableRow(f"{self.origin(number)}: {error}")

    def origin(self, number: int) -> str:
        return self._records.place(number)


class JoinedRows(Sequence[Any]):
    """Several sequences of rows, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = tuple(parts)
        self._ends = list(accumulate(map(len, self._parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _sliced(self, index)
        part, number = self._find(_checked(index, len(self)))
        return part[number]

    def origin(self, number: int) -> str:
        return origin(*self._find(number))

    def _find(self, number: int) -> tuple[Sequence[Any], int]:
        which = bisect_right(self._ends, number)
        return self._parts[which], number - (self._ends[which - 1] if which else 0)


class ChosenRows(Sequence[Any]):
    """Rows of another sequence by their numbers, in that order."""

    def __init__(self, rows: Sequence[Any], numbers: npt.ArrayLike) -> None:
        self._rows, self._numbers = rows, np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return ChosenRows(self._rows, self._numbers[index])
        return self._rows[int(self._numbers[_checked(index, len(self))])]

    def origin(self, number: int) -> str:
        return origin(self._rows, int(self._numbers[number]))


class NamedRows(Sequence[Any]):
    """Rows that are in memory already, of something with a name."""

    def __init__(self, name: str, rows: Sequence[Any]) -> None:
        self._name, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._rows[index]

    def origin(self, number: int) -> str:
        return f"{self._name}, row {number}"


def origin(rows: Sequence[Any], number: int) -> str:
    """Where row `number` of a chat set comes from, for people: "chats.jsonl, row 3 (line 4)". Rows count from 0."""
    found = getattr(rows, "origin", None)
    return str(found(number)) if found is not None else f"row {number}"


def _sliced(rows: Sequence[Any], index: slice) -> ChosenRows:
    return ChosenRows(rows, np.arange(*index.indices(len(rows))))


def _checked(index: int, length: int) -> int:
    """`index` counted from the front. Raises IndexError."""
    number = index + length if index < 0 else index
    if not 0 <= number < length:
        raise IndexError(f"row {index} of {length}")
    return int(number)
