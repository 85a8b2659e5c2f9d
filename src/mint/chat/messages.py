"""Checks raw rows and turns them into a `Dialog` of `Message` records. Knows no template and no tokenizer.

Rows come from data sets that nobody wrote for MinT, so whatever cannot be rendered faithfully is refused with a reason
code, and nothing is guessed or dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from mint.chat.marks import NONCHARACTER, NONCHARACTER_LEAD
from mint.errors import DataError

SkipReason = Literal[
    "unreadable",  # the source could not read a conversation from the row
    "not_a_conversation",  # not a non-empty list of messages
    "bad_role",
    "bad_content",
    "bad_tool_call",
    "bad_weight",
    "refused_key",
    "no_assistant",  # nothing to train on
    "untrained",  # every answer has weight 0
    "no_prompt",  # an assistant turn with nothing before it
    "empty_answer",
    "thinking_mismatch",  # a thought in the answer, but a renderer that prompts for none
    "template_refused",  # the chat template raises
    "not_shown",  # the chat template leaves out or changes what a message says
    "no_continuation",  # the answer does not continue the prompt that the sampler would get
    "overlong",
]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
MAX_WEIGHT: Final = 1e6  # far beyond use, and its sums are still exact enough in single precision
REASONING_KEYS: Final = ("reasoning_content", "reasoning", "thinking")

_PLAIN_KEYS: Final = {"role", "content"}

# Keys that change what is rendered wherever they are understood, and that are not understood here. Every other key is
# metadata (id, source, timestamp ...) that no template reads.
REFUSED_KEYS: Final = frozenset(
    {
        *("function_call", "functions", "documents", "tools", "prefix"),
        *("images", "audio", "audios", "video", "videos"),
    }
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function called by the assistant. arguments: as JSON would give them."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if self.id is None else {**call, "id": self.id}


@dataclass(frozen=True, slots=True)
class Message:
    """One checked message.

    role: one of ROLES. content: the text as given, untrimmed; "" only for blank messages and for bare tool calls.
    reasoning: the thought before an answer. weight: its own loss weight, None where the rules decide.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Dialog:
    """A checked conversation; tools: the JSON schemas of the functions that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text without turns, trained as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class UnusableRow:
    """Stands in a data set for a row of which no conversation could be read. error: names file, row and field."""

    error: str


def data_error(reason: SkipReason, text: str) -> DataError:
    """A DataError whose message starts with the reason code, so that the code survives pickling."""
    return DataError(f"[{reason}] {text}")


def skip_reason(error: DataError) -> str:
    """The code that stands in brackets before the message of a DataError of this package; "other" without one."""
    found = re.match(r"\[(\w+)\] ", str(error))
    return found[1] if found else "other"


def check_row(row: object) -> Dialog | PlainText:
    """A checked copy of a row of a data set.

    row: a list of messages; {"messages": [...], "tools": [...]}, tools optional; {"text": ...}; or an UnusableRow.
    Raises DataError, see `check_messages`.
    """
    if isinstance(row, UnusableRow):
        raise data_error("unreadable", row.error)
    if not isinstance(row, Mapping):
        return Dialog(check_messages(row))
    if "messages" in row:
        return Dialog(check_messages(row["messages"]), _tools(row.get("tools")))
    if isinstance(row.get("text"), str):
        if not row["text"].strip():
            raise data_error("empty_answer", "the row's text is empty: leave the row out")
        return PlainText(_unicode(row["text"], "the row"))
    raise data_error(
        "not_a_conversation",
        "a conversation is a non-empty list of messages, a mapping with 'messages', or one with 'text'; got a mapping "
        f"with {', '.join(map(repr, list(row)[:8])) or 'no keys'}",
    )


def check_messages(messages: object) -> tuple[Message, ...]:
    """Checked copies of `messages`.

    messages: a non-empty list of mappings with "role" (one of ROLES) and "content" (text, or a list of
    {"type": "text", "text": ...} parts, which are joined without a separator; None beside tool_calls). An assistant's may
    have "reasoning_content" (also named "reasoning" or "thinking"), "tool_calls" as in the OpenAI API, and "train" (bool)
    or "weight" (number from 0 to a million). Key order does not matter. Keys of REFUSED_KEYS are refused unless their
    value is empty (data sets fill absent keys with None); others are ignored.
    Raises DataError that names the message and what is allowed.
    """
    if not isinstance(messages, list | tuple) or not messages:
        given = "an empty list" if isinstance(messages, list | tuple) else type(messages).__name__
        hint = "; pass its list of messages, e.g. row['messages']" if isinstance(messages, Mapping) else ""
        raise data_error("not_a_conversation", f"a conversation is a non-empty list of messages, got {given}{hint}")
    return tuple(_check_message(message, f"message {index}") for index, message in enumerate(messages))


def _check_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise data_error(
            "not_a_conversation",
            f"{where} is {type(message).__name__}; a message is a mapping with 'role' and 'content'",
        )
    role = message.get("role")
    if message.keys() == _PLAIN_KEYS and role in ROLES and isinstance(message["content"], str):  # as most are
        return Message(str(role), _unicode(message["content"], where))
    if role not in ROLES:
        raise data_error("bad_role", f"{where} has role {role!r}; allowed: {', '.join(ROLES)}. Rename the roles first")
    refused = sorted(key for key in REFUSED_KEYS.intersection(message) if not _is_empty(message[key]))
    answers = ("tool_calls", *REASONING_KEYS)
    if role != "assistant":
        refused += [key for key in answers if not _is_empty(message.get(key))]
    if refused:
        raise data_error(
            "refused_key",
            f"{where} (role {role}) has {', '.join(map(repr, refused))}, which would change its meaning and cannot be "
            "rendered; write it into 'content' or remove it",
        )
    if role != "assistant":
        _refuse_weight(message, where)
    tool_calls = _tool_calls(message.get("tool_calls"), where)
    content: object = message.get("content")
    text = "" if content is None and tool_calls else _text(content, where)
    weight = _weight(message, where) if role == "assistant" else None
    names = _names(message, where) if role == "tool" else (None, None)  # elsewhere they are metadata
    return Message(str(role), text, _reasoning(message, where), tool_calls, *names, weight)


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _names(message: Mapping[str, Any], where: str) -> tuple[str | None, str | None]:
    values = []
    for key in ("tool_call_id", "name"):
        value = message.get(key)
        if value is not None and not isinstance(value, str):
            raise data_error("bad_content", f"{where}: {key!r} is {type(value).__name__}, expected text")
        values.append(value if value is None else _unicode(value, f"{where}, {key!r}"))
    return values[0], values[1]


def _reasoning(message: Mapping[str, Any], where: str) -> str | None:
    given = {key: message[key] for key in REASONING_KEYS if not _is_empty(message.get(key))}
    texts = set()
    for key, value in given.items():
        if not isinstance(value, str):
            raise data_error("bad_content", f"{where}: {key!r} is {type(value).__name__}, expected text")
        texts.add(_unicode(value, f"{where}, {key!r}"))
    if len(texts) > 1:
        raise data_error("bad_content", f"{where} has different texts under {', '.join(given)}; keep one of them")
    return texts.pop() if texts else None


def _refuse_weight(message: Mapping[str, Any], where: str) -> None:
    if _weight(message, where):
        raise data_error(
            "bad_weight",
            f"{where} (role {message['role']}) is to be trained, but only answers can be trained one by one; remove its "
            "'train' or 'weight', or train on everything with train_on='all'",
        )


def _weight(message: Mapping[str, Any], where: str) -> float | None:
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise data_error("bad_weight", f"{where} has train={train!r}; allowed: true or false")
    if weight is None:
        return None if train is None else float(train)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MAX_WEIGHT:
        raise data_error("bad_weight", f"{where} has weight={weight!r}; allowed: a number from 0 to {MAX_WEIGHT:,.0f}")
    if train is not None and train != bool(weight):
        raise data_error("bad_weight", f"{where} has train={train} and weight={weight}; keep one of them")
    return float(weight)


def _tool_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    if _is_empty(calls):
        return ()
    if not isinstance(calls, list | tuple):
        raise data_error("bad_tool_call", f"{where}: 'tool_calls' is {type(calls).__name__}, expected a list")
    return tuple(_tool_call(call, f"{where}, tool call {index}") for index, call in enumerate(calls))


def _tool_call(call: object, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise data_error(
            "bad_tool_call",
            f"{where}: expected {{'type': 'function', 'function': {{'name': ..., 'arguments': {{...}}}}}}",
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise data_error("bad_tool_call", f"{where}: its arguments are not valid JSON ({error})") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise data_error("bad_tool_call", f"{where}: arguments are {type(arguments).__name__}, expected a mapping")
    call_id = call.get("id")
    return ToolCall(
        _unicode(function["name"], where),
        _json_copy(dict(arguments), where),
        call_id if isinstance(call_id, str) else None,
    )


def _tools(tools: object) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise data_error("bad_tool_call", f"the row's 'tools' are not valid JSON ({error})") from None
    if _is_empty(tools):
        return ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise data_error("bad_tool_call", "the row's 'tools' must be a list of JSON schemas of functions")
    return tuple(_json_copy(dict(tool), "the row's 'tools'") for tool in tools)


def _json_copy(value: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        copy: dict[str, Any] = json.loads(_unicode(json.dumps(value, ensure_ascii=False), where))
    except (TypeError, ValueError, RecursionError) as error:
        raise data_error("bad_tool_call", f"{where}: cannot be written as JSON ({error})") from None
    return copy


def _text(content: object, where: str) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part_text(part, f"{where}, part {index}") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise _bad_content(where, "content", content)
    return _unicode(content, where)


def _unicode(text: str, where: str) -> str:
    if text.isascii():
        return text
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:  # JSON escapes can hold half a surrogate pair; no tokenizer takes it
        raise data_error(
            "bad_content",
            f"{where} has content that is not valid Unicode (half a surrogate pair at character {error.start}); "
            "repair it",
        ) from None
    found = NONCHARACTER.search(text) if NONCHARACTER_LEAD in encoded else None
    if found:
        raise data_error(
            "bad_content",
            f"{where} has the Unicode noncharacter U+{ord(found[0]):04X} at character {found.start()}, which is no text; "
            "remove it",
        )
    return text


def _part_text(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise _bad_content(where, f"a part of type {kind!r}" if kind is not None else "a part", part)


def _bad_content(where: str, what: str, value: object) -> DataError:
    return data_error(
        "bad_content",
        f"{where} has {what} that is {type(value).__name__}; allowed: text, or a list of "
        "{'type': 'text', 'text': ...} parts",
    )
