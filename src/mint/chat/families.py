"""What is known of each model family beyond its template: where turns end, and how to read an answer back.

A family is data and one function. Prompts and answers are written by the tokenizer's own template, whatever its family.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mint.chat.messages import ToolCall

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer taken apart."""

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


# (answer's text without its end, types of the tools' arguments by function and argument name) -> the answer.
# Raises ValueError, or RecursionError for one nested too deep, for a tool call that cannot be read.
ArgumentTypes = Mapping[str, Mapping[str, str]]
Reader = Callable[[str, ArgumentTypes], Answer]


@dataclass(frozen=True, slots=True)
class Family:
    """What is fixed for every model of a family.

    ends: texts of the tokens at which a turn ends. The template writes one of them after each answer; where it writes
        none (`next_header_ends`), the header of the next turn ends it: ends[0] after an answer, ends[1] after a tool call.
    other_stops: further tokens at which sampling ends, where the vocabulary has them.
    read: takes an answer apart.
    """

    name: str
    ends: tuple[str, ...]
    other_stops: tuple[str, ...]
    read: Reader
    next_header_ends: bool = False


def split_reasoning(text: str) -> tuple[str | None, str]:
    """The thought and the rest of an assistant text, both without the newlines between; no </think>, no thought.

    Source: the Qwen3 chat template, which takes answers apart in the same way.
    """
    if THINK_CLOSE not in text:
        return None, text
    before, *_, after = text.split(THINK_CLOSE)
    thought = before.rstrip("\n").split(THINK_OPEN)[-1].strip("\n")
    return thought or None, after.lstrip("\n")


def read_text(text: str, types: ArgumentTypes) -> Answer:
    return Answer(text)


def read_hermes(text: str, types: ArgumentTypes) -> Answer:
    """ChatML with <tool_call>{"name": ..., "arguments": ...}</tool_call> (Qwen2.5, Qwen3)."""
    content, blocks = _blocks(text, "<tool_call>", "</tool_call>")
    return Answer(content, None, tuple(_call(json.loads(block), "arguments") for block in blocks))


def read_qwen_xml(text: str, types: ArgumentTypes) -> Answer:
    """<tool_call><function=NAME><parameter=NAME>value</parameter></function></tool_call> (Qwen3.5, Qwen3.6)."""
    content, blocks = _blocks(text, "<tool_call>", "</tool_call>")
    calls = []
    for block in blocks:
        found = re.fullmatch(r"\s*<function=([^>]+)>\n(.*)</function>\s*", block, re.DOTALL)
        if not found:
            raise ValueError(f"expected <function=...>, got {block[:60]!r}")
        pairs = re.findall(r"<parameter=([^>]+)>\n(.*?)\n</parameter>\n", found[2], re.DOTALL)
        calls.append(_typed_call(found[1], pairs, types))
    return Answer(content, None, tuple(calls))


def read_glm(text: str, types: ArgumentTypes) -> Answer:
    """<tool_call>NAME<arg_key>k</arg_key><arg_value>v</arg_value></tool_call> (GLM-4.5)."""
    content, blocks = _blocks(text.removeprefix("\n"), "<tool_call>", "</tool_call>")
    calls = []
    for block in blocks:
        name = re.match(r"[^\n<]+", block)
        if not name:
            raise ValueError(f"expected a function's name, got {block[:60]!r}")
        pattern = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"
        calls.append(_typed_call(name[0].strip(), re.findall(pattern, block, re.DOTALL), types))
    return Answer(content, None, tuple(calls))


def read_llama(text: str, types: ArgumentTypes) -> Answer:
    """An answer that is nothing but {"name": ..., "parameters": {...}} (Llama 3.1, 3.2)."""
    bare = text.removeprefix("<|python_tag|>")
    if not bare.lstrip().startswith('{"name":') or '"parameters":' not in bare:
        return Answer(text)
    return Answer("", None, (_call(json.loads(bare), "parameters"),))


def _deepseek(name: str) -> str:
    """A control token of DeepSeek, whose bars are full width."""
    return f"<\uff5c{name}\uff5c>"


def read_deepseek(text: str, types: ArgumentTypes) -> Answer:
    """Calls between control tokens, arguments as a fenced block of JSON (DeepSeek-V3)."""
    content, blocks = _blocks(text, _deepseek("tool▁call▁begin"), _deepseek("tool▁call▁end"))
    calls = []
    for block in blocks:
        found = re.fullmatch(rf"function{_deepseek('tool▁sep')}([^\n]+)\n```json\n(.*)\n```", block, re.DOTALL)
        if not found:
            raise ValueError(f"expected a function's name and a block of JSON, got {block[:60]!r}")
        calls.append(_call({"name": found[1], "arguments": json.loads(found[2])}, "arguments"))
    return Answer(content.removesuffix(_deepseek("tool▁calls▁begin")), None, tuple(calls))


def read_gpt_oss(text: str, types: ArgumentTypes) -> Answer:
    """Messages on channels: analysis is the thought, commentary to functions.NAME a call, final the answer."""
    content, thoughts, calls = "", [], []
    for message in re.split(r"<\|start\|>assistant|<\|end\|>(?=<\|start\|>)", text):
        header, found, body = message.partition("<|message|>")
        body = body.removesuffix("<|end|>")
        if not found:
            if message:
                content += message
            continue
        called = re.search(r"to=functions\.([^\s<]+)", header)
        if called:
            calls.append(_call({"name": called[1], "arguments": json.loads(body)}, "arguments"))
        elif "<|channel|>analysis" in header:
            thoughts.append(body)
        else:
            content += body
    return Answer(content, "\n".join(thoughts) or None, tuple(calls))


def _blocks(text: str, opening: str, closing: str) -> tuple[str, list[str]]:
    """The text before the first block, and what stands inside each."""
    content, *rest = text.split(opening)
    blocks = []
    for block in rest:
        inside, closed, _ = block.partition(closing)
        if not closed:
            raise ValueError(f"{opening} without {closing}")
        blocks.append(inside)
    return (content.rstrip("\n") if blocks else content), blocks


def _call(call: Any, arguments_key: str) -> ToolCall:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError("a tool call is an object with a name")
    arguments = call.get(arguments_key, {})
    if not isinstance(arguments, dict):
        raise ValueError("a tool call's arguments are an object")
    return ToolCall(call["name"], arguments)


def _typed_call(name: str, pairs: Sequence[tuple[str, str]], types: ArgumentTypes) -> ToolCall:
    """A call whose arguments are written without quotes: text where the schema says so, else JSON if it is valid."""
    known = types.get(name, {})
    return ToolCall(name, {key: value if known.get(key) == "string" else _value(value) for key, value in pairs})


def _value(text: str) -> Any:
    python_names = {"True": True, "False": False, "None": None}
    if text in python_names:
        return python_names[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


CHATML: Final = Family("chatml", ("<|im_end|>",), ("<|endoftext|>",), read_hermes)
FAMILIES: Final = (
    CHATML,
    replace(CHATML, name="qwen3_5", read=read_qwen_xml),
    Family("llama3", ("<|eot_id|>", "<|eom_id|>"), ("<|end_of_text|>",), read_llama),
    Family("gemma", ("<end_of_turn>",), ("<eos>",), read_text),
    Family("gpt_oss", ("<|return|>", "<|call|>"), ("<|endoftext|>",), read_gpt_oss),
    Family("phi3", ("<|end|>",), ("<|endoftext|>",), read_text),
    Family("deepseek", (_deepseek("end▁of▁sentence"),), (), read_deepseek),
    Family("glm4", ("<|user|>", "<|observation|>"), ("<|endoftext|>",), read_glm, next_header_ends=True),
)
