"""Finds out what a template is like by running it on probes: its family, whether it shows thoughts, what it opens with.

A family is accepted only if its reader takes apart what the template writes: an answer, a thought and a tool call that the
template shows come back as they were. Where none fits, the template is used as it is ("generic") and every rendering of it
is checked against the plain one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from mint.chat.encoding import Encoder, make_encoder
from mint.chat.families import FAMILIES, THINK_OPEN, Family, read_text, split_reasoning
from mint.chat.marks import CLOSE, mark, unmarked
from mint.chat.messages import Message, ToolCall
from mint.chat.template import ChatTemplate, TemplateRefusedError, display_name
from mint.chat.transcript import MarksMatterError, Style, write_transcript
from mint.errors import DataError, UnsupportedError

_QUESTION: Final = Message("user", "Which one?")
_ANSWER: Final = Message("assistant", "The blue one.")
_REASONING: Final = "Blue or red."
_THOUGHT: Final = replace(_ANSWER, reasoning=_REASONING)
_CALL: Final = ToolCall("pick_one", {"colour": "blue", "count": 2})
_CALLING: Final = Message("assistant", "", tool_calls=(_CALL,))
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "pick_one",
        "description": "Picks one.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["colour"],
        },
    },
}


def find_style(template: ChatTemplate, *, thinking: bool) -> Style:
    """How to write with `template`. Raises UnsupportedError saying what stands in the way."""
    encoder = make_encoder(template.tokenizer, template.source)
    template = replace(template, json_arguments=_wants_json(template))
    shows_thoughts = _REASONING in _text(template, [_QUESTION, _THOUGHT], thinking=True)
    opens = next((o for o in (f"{THINK_OPEN}\n", THINK_OPEN) if _prompt(template).endswith(o)), "")
    for family in FAMILIES:
        style = Style(template, family, encoder, shows_thoughts, opens, thinking)
        if family.ends[0] in encoder.control_ids and all(
            _reads_back(style, probe) for probe in _probes(shows_thoughts)
        ):
            return style
    style = Style(template, _generic(template, encoder), encoder, shows_thoughts, opens, thinking)
    _require_usable(style)
    return style


def _probes(shows_thoughts: bool) -> Iterator[Message]:
    yield _ANSWER
    yield _CALLING
    if shows_thoughts:
        yield _THOUGHT


def _reads_back(style: Style, probe: Message) -> bool:
    """Whether the family's reader gives back what the template writes of `probe`; also if the template refuses tools."""
    style = replace(style, thinking=style.thinking or probe is _THOUGHT)
    tools = [_TOOL] if probe is _CALLING else []
    try:
        transcript = write_transcript(style, [_QUESTION, probe], tools, with_prompt=False)
    except MarksMatterError:
        return False
    if transcript.refused:
        return probe is _CALLING and "end-of-turn" not in str(transcript.refused[1])
    text = transcript.runs[0][-1].text
    end = next((end for end in style.family.ends if text.endswith(end)), None)
    if end is None:
        return False
    reasoning, rest = (
        split_reasoning(text.removesuffix(end)) if style.shows_thoughts else (None, text.removesuffix(end))
    )
    try:
        answer = style.family.read(rest, {"pick_one": {"colour": "string", "count": "integer"}})
    except ValueError:
        return False
    return (answer.content, answer.reasoning or reasoning, answer.tool_calls) == (
        probe.content,
        probe.reasoning,
        probe.tool_calls,
    )


def _generic(template: ChatTemplate, encoder: Encoder) -> Family:
    """A family whose turns end with the control token that the template writes after every answer."""
    marked = replace(_ANSWER, content=mark(0, _ANSWER.content))
    _, _, after = _text(template, [_QUESTION, marked]).partition(CLOSE)
    _, _, between = _text(template, [_QUESTION, marked, _QUESTION]).partition(CLOSE)
    # what follows an answer whatever comes next ends it; the last of that is what the model stops at
    last, later = ([token for token in encoder.pattern.split(text)[1::2]] for text in (after, between))
    shared = [token for token, other in zip(last, later, strict=False) if token == other]
    found = shared or last
    if not found:
        eos = template.tokenizer.eos_token
        raise UnsupportedError(
            f"{display_name(template.tokenizer)}: its chat template writes no end-of-turn token after an answer "
            f"({unmarked(after[:40])!r} follows it), so a model trained with it would never learn to stop; "
            f"use a template that ends answers with a special token such as {eos!r}"
        )
    return Family("generic", (found[-1] if shared else found[0],), (), read_text)


def _require_usable(style: Style) -> None:
    try:
        transcript = write_transcript(style, [_QUESTION, _ANSWER], [], with_prompt=False)
        if transcript.refused:
            raise transcript.refused[1]
    except MarksMatterError:
        pass  # it will be written without marks
    except DataError as error:
        raise UnsupportedError(
            f"{display_name(style.template.tokenizer)}: its chat template cannot be used to train on: {error}"
        ) from None


def _wants_json(template: ChatTemplate) -> bool:
    """Whether tool calls are only written if their arguments come as JSON text."""

    def is_written(candidate: ChatTemplate) -> bool:
        try:
            return "pick_one" in candidate.write([_QUESTION, _CALLING], [_TOOL], as_prompt=False)
        except TemplateRefusedError:
            return False

    return not is_written(template) and is_written(replace(template, json_arguments=True))


def _text(template: ChatTemplate, messages: Sequence[Message], *, thinking: bool = False) -> str:
    """A finished conversation. Raises UnsupportedError."""
    try:
        return template.write(messages, as_prompt=False, thinking=thinking)
    except TemplateRefusedError as refusal:
        raise _not_runnable(template, refusal) from None


def _prompt(template: ChatTemplate) -> str:
    try:
        return template.write([_QUESTION], as_prompt=True, thinking=True)
    except TemplateRefusedError as refusal:
        raise _not_runnable(template, refusal) from None


def _not_runnable(template: ChatTemplate, refusal: TemplateRefusedError) -> UnsupportedError:
    return UnsupportedError(
        f"{display_name(template.tokenizer)}: its chat template cannot be run on one question and its answer: {refusal}"
    )
