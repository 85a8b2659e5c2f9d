"""What columns mean: each schema's rows, how it is recognised, what is ambiguous, what does not fit."""

import json

import pytest

from mint.chat import check_messages
from mint.data.schemas import detect, parse_columns
from mint.errors import DataError, InputError

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def row_of(record, given=None):
    schema = detect(tuple(record), [record], given)
    return schema.kind, schema.row(record)


@pytest.mark.parametrize(
    ("record", "kind", "row"),
    [
        ({"messages": [U, A], "id": 3}, "messages", [U, A]),
        ({"conversations": [U, A]}, "messages", [U, A]),
        ({"messages": json.dumps([U, A])}, "messages", [U, A]),
        ({"messages": [U, A], "tools": TOOLS}, "messages", {"messages": [U, A], "tools": TOOLS}),
        ({"messages": [U, A], "tools": json.dumps(TOOLS)}, "messages", {"messages": [U, A], "tools": TOOLS}),
        ({"messages": [U, A], "tools": None}, "messages", [U, A]),
        ({"messages": [U, A], "prompt": "q"}, "messages", [U, A]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", [U, A]),
        (
            {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": "s"},
            "sharegpt",
            [S, U, A],
        ),
        ({"instruction": "q", "output": "a"}, "alpaca", [U, A]),
        ({"instruction": "q", "input": " ", "output": "a", "system": "s"}, "alpaca", [S, U, A]),
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", [{"role": "user", "content": "q\n\nx"}, A]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, "alpaca", [U, A, U, A]),
        ({"prompt": "q", "completion": "a"}, "prompt_completion", [U, A]),
        ({"prompt": "q", "completion": "a", "system": "s"}, "prompt_completion", [S, U, A]),
        ({"prompt": [S, U], "completion": [A]}, "prompt_completion", [S, U, A]),
        ({"prompt": [U, A, U], "completion": [A]}, "prompt_completion", [U, {**A, "train": False}, U, A]),
        ({"text": "once upon a time"}, "text", {"text": "once upon a time"}),
    ],
)
def test_rows_of_every_schema(record, kind, row):
    assert row_of(record) == (kind, row)


def test_sharegpt_tool_use_becomes_calls_and_results():
    call = {"name": "f", "arguments": {"x": 1}}
    record = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "a", "weight": 0},
        ],
        "tools": json.dumps(TOOLS),
    }
    calls = [{"type": "function", "function": call}]
    assert row_of(record) == (
        "sharegpt",
        {
            "messages": [
                U,
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "content": "7"},
                {**A, "weight": 0},
            ],
            "tools": TOOLS,
        },
    )


def test_rows_of_text_schemas_are_what_the_converter_checks():
    _, row = row_of({"instruction": "q", "output": "a"})
    assert [(m.role, m.content) for m in check_messages(row)] == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "columns", "row"),
    [
        ({"dialog": [U, A]}, "messages=dialog", [U, A]),
        ({"chat": [{"from": "human", "value": "q"}], "messages": 1}, "messages=chat", [U]),
        ({"question": "q", "answer": "a"}, "prompt=question, completion=answer", [U, A]),
        ({"prompt": "s", "q": "q", "completion": "a"}, "system=prompt,prompt=q,completion=completion", [S, U, A]),
        ({"messages": [U], "text": "t"}, "text=text", {"text": "t"}),
        ({"messages": [U], "text": "t"}, "messages=messages", [U]),
        ({"q": "q", "a": "a"}, "instruction=q,output=a", [U, A]),
    ],
)
def test_columns_can_be_said(record, columns, row):
    assert row_of(record, parse_columns(columns))[1] == row


@pytest.mark.parametrize(
    ("record", "columns", "error"),
    [
        ({"q": 1, "a": 2}, None, r"no schema is known for these columns \(messages, .*columns found: q, a\. Say what"),
        ({"messages": [U], "text": "t"}, None, r"several schemas fit \(schema messages: .*; schema text: text -> text"),
        ({"messages": [U], "conversations": [U]}, None, "several columns hold conversations .*--columns messages=mess"),
        ({"messages": "hello"}, None, "no schema is known"),
        ({"q": 1}, {"text": "body"}, "there is no column 'body'; columns found: q"),
        ({"q": "x"}, {"prompt": "q"}, "fit no schema"),
        ({"q": "x"}, {"messages": "q"}, "fit no schema"),
        ({"q": "x", "t": "y"}, {"text": "q", "system": "t"}, "fit no schema"),
    ],
)
def test_no_schema_and_several_are_errors_that_list_the_columns(record, columns, error):
    with pytest.raises(DataError, match=error):
        detect(tuple(record), [record], columns)


@pytest.mark.parametrize("text", ["", "dialog", "role=dialog", "messages=", "prompt=a,=b"])
def test_columns_that_cannot_be_read_are_refused_with_the_fields(text):
    with pytest.raises(InputError, match=r"expected FIELD=COLUMN with a field of completion, history, .*messages="):
        parse_columns(text)
    with pytest.raises(InputError, match="a field is named twice"):
        parse_columns("text=a,text=b")


GOOD = {
    "messages": {"messages": [U, A]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "tools": None},
    "alpaca": {"instruction": "q", "output": "a", "history": None},
    "prompt": {"prompt": "q", "completion": "a"},
}


@pytest.mark.parametrize(
    ("good", "bad", "error"),
    [
        ("messages", {}, "field 'messages': not there"),
        ("messages", {"messages": None}, r"field 'messages': empty \(null\)"),
        ("messages", {"messages": {}}, "field 'messages': expected a list of messages, got an object"),
        ("messages", {"messages": "hi"}, "field 'messages': expected a list of messages, got text that is not JSON"),
        ("messages", {"messages": [U, "x"]}, "field 'messages': message 1 is text, expected an object"),
        (
            "sharegpt",
            {"conversations": [{"from": "bot", "value": ""}]},
            "'conversations': message 0 is from 'bot'; allo",
        ),
        ("sharegpt", {"conversations": [{"role": "user"}]}, "message 0 is from None"),
        (
            "sharegpt",
            {"conversations": [{"from": "function_call", "value": "f(1)"}]},
            "field 'conversations': message 0 is a function_call whose value is not JSON with 'name' and 'arguments'",
        ),
        ("sharegpt", {**GOOD["sharegpt"], "tools": "{"}, "field 'tools': not valid JSON"),
        ("sharegpt", {**GOOD["sharegpt"], "tools": "{}"}, "field 'tools': expected a list of functions, got an object"),
        ("alpaca", {"instruction": 3, "output": "a"}, "field 'instruction': expected text, got int"),
        ("alpaca", {"instruction": "q", "output": None}, r"field 'output': empty \(null\)"),
        ("alpaca", {**GOOD["alpaca"], "history": ["q"]}, r"field 'history': expected a list of \[question, answer\]"),
        ("prompt", {"prompt": ["x"], "completion": "a"}, "field 'prompt': message 0 is text, expected an object"),
        ("prompt", {"prompt": "q", "completion": 3}, "field 'completion': expected a list of messages, got int"),
    ],
)
def test_a_record_that_does_not_fit_names_its_field(good, bad, error):
    schema = detect(tuple(GOOD[good]), [GOOD[good]], None)
    with pytest.raises(DataError, match=error):
        schema.row(bad)
