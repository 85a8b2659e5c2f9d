"""A row as the tokens that are made of it, each with what it is: for the terminal, the HTML page, the curious."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from mint.chat.encoding import Encoder
from mint.chat.examples import Conversion, Example, convert, require_examples, without_oldest_turns
from mint.chat.messages import Dialog, PlainText, check_row, skip_reason
from mint.chat.report import Converter
from mint.chat.transcript import Stretch
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
    before: list[int] = []  # some tokenizers drop the blank of a text's first token, so each is decoded after another
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = encoder.decode([*before, *pending])[len(encoder.decode(before)) :]
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 8:
            texts.append("")
        else:
            texts.append(text)
            before, pending = pending, []
    if pending:
        texts[-1] = encoder.decode([*before, *pending])[len(encoder.decode(before)) :]
    return texts


def _owners(converter: Converter, row: Dialog | PlainText, example: Example, texts: Sequence[str]) -> list[int | None]:
    """The message that each token's text belongs to, None for the template's own."""
    if isinstance(row, PlainText):
        return [0] * len(example.tokens)
    for numbers in _histories(row, example):
        messages = tuple(row.messages[number] for number in numbers)
        for run in converter.renderer.scribe.write(replace(row, messages=messages)).runs:
            owners = _owners_in(converter.renderer.style.encoder, run, texts)
            if owners is not None:
                return [None if owner is None else numbers[owner] for owner in owners]
    return [None] * len(example.tokens)


def _histories(row: Dialog, example: Example) -> Iterator[tuple[int, ...]]:
    """Numbers of the messages that an example may have been made of: all, or without the oldest turns."""
    yield tuple(range(len(row.messages)))
    for answer, _ in example.answers:
        yield from without_oldest_turns(row.messages, answer)


def _owners_in(encoder: Encoder, run: Sequence[Stretch], texts: Sequence[str]) -> list[int | None] | None:
    """The message of each text of a token, all of which the run begins with; None where it does not."""
    parts = [(encoder.unguarded(text), mark) for stretch in run for text, mark in stretch.parts]
    if not _begins(parts, texts):  # tokenizers may rewrite texts: normalise Unicode, write or swallow blanks
        parts = [(_without_blanks(encoder.decode(encoder.encode([text])[0])), mark) for text, mark in parts]
        texts = list(map(_without_blanks, texts))
    if not _begins(parts, texts):
        return None
    owner_of = [None if mark is None else mark // 2 for text, mark in parts for _ in text]
    return [owner_of[end - 1] if end else None for end in accumulate(map(len, texts))]


def _begins(parts: Sequence[tuple[str, int | None]], texts: Sequence[str]) -> bool:
    return "".join(text for text, _ in parts).startswith("".join(texts))


def _without_blanks(text: str) -> str:
    return "".join(text.split())


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
