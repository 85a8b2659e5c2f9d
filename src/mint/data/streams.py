"""Records of files that are read through again and again instead of being indexed: for sets larger than memory and disk."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from mint.data.records import COMPRESSED, CsvLine, JsonLine, csv_columns, cut_records, delimiter_of, format_of
from mint.errors import DataError, OperationError
from mint.hub import open_compressed

_BATCH_ROWS = 256  # of parquet, decoded at a time


@dataclass(frozen=True, slots=True)
class Waiting:
    """A record that was read and not yet parsed. place: for people."""

    place: str
    parse: Callable[[], dict[str, Any]] = field(repr=False)


class StreamedRecords:
    """The records of several files, one after the other, of which the last `window` read are held in memory.

    Any record can be asked for: one ahead is read up to, one that is held is there at once, and for one further back the
    files are read again from the beginning. So reading is quick for who goes forward and looks back no more than
    `window` records, and right for everybody. Nothing is unpacked or converted on disk.
    """

    def __init__(self, files: Sequence[tuple[Path, str]], window: int) -> None:
        """files: path and the name that messages call it. Reads text files through once, to count their records."""
        self._files, self._window = tuple(files), window
        self._lengths = [_count(path, name) for path, name in self._files]
        self._reset()
        first = next((f for f, length in zip(self._files, self._lengths, strict=True) if length), None)
        self.columns: tuple[str, ...] = _columns(*first) if first is not None else ()

    def __len__(self) -> int:
        return sum(self._lengths)

    def __getitem__(self, number: int) -> dict[str, Any]:
        found = self._find(number)
        try:
            return found.parse()
        except DataError as error:
            raise DataError(f"{found.place}: {error}") from None

    def place(self, number: int) -> str:
        return self._find(number).place

    def _find(self, number: int) -> Waiting:
        if number < self._next - len(self._held):
            self._reset()
        while self._next <= number:
            found = next(self._reading, None)
            if found is None:
                names = ", ".join(name for _, name in self._files)
                raise OperationError(
                    f"{names}: fewer rows than at the start; leave the files alone while they are read"
                )
            self._held.append(found)
            self._next += 1
        return self._held[number - self._next]  # counted from the end

    def _reset(self) -> None:
        self._held: deque[Waiting] = deque(maxlen=self._window)
        self._next = 0  # number of the record that is read next
        self._reading = chain.from_iterable(_records(path, name) for path, name in self._files)


def _records(path: Path, name: str) -> Iterator[Waiting]:
    kind = format_of(path.name)
    if kind == ".parquet":
        yield from _parquet_records(path, name)
        return
    delimiter = delimiter_of(kind)
    with _opened(path) as stream:
        cuts = cut_records(stream, name, quoted=delimiter is not None)
        read: JsonLine | CsvLine = JsonLine()
        try:
            if delimiter is not None:
                header = next(cuts, None)
                read = CsvLine(csv_columns(header.data if header else b"", delimiter, name), delimiter)
            for number, cut in enumerate(cuts):
                yield Waiting(f"{name}, row {number} (line {cut.line})", _later(read, cut.data.strip(b"\r\n")))
        except (OSError, EOFError) as error:  # of damaged compressed files
            raise DataError(
                f"{name}: cannot be unpacked, the file is damaged or not what its name says ({error})"
            ) from None


def _later(read: JsonLine | CsvLine, data: bytes) -> Callable[[], dict[str, Any]]:
    return lambda: read(data)


def _parquet_records(path: Path, name: str) -> Iterator[Waiting]:
    from pyarrow.parquet import ParquetFile

    number = 0
    with ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            for record in batch.to_pylist():
                yield Waiting(f"{name}, row {number}", lambda record=record: record)  # type: ignore[misc]
                number += 1


def _count(path: Path, name: str) -> int:
    kind = format_of(path.name)
    if kind == ".json":
        raise DataError(f"{name}: a JSON file is read whole and cannot be streamed; write one record a line (.jsonl)")
    if kind != ".parquet":
        return sum(1 for _ in _records(path, name))
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import read_metadata

    try:
        return int(read_metadata(path).num_rows)
    except ArrowInvalid as error:
        raise DataError(f"{name}: not a parquet file that can be read ({error})") from error


def _columns(path: Path, name: str) -> tuple[str, ...]:
    """Those that the format names once for all."""
    kind = format_of(path.name)
    if kind == ".parquet":
        from pyarrow.parquet import read_schema

        return tuple(read_schema(path).names)
    delimiter = delimiter_of(kind)
    if delimiter is None:
        return ()
    with _opened(path) as stream:
        header = next(cut_records(stream, name, quoted=True))
        return csv_columns(header.data, delimiter, name)


def _opened(path: Path) -> contextlib.AbstractContextManager[Any]:
    return _packed_lines(path) if path.suffix.lower() in COMPRESSED else path.open("rb")


@contextlib.contextmanager
def _packed_lines(path: Path) -> Iterator[Iterator[bytes]]:
    with open_compressed(path) as source:
        yield _lines(source)


def _lines(source: BinaryIO) -> Iterator[bytes]:
    """Lines of a stream that can only be read in pieces."""
    rest = b""
    while chunk := source.read(1 << 20):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest
