"""Conversations as text: what the sampler is given before each answer, and what the model has to answer. No token ids.

All of it is written by the tokenizer's own template. Contents are marked (see marks.py), so that the output says what
came from which message and what the template wrote itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mint.chat.encoding import Encoder
from mint.chat.families import THINK_CLOSE, THINK_OPEN, Family, split_reasoning
from mint.chat.marks import (
    TAGGED,
    UNTAGGED,
    content_number,
    mark,
    marked_parts,
    numbers_in,
    reasoning_number,
    unmarked,
)
from mint.chat.messages import Message, ToolCall, data_error
from mint.chat.template import ChatTemplate, TemplateRefusedError
from mint.chat.verify import no_continuation, require_answer, require_shown, require_tools, thinking_mismatch
from mint.errors import DataError

_EMPTY_THOUGHT: Final = re.compile(rf"\n?{THINK_OPEN}\n*{THINK_CLOSE}\n*")


@dataclass(frozen=True, slots=True)
class Style:
    """How conversations are written: a template, what is known of its family, and the choices of one renderer.

    shows_thoughts: the template writes an answer's `reasoning_content` before it.
    opens_thought: what a prompt ends with where the template makes every answer start with a thought, else "".
    """

    template: ChatTemplate
    family: Family
    encoder: Encoder
    shows_thoughts: bool = False
    opens_thought: str = ""
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """Message number `message`, an answer, in its place; texts are marked.

    prompt: what the sampler is given. lead: what follows it but is not to be learned (an empty thought). answer: what the
    model has to write, up to and with the text of its end-of-turn token.
    """

    message: int
    prompt: str
    lead: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.lead + self.answer


@dataclass(frozen=True, slots=True)
class Stretch:
    """Text that is encoded on its own. parts: texts and the numbers of the marks they stand in (None: the template's own).

    message: the answer that the stretch begins with, up to its end-of-turn token; None where nothing is to be learned.
    known: the same text in pieces of which some are encoded already; None where it has to be encoded whole.
    """

    parts: tuple[tuple[str, int | None], ...]
    message: int | None
    known: tuple[str | tuple[int, ...], ...] | None = None

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)

    @property
    def pieces(self) -> tuple[str | tuple[int, ...], ...]:
        return (self.text,) if self.known is None else self.known


@dataclass(frozen=True, slots=True)
class Transcript:
    """A conversation written down.

    runs: stretches of one text each, in which answers follow one another as far as each prompt continues the text before.
    refused: why an answer could not be written, by its message number.
    prompt: the stretches to sample the next answer from, where that was asked for.
    added: texts that the template adds of its own, beside roles and control tokens.
    """

    runs: tuple[tuple[Stretch, ...], ...]
    refused: Mapping[int, DataError]
    prompt: tuple[Stretch, ...] | None
    added: tuple[str, ...]


def prepare_message(style: Style, message: Message) -> Message:
    """The message as it is rendered: a thought written into an answer is taken out where the template would do so too."""
    if message.role == "assistant" and message.reasoning is None and (style.shows_thoughts or style.opens_thought):
        reasoning, content = split_reasoning(message.content)
        if reasoning is not None or THINK_CLOSE in message.content:
            return replace(message, reasoning=reasoning, content=content)
    return message


def mark_message(style: Style, index: int, message: Message) -> Message:
    """The message with control tokens' texts guarded and its texts marked."""
    guard = style.encoder.guard
    return replace(
        message,
        content=mark(content_number(index), guard(message.content)),
        reasoning=None if message.reasoning is None else mark(reasoning_number(index), guard(message.reasoning)),
        tool_calls=tuple(
            ToolCall(guard(call.name), _guarded(guard, call.arguments), call.id) for call in message.tool_calls
        ),
    )


def guard_tools(style: Style, tools: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [_guarded(style.encoder.guard, tool) for tool in tools]


def _guarded(guard: Any, value: Any) -> Any:
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {guard(key): _guarded(guard, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_guarded(guard, item) for item in value]
    return value


class MarksMatterError(Exception):
    """The template writes something else where marks stand; the transcript has to be made without them."""


def write_transcript(
    style: Style, messages: Sequence[Message], tools: Sequence[Any], *, with_prompt: bool
) -> Transcript:
    """The transcript of marked messages, or of messages without marks. with_prompt: also the prompt for one more answer.

    Raises DataError where the prompt cannot be written, MarksMatterError.
    """
    turns: list[Turn] = []
    refused: dict[int, DataError] = {}
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        try:
            turns.append(_write_turn(style, messages[: index + 1], tools))
        except DataError as error:
            refused[index] = error
    runs: list[tuple[Stretch, ...]] = []
    written = ""  # the text of the last run
    for turn in turns:
        if runs and turn.prompt.startswith(written):
            begun = _carried_on(runs.pop(), turn.prompt[len(written) :])
        else:
            begun = (_stretch(turn.prompt, None),)
        lead = (_stretch(turn.lead, None),) if turn.lead else ()
        runs.append((*begun, *lead, _stretch(turn.answer, turn.message)))
        written = turn.text
    prompt = None
    if with_prompt:
        text = write_prompt(style, messages, tools)
        continues = bool(runs) and text.startswith(written)
        prompt = _carried_on(runs[-1], text[len(written) :]) if continues else (_stretch(text, None),)
    longest = prompt or (runs[-1] if runs else ())
    # with tools the template writes much that came from the row, which tells nothing about the template
    has_tools = bool(tools) or any(message.tool_calls for message in messages)
    return Transcript(tuple(runs), refused, prompt, () if has_tools else _added_texts(style, longest))


def _carried_on(run: tuple[Stretch, ...], text: str) -> tuple[Stretch, ...]:
    """The run with `text` put to its last stretch, behind the end of the answer."""
    return (*run[:-1], replace(run[-1], parts=(*run[-1].parts, *marked_parts(text))))


def write_prompt(style: Style, messages: Sequence[Message], tools: Sequence[Any]) -> str:
    """The prompt for the next answer. Raises DataError, MarksMatterError."""
    if not messages:
        raise data_error(
            "no_prompt",
            "message 0 is an assistant turn with nothing before it to answer; remove it, put a system or "
            "user message before it, or use train_on='last_assistant'",
        )
    prompt = _without_tags(_write(style, messages, tools, as_prompt=True))
    require_shown(messages, prompt)
    require_tools(tools, prompt)
    return prompt if style.thinking else prompt.removesuffix(style.opens_thought)


def whole_text(style: Style, messages: Sequence[Message], tools: Sequence[Any]) -> Stretch:
    """All messages as the template writes them when nothing is to follow, up to the last end-of-turn token."""
    text = _without_tags(_write(style, messages, tools, as_prompt=False))
    require_shown(messages, text)
    if style.family.next_header_ends:
        return _stretch(_with_next_header(style, text, messages[-1]), None)
    text = text[: max((text.rfind(end) + len(end) for end in style.family.ends if end in text), default=len(text))]
    return _stretch(text, None)


def _write(style: Style, messages: Sequence[Message], tools: Sequence[Any], *, as_prompt: bool) -> str:
    """What the template writes. Raises DataError, MarksMatterError."""
    written = _run(style, messages, tools, as_prompt)
    if numbers_in(written):
        plain = _run(style, [without_marks(message) for message in messages], tools, as_prompt)
        if unmarked(written) != plain:
            raise MarksMatterError
    elif any(numbers_in(message.content) for message in messages):
        raise MarksMatterError
    return written


def _run(style: Style, messages: Sequence[Message], tools: Sequence[Any], as_prompt: bool) -> str:
    try:
        return style.template.write(messages, tools, as_prompt=as_prompt, thinking=style.thinking)
    except TemplateRefusedError as refusal:
        raise data_error(
            "template_refused",
            f"the chat template refuses the conversation up to message {len(messages) - 1} "
            f"({messages[-1].role}): {refusal}",
        ) from None


def without_marks(message: Message) -> Message:
    reasoning = None if message.reasoning is None else unmarked(message.reasoning)
    return replace(message, content=unmarked(message.content), reasoning=reasoning)


def _without_tags(text: str) -> str:
    return text.replace(TAGGED, "").replace(UNTAGGED, "")


def _write_turn(style: Style, messages: Sequence[Message], tools: Sequence[Any]) -> Turn:
    """The last message as an answer to those before it. Raises DataError, MarksMatterError."""
    index, message = len(messages) - 1, messages[-1]
    if not unmarked(message.content).strip() and not message.tool_calls:
        raise data_error("empty_answer", f"message {index} is an assistant turn without text: leave the row out")
    prompt = write_prompt(style, messages[:-1], tools)
    tagged = _write(style, messages, tools, as_prompt=False)
    answer = _answer_after(style, messages, tools, prompt, _without_tags(tagged))
    answer = _up_to_the_end(style, answer, message, index)
    require_answer(message, index, answer, thoughts_are_off=bool(style.opens_thought) and not style.thinking)
    lead = _untrained_lead(style, prompt, tagged, answer)
    return Turn(index, prompt, lead, answer[len(lead) :])


def _answer_after(style: Style, messages: Sequence[Message], tools: Sequence[Any], prompt: str, full: str) -> str:
    """What the finished conversation `full` has after the prompt. Raises DataError, MarksMatterError."""
    message, index = messages[-1], len(messages) - 1
    if full.startswith(prompt):
        return full[len(prompt) :]
    unopened = prompt.removesuffix(style.opens_thought)
    if (
        style.thinking
        and unopened != prompt
        and full.startswith(unopened)
        and not full.startswith(unopened + THINK_OPEN)
    ):
        # the prompt begins a thought, but the template writes none into finished answers
        return f"{message.reasoning or ''}\n{THINK_CLOSE}\n\n{full[len(unopened) :]}"
    # a template may write the history otherwise once the answer is there; the answer itself follows the same opening
    history = _without_tags(_write(style, messages[:-1], tools, as_prompt=False))
    opening = prompt.removeprefix(history)
    _, found, answer = full.rpartition(opening) if opening and opening != prompt else ("", "", "")
    if found and content_number(index) in numbers_in(answer):
        return answer
    if message.reasoning and not style.thinking and style.template.has_thinking_switch:
        raise thinking_mismatch(index)
    raise no_continuation(prompt, full, index)


def _untrained_lead(style: Style, prompt: str, tagged: str, answer: str) -> str:
    """What the answer begins with that is not to be learned.

    An empty thought: a model that is asked to think is not taught to leave it out. And what stands before the template's
    own {% generation %} tag, if it has any.
    """
    starts = [len(_without_tags(tagged[: tag.start()])) - len(prompt) for tag in re.finditer(TAGGED, tagged)]
    if starts:
        return answer[: min((start for start in starts if 0 <= start < len(answer)), default=0)]
    if not (style.shows_thoughts or style.opens_thought):
        return ""
    begun = style.opens_thought if style.opens_thought and prompt.endswith(style.opens_thought) else ""
    found = _EMPTY_THOUGHT.match(begun + answer)
    return answer[: found.end() - len(begun)] if found and found.end() > len(begun) else ""


def _up_to_the_end(style: Style, answer: str, message: Message, index: int) -> str:
    """`answer` up to and with its end-of-turn text."""
    family = style.family
    if family.next_header_ends:
        return _with_next_header(style, answer, message)
    found = [(answer.find(end), end) for end in family.ends if end in answer]
    if not found:
        raise data_error(
            "no_continuation",
            f"message {index}: the template writes no end-of-turn token ({' or '.join(family.ends)}) after it, so the "
            "model would never learn to stop",
        )
    start, end = min(found)
    return answer[: start + len(end)]


def _with_next_header(style: Style, text: str, answer: Message) -> str:
    """`text`, which ends with an answer, and the header that ends it."""
    return text.rstrip("\n") + style.family.ends[1 if answer.tool_calls else 0]


def _stretch(text: str, message: int | None) -> Stretch:
    return Stretch(tuple(marked_parts(text)), message)


def _added_texts(style: Style, stretches: Sequence[Stretch]) -> tuple[str, ...]:
    """What the template wrote of its own, roles and control tokens aside. Nothing where marks are missing."""
    parts = [part for stretch in stretches for part in stretch.parts]
    if all(number is None for _, number in parts):
        return ()
    texts = []
    own = "".join(text if number is None else "\0" for text, number in parts)
    for chunk in re.split("\0", style.encoder.pattern.sub("\0", own)):
        text = chunk.strip()
        first, _, rest = text.partition("\n")
        if first in ("system", "user", "assistant", "developer", "tool", "model", "ipython"):
            text = rest.strip()
        if any(character.isalnum() for character in text):
            texts.append(text)
    return tuple(dict.fromkeys(texts))
