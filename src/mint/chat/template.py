"""Runs a tokenizer's chat template. The only module that does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from mint.chat.encoding import Tokenizer
from mint.chat.marks import TAGGED, UNTAGGED
from mint.chat.messages import Message
from mint.chat.template_source import Reading, read_source
from mint.errors import InputError, UnsupportedError

FROZEN_DATE: Final = "26 Jul 2024"  # the Llama 3.1 template's own default, and 3.2's where no clock is available
DATE_FORMATS: Final = ("%d %b %Y", "%Y-%m-%d")

_CLOCK: Final = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_TAG: Final = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


class TemplateRefusedError(Exception):
    """The template raised; the text says what."""


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """A tokenizer's template with its date frozen.

    source: as the tokenizer has it. tagged: whether it marks answers with {% generation %}.
    json_arguments: tool calls' arguments are given to it as JSON text, not as a mapping.
    """

    tokenizer: Tokenizer = field(repr=False)
    source: str = field(repr=False)
    runnable: str = field(repr=False)
    date: str
    tagged: bool
    reading: Reading = field(repr=False)
    json_arguments: bool = False

    @property
    def has_thinking_switch(self) -> bool:
        return "enable_thinking" in self.source

    @property
    def is_dated(self) -> bool:
        return "date_string" in self.source or "strftime_now" in self.source

    def write(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, as_prompt: bool, thinking: bool = False
    ) -> str:
        """What the template makes of the messages. Raises TemplateRefusedError."""
        from jinja2 import TemplateError  # with transformers, so not needed to import mint.chat

        try:
            text = self.tokenizer.apply_chat_template(
                [self._given(message) for message in messages],
                chat_template=self.runnable,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=as_prompt,
                enable_thinking=thinking,
                date_string=self.date,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            # what a sandboxed template can raise: its own refusals, and operations on values it did not expect
            raise TemplateRefusedError(str(error) or type(error).__name__) from None
        return str(text)

    def _given(self, message: Message) -> dict[str, Any]:
        """A message as the template sees it. Keys that a message has no use for are absent: some templates ask for keys."""
        role = message.role
        if role == "developer" and role not in self.reading.compared:
            role = "system"  # the newer name of the same role
        given: dict[str, Any] = {"role": role, "content": message.content}
        if message.reasoning is not None:
            given["reasoning_content"] = message.reasoning
        if message.tool_calls:
            given["tool_calls"] = [self._given_call(call.to_dict()) for call in message.tool_calls]
        if message.tool_call_id is not None:
            given["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            given["name"] = message.name
        return given

    def _given_call(self, call: dict[str, Any]) -> dict[str, Any]:
        import json

        if self.json_arguments:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return call


def open_template(tokenizer: Tokenizer, date: str | None) -> ChatTemplate:
    """The tokenizer's template; `date` None for FROZEN_DATE.

    Raises UnsupportedError if the tokenizer has no template or one that asks for the time in a way that cannot be frozen,
    InputError if `tokenizer` is none or the template needs a date that `date` is not.
    """
    source = _source_of(tokenizer)
    shown = _in_format(FROZEN_DATE if date is None else date, DATE_FORMATS[0])
    runnable = _CLOCK.sub(lambda call: repr(_in_format(shown, call[2])), source)
    if re.search(r"strftime_now\s*\(", runnable):
        raise UnsupportedError(
            f"{display_name(tokenizer)}: its chat template computes the format of today's date, so that the date cannot be "
            "frozen; set tokenizer.chat_template to one with strftime_now('...') or without a date"
        )
    runnable = _TAG.sub(lambda tag: f"{{{{{tag[1]} '{UNTAGGED if tag[2] else TAGGED}' {tag[3]}}}}}", runnable)
    return ChatTemplate(
        tokenizer, source, runnable, shown, bool(_TAG.search(source)), read_source(_TAG.sub("", source))
    )


def display_name(tokenizer: Tokenizer) -> str:
    return f"tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"


def _source_of(tokenizer: Tokenizer) -> str:
    if not hasattr(tokenizer, "apply_chat_template"):
        raise InputError(
            f"expected a transformers tokenizer, got {type(tokenizer).__name__}; "
            "load one with AutoTokenizer.from_pretrained(...)"
        )
    if not tokenizer.chat_template:
        raise UnsupportedError(
            f"{display_name(tokenizer)} has no chat template (is it a base model?); set tokenizer.chat_template to "
            "that of its instruct version"
        )
    return tokenizer.get_chat_template()


def _in_format(text: str, wanted: str) -> str:
    for known in DATE_FORMATS:
        try:
            return datetime.strptime(text, known).strftime(wanted)
        except (ValueError, TypeError):
            continue
    raise InputError(f"date={text!r}: expected a date such as '26 Jul 2024' or '2024-07-26'")
