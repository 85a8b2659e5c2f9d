"""From the name of a set to its rows: files, folders, addresses of the web, data sets of the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mint.data.records import COMPRESSED, Records, TableRecords, format_of, open_records
from mint.data.rows import FileRows, JoinedRows
from mint.data.schemas import Schema, detect
from mint.data.splits import held_out_split, split_of, training_split
from mint.data.streams import StreamedRecords
from mint.errors import DataError, InputError
from mint.hub import HubListing, fetched_url, is_url, listed_dataset_files, matching, unpacked, url_file_name
from mint.settings import Settings

logger = logging.getLogger("mint")
T = TypeVar("T")

LOOKED_AT = 100  # records that the schema is found from
READABLE = "*.jsonl, *.json, *.csv, *.tsv (each also as .gz or .zst) and *.parquet"
HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^:]+))?"
    r"(?::(?:(?P<config>[^/:]+)/)?(?P<split>[^/:]+))?",
    re.ASCII,
)
# JSON files of hub repositories that describe the data
_DESCRIPTIONS = re.compile(r"(?:^|/)(?:dataset_infos?|state|config|metadata|package)\.json$")


@dataclass(frozen=True, slots=True)
class DataFile:
    """name: what messages call it."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The rows of a set; `test` where a split of its own evaluates it."""

    train: Sequence[Any]
    test: Sequence[Any] | None


def open_source(
    name: str,
    columns: Mapping[str, str] | None,
    settings: Settings,
    *,
    held_out: bool,
    test_split: str | None = None,
    window: int | None = None,
) -> Opened:
    """The set `name`. What a name means depends on its form alone:

    - http:// or https://: a file, downloaded once into MINT_HOME.
    - a name that ends in a format of FORMATS, or one with .gz or .zst: a file.
    - owner/name, owner/name@revision, owner/name:split, owner/name:config/split: a data set of the Hugging Face hub.
    - anything else: a folder of such files; FOLDER:split.

    columns: field -> column, where the schema is not to be found out. held_out: whether a split that evaluates is looked
    for; test_split: that it must be this one. window: stream the rows to train on and hold so many of them in memory
    (see `StreamedRecords`). Raises DataError, InputError, HubUnreachableError, ModelAccessError.
    """
    if is_url(name) or format_of(name):
        if test_split is not None:
            raise InputError(f"test=':{test_split}': {name} is a single file without splits; give a file or a fraction")
        return Opened(_open_files([_one_file(name, settings)], name, columns, settings, window), None)
    match = HUB_NAME.fullmatch(name)
    base = match["repo"] if match else name
    split = match["split"] if match else None
    if match is None and not Path(name).exists():
        base, _, split = name.rpartition(":") if ":" in name else (name, "", None)

    def pick(splits: Mapping[str, list[T]]) -> tuple[list[T], list[T]]:
        return _pick(splits, base, split, held_out=held_out, test_split=test_split)

    if match:
        train, test = _hub_files(match, pick, settings)
    else:
        train, test = pick(_folder_splits(base))
    train_rows = _open_files(train, base, columns, settings, window)
    return Opened(train_rows, _open_files(test, base, columns, settings) if test else None)


def _pick(
    splits: Mapping[str, list[T]], name: str, wanted: str | None, *, held_out: bool, test_split: str | None
) -> tuple[list[T], list[T]]:
    """What to train on, and what to evaluate on or nothing."""
    training = training_split(splits, wanted, name)
    if test_split is not None and test_split not in splits:
        raise DataError(f"{name} has the splits {', '.join(sorted(splits))}, no {test_split!r} to evaluate on")
    testing = test_split or (held_out_split(splits, training) if held_out else None)
    return splits[training], splits[testing] if testing is not None else []


def _one_file(name: str, settings: Settings) -> DataFile:
    if is_url(name):
        if not format_of(url_file_name(name)):
            raise DataError(f"{name}: the address must end in the name of a file that can be read: {READABLE}")
        return DataFile(fetched_url(name, settings), name)
    path = Path(name).expanduser()
    if not path.is_file():
        raise DataError(f"data set {name!r}: there is no such file")
    return DataFile(path, name)


def _folder_splits(name: str) -> dict[str, list[DataFile]]:
    folder = Path(name).expanduser()
    if folder.is_file():
        raise DataError(
            f"{name} is not a data file that can be read ({READABLE}); archives and pickles are never opened"
        )
    if not folder.is_dir():
        raise DataError(
            f"data set {name!r}: there is no such file or folder, and it is no name on the hub (owner/name)"
        )
    splits = defaultdict(list)
    others = 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if format_of(path.name):
            splits[split_of(relative.as_posix())].append(DataFile(path, str(path)))
        else:
            others += 1
    if not splits:
        raise DataError(f"the folder {name} holds no data file that can be read: {READABLE}")
    if others:
        logger.info("%s: %d other files there are left alone", name, others)
    return dict(splits)


def _hub_files(match: re.Match[str], pick: Any, settings: Settings) -> tuple[list[DataFile], list[DataFile]]:
    def choose(listing: HubListing) -> list[str]:
        train, test = pick(hub_splits(listing, match["config"]))
        return [*train, *test]

    folder, listing = listed_dataset_files(match["repo"], match["revision"], choose, settings)
    train, test = (
        [DataFile(folder / file, f"{match['repo']}/{file}") for file in files]
        for files in pick(hub_splits(listing, match["config"]))
    )
    return train, test


def hub_splits(listing: HubListing, config: str | None) -> dict[str, list[str]]:
    """The files of each split of a repository: as its card says, else as their paths say.

    config: of several that the card names; None is the one called or marked default, or the only one.
    Where a split is there in several formats, one is taken (parquet before JSON Lines before CSV before JSON).
    Raises DataError that lists the configurations, or says that nothing can be read.
    """
    readable = [file for file in listing.files if format_of(file) and not _DESCRIPTIONS.search(file)]
    named = {str(found.get("config_name", "default")): found["data_files"] for found in listing.configs}
    if config is None:
        marked = [name for name, found in zip(named, listing.configs, strict=True) if found.get("default")]
        config = next(iter(marked or (named if len(named) == 1 else ())), None)
    config = config or "default"
    if named and config not in named:
        raise DataError(
            f"{listing.repo} has the configurations {', '.join(named)}; name one and its split, "
            f"e.g. {listing.repo}:{next(iter(named))}/train"
        )
    splits: dict[str, list[str]] = defaultdict(list)
    if named:
        for split, pattern in _patterns(named[config]):
            splits[split] += matching(readable, pattern)
    else:
        for file in readable:
            if config == "default" or config in file.split("/")[:-1]:
                splits[split_of(file)].append(file)
    found = {split: _one_format(files) for split, files in splits.items() if files}
    if not found:
        raise DataError(
            f"{listing.repo} on the hub holds no data file that can be read ({READABLE})"
            + (f" in {config}" if config != "default" else "")
            + "; scripts and archives are never run or opened"
        )
    return found


def _patterns(data_files: Any) -> list[tuple[str, str]]:
    """(split, pattern) of a card's data_files: a pattern, a list of such, or of {"split", "path"}."""
    if isinstance(data_files, str):
        return [("train", data_files)]
    if isinstance(data_files, Mapping) and "path" not in data_files:
        return [(split, path) for split, paths in data_files.items() for _, path in _patterns(paths)]
    if isinstance(data_files, Mapping):
        return [(str(data_files.get("split", "train")), path) for _, path in _patterns(data_files["path"])]
    return [pair for entry in data_files for pair in _patterns(entry)]


def _one_format(files: list[str]) -> list[str]:
    for formats in ((".parquet",), (".jsonl", ".ndjson"), (".csv", ".tsv"), (".json",)):
        chosen = sorted(file for file in files if format_of(file) in formats)
        if chosen:
            return chosen
    return []


def _open_files(
    files: Sequence[DataFile],
    name: str,
    columns: Mapping[str, str] | None,
    settings: Settings,
    window: int | None = None,
) -> Sequence[Any]:
    opened: list[Records]
    if window is not None:
        opened = [StreamedRecords([(file.path, file.name) for file in files], window)]
    else:
        opened = [open_records(_plain(file.path, settings), file.name) for file in files]
    if not any(map(len, opened)):
        raise DataError(f"{name}: holds no rows")
    schema = _schema_of(next(records for records in opened if len(records)), name, columns)
    logger.info("%s: %s, %s rows", name, schema, f"{sum(map(len, opened)):,}")
    rows = [FileRows(_narrowed(records, schema), schema) for records in opened]
    return rows[0] if len(rows) == 1 else JoinedRows(rows)


def _plain(path: Path, settings: Settings) -> Path:
    return unpacked(path, settings) if path.suffix.lower() in COMPRESSED else path


def _schema_of(records: Records, name: str, columns: Mapping[str, str] | None) -> Schema:
    """Of the first records that can be read."""
    first: list[dict[str, Any]] = []
    errors: list[DataError] = []
    for number in range(min(LOOKED_AT, len(records))):
        try:
            first.append(records[number])
        except DataError as error:
            errors.append(error)
    if not first:
        raise DataError(f"none of the first {len(errors)} rows can be read; {errors[0]}")
    found = records.columns or tuple(dict.fromkeys(key for record in first for key in record))
    try:
        schema = detect(found, first, columns)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    unused = [column for column in found if column not in schema.columns.values()]
    if unused:
        logger.info("%s: columns that are not used: %s", name, ", ".join(unused))
    return schema


def _narrowed(records: Records, schema: Schema) -> Records:
    if not isinstance(records, TableRecords):
        return records
    return records.select([column for column in schema.columns.values() if column in records.columns])
