"""Shown rows made by hand, and from a converter's outcome."""

from __future__ import annotations

from typing import Any

from mint.chat import ShownRow, ShownToken, TokenKind, skip_reason
from mint.chat.report import Converter


def token(text: str, kind: TokenKind = "context", *, id: int | None = None, **rest: Any) -> ShownToken:
    """A token; its id is the sum of its text's code points where none is given."""
    weight = rest.pop("weight", 1.0 if kind == "trained" else 0.0)
    return ShownToken(sum(map(ord, text)) if id is None else id, text, weight, kind, **rest)


def plain_row(number: int, *words: str) -> ShownRow:
    """A user message of one token, and an answer of `words`, one trained token each."""
    tokens = (token("<user>", "scaffold"), token("Hi", message=0), *(token(w, "trained", message=1) for w in words))
    return ShownRow(number, ("user", "assistant"), (tokens,))


def shown_row(number: int, row: Any, converter: Converter) -> ShownRow:
    """What `mint.chat` would show of a row, without messages."""
    outcome = converter.outcome(number, row)
    roles = tuple(str(m.get("role")) for m in row) if isinstance(row, list) else ()
    if outcome.conversion is None:
        assert outcome.error is not None
        return ShownRow(number, roles, (), skip_reason(outcome.error), str(outcome.error))
    decode = converter.renderer.encoder.tokenizer.decode
    examples = []
    for example in outcome.conversion.examples:
        tokens = []
        for id, weight in zip(example.tokens, example.weights, strict=True):
            text = decode([id])
            kind: TokenKind = "trained" if weight else "scaffold" if text.startswith("<|") else "context"
            tokens.append(ShownToken(id, text, weight, kind, message=None if kind == "scaffold" else 0))
        examples.append(tuple(tokens))
    return ShownRow(number, roles, tuple(examples))
