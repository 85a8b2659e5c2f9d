"""Preparations of rows for the tests of worker processes, which have to be able to import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mint.errors import DataError

Rows = Iterable[tuple[int, Any]]


class Prints:
    def outcomes(self, rows: Rows) -> list[None]:
        return [print(*row) for row in rows]


@dataclass
class Squares:
    """Rows are numbers; multiples of `unusable` give nothing. Keeps what was taken, in order."""

    unusable: int = 0
    taken: list[tuple[int, int | None]] = field(default_factory=list)

    def __call__(self, number: int, row: int) -> list[int]:
        return self.take(*self.outcomes([(number, row)]))

    def outcomes(self, rows: Rows) -> Iterator[tuple[int, int | None]]:
        for number, row in rows:
            yield number, None if self.unusable and row % self.unusable == 0 else row * row

    def take(self, outcome: tuple[int, int | None]) -> list[int]:
        self.taken.append(outcome)
        return [] if outcome[1] is None else [outcome[1]]


class Pid:
    def outcomes(self, rows: Rows) -> list[int]:
        return [os.getpid() for _ in rows]

    def take(self, outcome: int) -> list[int]:
        return [outcome]


class Fails:
    """Raises what the row says."""

    def __call__(self, number: int, row: str) -> list[str]:
        return self.take(*self.outcomes([(number, row)]))

    def outcomes(self, rows: Rows) -> Iterator[str]:
        for number, row in rows:
            if row == "data error":
                raise DataError(f"[bad_content] row {number} is bad")
            if row == "bug":
                raise KeyError(row)
            if row == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if row == "exit":
                os._exit(3)
            yield row

    def take(self, outcome: str) -> list[str]:
        return [outcome]


@dataclass
class Waits:
    """Says that it has begun a row by making a file with its process's number, then waits for the file "go on"."""

    folder: Path

    def outcomes(self, rows: Rows) -> Iterator[int]:
        for number, _ in rows:
            (self.folder / f"{os.getpid()}").touch()
            while not (self.folder / "go on").exists():
                time.sleep(0.01)
            yield number

    def take(self, outcome: int) -> list[int]:
        return [outcome]


class CannotBePickled:
    def __init__(self) -> None:
        self.function: Callable[[], None] = lambda: None

    def outcomes(self, rows: Rows) -> list[int]:
        return [number for number, _ in rows]

    def take(self, outcome: int) -> list[int]:
        return [outcome]


def _refuse() -> None:
    raise ValueError("not here")


class CannotBeLoaded:
    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _refuse, ()

    def outcomes(self, rows: Rows) -> list[int]:
        return [number for number, _ in rows]

    def take(self, outcome: int) -> list[int]:
        return [outcome]


class ModulesLoaded:
    """Which of the heavy libraries the worker has."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def outcomes(self, rows: Rows) -> list[list[str]]:
        import sys

        outcomes = list(self.inner.outcomes(rows))
        return [sorted({"torch", "datasets", "pyarrow", "pandas"} & sys.modules.keys())] * len(outcomes)

    def take(self, outcome: list[str]) -> list[str]:
        return outcome
