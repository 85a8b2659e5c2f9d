"""Which rows are held out: by the names that files and hub sets give their splits, or by a hash of each row's content."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from mint.chat import UnusableRow
from mint.data.rows import ChosenRows
from mint.errors import DataError

MAX_TEST_SHARE, MAX_TEST_ROWS = 0.1, 500  # where nothing is said about test rows
HELD_OUT_NAMES: Final = ("test", "validation", "valid", "val", "dev", "eval")
WHOLE: Final = "train"  # the split of files that name none
# train, test_sft, validation ... where a part of a path begins with it or ends in it: data/train-00000-of-00002.parquet
_SPLIT = re.compile(rf"(?:^|[/._-])((?:train|{'|'.join(HELD_OUT_NAMES)})(?:_[A-Za-z0-9]+)*)(?=[-./]|$)")


def split_of(path: str) -> str:
    """The split that a file's path names, relative to its data set; the last such name in it; WHOLE where there is none."""
    found = _SPLIT.findall(path)
    return str(found[-1]) if found else WHOLE


def training_split(splits: Iterable[str], wanted: str | None, name: str) -> str:
    """The split to train on: the one wanted, else "train", else the only one that is not held out, else the only one.

    Raises DataError that lists the splits where that decides nothing.
    """
    splits = sorted(splits)
    listed = f"{name} has the splits {', '.join(splits)}"
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{listed}, no {wanted!r}; name one of them, e.g. {name}:{splits[0]}")
        return wanted
    candidates = [split for split in splits if not split.startswith(HELD_OUT_NAMES)] or splits
    if WHOLE in candidates:
        return WHOLE
    if len(candidates) > 1:
        raise DataError(f"{listed}; name one of them, e.g. {name}:{candidates[0]}")
    return candidates[0]


def held_out_split(splits: Iterable[str], training: str) -> str | None:
    """The split that evaluates what is trained on `training`: "test_sft" for "train_sft", say. None: there is none."""
    found = set(splits)
    names = [training.replace(WHOLE, name, 1) for name in HELD_OUT_NAMES] if WHOLE in training else []
    return next((name for name in names if name in found), None)


def hold_out(rows: Sequence[Any], name: str, seed: int, fraction: float | None) -> tuple[ChosenRows, ChosenRows]:
    """Rows to train on and rows held out, chosen by the content of each row and `seed`: the order of a file and the
    numbers of its rows do not matter, and equal rows never stand on both sides.

    fraction: of the rows, between 0 and 1 (at least one row); None is a tenth, at most 500 rows. The rows whose hash is
    lowest are held out, so a row that comes to the file changes the membership of few others. More are held out than
    were asked for where equal rows stand at the border.
    Raises DataError where no row would be left on one side.
    """
    wanted = int(len(rows) * (MAX_TEST_SHARE if fraction is None else fraction))
    wanted = max(1, wanted if fraction is not None else min(MAX_TEST_ROWS, wanted))
    hashes = np.frombuffer(array("Q", (row_hash(row, seed) for row in rows)), np.uint64)
    if len(hashes):
        held_out = hashes <= np.partition(hashes, wanted - 1)[wanted - 1]
    if not len(hashes) or held_out.all():
        what = "one row" if len(rows) == 1 else f"{len(rows)} rows, all of them equal,"
        raise DataError(f"{name}: {what} cannot be split into train and test rows; give a test file")
    return ChosenRows(rows, np.flatnonzero(~held_out)), ChosenRows(rows, np.flatnonzero(held_out))


def row_hash(row: Any, seed: int) -> int:
    """64 bits of a row's content: equal for rows that differ only in the order of keys, or in keys that hold null.

    The highest for a row that could not be read, so that it stays with those to train on and is counted there.
    """
    if isinstance(row, UnusableRow):
        return 2**64 - 1
    text = json.dumps(_without_null(row), sort_keys=True, separators=(",", ":"), default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=(seed % 2**64).to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_null(inner) for inner in value]
    return value
