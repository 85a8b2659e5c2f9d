"""Files of records, read record by record: JSON Lines, JSON, CSV, parquet. A record is what stands there, unconverted."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mint.errors import DataError

COMPRESSED = (".gz", ".zst")
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
FORMATS = (*TEXT_FORMATS, ".parquet")
CELL_BYTES = 2**31 - 1  # of CSV; the standard library's own limit of 128 kB is less than a long conversation
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Records(Protocol):
    """The records of one file."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Of a format that names them once for all; empty for JSON, where every record names its own."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Raises DataError where that one cannot be read."""

    def place(self, number: int) -> str:
        """Of a record, for people: "FILE, row 3 (line 7)". Rows count from 0, lines from 1."""


def format_of(name: str) -> str:
    """The suffix that tells the format, below that of a compression: ".jsonl" of chats.jsonl.gz; "" where it is none."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return path.suffix if path.suffix in TEXT_FORMATS else ""
    return path.suffix if path.suffix in FORMATS else ""


def open_records(path: Path, name: str) -> Records:
    """The records of an uncompressed file. name: what messages call it.

    Text files are indexed, not loaded; parquet is converted once by `datasets` into its cache and memory-mapped; a JSON
    array is read whole. Raises DataError where the file as a whole cannot be used.
    """
    kind = format_of(path.name)
    if kind == ".parquet":
        return _open_table(path, name)
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty")
    if kind in _DELIMITERS:
        return _open_csv(path, name, _DELIMITERS[kind])
    if kind == ".json":
        text = path.read_bytes()
        if not _is_json_lines(text):
            return ListRecords(name, _json_array(text, name))
    return _index(path, name, JsonLine())


@dataclass(frozen=True, slots=True)
class Cut:
    """One record of a text file: its bytes, where they begin, and the number of its first line (from 1)."""

    start: int
    line: int
    data: bytes


def cut_records(stream: Iterable[bytes], name: str, *, quoted: bool) -> Iterator[Cut]:
    """The records of a stream of lines: one a line, blank ones left out.

    quoted: a line break within double quotes does not end a record (CSV).
    Raises DataError for a quote that is never closed.
    """
    held: list[bytes] = []
    start = offset = 0
    first = 1
    inside = False
    for number, line in enumerate(stream, 1):
        if not held:
            start, first = offset, number
        held.append(line)
        offset += len(line)
        if quoted and line.count(b'"') % 2:
            inside = not inside
        if inside:
            continue
        data = b"".join(held)
        held.clear()
        if data.strip():
            yield Cut(start, first, data)
    if held:
        raise DataError(
            f"{name}, line {first}: a double quote is opened and never closed; write a quote in a field twice"
        )


@dataclass(frozen=True, slots=True)
class JsonLine:
    """Reads a line of JSON Lines."""

    columns: tuple[str, ...] = ()

    def __call__(self, data: bytes) -> dict[str, Any]:
        try:
            record = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"not valid JSON ({error})") from None
        return _require_object(record)


@dataclass(frozen=True, slots=True)
class CsvLine:
    """Reads a record of a CSV file; every field is text, as it stands there."""

    columns: tuple[str, ...]
    delimiter: str

    def __call__(self, data: bytes) -> dict[str, Any]:
        cells = _cells(data, self.delimiter)
        if len(cells) != len(self.columns):
            raise DataError(f"{len(cells)} fields, but the header names {len(self.columns)}")
        return dict(zip(self.columns, cells, strict=True))


class TextRecords:
    """Records of a text file. Only where each begins is kept, 16 bytes a record."""

    def __init__(self, path: Path, name: str, read: JsonLine | CsvLine, starts: array[int], lines: array[int]) -> None:
        """starts: of every record, and the end of the last."""
        self._path, self._name, self._read, self._starts, self._lines = path, name, read, starts, lines

    @property
    def columns(self) -> tuple[str, ...]:
        return self._read.columns

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> dict[str, Any]:
        # opened for every record: no state, and no page of the file counts as this process's memory
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._starts[number])
            data = file.read(self._starts[number + 1] - self._starts[number])
        try:
            return self._read(data.strip(b"\r\n"))
        except DataError as error:
            raise DataError(f"{self.place(number)}: {error}") from None

    def place(self, number: int) -> str:
        return f"{self._name}, row {number} (line {self._lines[number]})"


class ListRecords:
    """Records that are in memory already."""

    columns: tuple[str, ...] = ()

    def __init__(self, name: str, records: list[Any]) -> None:
        self._name, self._records = name, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return _require_object(self._records[number])
        except DataError as error:
            raise DataError(f"{self.place(number)}: {error}") from None

    def place(self, number: int) -> str:
        return f"{self._name}, row {number}"


class TableRecords:
    """Records of a memory-mapped `datasets.Dataset`: a million rows cost no memory."""

    def __init__(self, name: str, table: Any) -> None:
        self._name, self._table = name, table

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._table.column_names)

    def select(self, columns: list[str]) -> TableRecords:
        """The same rows with these columns only; others are not read."""
        return TableRecords(self._name, self._table.select_columns(columns))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        record: dict[str, Any] = self._table[number]
        return record

    def place(self, number: int) -> str:
        return f"{self._name}, row {number}"


def _index(path: Path, name: str, read: JsonLine | CsvLine) -> TextRecords:
    starts, lines = array("Q"), array("Q")
    with path.open("rb") as file:
        for cut in cut_records(file, name, quoted=isinstance(read, CsvLine)):
            starts.append(cut.start)
            lines.append(cut.line)
        starts.append(file.tell())
    if isinstance(read, CsvLine):
        del starts[0], lines[0]  # the header
    return TextRecords(path, name, read, starts, lines)


def _open_csv(path: Path, name: str, delimiter: str) -> TextRecords:
    with path.open("rb") as file:
        header = next(cut_records(file, name, quoted=True), None)
    return _index(path, name, CsvLine(csv_columns(header.data if header else b"", delimiter, name), delimiter))


def delimiter_of(kind: str) -> str | None:
    """Of a format of FORMATS; None where it is no table of text."""
    return _DELIMITERS.get(kind)


def csv_columns(header: bytes, delimiter: str, name: str) -> tuple[str, ...]:
    """Raises DataError where the first record of a CSV file does not name columns."""
    csv.field_size_limit(CELL_BYTES)
    try:
        columns = tuple(_cells(header, delimiter)) if header else ()
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if not columns or len(set(columns)) < len(columns) or not all(columns):
        raise DataError(f"{name}: the first line must name every column once; it reads {list(columns)}")
    return columns


def _cells(data: bytes, delimiter: str) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
        return next(csv.reader(io.StringIO(text.strip("\r\n"), newline=""), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"not valid CSV ({error})") from None


def _open_table(path: Path, name: str) -> TableRecords:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        return TableRecords(name, Dataset.from_parquet(str(path)))
    except (DatasetGenerationError, ArrowInvalid) as error:
        reason = error.__cause__ or error
        raise DataError(f"{name}: not a parquet file that can be read ({reason})") from error


def _is_json_lines(text: bytes) -> bool:
    """Many a .json is JSON Lines: an object ends with the first line, and it is not {"data": [...]}."""
    first = text.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")[0]
    if not first.startswith(b"{"):
        return False
    try:
        return not isinstance(json.loads(first).get("data"), list)
    except (ValueError, RecursionError):
        return False


def _json_array(text: bytes, name: str) -> list[Any]:
    try:
        found = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not valid JSON ({error})") from None
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list):
        keys = f" with {', '.join(map(repr, found))}" if isinstance(found, dict) else ""
        raise DataError(f"{name}: expected a list of records, or {{'data': [...]}}, got {type(found).__name__}{keys}")
    return found


def _require_object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"expected an object with named fields, got {type(record).__name__}")
    return record
