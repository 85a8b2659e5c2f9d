"""The cache of conversions: nothing but time depends on it, whatever becomes of its file."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.disk import full_disk
from tests.unit.chat.conversations import CONVERSATIONS, HELLO, THREE_TURNS, TWO_TURNS
from tests.unit.chat.tiny_tokenizers import FAMILIES, make_tokenizer, tokenizer_of

from mint import settings
from mint.chat import Converter, UnusableRow, get_renderer
from mint.data import Batches, CachedConverter, ChatSet, DiskCache, cached
from mint.data.cache import fingerprint
from mint.data.certificate import ModelFacts
from mint.data.checking import check_chat_set
from mint.errors import UnsupportedError

ROWS: list[Any] = [
    *CONVERSATIONS.values(),
    UnusableRow("file.jsonl, line 3: no 'messages'"),
    [{"role": "user"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "much too long " * 60}],
    {"text": "Plain text, trained as it is."},
    {"messages": [*HELLO, *[{**message, "weight": 0.3} for message in TWO_TURNS[1::2]]], "tools": None},
    HELLO,
]


class Counting:
    """A converter that counts what it has to render."""

    def __init__(self, converter: Converter) -> None:
        self.inner, self.rendered = converter, 0
        self.renderer, self.rules = converter.renderer, converter.rules

    def outcome(self, number: int, row: Any) -> Any:
        self.rendered += 1
        return self.inner.outcome(number, row)


def same(outcome: Any) -> Any:
    """What two equal outcomes have in common: arrays are equal where type and values are, errors where their texts are."""
    if is_dataclass(outcome):
        return type(outcome), [(field.name, same(getattr(outcome, field.name))) for field in fields(outcome)]
    if isinstance(outcome, list | tuple):
        return type(outcome), [same(item) for item in outcome]
    if isinstance(outcome, np.ndarray):
        return outcome.dtype, outcome.tolist()
    return type(outcome), str(outcome) if isinstance(outcome, Exception) else outcome


@pytest.fixture
def store(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache" / "c.sqlite", 10**8)


def converter(name: str = "qwen3", max_length: int = 300, **options: Any) -> Converter:
    return Converter(tokenizer_of(name), max_length, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_overlong", ["drop", "truncate_right", "truncate_left_turns"])
def test_outcomes_are_the_same_with_an_empty_and_a_full_cache_and_under_another_number(store, family, on_overlong):
    plain = converter(family, on_overlong=on_overlong)
    expected = [same(plain.outcome(number, row)) for number, row in enumerate(ROWS, 7)]
    counting = Counting(converter(family, on_overlong=on_overlong))
    kept = CachedConverter(counting, store)
    for number, row in enumerate(ROWS):
        kept.outcome(number, row)
    assert counting.rendered == len(ROWS) - 1  # HELLO stands there twice
    assert [same(kept.outcome(number, row)) for number, row in enumerate(ROWS, 7)] == expected
    assert counting.rendered == len(ROWS)  # what is not JSON is never kept


def test_datums_and_report_are_the_same_in_batches_with_and_without_workers():
    plain = converter()
    expected = Batches(ROWS, 4, prepare=plain)
    batches = [next(expected) for _ in range(6)]
    for workers in (0, 1, 1):
        kept = cached(converter())
        with Batches(ROWS, 4, prepare=kept, workers=workers) as found:
            assert [next(found) for _ in range(6)] == batches
        assert kept.report == plain.report
    assert (settings.load().cache_dir / "conversions-1.sqlite").stat().st_size > 0


def test_the_certificate_of_a_set_is_the_same_and_training_finds_what_it_has_rendered(store):
    chats = ChatSet("set", [row for row in ROWS if row is not HELLO], [HELLO])
    facts = ModelFacts("model", None, None, "0" * 64, None)
    plain = check_chat_set(chats, converter(), facts, mint_version="1")
    counting = Counting(converter())
    kept = CachedConverter(counting, store)
    for _ in range(2):
        assert check_chat_set(chats, kept, facts, mint_version="1").to_json() == plain.to_json()
    rendered = counting.rendered
    for number, row in enumerate(chats.train):
        kept.outcome(number, row)
    assert counting.rendered == rendered + 1  # what is not JSON


def test_what_decides_an_outcome_decides_the_key():
    template = tokenizer_of("qwen3").chat_template
    other_vocabulary, other_eos = make_tokenizer("qwen3"), make_tokenizer("qwen3")
    other_vocabulary.add_tokens(["house"])
    other_eos.eos_token = "<|endoftext|>"
    different = [
        converter(),
        converter(max_length=301),
        converter(train_on="last_assistant"),
        converter(on_overlong="truncate_right"),
        converter("qwen3_instruct_2507"),
        Converter(get_renderer(tokenizer_of("qwen3"), thinking=True), 300),
        Converter(make_tokenizer("qwen3", template + "{# another text #}"), 300),
        Converter(other_vocabulary, 300),
        Converter(other_eos, 300),
        converter("llama3_1"),
        Converter(get_renderer(tokenizer_of("llama3_1"), date="1 Jan 2030"), 300),
    ]
    assert len({fingerprint(one) for one in different}) == len(different)
    assert fingerprint(Converter(make_tokenizer("qwen3"), 300)) == fingerprint(converter())


def test_the_fingerprint_is_the_same_after_a_call_that_truncates():
    tokenizer = make_tokenizer("qwen3")
    tokenizer(["a b c d e f"], truncation=True, max_length=3)
    assert fingerprint(Converter(tokenizer, 300)) == fingerprint(converter())
    made = Converter(tokenizer, 300)
    tokenizer(["a b c d e f"], truncation=True, max_length=3)
    assert fingerprint(made) == fingerprint(converter())


def test_the_fingerprint_is_the_same_in_every_process():
    code = """
        from tests.unit.chat.tiny_tokenizers import tokenizer_of
        from mint.chat import Converter
        from mint.data.cache import fingerprint

        print(fingerprint(Converter(tokenizer_of("qwen3"), 300)).hex())
    """
    found = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {fingerprint(converter()).hex()}


def test_rows_that_differ_in_one_place_or_in_the_order_of_keys_are_kept_apart(store):
    call = {"first": 1, "second": 2}
    turned = {"second": 2, "first": 1}
    kept = CachedConverter(converter(), store)
    for row in (HELLO, [*HELLO, {"role": "user", "content": "More?"}], TWO_TURNS, THREE_TURNS):
        for extra in (call, turned):
            changed = [{**row[0], "note": extra}, *row[1:]]
            assert same(kept.outcome(0, changed)) == same(converter().outcome(0, changed))
    assert sqlite3.connect(store.path).execute("SELECT count(*) FROM entries").fetchone() == (8,)


def test_a_tokenizer_that_cannot_be_read_whole_is_refused():
    class Slow:
        pass

    other = SimpleNamespace(renderer=SimpleNamespace(tokenizer=Slow()))
    with pytest.raises(UnsupportedError, match="Slow: conversions can be cached only with a tokenizer"):
        fingerprint(other)


@given(values=st.lists(st.tuples(st.binary(min_size=16, max_size=16), st.binary(max_size=64)), max_size=20))
def test_a_store_gives_back_what_was_put_in_last(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("store") / "c.sqlite"
    written, read = DiskCache(path, 10**8), DiskCache(path, 10**8)
    for key, value in values:
        written.put(key, value)
    expected = dict(values)
    assert {key: read.get(key) for key in expected} == expected
    assert read.get(b"another key") is None


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_the_file_stays_within_its_size_and_the_oldest_entries_go_first(store):
    store.max_bytes = 400_000
    for number in range(3000):
        store.put(key_of(number), bytes(1000))
    there = [number for number in range(3000) if store.get(key_of(number)) is not None]
    assert store.path.stat().st_size <= 400_000
    assert 250 <= len(there) <= 400
    assert there == list(range(3000 - len(there), 3000))


def test_a_damaged_entry_is_not_there_and_is_made_again(store):
    store.put(key_of(1), b"value one")
    store.put(key_of(2), b"value two")
    with sqlite3.connect(store.path) as raw:
        (stored,) = raw.execute("SELECT value FROM entries WHERE key = ?", (key_of(1),)).fetchone()
        raw.execute("UPDATE entries SET value = ? WHERE key = ?", (stored[:-1] + b"X", key_of(1)))
        raw.execute("UPDATE entries SET value = ? WHERE key = ?", (stored, key_of(2)))  # whole, but another's
    raw.close()
    assert store.get(key_of(1)) is None
    assert store.get(key_of(2)) is None
    store.put(key_of(1), b"value one")
    assert store.get(key_of(1)) == b"value one"


def test_an_entry_of_another_form_is_rendered_again(store):
    counting = Counting(converter())
    kept = CachedConverter(counting, store)
    expected = same(kept.outcome(0, HELLO))
    (key,) = sqlite3.connect(store.path).execute("SELECT key FROM entries").fetchone()
    store.put(key, b'["not", "an", "outcome"]')
    assert same(kept.outcome(0, HELLO)) == expected
    assert same(kept.outcome(0, HELLO)) == expected
    assert counting.rendered == 2


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_file_that_is_no_cache_costs_a_warning_and_is_begun_anew_by_the_next_program(store, caplog):
    store.path.parent.mkdir()
    store.path.write_bytes(b"this is no database" * 1000)
    kept = CachedConverter(converter(), store)
    for number in range(3):
        assert same(kept.outcome(number, HELLO)) == same(converter().outcome(number, HELLO))
    (text,) = warnings_of(caplog)
    assert "file is not a database" in text and "goes on without it" in text and str(store.path) in text
    again = DiskCache(store.path, store.max_bytes)
    again.put(key_of(1), b"one")
    assert again.get(key_of(1)) == b"one"


def test_a_full_disk_costs_one_warning(store, caplog):
    kept = CachedConverter(converter(), store)
    expected = [same(kept.outcome(number, row)) for number, row in enumerate(ROWS)]
    with full_disk(store.path.stat().st_size):
        for number in range(200):
            store.put(key_of(number), bytes(1000))
        assert [same(kept.outcome(number, row)) for number, row in enumerate(ROWS)] == expected
    (text,) = warnings_of(caplog)
    assert "make room, or make it writable" in text
    later = CachedConverter(converter(), DiskCache(store.path, store.max_bytes))
    assert [same(later.outcome(number, row)) for number, row in enumerate(ROWS)] == expected
    assert len(warnings_of(caplog)) == 1


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    store = DiskCache(tmp_path / "file" / "cache" / "c.sqlite", 10**8)
    kept = CachedConverter(converter(), store)
    for number, row in enumerate(ROWS):
        assert same(kept.outcome(number, row)) == same(converter().outcome(number, row))
    (text,) = warnings_of(caplog)
    assert str(store.path) in text


def test_several_processes_write_and_read_one_file_that_none_has_made_yet(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from mint.data import DiskCache

        store, first = DiskCache(Path(sys.argv[1]), 10**8), int(sys.argv[2])
        for number in range(first, first + 300):
            store.put((number % 400).to_bytes(16, "big"), b"value %d" % (number % 400))
            store.get((number * 7 % 400).to_bytes(16, "big"))
    """
    path = tmp_path / "new" / "c.sqlite"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), path, str(first)], stderr=subprocess.PIPE, text=True,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        for first in (0, 50, 100)
    ]  # fmt: skip
    assert [process.communicate()[1] for process in processes] == [""] * 3
    store = DiskCache(path, 10**8)
    assert [store.get(key_of(number)) for number in range(400)] == [b"value %d" % number for number in range(400)]


@pytest.mark.parametrize("text", ["0", "-1", "two", "0.5"])
def test_a_size_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("MINT_CACHE_GB", text)
    with pytest.raises(settings.InputError, match=r"MINT_CACHE_GB=.* is not a positive whole number"):
        settings.load()


def test_the_size_of_the_cache_is_a_setting(monkeypatch):
    assert settings.load().cache_bytes == 2 * 10**9
    monkeypatch.setenv("MINT_CACHE_GB", "7")
    assert settings.load().cache_bytes == 7 * 10**9
