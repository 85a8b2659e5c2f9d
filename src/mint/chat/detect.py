"""Finds the layout of a tokenizer's chat template by running the template. The only module that runs one.

A family is accepted only if it writes every probe conversation exactly as the template does. So a revision of a
template that behaves the same is recognised, whatever its source looks like, and one that does not is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

from mint.chat.encoding import Tokenizer
from mint.chat.layout import FAMILIES, FROZEN_DATE, Family, Layout, history_spans, prompt_spans, spans_text
from mint.chat.messages import Message
from mint.errors import InputError, UnsupportedError

_SYSTEM, _USER, _OTHER_USER = Message("system", " S\n"), Message("user", " U\n"), Message("user", "V")
_ANSWER, _THOUGHT = Message("assistant", "\n A "), Message("assistant", "<think>\n\nT\n</think>\n\n B")
_TOOL_TEXT = Message("user", "<tool_response>R</tool_response>")
# Together they show: system text (none, own, in the middle), trimming, thoughts in history and at the end, answers in a
# row, and text that Qwen3 takes for a tool's.
PROBES: Final[tuple[tuple[Message, ...], ...]] = (
    (_OTHER_USER,),
    (_SYSTEM, _USER),
    (_USER, _ANSWER),
    (_USER, _THOUGHT),
    (_SYSTEM, _USER, _ANSWER, _OTHER_USER, _THOUGHT, _USER),
    (_USER, _THOUGHT, _SYSTEM, _ANSWER, _OTHER_USER, _ANSWER),
    (_USER, _THOUGHT, _ANSWER, _TOOL_TEXT),
)

# (template, bos, eos) -> its layout
_known: dict[tuple[str, str | None, str | None], Layout] = {}


def template_of(tokenizer: Tokenizer) -> str:
    """The source of the tokenizer's chat template. Raises UnsupportedError if it has none, InputError if it is none."""
    if not hasattr(tokenizer, "apply_chat_template"):
        raise InputError(
            f"expected a transformers tokenizer, got {type(tokenizer).__name__}; "
            "load one with AutoTokenizer.from_pretrained(...)"
        )
    if not tokenizer.chat_template:
        raise UnsupportedError(
            f"{display_name(tokenizer)} has no chat template (is it a base model?); set tokenizer.chat_template to "
            f"that of its instruct version. Supported: {_supported()}"
        )
    return tokenizer.get_chat_template()


def find_layout(tokenizer: Tokenizer) -> Layout:
    """The layout, thinking off and date frozen, that writes all probes as the tokenizer's template does.

    A template is examined once per process. Raises UnsupportedError saying what the template writes.
    """
    template = template_of(tokenizer)
    key = (template, tokenizer.bos_token, tokenizer.eos_token)
    if key not in _known:
        _known[key] = _examine(tokenizer, template)
    return _known[key]


def display_name(tokenizer: Tokenizer) -> str:
    return f"tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "this tokenizer"


def _examine(tokenizer: Tokenizer, template: str) -> Layout:
    for family in FAMILIES:
        if "strftime_now" in template and not family.dated_system:
            continue  # its default system text could change from day to day
        layout = Layout(family, default_system=_default_system(tokenizer, family))
        if all(ours == theirs for ours, theirs in _renderings(tokenizer, layout)):
            return layout
    shown = _run_template(tokenizer, (_OTHER_USER,), as_prompt=True)
    written = "cannot be run on a single user message" if shown is None else f"writes the user message 'V' as {shown!r}"
    raise UnsupportedError(
        f"{display_name(tokenizer)}: its chat template is of no supported family; it {written}. "
        f"Supported: {_supported()}"
    )


def _default_system(tokenizer: Tokenizer, family: Family) -> str | None:
    """The system text that the template puts before a lone user message, if it is written in this family's form."""
    text = _run_template(tokenizer, (_OTHER_USER,), as_prompt=False) or ""
    opening = family.bos + family.header.format(role="system")
    closing = family.end_of_turn + family.after_turn
    closing += family.header.format(role="user") + _OTHER_USER.content + closing
    if family.dated_system or not (text.startswith(opening) and text.endswith(closing)):
        return None
    return text.removeprefix(opening).removesuffix(closing)


def _renderings(tokenizer: Tokenizer, layout: Layout) -> Iterator[tuple[str, str | None]]:
    """Every probe, finished and as a prompt, as the layout and as the template write it."""
    for thinking, date in ((False, FROZEN_DATE), (True, "1 Jan 2030")):
        ours = replace(layout, thinking=thinking and layout.family.thinks, date=date)
        for probe in PROBES:
            for as_prompt, spans in ((False, history_spans(ours, probe)), (True, prompt_spans(ours, probe))):
                theirs = _run_template(
                    tokenizer, probe, as_prompt=as_prompt, enable_thinking=thinking, date_string=date
                )
                yield spans_text(spans), theirs


def _run_template(tokenizer: Tokenizer, messages: Sequence[Message], *, as_prompt: bool, **options: Any) -> str | None:
    """What the template writes; None if it refuses the conversation, which is how some insist on taking turns."""
    from jinja2 import TemplateError  # with transformers, so not needed to import mint.chat

    conversation = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=as_prompt, **options)
    except TemplateError:
        return None
    return str(text)


def _supported() -> str:
    return "; ".join(f"{family.name} ({models})" for family, models in FAMILIES.items())
