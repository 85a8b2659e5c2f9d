"""`get_renderer`: prompts, stop tokens and answers in the form of a tokenizer's chat template. No loss weights here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mint.chat.encoding import Tokenizer
from mint.chat.families import THINK_CLOSE, THINK_OPEN, Answer, ArgumentTypes, split_reasoning
from mint.chat.marks import BREAK
from mint.chat.messages import Dialog, check_messages, check_row
from mint.chat.scribe import Scribe
from mint.chat.styles import find_style
from mint.chat.template import display_name, open_template
from mint.chat.transcript import Style
from mint.errors import UnsupportedError

Ended = Literal["end_of_turn", "tool_call", "end_of_text", "cut_off"]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer that a model has written.

    content: the text without thought, tool calls and stop token. reasoning: the thought, None where there is none.
    tool_calls: in the form of a message's. A call that cannot be read leaves the whole text in `content`.
    ended: "end_of_turn"; "tool_call", the same with a call in it; "end_of_text" at a stop token that ends no turn;
        "cut_off" if sampling ended (max_tokens) before the model ended its turn.
    """

    content: str
    reasoning: str | None
    tool_calls: tuple[dict[str, Any], ...]
    ended: Ended

    @property
    def finished(self) -> bool:
        return self.ended != "cut_off"

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message to put into the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = list(self.tool_calls)
        return message


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Renderer:
    """Writes conversations as token ids, in the form that a tokenizer's model was trained on; see `get_renderer`."""

    scribe: Scribe
    date: str | None

    def __repr__(self) -> str:
        return f"Renderer({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def __reduce__(self) -> Any:
        return _renderer_again, (self.tokenizer, self.style.thinking, self.date)

    @property
    def style(self) -> Style:
        return self.scribe.style

    @property
    def tokenizer(self) -> Tokenizer:
        return self.style.encoder.tokenizer

    @property
    def settings(self) -> dict[str, str | bool | None]:
        """What a run has to record so that others render as it did: family, template (hash), thinking, date."""
        template = self.style.template
        return {
            "family": self.style.family.name,
            "template": hashlib.sha256(template.source.encode()).hexdigest()[:16],
            "thinking": self.style.thinking,
            "date": template.date if template.is_dated else None,
        }

    @property
    def can_think(self) -> bool:
        """Whether the template has a place for thoughts, so that thinking=True is possible."""
        return self.style.shows_thoughts or bool(self.style.opens_thought)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which sampling has to stop: end of turn first, then end of text; for `SamplingParams`."""
        family, control_ids = self.style.family, self.style.encoder.control_ids
        stops = [control_ids[text] for text in (*family.ends, *family.other_stops) if text in control_ids]
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys(stops if eos is None else [*stops, eos]))

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Ids that end a turn."""
        control_ids = self.style.encoder.control_ids
        return frozenset(control_ids[text] for text in self.style.family.ends if text in control_ids)

    def prompt(self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids to sample the next assistant turn from; the generation prompt is included.

        messages: see `conversation_to_datums`. tools: JSON schemas of functions that the model may call. Raises DataError.
        """
        dialog = _dialog(messages, tools)
        stretches = self.scribe.write(dialog, with_prompt=True).prompt
        assert stretches is not None
        return [token for ids in self.style.encoder.encode_pieces([s.pieces for s in stretches], {}) for token in ids]

    def parse(self, tokens: Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None) -> Response:
        """The answer in sampled token ids (list, numpy or torch), as they come after the prompt, stop token included.

        What follows the first stop token is ignored. Other control tokens stay visible in the text. tools: as given to
        `prompt`; Qwen3.5 and GLM write arguments without quotes, and only the schema tells text from numbers there.
        """
        ids = [int(token) for token in tokens]
        stops = set(self.stop_token_ids)
        end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
        text = self.style.encoder.decode_guarded(ids[:end])
        cut_off = end == len(ids)
        answer = self._read(text, _argument_types(tools), cut_off)
        calls = tuple(_unguarded(call.to_dict()) for call in answer.tool_calls)
        ended: Ended = "cut_off"
        if not cut_off:
            ended = "end_of_text" if ids[end] not in self.end_token_ids else "tool_call" if calls else "end_of_turn"
        reasoning = None if answer.reasoning is None else _unguarded(answer.reasoning)
        return Response(_unguarded(answer.content), reasoning, calls, ended)

    def _read(self, text: str, types: ArgumentTypes, cut_off: bool) -> Answer:
        style = self.style
        reasoning, rest = None, text
        if self.can_think:
            opened = style.thinking and bool(style.opens_thought)  # the prompt has begun the thought
            if cut_off and THINK_CLOSE not in text and (opened or text.lstrip("\n").startswith(THINK_OPEN)):
                return Answer("", text.split(THINK_OPEN)[-1].strip("\n"))  # cut off inside the thought
            reasoning, rest = split_reasoning(text)
        try:
            answer = style.family.read(rest, types)
        except (
            ValueError,
            RecursionError,
        ):  # a call that the model has written wrongly: the user sees the text as it is
            return Answer(rest, reasoning)
        return answer if reasoning is None else Answer(answer.content, reasoning, answer.tool_calls)


def prompt(
    messages: Sequence[Any],
    tokenizer: Tokenizer | Renderer,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids to sample the next assistant turn from; see `Renderer.prompt`."""
    return as_renderer(tokenizer).prompt(messages, tools)


def as_renderer(tokenizer: Tokenizer | Renderer) -> Renderer:
    return tokenizer if isinstance(tokenizer, Renderer) else get_renderer(tokenizer)


def get_renderer(tokenizer: Tokenizer, *, thinking: bool = False, date: str | None = None) -> Renderer:
    """The renderer of a tokenizer's chat template. A template is examined when its renderer is made (some 10 ms).

    tokenizer: a transformers tokenizer with a chat template, in its final state; tokens added later need a new renderer.
    thinking: for templates with thoughts (Qwen3, GLM-4.5 ...). False: where the template has the switch, prompts say that
        there is no thought, which fits data without thoughts. True: the model writes its own thought; a thought in an answer
        is trained, and where an answer has none the template's empty block is put in, untrained.
    date: for templates that write today's date (Llama 3.1, 3.2, gpt-oss), like "26 Jul 2024", which is the default, so
        that a run does not depend on the day it is started.
    Raises UnsupportedError for a template that cannot be used, and for an option that it does not have.
    """
    template = open_template(tokenizer, date)
    style = find_style(template, thinking=thinking)
    if thinking and not (style.shows_thoughts or style.opens_thought):
        raise UnsupportedError(
            f"thinking=True: the {style.family.name} template of {display_name(tokenizer)} writes no thoughts"
        )
    if date is not None and not template.is_dated:
        raise UnsupportedError(
            f"date={date!r}: the {style.family.name} template of {display_name(tokenizer)} writes no date"
        )
    return Renderer(Scribe(style), date)


def _renderer_again(tokenizer: Tokenizer, thinking: bool, date: str | None) -> Renderer:
    return get_renderer(tokenizer, thinking=thinking, date=date)


def _dialog(messages: Any, tools: Any) -> Dialog:
    if tools is None:
        return Dialog(check_messages(messages))
    dialog = check_row({"messages": messages, "tools": tools})
    assert isinstance(dialog, Dialog)
    return dialog


def _unguarded(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(BREAK, "")
    if isinstance(value, dict):
        return {_unguarded(key): _unguarded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unguarded(item) for item in value]
    return value


def _argument_types(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, str]]:
    types: dict[str, dict[str, str]] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        properties = (function.get("parameters") or {}).get("properties") or {}
        types[str(function.get("name"))] = {
            str(key): str(schema.get("type")) for key, schema in properties.items() if isinstance(schema, Mapping)
        }
    return types
