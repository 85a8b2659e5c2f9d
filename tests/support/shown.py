"""Shown rows made by hand."""

from __future__ import annotations

from typing import Any

from mint.chat import ShownRow, ShownToken, TokenKind


def token(text: str, kind: TokenKind = "context", *, id: int | None = None, **rest: Any) -> ShownToken:
    """A token; its id is the sum of its text's code points where none is given."""
    weight = rest.pop("weight", 1.0 if kind == "trained" else 0.0)
    return ShownToken(sum(map(ord, text)) if id is None else id, text, weight, kind, **rest)


def plain_row(number: int, *words: str) -> ShownRow:
    """A user message of one token, and an answer of `words`, one trained token each."""
    tokens = (token("<user>", "scaffold"), token("Hi", message=0), *(token(w, "trained", message=1) for w in words))
    return ShownRow(number, ("user", "assistant"), (tokens,))
