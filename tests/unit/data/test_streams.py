"""Streamed records: those of the indexed files, read forward once per epoch, with a bounded number in memory."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.data.test_sources import records, write

from mint.chat import UnusableRow
from mint.data import Batches, load_chat_set, origin, streams
from mint.data.records import open_records
from mint.data.streams import StreamedRecords
from mint.errors import DataError, OperationError

FILES = ("a.jsonl", "b.csv.gz", "c.tsv", "d.jsonl.zst", "e.parquet", "f.csv.zst", "g.ndjson.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    for number, name in enumerate(FILES):
        write(folder / name, records(name[0], 3 + number))
    return folder


@pytest.fixture(scope="module")
def streamed(folder):
    return StreamedRecords([(folder / name, name) for name in FILES], window=4)


@given(numbers=st.lists(st.integers(0, 41), max_size=12))
def test_any_record_can_be_asked_for_in_any_order(streamed, numbers):
    expected = [(name, i, r) for number, name in enumerate(FILES) for i, r in enumerate(records(name[0], 3 + number))]
    assert len(streamed) == len(expected) == 42
    for number in numbers:
        name, row, record = expected[number]
        assert streamed[number] == record
        assert streamed.place(number).startswith(f"{name}, row {row}")
        assert len(streamed._held) <= 4


@pytest.mark.parametrize("name", ["a.jsonl", "c.tsv", "e.parquet"])
def test_streamed_and_indexed_records_are_the_same(folder, name):
    indexed, streamed = open_records(folder / name, name), StreamedRecords([(folder / name, name)], 2)
    assert streamed.columns == indexed.columns
    assert [(streamed[i], streamed.place(i)) for i in range(len(streamed))] == [
        (indexed[i], indexed.place(i)) for i in range(len(indexed))
    ]


def test_long_lines_cross_the_pieces_that_are_read(tmp_path):
    found = [{"text": str(i) * 700_000} for i in range(5)]
    write(tmp_path / "a.jsonl.gz", found)
    streamed = StreamedRecords([(tmp_path / "a.jsonl.gz", "a")], 1)
    assert [streamed[i] for i in range(5)] == found


def test_an_epoch_of_batches_reads_every_file_once(tmp_path, monkeypatch):
    for name in ("a.jsonl.gz", "b.parquet"):
        write(tmp_path / "set" / name, records(name[0], 150))
    chats = load_chat_set(str(tmp_path / "set"), shuffle_buffer=20, seed=2)
    assert len(chats.train) == 270 and len(chats.test) == 30
    opened = []
    monkeypatch.setattr(
        streams, "_records", lambda path, name, original=streams._records: opened.append(path) or original(path, name)
    )
    batches = Batches(chats.train, 10, shuffle_buffer=20)
    for epoch in range(2):
        seen = [row[0]["content"] for _ in range(27) for row in next(batches)]
        assert sorted(seen) == sorted(row[0]["content"] for row in chats.train) and seen != sorted(seen)
        # this epoch, and the line above that read the rows once more
        assert len(opened) == 2 * 2 * (epoch + 1)


def test_streamed_and_indexed_sets_hold_out_the_same_rows_and_report_the_same_places(tmp_path):
    lines = [json.dumps(r) for r in records("r", 30)]
    lines[7] = "{oops"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    plain, streamed = (load_chat_set(str(tmp_path / "a.jsonl"), shuffle_buffer=size) for size in (None, 5))
    assert list(streamed.test) == list(plain.test) and list(streamed.train) == list(plain.train)
    number = next(i for i, row in enumerate([*streamed.train]) if isinstance(row, UnusableRow))
    assert origin(streamed.train, number) == origin(plain.train, number) == f"{tmp_path}/a.jsonl, row 7 (line 8)"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.json", b"[]", r"a JSON file is read whole and cannot be streamed; write one record a line \(\.jsonl\)"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be unpacked, the file is damaged"),
        ("a.csv", b'a\n"1\n', "a.csv, line 2: a double quote is opened and never closed"),
        ("a.parquet", b"PAR1", "a.parquet: not a parquet file that can be read"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=error):
        StreamedRecords([(tmp_path / name, name)], 3)


def test_nested_parquet_is_streamed_as_written(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}]} for i in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    streamed = StreamedRecords([(tmp_path / "a.parquet", "a")], 1)
    assert [streamed[i] for i in (0, 299, 599)] == [rows[i] for i in (0, 299, 599)]


def test_a_file_that_has_become_shorter_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, records("r", 5))
    streamed = StreamedRecords([(path, "a.jsonl")], 2)
    write(path, records("r", 3))
    assert streamed[2] == records("r", 3)[2]
    with pytest.raises(OperationError, match=r"a\.jsonl: fewer rows than at the start; leave the files alone"):
        streamed[4]
