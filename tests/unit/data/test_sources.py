"""Sets by their names: files of every format, folders, hub data sets; schema, columns, splits and mixtures together."""

import csv
import functools
import gzip
import json
import logging
import pickle
import subprocess
import sys
import textwrap
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.fakehub import FakeHub
from tests.unit.chat.conversations import trained_texts
from tests.unit.chat.tiny_tokenizers import tokenizer_of

from mint.chat import Converter, UnusableRow
from mint.data import load_chat_set, origin
from mint.data.sources import hub_splits
from mint.errors import DataError, InputError
from mint.hub import HubListing, matching

PAIRS = "prompt=prompt,completion=completion"


def turns(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}]


def records(name, count):
    return [{"prompt": f"{name} {i}", "completion": f"{name.upper()} {i}"} for i in range(count)]


def write(path, found):
    """`found` in the format of the path's name."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(found), path)
        return
    plain = path.parent / f"plain-{name}" if name != path.name else path
    if name.endswith((".csv", ".tsv")):
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, found[0], delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(found)
    else:
        plain.write_text(json.dumps(found) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in found))
    if plain is not path:
        content = plain.read_bytes()
        plain.unlink()
        path.write_bytes(
            gzip.compress(content) if path.suffix == ".gz" else pa.Codec("zstd").compress(content, asbytes=True)
        )


def texts(rows):
    return sorted(row[0]["content"] for row in rows)


def names(name, count):
    return sorted(f"{name} {i}" for i in range(count))


@pytest.mark.parametrize(
    "name",
    [f"a{f}{c}" for f in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") for c in ("", ".gz", ".zst")] + ["a.parquet"],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    write(tmp_path / name, records("r", 20))
    chats = load_chat_set(str(tmp_path / name), seed=3)
    whole = [*chats.train, *chats.test]
    assert sorted(whole, key=str) == sorted((turns(f"r {i}") for i in range(20)), key=str)
    write(tmp_path / "b.jsonl", records("r", 20)[::-1])
    assert texts(load_chat_set(str(tmp_path / "b.jsonl"), seed=3).test) == texts(chats.test)
    for rows in (chats.train, pickle.loads(pickle.dumps(chats.train))):
        number = int(rows[3][0]["content"].split()[1])
        assert origin(rows, 3).startswith(f"{tmp_path / name}, row {number}")


def test_the_name_of_a_single_set_may_end_like_a_share(tmp_path):
    write(tmp_path / "set=2" / "a.jsonl", records("r", 10))
    chats = load_chat_set(str(tmp_path / "set=2"))
    assert len(chats.train) == 9 and chats.name == str(tmp_path / "set=2")
    assert len(load_chat_set([f"{tmp_path}/set=2=1", "packaged=1"]).train) == 18


def test_what_was_found_is_told(tmp_path, caplog):
    write(tmp_path / "a.jsonl", [{"id": i, "conversations": [{"from": "human", "value": "q"}]} for i in range(3)])
    with caplog.at_level(logging.INFO, "mint"):
        load_chat_set(str(tmp_path / "a.jsonl"), test=tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl: schema sharegpt: conversations -> messages, 3 rows" in caplog.messages
    assert f"{tmp_path}/a.jsonl: columns that are not used: id" in caplog.messages


def test_rows_that_cannot_be_read_are_counted_with_file_row_and_field(tmp_path):
    lines = [
        json.dumps({"messages": turns("a")}),
        "{oops",
        json.dumps({"messages": "x"}),
        json.dumps({"messages": turns("b")}),
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write(tmp_path / "t.jsonl", [{"messages": turns("t")}])
    rows = load_chat_set(str(tmp_path / "a.jsonl"), test=tmp_path / "t.jsonl").train
    assert [isinstance(row, UnusableRow) for row in rows] == [False, True, True, False]
    assert rows[1].error.startswith(f"{tmp_path}/a.jsonl, row 1 (line 2): not valid JSON (")
    assert rows[2].error == (
        f"{tmp_path}/a.jsonl, row 2 (line 3): field 'messages': expected a list of messages, got text that is not JSON"
    )
    converter = Converter(tokenizer_of("smollm2"), 256)
    assert sum(len(converter(number, rows[number])) for number in range(4)) == 2
    assert converter.report.skipped_rows == {"unreadable": [1, 2]}


def test_answers_within_a_prompt_are_context(tmp_path):
    tokenizer = tokenizer_of("smollm2")
    prompt = [*turns("first"), {"role": "user", "content": "again"}]
    write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": "answer"}, {"text": "plain text"}])
    rows = load_chat_set(str(tmp_path / "a.jsonl"), test=tmp_path / "a.jsonl", columns=PAIRS).train
    (datum,) = Converter(tokenizer, 256)(0, rows[0])
    assert trained_texts(tokenizer, datum) == ["answer<|im_end|>"]
    assert rows[1].error.endswith("row 1 (line 2): field 'prompt': not there")


def test_a_parquet_file_that_was_written_anew_is_read_anew(tmp_path):
    for name in "ab":
        write(tmp_path / "a.parquet", records(name, 12))
        chats = load_chat_set(str(tmp_path / "a.parquet"))
        assert texts([*chats.train, *chats.test]) == names(name, 12)


def test_a_folder_is_the_set_of_its_files_in_order(tmp_path, caplog):
    for name, count in {"b.csv": 3, "a.jsonl": 2, "sub/c.parquet": 4}.items():
        write(tmp_path / "set" / name, records(name[0] if "/" not in name else "c", count))
    (tmp_path / "set" / "model.pkl").write_bytes(b"never opened")
    (tmp_path / "set" / ".hidden.jsonl").write_text("{")
    write(tmp_path / "t.jsonl", records("t", 1))
    with caplog.at_level(logging.INFO, "mint"):
        chats = load_chat_set(str(tmp_path / "set"), test=str(tmp_path / "t.jsonl"))
    assert [row[0]["content"] for row in chats.train] == [*names("a", 2), *names("b", 3), *names("c", 4)]
    assert origin(chats.train, 4) == f"{tmp_path}/set/b.csv, row 2 (line 4)"
    assert any("1 other files there are left alone" in message for message in caplog.messages)


def test_a_folder_with_splits_and_how_else_rows_are_held_out(tmp_path):
    for name, count in {"train": 20, "validation": 3, "other": 2}.items():
        write(tmp_path / "set" / f"{name}.jsonl", records(name, count))
    (tmp_path / "set" / "other.jsonl").rename(tmp_path / "set" / "dev.jsonl")
    folder = str(tmp_path / "set")
    chats = load_chat_set(folder)
    assert (texts(chats.train), texts(chats.test)) == (names("train", 20), names("validation", 3))
    assert texts(load_chat_set(folder, test=":dev").test) == names("other", 2)
    assert texts(load_chat_set(f"{folder}:dev", test=f"{folder}:train").train) == names("other", 2)
    assert texts(load_chat_set(f"{folder}:dev", test=f"{folder}:train").test) == names("train", 20)
    tenth = load_chat_set(folder, test=0.25)
    assert len(tenth.test) == 5 and texts([*tenth.train, *tenth.test]) == names("train", 20)
    assert list(load_chat_set(folder, test="0.25").test) == list(tenth.test)
    with pytest.raises(DataError, match="has the splits dev, train, validation, no 'x' to evaluate on"):
        load_chat_set(folder, test=":x")
    with pytest.raises(DataError, match=r"no 'x'; name one of them, e\.g\. .*/set:dev"):
        load_chat_set(f"{folder}:x")


def test_mixtures_of_files_with_columns_of_their_own(tmp_path):
    write(tmp_path / "a.jsonl", [{"messages": turns(f"a {i}")} for i in range(100)])
    write(tmp_path / "b.csv", [{"question": f"b {i}", "answer": "x"} for i in range(50)])
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")
    options = {"columns": f"{b}:prompt=question,completion=answer", "seed": 1}
    chats = load_chat_set([a, f"{b}=0.25"], **options)
    counts = [sum(row[0]["content"].startswith(name) for row in chats.train) for name in "ab"]
    assert counts == [90, 30] and chats.name == f"{a} + {b}=0.25"
    assert len(chats.test) == 13 and {row[0]["content"][0] for row in chats.test} == {"a", "b"}
    for number in range(len(chats.train)):
        name, row = chats.train[number][0]["content"].split()
        assert origin(chats.train, number).startswith(f"{a if name == 'a' else b}, row {row} ")
    assert list(load_chat_set([a, f"{b}=0.25"], **options).train) == list(chats.train)
    whole = load_chat_set([a, "packaged"], seed=1)
    assert len(whole.train) == 90 + 216 and len(whole.test) == 10 + 32


@pytest.mark.parametrize(
    ("name", "options", "kind", "error"),
    [
        (
            "{a}",
            {"columns": "messages=dialog"},
            DataError,
            "a.jsonl: there is no column 'dialog'; columns found: prompt,",
        ),
        ("{a}", {"columns": "b.csv:text=x"}, InputError, "there is no data set 'b.csv', only .*a.jsonl"),
        ("{a}", {"columns": ["text=prompt", "{a}:text=x"]}, InputError, "a.jsonl are given twice"),
        ("packaged", {"columns": "text=prompt"}, InputError, "packaged has known columns; leave them out"),
        ("{a}", {"test": ":dev"}, InputError, "test=':dev': .*a.jsonl is a single file without splits"),
        (
            "{a}",
            {"test": "no_robots"},
            InputError,
            "give a fraction, a :split, a file, folder, address or hub data set",
        ),
        ("{a}", {"test": "none.jsonl"}, DataError, "data set 'none.jsonl': there is no such file"),
        ("packaged", {"test": ":dev"}, InputError, "test=':dev': packaged has its own held-out rows"),
        (["{a}", "{a}=2"], {}, InputError, "give at least one set, and none twice"),
        ([], {}, InputError, "give at least one set"),
        ("{d}", {}, DataError, "holds no data file that can be read: .*parquet"),
        ("{d}/x.pkl", {}, DataError, "is not a data file that can be read .*; archives and pickles are never opened"),
        ("./nowhere", {}, DataError, "there is no such file or folder, and it is no name on the hub"),
        ("https://h/a.zip", {}, DataError, "the address must end in the name of a file that can be read"),
        ("{d}/empty.csv", {}, DataError, "empty.csv: holds no rows"),
        (
            "{d}/broken.jsonl",
            {},
            DataError,
            r"none of the first 2 rows can be read; .*row 0 \(line 1\): not valid JSON",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path, name, options, kind, error):
    write(tmp_path / "a.jsonl", records("a", 9))
    folder = tmp_path / "d"
    folder.mkdir()
    if not str(name).endswith("{d}"):
        for file, text in {"x.pkl": "x", "empty.csv": "text\n", "broken.jsonl": "{\n[\n"}.items():
            (folder / file).write_text(text)
    fill = lambda text: text.format(a=tmp_path / "a.jsonl", d=folder)  # noqa: E731
    filled = {key: fill(value) if isinstance(value, str) else list(map(fill, value)) for key, value in options.items()}
    with pytest.raises(kind, match=error):
        load_chat_set(fill(name) if isinstance(name, str) else list(map(fill, name)), **filled)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("data/*.jsonl", ["data/a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "data/a.jsonl", "data/en/b.jsonl"]),
        ("data/**", ["data/a.jsonl", "data/en/b.jsonl"]),
        ("?.jsonl", ["a.jsonl"]),
        ("a.jsonl", ["a.jsonl"]),
        ("data/en/b.jsonl", ["data/en/b.jsonl"]),
    ],
)
def test_patterns_of_cards(pattern, found):
    assert matching(["a.jsonl", "data/a.jsonl", "data/en/b.jsonl", "aXjsonl"], pattern) == found


def listing(files, configs=()):
    return HubListing("o/n", "c" * 40, list(files), list(configs))


def test_splits_of_a_hub_set_are_those_of_its_card_else_of_its_paths():
    files = ["README.md", "en/train.jsonl", "en/test.jsonl", "de/train.jsonl", "x/train.parquet", "dataset_infos.json"]
    assert hub_splits(listing(files), None) == {"train": ["x/train.parquet"], "test": ["en/test.jsonl"]}
    assert hub_splits(listing(files), "en") == {"train": ["en/train.jsonl"], "test": ["en/test.jsonl"]}
    card = [
        {"config_name": "en", "data_files": [{"split": "train", "path": "en/tr*"}, {"split": "t", "path": ["en/te*"]}]},
        {"config_name": "de", "data_files": "de/*"},
    ]
    assert hub_splits(listing(files, card), "en") == {"train": ["en/train.jsonl"], "t": ["en/test.jsonl"]}
    assert hub_splits(listing(files, card), "de") == hub_splits(listing(files, card[1:]), None)
    assert hub_splits(listing(files, [card[0], {**card[1], "default": True}]), None) == {"train": ["de/train.jsonl"]}
    with pytest.raises(
        DataError, match=r"o/n has the configurations en, de; name one and its split, e\.g\. o/n:en/train"
    ):
        hub_splits(listing(files, card), None)
    with pytest.raises(DataError, match="o/n on the hub holds no data file that can be read"):
        hub_splits(listing(["run.py", "data.zip"]), None)


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a server of the files in tmp_path / "web"."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "web").mkdir()
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path / "web"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_file_of_the_web_is_read_like_any_other(tmp_path, address, mint_home):
    write(tmp_path / "web" / "a.csv.gz", records("w", 12))
    url = f"{address}/a.csv.gz"
    chats = load_chat_set(url)
    assert texts([*chats.train, *chats.test]) == names("w", 12)
    number = int(chats.train[5][0]["content"].split()[1])
    assert origin(chats.train, 5) == f"{url}, row {number} (line {number + 2})"
    (tmp_path / "web" / "a.csv.gz").unlink()
    assert list(load_chat_set(url).test) == list(chats.test)  # from the copy
    assert sorted(path.parent.name for path in (mint_home / "datasets").rglob("*.*")) == ["unpacked", "web"]


SHOW = """
    import json, sys
    from mint.data import load_chat_set, origin

    chats = load_chat_set(sys.argv[1])
    print(json.dumps([len(chats.train), len(chats.test), origin(chats.train, 2)]))
"""


def test_a_hub_set_is_downloaded_by_split_and_read_from_the_cache_afterwards(tmp_path):
    repo = tmp_path / "hub" / "datasets" / "some" / "chats"
    for number in range(2):
        write(repo / "data" / f"train_sft-{number:05d}-of-00002.parquet", records("a", 2))
    write(repo / "data" / "test_sft-00000-of-00001.parquet", records("t", 3))
    write(repo / "data" / "train_gen-00000-of-00001.parquet", records("g", 5))
    empty = tmp_path / "empty"
    empty.mkdir()
    with FakeHub(tmp_path / "hub") as hub:
        env = hub.env(tmp_path / "hf")
        for _ in range(2):
            command = [sys.executable, "-c", textwrap.dedent(SHOW), "some/chats:train_sft"]
            done = subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == [4, 3, "some/chats/data/train_sft-00001-of-00002.parquet, row 0"]
            asked = [path for _, path, _ in hub.requests if "/resolve/" in path]
            assert not [path for path in asked if "train_gen" in path]
        first = len(hub.requests)
        command[-1] = "some/chats"
        done = subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True, timeout=120)
        assert "some/chats has the splits test_sft, train_gen, train_sft; name one of them" in done.stderr
        assert len(hub.requests) == first  # answered from the kept list of files
