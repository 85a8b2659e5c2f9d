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
    Raises DataError naming what is wrong, InputError, HubUnreachableError within seconds, StorageError.
    """
    parts = [parse_part(text) for text in ([name] if isinstance(name, str) else name)]
    names = [part.name for part in parts]
    if not parts or len(set(names)) < len(parts):
        raise InputError(f"dataset {', '.join(names)!r}: give at least one set, and none twice")
    settings = settings or load_settings()
    fraction, split, other = _test_rows(test)
    columns_of = _columns_of(columns, [*names, other] if other is not None else names)
    sets = [_load(n, columns_of[n], seed, settings, fraction=fraction, split=split, other=other) for n in names]
    chats = sets[0] if len(sets) == 1 else _mixed(parts, sets, seed)
    if other is None:
        return chats
    return replace(chats, test=open_source(other, columns_of[other], settings, held_out=False).train)


def _test_rows(test: str | float | Path | None) -> tuple[float | None, str | None, str | None]:
    """What is said of the rows to evaluate on: a fraction, a split of the set itself, or another set."""
    if test is None:
        return None, None, None
    text = str(test)
    if isinstance(test, int | float) or _NUMBER.fullmatch(text):
        return float(text), None, None
    if text.startswith(":"):
        return None, text[1:], None
    if text in CHAT_SETS:
        raise InputError(f"test={text!r}: give a fraction, a :split, a file, folder, address or hub data set")
    return None, None, text


def _columns_of(given: str | Sequence[str] | None, names: Sequence[str]) -> dict[str, dict[str, str] | None]:
    """Field -> column for every set, None where nothing is said of it. What names no set holds for all but CHAT_SETS."""
    found: dict[str, dict[str, str] | None] = dict.fromkeys(names)
    for text in [given] if isinstance(given, str) else given or ():
        match = _COLUMNS_OF.fullmatch(text)
        one = match["set"] if match else None
        if one is not None and one not in names:
            raise InputError(f"columns {text!r}: there is no data set {one!r}, only {', '.join(names)}")
        columns = parse_columns(match["pairs"] if match else text)
        for name in [one] if one is not None else [name for name in names if name not in CHAT_SETS]:
            if found[name] is not None:
                raise InputError(f"columns {text!r}: those of {name} are given twice")
            found[name] = columns
        if one in CHAT_SETS or (one is None and set(names) <= set(CHAT_SETS)):
            raise InputError(f"columns {text!r}: {one or names[0]} has known columns; leave them out")
    return found


def _load(
    name: str,
    columns: Mapping[str, str] | None,
    seed: int,
    settings: Settings,
    *,
    fraction: float | None,
    split: str | None,
    other: str | None,
) -> ChatSet:
    """One set, with test rows that come from itself; with none where they come from another."""
    if name in OWN_TEST_ROWS:
        if fraction is not None or split is not None:
            said = f"{fraction:g}" if fraction is not None else f":{split}"
            raise InputError(f"test={said!r}: {name} has its own held-out rows; leave it out, or give a file")
        return {"packaged": _packaged, "no_robots": _no_robots, "tulu3": _tulu3}[name]()
    if name == "chitchat":
        rows: Sequence[Any] = FileRows(open_records(chitchat_file(settings), name), MESSAGES)
        test = None
        if split is not None:
            raise InputError(f"test=':{split}': chitchat has no splits; give a fraction or a file")
    else:
        _require_known(name)
        opened = open_source(name, columns, settings, held_out=fraction is None and other is None, test_split=split)
        rows, test = opened.train, opened.test
    if test is not None:
        return ChatSet(name, rows, test)
    return ChatSet(name, rows, ()) if other is not None else ChatSet(name, *hold_out(rows, name, seed, fraction))


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
