"""A row as the tokens that are made of it, each with what it is: for the terminal, the HTML page, the curious."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mint.chat.encoding import Encoder
from mint.chat.examples import Conversion, Example, convert, require_examples
from mint.chat.messages import Dialog, PlainText, check_row, skip_reason
from mint.chat.report import Converter
from mint.chat.view import ShownRow, ShownToken, TokenKind
from mint.errors import DataError

_UNLIMITED = 2**40  # tokens


def show_row(number: int, row: Any, converter: Converter) -> ShownRow:
    """Row `number` with every token that the converter makes of it, and those that it cuts off or leaves out."""
    rules = converter.rules
    try:
        checked = check_row(row)
    except DataError as error:
        return ShownRow(number, (), (), skip_reason(error), str(error))
    roles = tuple(message.role for message in checked.messages) if isinstance(checked, Dialog) else ("text",)
    try:
        whole = convert(checked, converter.renderer, replace(rules, max_length=_UNLIMITED))
    except DataError as error:
        return ShownRow(number, roles, (), skip_reason(error), str(error))
    try:
        kept = convert(checked, converter.renderer, rules)
        require_examples(kept, rules)
    except DataError as error:
        shown = tuple(_shown(converter, checked, example, 0) for example in whole.examples)
        return ShownRow(number, roles, shown, skip_reason(error), str(error), _notes(whole))
    examples = [_shown(converter, checked, example, len(example.tokens)) for example in kept.examples]
    if kept.cut_tokens:
        examples = [_with_cut(converter, checked, example, kept.examples) for example in whole.examples]
        known = {tuple(example.tokens) for example in whole.examples}
        shorter = [example for example in kept.examples if not _begins_one(example, known)]
        examples += [_shown(converter, checked, example, len(example.tokens)) for example in shorter]
    return ShownRow(number, roles, tuple(examples), None, None, _notes(kept))


def _begins_one(example: Example, wholes: set[tuple[int, ...]]) -> bool:
    return any(list(whole[: len(example.tokens)]) == example.tokens for whole in wholes)


def _with_cut(
    converter: Converter, row: Dialog | PlainText, whole: Example, kept: Sequence[Example]
) -> tuple[ShownToken, ...]:
    """The tokens of an example before it was cut; those that are left out as truncated."""
    lengths = [len(e.tokens) for e in kept if whole.tokens[: len(e.tokens)] == e.tokens]
    return _shown(converter, row, whole, max(lengths, default=0))


def _shown(converter: Converter, row: Dialog | PlainText, example: Example, kept: int) -> tuple[ShownToken, ...]:
    renderer = converter.renderer
    texts = token_texts(renderer.style.encoder, example.tokens)
    owners = _owners(converter, row, example, texts)
    tokens: list[ShownToken] = []
    for index, (token, text, owner) in enumerate(zip(example.tokens, texts, owners, strict=True)):
        weight = float(example.weights[index])
        kind: TokenKind = "scaffold" if owner is None else "context"
        if index >= kept:
            kind, weight = "truncated", 0.0
        elif weight:
            kind, owner = "trained", tokens[-1].message if owner is None and tokens else owner  # an answer's end
        tokens.append(ShownToken(token, text, weight, kind, owner))
    return tuple(tokens)


def token_texts(encoder: Encoder, tokens: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text of all. Bytes of a character go to the token that completes it."""
    texts: list[str] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = encoder.decode(pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 8:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    if pending:
        texts[-1] = encoder.decode(pending)
    return texts


def _owners(converter: Converter, row: Dialog | PlainText, example: Example, texts: Sequence[str]) -> list[int | None]:
    """The message that each token's text belongs to, None for the template's own."""
    if isinstance(row, PlainText):
        return [0] * len(example.tokens)
    ends = np.cumsum([len(text) for text in texts])
    for run in converter.renderer.scribe.write(row).runs:
        spans = [part for stretch in run for part in stretch.parts]
        marked = "".join(text for text, _ in spans)
        plain = converter.renderer.style.encoder.unguarded(marked)
        if not plain.startswith("".join(texts)):
            continue
        owner_of = np.full(len(plain) + 1, -1)
        position = 0
        for text, mark in spans:
            length = len(converter.renderer.style.encoder.unguarded(text))
            if mark is not None:
                owner_of[position : position + length] = mark // 2
            position += length
        owners = [int(owner_of[end - 1]) if end else -1 for end in ends]
        return [None if owner < 0 else owner for owner in owners]
    return [None] * len(example.tokens)


def _notes(conversion: Conversion) -> tuple[str, ...]:
    notes = []
    if conversion.is_split:
        notes.append("the template rewrites earlier turns, so every answer is an example of its own")
    if conversion.injected_system:
        notes.append(f"the template adds: {conversion.injected_system!r}")
    if conversion.has_control_text:
        notes.append("a message contains the text of a control token; it is encoded as ordinary text")
    if conversion.trailing_messages:
        notes.append(f"left out after the last answer: {_count(conversion.trailing_messages, 'message')}")
    if conversion.shortened_turns or conversion.dropped_turns:
        notes.append(
            f"too long: {_count(conversion.shortened_turns, 'answer')} shortened, "
            f"{_count(conversion.dropped_turns, 'answer')} left out, {_count(conversion.cut_tokens, 'token')} in all"
        )
    return tuple(notes)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
