"""Conversions kept on disk by what they were made of, so that rows rendered once need not be rendered again.

One SQLite file that several processes may use at once. It is a cache: whatever goes wrong with it costs a warning and the
time that it would have saved, and it may be deleted whenever nobody uses it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import weakref
from dataclasses import fields, is_dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from itertools import repeat
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import numpy as np

from mint import types
from mint.chat import ConversionReport, Converter, Renderer
from mint.chat.encoding import without_leftovers
from mint.chat.examples import Rules
from mint.chat.report import RowOutcome
from mint.errors import DataError, UnsupportedError
from mint.settings import Settings
from mint.settings import load as load_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

logger = logging.getLogger("mint")

FILE = "conversions-1.sqlite"  # the number is that of the table's form
_SUM_BYTES = 8
_BUSY_SECONDS = 10.0  # that a write waits for other processes'
_CHECKS = 64  # how often the size is looked at while as many bytes are written as the cache may hold


class DiskCache:
    """Bytes by key in a SQLite file of about `max_bytes`; the entries written first go first.

    A value that is not what was put in is dropped and counts as not there. Where the file cannot be used (full or
    read-only disk, damaged) a warning says so once, and from then on the cache is empty. Pickles as its path and size.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._connection: sqlite3.Connection | None = None
        self._is_off = False
        self._unchecked_bytes = max_bytes  # the first write looks at the size

    def __reduce__(self) -> tuple[Callable[..., DiskCache], tuple[Any, ...]]:
        return DiskCache, (self.path, self.max_bytes)

    def get(self, key: bytes) -> bytes | None:
        found = self._run("SELECT value FROM entries WHERE key = ?", key)
        if not found:
            return None
        stored: bytes = found[0][0]
        value = stored[_SUM_BYTES:]
        if stored[:_SUM_BYTES] != _checksum(key, value):
            self._run("DELETE FROM entries WHERE key = ?", key)
            return None
        return value

    def put(self, key: bytes, value: bytes) -> None:
        self._unchecked_bytes += len(value)
        if self._unchecked_bytes >= self.max_bytes // _CHECKS:
            self._make_room()
            self._unchecked_bytes = 0
        self._run("INSERT OR REPLACE INTO entries (key, value) VALUES (?, ?)", key, _checksum(key, value) + value)

    def _make_room(self) -> None:
        found = self._run("SELECT (page_count - freelist_count) * page_size "
                          "FROM pragma_page_count, pragma_freelist_count, pragma_page_size")  # fmt: skip
        if found and found[0][0] > self.max_bytes * (1 - 2 / _CHECKS):
            self._run("DELETE FROM entries WHERE id <= (SELECT min(id) + (max(id) - min(id)) / 10 FROM entries)")

    def _run(self, statement: str, *values: bytes) -> list[Any]:
        """The rows of the answer; none where the cache is off."""
        if self._is_off:
            return []
        try:
            if self._connection is None:
                self._connection = self._opened()
            return self._connection.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self._turn_off(error)
            return []

    def _opened(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # every statement is a transaction of its own: nothing is pending when a process is killed
        connection = sqlite3.connect(self.path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        weakref.finalize(self, connection.close)
        connection.execute("PRAGMA journal_mode = TRUNCATE")  # unlike a write-ahead log it works on shared disks
        connection.execute("PRAGMA synchronous = OFF")  # what a power cut damages is found by the checksums
        connection.execute(
            "CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
        )
        return connection

    def _turn_off(self, error: sqlite3.Error | OSError) -> None:
        self._is_off = True
        if self._connection is not None:
            self._connection.close()
        advice = "make room, or make it writable"
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            for path in (self.path.with_name(f"{self.path.name}-journal"), self.path):
                path.unlink(missing_ok=True)
            advice = "it was damaged and is deleted; the next program begins a new one"
        logger.warning(
            "the cache of conversions cannot be used, and this program goes on without it: %s (%s): %s",
            error, self.path, advice,
        )  # fmt: skip


class CachedConverter:
    """A `mint.chat.Converter` that renders only what the cache does not hold. Outcomes, datums and report are the same.

    What decides the outcome is in the key: the row as JSON, the rules, the renderer's settings, the template, the whole
    tokenizer, and the code that renders. A row that is not JSON is rendered every time.
    Raises UnsupportedError for a tokenizer that cannot be read whole.
    """

    def __init__(self, converter: Converter, store: DiskCache) -> None:
        self._converter, self._store = converter, store
        self._fingerprint = fingerprint(converter)

    @property
    def renderer(self) -> Renderer:
        return self._converter.renderer

    @property
    def rules(self) -> Rules:
        return self._converter.rules

    @property
    def report(self) -> ConversionReport:
        return self._converter.report

    def __call__(self, number: int, row: Any) -> list[types.Datum]:
        return self.take(self.outcome(number, row))

    def take(self, outcome: RowOutcome) -> list[types.Datum]:
        return self._converter.take(outcome)

    def outcomes(self, rows: Iterable[tuple[int, Any]]) -> Iterator[RowOutcome]:
        return (self.outcome(number, row) for number, row in rows)

    def outcome(self, number: int, row: Any) -> RowOutcome:
        try:
            content = json.dumps(row).encode()
        except (TypeError, ValueError):  # an UnusableRow, or what only Python has
            return self._converter.outcome(number, row)
        key = hashlib.blake2b(content, digest_size=16, key=self._fingerprint).digest()
        stored = self._store.get(key)
        known = _decoded(number, stored) if stored is not None else None
        if known is not None:
            return known
        outcome = self._converter.outcome(number, row)
        self._store.put(key, _encoded(outcome))
        return outcome


def cached(converter: Converter, settings: Settings | None = None) -> CachedConverter:
    """`converter` with the cache in MINT_HOME/cache. `settings`: None reads the environment."""
    settings = settings or load_settings()
    return CachedConverter(converter, DiskCache(settings.cache_dir / FILE, settings.cache_bytes))


def fingerprint(converter: Converter) -> bytes:
    """32 bytes that are equal where a converter makes the same of every row, in any process."""
    renderer, tokenizer = converter.renderer, converter.renderer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__}: conversions can be cached only with a tokenizer that the tokenizers library "
            "runs; leave the cache out"
        )
    parts = {
        "code": _code_digest(),
        "libraries": [version(name) for name in ("jinja2", "tokenizers", "transformers")],
        "rules": repr(converter.rules),
        "settings": renderer.settings,
        "template": tokenizer.get_chat_template(),
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "tokenizer": without_leftovers(backend).to_str(),
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=32).digest()


@cache
def _code_digest() -> str:
    """Of the modules that render: another version of them meets none of the entries of this one."""
    sources = sorted((file for file in files("mint.chat").iterdir() if file.name.endswith(".py")), key=lambda f: f.name)
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in sources), digest_size=16).hexdigest()


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_SUM_BYTES, key=key).digest()


def _encoded(outcome: RowOutcome) -> bytes:
    return json.dumps(outcome, default=_plain, separators=(",", ":")).encode()


def _plain(value: object) -> object:
    """What JSON does not know, as something that it does."""
    match value:
        case np.ndarray():
            return value.tolist()
        case bytes():
            return value.hex()
        case DataError():
            return str(value)
        case _ if is_dataclass(value):
            return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} in a conversion cannot be kept in the cache")


def _decoded(number: int, stored: bytes) -> RowOutcome | None:
    """The outcome as that of row `number`; None where it is of another form."""
    try:
        outcome: RowOutcome = _restored(RowOutcome, json.loads(stored))
    except (ValueError, TypeError, KeyError):
        return None
    return replace(outcome, number=number)


def _restored(kind: Any, value: Any) -> Any:
    """The value of that type annotation whose JSON this is."""
    if isinstance(kind, UnionType):
        return None if value is None else _restored(kind.__args__[0], value)
    annotations = _annotations(kind)
    if annotations is not None:
        return kind(**{name: _restored(inner, value[name]) for name, inner in annotations.items()})
    if kind is bytes:
        return bytes.fromhex(value)
    if kind is DataError:
        return DataError(value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is np.ndarray:
        return np.array(value, get_args(inner[1])[0])
    if origin is tuple:
        kinds = repeat(inner[0], len(value)) if inner[-1] is ... else inner
        return tuple(_restored(one, item) for one, item in zip(kinds, value, strict=True))
    if origin is list and inner[0] not in (int, float, str, bool):
        return [_restored(inner[0], item) for item in value]
    return value


@cache
def _annotations(kind: Any) -> dict[str, Any] | None:
    """Of a dataclass's fields; None for any other type."""
    return get_type_hints(kind) if is_dataclass(kind) else None
