"""What a row becomes, token by token, to be looked at: the types that the terminal and the HTML page show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TokenKind = Literal["trained", "context", "scaffold", "truncated"]


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of an example.

    text: its own text; bytes that are no whole character alone are shown by the token that completes them.
    weight: its loss weight, 0.0 for a token that is not trained.
    kind: "trained"; else "truncated" (cut off, the model never sees it), "scaffold" (written by the chat template), or
        "context" (text of a message).
    message: index of the message it belongs to, None where the template speaks for itself.
    nll, nll_before: negative log-probability in nats that a checkpoint, and the base model, give it; None where unknown.
    """

    id: int
    text: str
    weight: float
    kind: TokenKind
    message: int | None = None
    nll: float | None = None
    nll_before: float | None = None


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row of a data set as the model is trained on it.

    number: its number in the data set, from 0. roles: those of its messages.
    examples: the tokens of every example made of it; empty where the row is dropped.
    dropped: the reason code where the row gives no example (see `mint.chat.skip_reason`), else None; error: the message.
    notes: what was done to the row or is remarkable in it, one line each.
    """

    number: int
    roles: tuple[str, ...]
    examples: tuple[tuple[ShownToken, ...], ...] = field(repr=False)
    dropped: str | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()
