"""How each model family writes a conversation down, as data, and the functions that render with it. No token ids here.

A rendering is a list of spans. A span is encoded as one text, so byte pairs may merge inside it but never across its
border; the borders stand where sampling starts and stops, so what is trained is what is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from mint.chat.messages import Message, data_error

FROZEN_DATE: Final = "26 Jul 2024"  # the Llama 3.1 template's own default, and 3.2's where no clock is available


@dataclass(frozen=True, slots=True)
class Family:
    """What is fixed for every model of a family.

    bos: the token that starts every prompt, or "".
    header: what stands before a turn; {role} is its role.
    end_of_turn: the token that ends a turn; the model must learn to write it.
    after_turn: what stands between end_of_turn and the next header.
    other_stops: further tokens at which sampling ends, where the vocabulary has them.
    trims_content: whitespace around contents is removed.
    dated_system: text that opens the system turn, with {date}; "" for none.
    thinks: answers start with a <think> block, which is taken out of the history (Qwen3).
    """

    name: str
    bos: str
    header: str
    end_of_turn: str
    after_turn: str
    other_stops: tuple[str, ...]
    trims_content: bool = False
    dated_system: str = ""
    thinks: bool = False


CHATML: Final = Family(
    name="chatml",
    bos="",
    header="<|im_start|>{role}\n",
    end_of_turn="<|im_end|>",
    after_turn="\n",
    other_stops=("<|endoftext|>",),
)
QWEN3: Final = replace(CHATML, name="qwen3", thinks=True)
LLAMA3: Final = Family(
    name="llama3",
    bos="<|begin_of_text|>",
    header="<|start_header_id|>{role}<|end_header_id|>\n\n",
    end_of_turn="<|eot_id|>",
    after_turn="",
    other_stops=("<|end_of_text|>", "<|eom_id|>"),
    trims_content=True,
)
LLAMA3_DATED: Final = replace(
    LLAMA3,
    name="llama3-dated",
    dated_system="Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n",
)
# The models each family is known from; detection goes by the template alone.
FAMILIES: Final = {
    CHATML: "SmolLM2, Qwen2, Qwen2.5, Qwen3-Instruct-2507",
    QWEN3: "Qwen3 with the thinking switch",
    LLAMA3: "Llama 3",
    LLAMA3_DATED: "Llama 3.1, 3.2",
}

THINK_OPEN: Final = "<think>\n"
THINK_CLOSE: Final = "\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class Layout:
    """A family and the choices made for one renderer.

    default_system: the system text that the template adds to a conversation that does not open with one; None for none.
    """

    family: Family
    default_system: str | None = None
    thinking: bool = False
    date: str = FROZEN_DATE


class Piece(NamedTuple):
    """Text of the template (`is_markup`: its control tokens are real) or of a message (always ordinary text)."""

    text: str
    is_markup: bool


Span = tuple[Piece, ...]


class AnswerSpan(NamedTuple):
    """A span of an assistant turn, and whether the model has to learn it."""

    span: Span
    trained: bool


def markup(text: str) -> Piece:
    return Piece(text, True)


def body(text: str) -> Piece:
    return Piece(text, False)


def spans_text(spans: Sequence[Span]) -> str:
    return "".join(piece.text for span in spans for piece in span)


def injected_system(layout: Layout, messages: Sequence[Message]) -> str | None:
    """The system text that the template adds to this conversation on its own, or None."""
    if layout.family.dated_system:
        return layout.family.dated_system.format(date=layout.date)
    return layout.default_system if messages[0].role != "system" else None


def prompt_spans(layout: Layout, messages: Sequence[Message]) -> list[Span]:
    """The prompt for the next assistant turn: all messages and the generation prompt."""
    spans = [*history_spans(layout, messages), (_header(layout, "assistant"),)]
    if layout.family.thinks and not layout.thinking:
        spans.append(_EMPTY_THOUGHT)
    return spans


def history_spans(layout: Layout, messages: Sequence[Message]) -> list[Span]:
    """All messages as finished turns, as the template shows them to the model; at least one message."""
    family = layout.family
    end, after = markup(family.end_of_turn + family.after_turn), markup(family.after_turn)
    spans: list[Span] = [(markup(family.bos),)] if family.bos else []
    first = 0
    injected = injected_system(layout, messages)
    if injected is not None:
        # a dated system turn takes in the conversation's own system text; a default one only stands in for it
        first = 1 if messages[0].role == "system" else 0
        own = messages[0].content if first else ""
        spans.append((_header(layout, "system"), markup(injected), body(_trimmed(family, own)), end))
    thought_from = _last_query(messages) + 1 if family.thinks else len(messages)
    for index, message in enumerate(messages[first:], start=first):
        if message.role != "assistant":
            spans.append((_header(layout, message.role), body(_trimmed(family, message.content)), end))
            continue
        reasoning, content = _taken_apart(family, message.content)
        shows_thought = index >= thought_from and (bool(reasoning) or index == len(messages) - 1)
        turn = _turn(family, reasoning if shows_thought else None, content)
        spans += [(_header(layout, "assistant"),), *(part.span for part in turn), (after,)]
    return spans


def answer_spans(layout: Layout, message: Message, where: str) -> list[AnswerSpan]:
    """What follows `prompt_spans` when the model answers with `message`, up to its end-of-turn token.

    Trained are the content, the thought if there is one, and the end-of-turn token. An empty thought is not trained,
    whether the prompt contains it (thinking off) or the template puts it in (thinking on, an answer without thought).
    Raises DataError naming `where` for an answer without text, or with a thought although thinking is off.
    """
    family = layout.family
    reasoning, content = _taken_apart(family, message.content)
    if not content.strip():
        raise data_error("empty_answer", f"{where} is an assistant turn without text: leave the row out")
    if reasoning and not layout.thinking:
        raise data_error(
            "thinking_mismatch",
            f"{where} has a <think> block, but the prompt says that there is none (thinking=False); "
            "use get_renderer(tokenizer, thinking=True) or remove the thoughts",
        )
    if not family.thinks:
        return _turn(family, None, content)
    return _turn(family, reasoning if layout.thinking else None, content.lstrip("\n"))


def split_reasoning(content: str) -> tuple[str, str]:
    """The thought and the rest of an assistant text, both without the newlines between; no </think>, no thought.

    Source: the Qwen3 chat template, which takes answers apart in the same way.
    """
    if "</think>" not in content:
        return "", content
    before, *_, after = content.split("</think>")
    return before.rstrip("\n").split("<think>")[-1].strip("\n"), after.lstrip("\n")


_EMPTY_THOUGHT: Final = (markup(THINK_OPEN + THINK_CLOSE),)


def _turn(family: Family, reasoning: str | None, content: str) -> list[AnswerSpan]:
    """An assistant turn after its header. reasoning: None for no think block, "" for an empty one."""
    end = markup(family.end_of_turn)
    if reasoning is None:
        return [AnswerSpan((body(_trimmed(family, content)), end), True)]
    text = body(content.lstrip("\n"))
    if not reasoning:
        return [AnswerSpan(_EMPTY_THOUGHT, False), AnswerSpan((text, end), True)]
    return [AnswerSpan((markup(THINK_OPEN), body(reasoning), markup(THINK_CLOSE), text, end), True)]


def _taken_apart(family: Family, content: str) -> tuple[str, str]:
    return split_reasoning(content) if family.thinks else ("", content)


def _header(layout: Layout, role: str) -> Piece:
    return markup(layout.family.header.format(role=role))


def _trimmed(family: Family, content: str) -> str:
    return content.strip() if family.trims_content else content


def _last_query(messages: Sequence[Message]) -> int:
    """Index of the last user message that is not a tool response written as text; the last index without one.

    Source: the Qwen3 chat template: thoughts are shown only in answers after that message.
    """
    for index in range(len(messages) - 1, -1, -1):
        text = messages[index].content
        is_tool_response = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if messages[index].role == "user" and not is_tool_response:
            return index
    return len(messages) - 1
