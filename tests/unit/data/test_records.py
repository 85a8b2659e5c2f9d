"""Files of records: every format gives the records that stand in it, as they stand there, and places for people."""

import csv
import gzip
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.data.records import TextRecords, format_of, open_records
from mint.errors import DataError

RECORDS = [{"a": 1, "b": None}, {"a": "ü\n", "c": {"x": [1.5]}}, {}]


def opened(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_records(path, path.name)


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("a.jsonl", ".jsonl"), ("A.JSONL", ".jsonl"), ("a.csv.gz", ".csv"), ("x/a.json.zst", ".json")],
        *[("a.parquet", ".parquet"), ("a.parquet.gz", ""), ("a.tar.gz", ""), ("a.zip", ""), ("a.pkl", ""), ("a", "")],
    ],
)
def test_the_format_is_that_of_the_name(name, expected):
    assert format_of(name) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(RECORDS)),
        ("a.jsonl", "\ufeff\n" + lines(RECORDS).replace("\n", "\r\n\r\n")),
        ("a.jsonl", lines(RECORDS).rstrip("\n")),
        ("a.json", lines(RECORDS)),  # JSON Lines under the wrong name
        ("a.json", json.dumps(RECORDS, indent=2)),
        ("a.json", json.dumps({"data": RECORDS, "version": 1})),
        ("a.json", json.dumps({"version": 1, "data": RECORDS}, indent=1)),
    ],
)
def test_json_files_hold_the_records_that_were_written(tmp_path, name, text):
    records = opened(tmp_path / name, text)
    if text.startswith("\ufeff\n"):  # the mark stands alone on its line
        assert [records[i + 1] for i in range(len(records) - 1)] == RECORDS
    else:
        assert [records[i] for i in range(len(records))] == RECORDS


def test_a_byte_order_mark_before_the_first_record_is_no_part_of_it(tmp_path):
    records = opened(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines(RECORDS).encode())
    assert records[0] == RECORDS[0]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


@given(rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6), tabs=st.booleans())
def test_csv_fields_are_the_texts_that_the_standard_library_writes(tmp_path_factory, rows, tabs):
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if tabs else "a.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([["a", "b,\n"], *rows])
    records = open_records(path, "a")
    assert records.columns == ("a", "b,\n")
    assert [records[i] for i in range(len(records))] == [{"a": row[0], "b,\n": row[1]} for row in rows]


def test_csv_keeps_text_that_looks_like_a_number_and_counts_the_lines_of_its_records(tmp_path):
    records = opened(tmp_path / "a.csv", 'id,text\n007,"two\nlines"\n\n1e3,\n')
    assert [records[0], records[1]] == [{"id": "007", "text": "two\nlines"}, {"id": "1e3", "text": ""}]
    assert (records.place(0), records.place(1)) == ("a.csv, row 0 (line 2)", "a.csv, row 1 (line 5)")


def test_a_long_csv_field_is_read_whole(tmp_path):
    records = opened(tmp_path / "a.csv", "text\n" + "x" * 300_000)
    assert records[0] == {"text": "x" * 300_000}


def test_parquet_holds_the_records_that_were_written_and_can_be_narrowed(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}], "id": i} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet", "a.parquet")
    assert [records[i] for i in range(5)] == rows and records.columns == ("messages", "id")
    assert records.select(["id"])[3] == {"id": 3} and records.place(3) == "a.parquet, row 3"


def test_only_the_record_that_is_asked_for_is_parsed_and_one_that_cannot_be_is_named(tmp_path):
    records = opened(tmp_path / "a.jsonl", '{"a": 1}\n{oops\n\n[1]\n"x"\n\xff'.encode("latin-1"))
    assert len(records) == 5 and records[0] == {"a": 1}
    for number, line, problem in [
        (1, 2, "not valid JSON"),
        (2, 4, "expected an object with named fields, got list"),
        (3, 5, "expected an object with named fields, got str"),
        (4, 6, "not valid JSON"),
    ]:
        with pytest.raises(DataError, match=rf"a\.jsonl, row {number} \(line {line}\): {problem}"):
            records[number]


def test_text_records_cross_process_borders(tmp_path):
    records = opened(tmp_path / "a.jsonl", lines(RECORDS))
    assert records[1] == RECORDS[1]
    again = pickle.loads(pickle.dumps(records))
    assert isinstance(again, TextRecords) and [again[i] for i in range(3)] == RECORDS


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        (
            "a.json",
            '{"rows": [],\n"b": 1}',
            r"expected a list of records, or \{'data': \[...\]\}, got dict with 'rows', 'b'",
        ),
        ("a.json", "[1, 2", "a.json: not valid JSON"),
        ("a.csv", "a,a\n1,2\n", "the first line must name every column once; it reads"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "a.csv, line 2: a double quote is opened and never closed"),
        ("a.parquet", "PAR1 it is not", "a.parquet: not a parquet file that can be read"),
    ],
)
def test_a_file_that_cannot_be_used_as_a_whole_is_refused(tmp_path, name, text, error):
    with pytest.raises(DataError, match=error):
        opened(tmp_path / name, text)


def test_a_csv_record_with_a_field_too_many_is_named(tmp_path):
    records = opened(tmp_path / "a.csv", "a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv, row 1 \(line 3\): 3 fields, but the header names 2"):
        records[1]


def test_gzip_is_not_opened_as_it_is(tmp_path):
    records = opened(tmp_path / "a.jsonl", gzip.compress(b'{"a": 1}\n'))
    with pytest.raises(DataError, match="not valid JSON"):
        records[0]
