"""Checks raw chat messages and turns them into `Message` records. Knows no template and no tokenizer.

Rows come from data sets that nobody wrote for MinT, so whatever cannot be rendered faithfully is refused with a reason
code, and nothing is guessed or dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from mint.errors import DataError

SkipReason = Literal[
    "unreadable",  # the source could not read a conversation from the row
    "not_a_conversation",  # not a non-empty list of messages
    "bad_role",
    "tool_message",
    "bad_content",
    "refused_key",
    "no_assistant",  # nothing to train on
    "no_prompt",  # an assistant turn with nothing before it
    "empty_answer",
    "thinking_mismatch",  # a thought in the answer, but a renderer that prompts for none
    "overlong",
]

ROLES: Final = ("system", "user", "assistant")

# Keys that change what is rendered or trained wherever they are understood. Every other key is metadata (id, source,
# timestamp, name ...) that none of the supported templates reads.
MEANINGFUL_KEYS: Final = frozenset(
    {
        *("tool_calls", "tool_call_id", "function_call", "tools", "functions", "documents"),
        *("reasoning_content", "reasoning", "thinking", "prefix"),
        *("images", "audio", "audios", "video", "videos"),
        *("train", "weight"),  # a loss weight of the message's own
    }
)


@dataclass(frozen=True, slots=True)
class Message:
    """One checked message. `role` is one of ROLES; `content` is the text as given, untrimmed."""

    role: str
    content: str


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


def check_messages(messages: object) -> tuple[Message, ...]:
    """Checked copies of `messages`.

    messages: a non-empty list of mappings with "role" (system, user or assistant) and "content" (text, or a list of
    {"type": "text", "text": ...} parts, which are joined without a separator). Key order does not matter. Keys of
    MEANINGFUL_KEYS are refused unless their value is empty (data sets fill absent keys with None); others are ignored.
    Raises DataError that names the message and what is allowed.
    """
    if isinstance(messages, UnusableRow):
        raise data_error("unreadable", messages.error)
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
    if role == "tool":
        raise data_error("tool_message", f"{where} has role 'tool'; tool use is not supported yet: leave the row out")
    if role not in ROLES:
        raise data_error("bad_role", f"{where} has role {role!r}; allowed: {', '.join(ROLES)}. Rename the roles first")
    refused = sorted(key for key in MEANINGFUL_KEYS.intersection(message) if not _is_empty(message[key]))
    if refused:
        raise data_error(
            "refused_key",
            f"{where} has {', '.join(map(repr, refused))}, which would change its meaning and cannot be rendered; "
            "write it into 'content' or remove it",
        )
    return Message(str(role), _text(message.get("content"), where))


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _text(content: object, where: str) -> str:
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part_text(part, f"{where}, part {index}") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise _bad_content(where, "content", content)
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON escapes can hold half a surrogate pair; no tokenizer takes it
        raise data_error(
            "bad_content",
            f"{where} has content that is not valid Unicode (half a surrogate pair at character {error.start}); "
            "repair it",
        ) from None
    return content


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
