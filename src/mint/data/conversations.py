"""Where conversations come from: the packaged demo set, JSON Lines files."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from mint.errors import DataError

Conversation = list[dict[str, Any]]


def load_demo() -> tuple[list[Conversation], list[Conversation]]:
    """The packaged chat set, written for MinT: 216 conversations to train on and 32 held out.

    Every answer has one form (a one-sentence summary, a few points, a next step), so that a short run visibly changes
    how a small model answers.
    """
    folder = files("mint.data")
    train, test = (
        _parse((folder / f"demo_{part}.jsonl").read_text(encoding="utf-8"), part) for part in ("train", "test")
    )
    return train, test


def load_jsonl(path: Path) -> list[Conversation]:
    """One JSON object with `messages` a line. Raises DataError naming the line that is not."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a JSON Lines file with one {{'messages': [...]}} a line")
    return _parse(path.read_text(encoding="utf-8"), str(path))


def _parse(text: str, name: str) -> list[Conversation]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, line {number}: not valid JSON ({error})") from None
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list):
            raise DataError(f"{name}, line {number}: expected an object with a list 'messages'")
        rows.append(messages)
    if not rows:
        raise DataError(f"{name}: holds no conversation")
    return rows
