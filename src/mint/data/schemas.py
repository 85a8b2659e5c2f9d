"""What the columns of a data set mean: found out from the first records, or said by the user; then record -> row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from mint.errors import DataError, InputError

Kind = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]

# The columns of each kind by their usual names: those that must be there, then those that may.
REQUIRED: Final[dict[Kind, tuple[str, ...]]] = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL: Final[dict[Kind, tuple[str, ...]]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("system", "tools"),
    "text": (),
}
FIELDS: Final = tuple(sorted({name for table in (REQUIRED, OPTIONAL) for names in table.values() for name in names}))
MESSAGE_COLUMNS: Final = ("messages", "conversations", "conversation")
SHAREGPT_ROLES: Final = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"tool": "tool", "observation": "tool", "function_response": "tool"},
    "function_call": "assistant",
}
EXAMPLE: Final = "--columns messages=dialog, or --columns prompt=question,completion=answer"


@dataclass(frozen=True, slots=True)
class Schema:
    """columns: what a field is called here -> the name of its column in the file."""

    kind: Kind
    columns: dict[str, str]

    def __str__(self) -> str:
        target = {"text": "text"}.get(self.kind, "messages")
        extra = [c for field, c in self.columns.items() if field == "tools"]
        sources = ", ".join(column for field, column in self.columns.items() if field != "tools")
        return f"schema {self.kind}: {sources} -> {target}" + (f", {extra[0]} -> tools" if extra else "")

    def row(self, record: Mapping[str, Any]) -> Any:
        """The row of a record: a message list, {"messages", "tools"} or {"text"}. Raises DataError naming the field."""
        values = {field: record.get(column) for field, column in self.columns.items()}
        for field in REQUIRED[self.kind]:
            if values[field] is None:
                column = self.columns[field]
                raise DataError(f"field {column!r}: {'empty (null)' if column in record else 'not there'}")
        try:
            row = _CONVERT[self.kind](values)
        except _FieldError as error:
            raise DataError(f"field {self.columns[error.field]!r}: {error.problem}") from None
        tools = _tools(values.get("tools"), self.columns.get("tools", ""))
        return {"messages": row, "tools": tools} if tools else row


def parse_columns(text: str) -> dict[str, str]:
    """Field -> column, of `FIELD=COLUMN,FIELD=COLUMN`. Raises InputError naming the fields there are."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not (field.strip() in FIELDS and column.strip()) for field, _, column in pairs):
        raise InputError(
            f"columns {text!r}: expected FIELD=COLUMN with a field of {', '.join(FIELDS)}, several joined by commas: "
            f"{EXAMPLE}"
        )
    columns = {field.strip(): column.strip() for field, _, column in pairs}
    if len(columns) < len(pairs):
        raise InputError(f"columns {text!r}: a field is named twice")
    return columns


def detect(columns: Sequence[str], records: Sequence[Mapping[str, Any]], given: Mapping[str, str] | None) -> Schema:
    """The schema of a data set with these columns, which begins with `records` (at least one).

    given: field -> column as the user says; what is not said is found by its usual name.
    Raises DataError that lists the columns where none or more than one schema fits.
    """
    if given:
        missing = [column for column in given.values() if column not in columns]
        if missing:
            raise DataError(f"there is no column {', '.join(map(repr, missing))}; {_listed(columns)}")
        # a column that is named for one field is not found again, by its name, for another
        left = [column for column in columns if column not in given.values()]
    found: list[Schema] = []
    for kind in REQUIRED:
        usual = _usual(kind, columns, records) if not given else _said(kind, given, left, records)
        found += [Schema(kind, usual)] if usual is not None else []
    if len(found) == 1:
        return found[0]
    ways = f"Say what they mean: {EXAMPLE}. Fields: {', '.join(FIELDS)}"
    if not found:
        what = f"columns {given} fit no schema" if given else "no schema is known for these columns"
        raise DataError(f"{what} ({', '.join(REQUIRED)}); {_listed(columns)}. {ways}")
    raise DataError(f"several schemas fit ({'; '.join(map(str, found))}); {_listed(columns)}. {ways}")


def _listed(columns: Sequence[str]) -> str:
    return f"columns found: {', '.join(columns) or 'none'}"


def _usual(kind: Kind, columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Field -> column by the usual names, or None where a required one is missing or holds something else."""
    if kind in ("messages", "sharegpt"):
        holding = [name for name in MESSAGE_COLUMNS if name in columns and _message_kind(name, records) == kind]
        if len(holding) > 1:
            raise DataError(
                f"several columns hold conversations ({', '.join(holding)}); say which: --columns messages={holding[0]}"
            )
        required = {"messages": holding[0]} if holding else None
    elif all(name in columns for name in REQUIRED[kind]):
        required = {name: name for name in REQUIRED[kind]}
    else:
        required = None
    return None if required is None else required | _optional(kind, columns)


def _said(
    kind: Kind, given: Mapping[str, str], left: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> dict[str, str] | None:
    """As `_usual`, of what the user says: the fields said must all be of this kind, and fields required be said."""
    known = {*REQUIRED[kind], *OPTIONAL[kind]}
    if not (given.keys() <= known and given.keys() >= set(REQUIRED[kind])):
        return None
    if kind in ("messages", "sharegpt") and _message_kind(given["messages"], records) != kind:
        return None
    return {**_optional(kind, left), **given}


def _optional(kind: Kind, columns: Sequence[str]) -> dict[str, str]:
    return {name: name for name in OPTIONAL[kind] if name in columns}


def _message_kind(column: str, records: Sequence[Mapping[str, Any]]) -> Kind | None:
    """How the first messages that are found in a column are written; None where there are none."""
    for record in records:
        try:
            messages = _messages(record.get(column), "messages")
        except _FieldError:
            continue
        if messages:
            keys = messages[0].keys()
            return "sharegpt" if {"from", "value"} <= keys else "messages" if "role" in keys else None
    return None


class _FieldError(Exception):
    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field, self.problem = field, problem


def _messages(value: Any, field: str) -> list[Mapping[str, Any]]:
    """A list of mappings, or its JSON text (CSV files hold that)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _FieldError(field, "expected a list of messages, got text that is not JSON") from None
    if not isinstance(value, list):
        raise _FieldError(field, f"expected a list of messages, got {_named(value)}")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise _FieldError(field, f"message {number} is {_named(message)}, expected an object")
    return value


def _text(values: Mapping[str, Any], field: str) -> str:
    """The text of a field, "" where it is absent or null."""
    value = values.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _FieldError(field, f"expected text, got {_named(value)}")
    return value


def _named(value: Any) -> str:
    return {type(None): "null", dict: "an object", list: "a list", str: "text"}.get(type(value), type(value).__name__)


def _tools(value: Any, column: str) -> list[Any]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"field {column!r}: not valid JSON ({error})") from None
    if not isinstance(value, list):
        raise DataError(f"field {column!r}: expected a list of functions, got {_named(value)}")
    return value


def _system(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = _text(values, "system")
    return [{"role": "system", "content": text}] if text else []


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _as_messages(values: Mapping[str, Any]) -> Any:
    return _messages(values["messages"], "messages")


def _sharegpt(values: Mapping[str, Any]) -> Any:
    messages = _messages(values["messages"], "messages")
    return _system(values) + [_sharegpt_message(message, number) for number, message in enumerate(messages)]


def _sharegpt_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    sender, value = message.get("from"), message.get("value")
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        allowed = ", ".join(SHAREGPT_ROLES)
        raise _FieldError("messages", f"message {number} is from {sender!r}; allowed: {allowed}")
    rest = {key: other for key, other in message.items() if key not in ("from", "value")}
    if sender == "function_call":
        return {**rest, "role": role, "content": None, "tool_calls": _calls(value, number)}
    return {**rest, "role": role, "content": value}


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls of {"name", "arguments"} or a list of such, as JSON text or parsed."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and {"name", "arguments"} <= call.keys() for call in calls):
        problem = f"message {number} is a function_call whose value is not JSON with 'name' and 'arguments'"
        raise _FieldError("messages", problem)
    return [{"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}} for call in calls]


def _alpaca(values: Mapping[str, Any]) -> Any:
    history = values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise _FieldError("history", "expected a list of [question, answer] pairs")
    earlier = [turn for question, answer in history for turn in (_turn("user", question), _turn("assistant", answer))]
    more = _text(values, "input")
    question = _text(values, "instruction") + (f"\n\n{more}" if more.strip() else "")
    return [*_system(values), *earlier, _turn("user", question), _turn("assistant", _text(values, "output"))]


def _prompt_completion(values: Mapping[str, Any]) -> Any:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [*_system(values), _turn("user", prompt), _turn("assistant", completion)]
    # answers within the prompt are context, whatever is trained otherwise
    earlier = [
        {**message, "train": False} if message.get("role") == "assistant" else message
        for message in ([_turn("user", prompt)] if isinstance(prompt, str) else _messages(prompt, "prompt"))
    ]
    answer = [_turn("assistant", completion)] if isinstance(completion, str) else _messages(completion, "completion")
    return [*_system(values), *earlier, *answer]


def _plain(values: Mapping[str, Any]) -> Any:
    return {"text": _text(values, "text")}


_CONVERT: Final[dict[Kind, Callable[[Mapping[str, Any]], Any]]] = {
    "messages": _as_messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _plain,
}
