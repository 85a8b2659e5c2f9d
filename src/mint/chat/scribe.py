"""Transcripts of conversations, most of them from memory: what the template makes of a shape is kept and filled in.

A conversation's shape is its roles and the whitespace around its texts. Where the template is one whose treatment of
contents is known (it only writes and trims them, and compares them with texts that can be read off its source), two
conversations of one shape differ in their contents alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from mint.chat.encoding import Encoder
from mint.chat.marks import content_number, mark, reasoning_number
from mint.chat.messages import Dialog, Message
from mint.chat.transcript import (
    MarksMatterError,
    Stretch,
    Style,
    Transcript,
    guard_tools,
    mark_message,
    prepare_message,
    without_marks,
    write_transcript,
)
from mint.errors import DataError

MAX_SHAPES: Final = 512
# Two contents as different as contents can be: if the template makes the same of both, it makes the same of all.
_SAMPLES: Final = ("Ab", "Über 'q' \"d\" {x} [y]\n\n\t1. <b>\\ 世界\n" * 9 + "z")

# ids, or texts and marks' numbers to be encoded as one text
_Pieces = tuple[tuple[int, ...] | list[str | int], ...]
_Shape = tuple[tuple[str, str, str, bool, tuple[str, str] | None], ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """The transcript of a shape, with sample texts in its marks; and each of its stretches in pieces."""

    transcript: Transcript
    pieces: Mapping[Stretch, _Pieces]


@dataclass(eq=False)
class Scribe:
    """Writes transcripts in one style."""

    style: Style

    def __post_init__(self) -> None:
        reading = self.style.template.reading
        self._searched, self._compared = tuple(reading.searched), reading.compared
        self._remembers = self.style.family.name != "generic" and not reading.depends_on_texts
        self._of_shape = lru_cache(MAX_SHAPES)(self._examine)

    def write(self, dialog: Dialog, *, with_prompt: bool = False) -> Transcript:
        """Raises DataError where a prompt is asked for and cannot be written."""
        messages = [prepare_message(self.style, message) for message in dialog.messages]
        if self._remembers and not dialog.tools and all(map(self._is_plain, messages)):
            plan = self._of_shape(_shape(messages), with_prompt)
            if plan is not None:
                return _filled(plan, messages)
        return self._write(messages, dialog.tools, with_prompt)

    def mark(self, dialog: Dialog) -> tuple[list[Message], list[Any]]:
        """Messages and tools as the template is given them."""
        messages = [prepare_message(self.style, message) for message in dialog.messages]
        return (
            [mark_message(self.style, index, message) for index, message in enumerate(messages)],
            guard_tools(self.style, dialog.tools),
        )

    def has_control_text(self, dialog: Dialog) -> bool:
        """Whether a message contains the text of a control token."""
        search = self.style.encoder.find_control
        prepared = (prepare_message(self.style, message) for message in dialog.messages)
        return any(search(m.content) or (m.reasoning is not None and search(m.reasoning)) for m in prepared)

    def _write(self, messages: Sequence[Message], tools: Sequence[Any], with_prompt: bool) -> Transcript:
        marked = [mark_message(self.style, index, message) for index, message in enumerate(messages)]
        guarded = guard_tools(self.style, tools)
        try:
            return write_transcript(self.style, marked, guarded, with_prompt=with_prompt)
        except MarksMatterError:
            bare = [without_marks(message) for message in marked]
            return write_transcript(self.style, bare, guarded, with_prompt=with_prompt)

    def _is_plain(self, message: Message) -> bool:
        if message.tool_calls or message.name is not None or message.tool_call_id is not None or message.role == "tool":
            return False
        return self._is_plain_text(message.content) and (
            message.reasoning is None or (bool(message.reasoning.strip()) and self._is_plain_text(message.reasoning))
        )

    def _is_plain_text(self, text: str) -> bool:
        return (
            not any(literal in text for literal in self._searched)
            and text not in self._compared
            and text.strip() not in self._compared
            and not self.style.encoder.find_control(text)
        )

    def _examine(self, shape: _Shape, with_prompt: bool) -> _Plan | None:
        """What conversations of a shape have in common; None where it depends on more than the shape."""
        written = []
        samples = [[_sample(index, form, text) for index, form in enumerate(shape)] for text in _SAMPLES]
        for messages in samples:
            try:
                written.append(write_transcript(self.style, messages, [], with_prompt=with_prompt))
            except (MarksMatterError, DataError):
                return None
        first, second = written
        if first.refused or second.refused or _skeleton(first) != _skeleton(second):
            return None
        encoder = self.style.encoder
        if encoder.adds_blank:  # ids depend on what stands before
            return _Plan(first, {})
        stretches = {stretch for run in (*first.runs, first.prompt or ()) for stretch in run}
        plan = _Plan(first, {stretch: _pieces_of(encoder, stretch) for stretch in stretches})
        for messages in samples:  # there are tokenizers whose control tokens swallow blanks, or that look across them
            filled = _filled(plan, [without_marks(message) for message in messages])
            for stretch in (stretch for run in (*filled.runs, filled.prompt or ()) for stretch in run):
                if encoder.encode_pieces([stretch.pieces], {}) != encoder.encode([stretch.text]):
                    return _Plan(first, {})
        return plan


def _shape(messages: Sequence[Message]) -> _Shape:
    return tuple(
        (
            message.role,
            *_around(message.content),
            bool(message.content.strip()),
            None if message.reasoning is None else _around(message.reasoning),
        )
        for message in messages
    )


def _around(text: str) -> tuple[str, str]:
    """The whitespace before and after a text; all of a blank one is before."""
    core = text.strip()
    if not core:
        return text, ""
    start = text.index(core)
    return text[:start], text[start + len(core) :]


def _sample(index: int, form: tuple[str, str, str, bool, tuple[str, str] | None], sample: str) -> Message:
    role, before, after, has_text, around_reasoning = form
    reasoning = None
    if around_reasoning is not None:
        reasoning = around_reasoning[0] + mark(reasoning_number(index), sample) + around_reasoning[1]
    content = before + (mark(content_number(index), sample) if has_text else "") + after
    return Message(role, content, reasoning)


def _skeleton(transcript: Transcript) -> Any:
    """All of a transcript but the texts in its marks."""
    runs = (*transcript.runs, *((transcript.prompt,) if transcript.prompt else ()))
    return [[([t if n is None else n for t, n in s.parts], s.message) for s in run] for run in runs], transcript.added


def _filled(plan: _Plan, messages: Sequence[Message]) -> Transcript:
    texts: dict[int, str] = {}
    for index, message in enumerate(messages):
        texts[content_number(index)] = message.content.strip()
        if message.reasoning is not None:
            texts[reasoning_number(index)] = message.reasoning.strip()

    def fill(run: tuple[Stretch, ...]) -> tuple[Stretch, ...]:
        return tuple(
            Stretch(
                tuple([(t, n) if n is None else (texts[n], n) for t, n in stretch.parts]),
                stretch.message,
                _filled_pieces(plan.pieces.get(stretch), texts),
            )
            for stretch in run
        )

    transcript = plan.transcript
    prompt = None if transcript.prompt is None else fill(transcript.prompt)
    return replace(transcript, runs=tuple(map(fill, transcript.runs)), prompt=prompt)


def _filled_pieces(pieces: _Pieces | None, texts: Mapping[int, str]) -> tuple[str | tuple[int, ...], ...] | None:
    if pieces is None:
        return None
    return tuple(
        [p if isinstance(p, tuple) else "".join([t if isinstance(t, str) else texts[t] for t in p]) for p in pieces]
    )


def _pieces_of(encoder: Encoder, stretch: Stretch) -> _Pieces:
    """A stretch in pieces: ids of what is the same whatever the contents are, and lists of texts and marks' numbers."""
    pieces: list[tuple[int, ...] | list[str | int]] = [[]]
    for text, number in stretch.parts:
        for piece in encoder.split_markup(text) if number is None else [number]:
            if isinstance(piece, tuple):
                pieces += [piece, []]
            elif piece != "":
                last = pieces[-1]
                assert isinstance(last, list)
                last.append(piece)
    return tuple(piece for piece in pieces if piece)
