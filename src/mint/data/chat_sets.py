"""Chat sets by name: the packaged one, two of the Hugging Face hub, JSON Lines files. Each with rows held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from mint.chat import TrainOn
from mint.data.conversations import Conversation, load_demo, load_jsonl
from mint.errors import DataError, InputError
from mint.hub import dataset_files

NO_ROBOTS, TULU3 = "HuggingFaceH4/no_robots", "allenai/tulu-3-sft-mixture"
CHAT_SETS = ("packaged", "no_robots", "tulu3")
TULU3_TEST_ROWS, TULU3_SEED = 1024, 42
MAX_TEST_SHARE, MAX_TEST_ROWS = 0.1, 500  # of a file without a test file


@dataclass(frozen=True, slots=True, repr=False)
class ChatSet:
    """Conversations to train on and others to evaluate on; `train_on` is what this set is usually trained on."""

    name: str
    train: Sequence[Conversation]
    test: Sequence[Conversation]
    train_on: TrainOn = "all_assistant"

    def __repr__(self) -> str:
        return f"ChatSet({self.name!r}, {len(self.train):,} to train on, {len(self.test):,} held out)"


class ArrowRows(Sequence[Conversation]):
    """The `messages` of a memory-mapped data set, read when asked for: a million rows cost no memory."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return ArrowRows(self._table.select(range(*index.indices(len(self)))))
        messages: Conversation = self._table[int(index)]["messages"]
        return messages


def load_chat_set(name: str, *, test: str | Path | None = None, seed: int = 0) -> ChatSet:
    """The chat set `name`: "packaged", "no_robots", "tulu3" or a JSON Lines file with `messages` a line.

    test: a second file with the rows to evaluate on; without one, a tenth of the file (at most 500 rows), chosen by
    `seed`, is held out. The sets of the hub come with their own (no_robots) or with the first 1,024 rows after a
    shuffle (tulu3), as in the tutorial they are known from.
    Raises DataError naming what is wrong, HubUnreachableError within seconds.
    """
    if name in CHAT_SETS:
        if test is not None:
            raise InputError(f"test={str(test)!r}: {name} has its own held-out rows; leave it out")
        return {"packaged": _packaged, "no_robots": _no_robots, "tulu3": _tulu3}[name]()
    if not Path(name).is_file():
        raise DataError(
            f"data set {name!r}: there is no such file, and it is none of {', '.join(CHAT_SETS)}; "
            "give a JSON Lines file with one {'messages': [...]} a line"
        )
    rows = load_jsonl(Path(name))
    if test is not None:
        return ChatSet(name, rows, load_jsonl(Path(test)))
    if len(rows) < 2:
        raise DataError(f"{name}: one conversation cannot be split into train and test rows; give a test file")
    held_out = max(1, min(MAX_TEST_ROWS, int(len(rows) * MAX_TEST_SHARE)))
    chosen = set(np.random.Generator(np.random.Philox(seed % 2**64)).permutation(len(rows))[:held_out].tolist())
    train = [row for number, row in enumerate(rows) if number not in chosen]
    return ChatSet(name, train, [rows[number] for number in sorted(chosen)])


def _packaged() -> ChatSet:
    return ChatSet("packaged", *load_demo())


def _no_robots() -> ChatSet:
    files = dataset_files(NO_ROBOTS, {"train": "data/train-*.parquet", "test": "data/test-*.parquet"})
    train, test = (ArrowRows(_table(NO_ROBOTS, files[split])) for split in ("train", "test"))
    return ChatSet("no_robots", train, test)


def _tulu3() -> ChatSet:
    files = dataset_files(TULU3, {"train": "data/train-*.parquet"})
    table = _table(TULU3, files["train"]).shuffle(seed=TULU3_SEED)
    rows = ArrowRows(table)
    return ChatSet("tulu3", rows[TULU3_TEST_ROWS:], rows[:TULU3_TEST_ROWS], train_on="last_assistant")


def _table(repo: str, files: list[Path]) -> Any:
    if not files:
        raise DataError(f"{repo} on the hub does not hold the expected parquet files under data/; was it changed?")
    from datasets import Dataset

    table = Dataset.from_parquet([str(file) for file in files])
    if "messages" not in table.column_names:
        raise DataError(f"{repo}: no column 'messages', only {', '.join(table.column_names)}")
    return table.select_columns(["messages"])
