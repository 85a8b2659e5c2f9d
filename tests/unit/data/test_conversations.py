"""The packaged chat set and JSON Lines files."""

import re

import pytest

from mint.data import load_demo, load_jsonl
from mint.errors import DataError

STYLE = re.compile(r"In short: [^\n]+\n\n(?:- [^\n]+\n){2,4}\nTry this: [^\n]+")


def test_the_packaged_set_is_varied_multi_turn_and_of_one_style():
    train, test = load_demo()
    assert len(train) >= 200 and len(test) >= 30
    for rows in (train, test):
        assert sum(sum(m["role"] == "user" for m in row) > 1 for row in rows) >= len(rows) / 3
        answers = [m["content"] for row in rows for m in row if m["role"] == "assistant"]
        assert all(STYLE.fullmatch(answer) for answer in answers)
    prompts = [m["content"].lower() for row in train + test for m in row if m["role"] == "user"]
    assert len(set(prompts)) == len(prompts)


def test_roles_alternate_and_end_with_the_assistant():
    for row in [row for part in load_demo() for row in part]:
        roles = [m["role"] for m in row]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns


def test_json_lines_are_read_in_order_and_blank_lines_passed_over(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n\n{"messages": [], "id": 2}\n')
    assert load_jsonl(path) == [[{"role": "user", "content": "a"}], []]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "holds no conversation"),
        ("{oops", "line 1: not valid JSON"),
        ('{"messages": []}\n[1]', "line 2: expected an object with a list 'messages'"),
        ('{"messages": "hi"}', "line 1: expected an object with a list 'messages'"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, text, error):
    path = tmp_path / "chat.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=error):
        load_jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file; give a JSON Lines file"):
        load_jsonl(tmp_path / "none.jsonl")
