"""Chat sets by name: packaged ones, two of the Hugging Face hub, files, and mixtures. Each with rows held out."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mint.chat import TrainOn
from mint.data.chitchat import chitchat_file
from mint.data.conversations import load_demo
from mint.data.mixtures import Part, mix, parse_part
from mint.data.records import TableRecords, open_records
from mint.data.rows import FileRows, NamedRows
from mint.data.schemas import FIELDS, Schema, parse_columns
from mint.data.sources import READABLE, open_source
from mint.data.splits import hold_out
from mint.errors import DataError, InputError
from mint.hub import dataset_files, is_url
from mint.settings import Settings
from mint.settings import load as load_settings

logger = logging.getLogger("mint")

NO_ROBOTS, TULU3 = "HuggingFaceH4/no_robots", "allenai/tulu-3-sft-mixture"
CHAT_SETS = ("packaged", "no_robots", "tulu3", "chitchat")
OWN_TEST_ROWS = ("packaged", "no_robots", "tulu3")
TULU3_TEST_ROWS, TULU3_SEED = 1024, 42
MESSAGES = Schema("messages", {"messages": "messages"})
_COLUMNS_OF = re.compile(rf"(?:(?P<set>.+):)?(?P<pairs>(?:{'|'.join(FIELDS)})=.*)", re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d*)?|\.\d+")


@dataclass(frozen=True, slots=True, repr=False)
class ChatSet:
    """Rows to train on and others to evaluate on; `train_on` is what this set is usually trained on.

    A row is what `mint.chat.Converter` takes: a message list, {"messages": ..., "tools": ...}, {"text": ...}, or an
    UnusableRow where none could be read. `mint.data.origin(train, number)` says which file and row it comes from.
    """

    name: str
    train: Sequence[Any]
    test: Sequence[Any]
    train_on: TrainOn = "all_assistant"

    def __repr__(self) -> str:
        return f"ChatSet({self.name!r}, {len(self.train):,} to train on, {len(self.test):,} held out)"


def load_chat_set(
    name: str | Sequence[str],
    *,
    test: str | float | Path | None = None,
    columns: str | Sequence[str] | None = None,
    seed: int = 0,
    shuffle_buffer: int | None = None,
    settings: Settings | None = None,
) -> ChatSet:
    """The chat set `name`: one of CHAT_SETS, a file, folder, http(s) address or hub data set (see `open_source`), or a
    mixture: several of them, each `NAME` or `NAME=SHARE` (see `mint.data.mixtures`).

    test: the rows to evaluate on: a fraction ("0.05"), a split (":validation"), or a file, folder, address or hub set.
        Without it, a split of the set that is called test or validation; else a tenth, at most 500 rows, chosen by
        `seed` and each row's content (see `mint.data.splits.hold_out`). The rows of packaged, no_robots and tulu3 are
        those of their authors, and of the tutorial they are known from.
    columns: what the columns mean, where that is not to be found out: "prompt=question,completion=answer"; with a set's
        name before it, "a.csv:prompt=question", for that set alone.
    shuffle_buffer: stream the rows of files instead of indexing or converting them, for batches with that shuffle
        buffer: nothing is unpacked on disk and about twice the buffer is in memory, besides 16 bytes a row where rows
        are held out by content. One set, no mixture.
    Raises DataError naming what is wrong, InputError, HubUnreachableError within seconds, StorageError.
    """
    given = [name] if isinstance(name, str) else list(name)
    parts = [parse_part(text) for text in given] if len(given) > 1 else list(map(Part, given))
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(parts):
        raise InputError(f"dataset {', '.join(names)!r}: give at least one set, and none twice")
    if shuffle_buffer is not None and (shuffle_buffer < 1 or len(parts) > 1):
        raise InputError(
            f"shuffle_buffer={shuffle_buffer} with {len(parts)} data set(s): streaming takes a buffer of at least 1 and "
            "one data set (a folder of files is one); leave --stream out to mix several"
        )
    settings = settings or load_settings()
    held_out = _held_out(test)
    other = held_out.other
    columns_of = _columns_of(columns, [*names, other] if other is not None else names)
    # blocks of the buffer's length in the rows to train on; those held out lie between them
    window = None if shuffle_buffer is None else int(shuffle_buffer * (1 + 1 / (1 - (held_out.fraction or 0.1)))) + 1
    sets = [_load(name, columns_of[name], seed, settings, held_out, window) for name in names]
    chats = sets[0] if len(sets) == 1 else _mixed(parts, sets, seed)
    if other is None:
        return chats
    return replace(chats, test=open_source(other, columns_of[other], settings, held_out=False).train)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is said of the rows to evaluate on, at most one: a fraction, a split of the set itself, or another set."""

    fraction: float | None = None
    split: str | None = None
    other: str | None = None


def _held_out(test: str | float | Path | None) -> HeldOut:
    if test is None:
        return HeldOut()
    text = str(test)
    if isinstance(test, int | float) or _NUMBER.fullmatch(text):
        fraction = float(text)
        if not 0 < fraction < 1:
            raise InputError(f"test={text}: a fraction of the rows must lie between 0 and 1")
        return HeldOut(fraction=fraction)
    if text.startswith(":"):
        return HeldOut(split=text[1:])
    if text in CHAT_SETS:
        raise InputError(f"test={text!r}: give a fraction, a :split, a file, folder, address or hub data set")
    return HeldOut(other=text)


def _columns_of(given: str | Sequence[str] | None, names: Sequence[str]) -> dict[str, dict[str, str] | None]:
    """Field -> column for every set, None where nothing is said of it. What names no set holds for all but CHAT_SETS."""
    found: dict[str, dict[str, str] | None] = dict.fromkeys(names)
    for text in [given] if isinstance(given, str) else given or ():
        match = _COLUMNS_OF.fullmatch(text)
        one = match["set"] if match else None
        if one is not None and one not in names:
            raise InputError(f"columns {text!r}: there is no data set {one!r}, only {', '.join(names)}")
        columns = parse_columns(match["pairs"] if match else text)
        for name in [one] if one is not None else [name for name in found if name not in CHAT_SETS]:
            if found[name] is not None:
                raise InputError(f"columns {text!r}: those of {name} are given twice")
            found[name] = columns
        if one in CHAT_SETS or (one is None and set(names) <= set(CHAT_SETS)):
            raise InputError(f"columns {text!r}: {one or names[0]} has known columns; leave them out")
    return found


def _load(
    name: str, columns: Mapping[str, str] | None, seed: int, settings: Settings, held_out: HeldOut, window: int | None
) -> ChatSet:
    """One set, with test rows that come from itself; with none where they come from another."""
    said = f":{held_out.split}" if held_out.split is not None else held_out.fraction
    if name in OWN_TEST_ROWS:
        if said is not None:
            raise InputError(f"test={said!r}: {name} has its own held-out rows; leave it out, or give a file")
        return {"packaged": _packaged, "no_robots": _no_robots, "tulu3": _tulu3}[name]()
    if name == "chitchat":
        if held_out.split is not None:
            raise InputError(f"test={said!r}: chitchat has no splits; give a fraction or a file")
        rows: Sequence[Any] = FileRows(open_records(chitchat_file(settings), name), MESSAGES)
        test = None
    else:
        _require_known(name)
        looked_for = held_out == HeldOut()
        opened = open_source(name, columns, settings, held_out=looked_for, test_split=held_out.split, window=window)
        rows, test = opened.train, opened.test
    if test is not None:
        return ChatSet(name, rows, test)
    if held_out.other is not None:
        return ChatSet(name, rows, ())
    return ChatSet(name, *hold_out(rows, name, seed, held_out.fraction))


def _require_known(name: str) -> None:
    """An error for a single word that names nothing, which a folder of that name would be written ./NAME."""
    if not Path(name).expanduser().exists() and not is_url(name) and "/" not in name and ":" not in name:
        raise DataError(
            f"data set {name!r}: there is no such file, and it is none of {', '.join(CHAT_SETS)}; "
            f"give a file ({READABLE}), a folder of such, an http(s) address or owner/name on the hub"
        )


def _mixed(parts: Sequence[Part], sets: Sequence[ChatSet], seed: int) -> ChatSet:
    name = " + ".join(map(str, parts))
    usual = {chats.train_on for chats in sets}
    train = mix(parts, [chats.train for chats in sets], seed)
    test = mix(parts, [chats.test for chats in sets], seed) if all(len(chats.test) for chats in sets) else ()
    taken = f"{len(train):,} of {sum(len(chats.train) for chats in sets):,}"
    logger.info("%s: %s training rows, so that the shares hold and none is repeated", name, taken)
    return ChatSet(name, train, test, usual.pop() if len(usual) == 1 else "all_assistant")


def _packaged() -> ChatSet:
    train, test = load_demo()
    return ChatSet("packaged", NamedRows("packaged train", train), NamedRows("packaged test", test))


def _no_robots() -> ChatSet:
    files = dataset_files(NO_ROBOTS, {"train": "data/train-*.parquet", "test": "data/test-*.parquet"})
    train, test = (_table_rows(f"{NO_ROBOTS} {split}", _table(NO_ROBOTS, files[split])) for split in ("train", "test"))
    return ChatSet("no_robots", train, test)


def _tulu3() -> ChatSet:
    files = dataset_files(TULU3, {"train": "data/train-*.parquet"})
    rows = _table_rows(f"{TULU3} shuffled", _table(TULU3, files["train"]).shuffle(seed=TULU3_SEED))
    return ChatSet("tulu3", rows[TULU3_TEST_ROWS:], rows[:TULU3_TEST_ROWS], train_on="last_assistant")


def _table_rows(name: str, table: Any) -> FileRows:
    return FileRows(TableRecords(name, table), MESSAGES)


def _table(repo: str, files: list[Path]) -> Any:
    if not files:
        raise DataError(f"{repo} on the hub does not hold the expected parquet files under data/; was it changed?")
    from datasets import Dataset

    table = Dataset.from_parquet([str(file) for file in files])
    if "messages" not in table.column_names:
        raise DataError(f"{repo}: no column 'messages', only {', '.join(table.column_names)}")
    return table.select_columns(["messages"])
