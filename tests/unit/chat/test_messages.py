"""Which messages are accepted, and how the others are refused."""

from __future__ import annotations

import pickle
from types import MappingProxyType
from typing import Any

import pytest
from tests.unit.chat.conversations import HELLO, TWO_TURNS, chat
from tests.unit.chat.tiny_tokenizers import tokenizer_of

from mint.chat import Message, check_messages, conversation_to_datums, get_renderer, skip_reason
from mint.errors import DataError

USER = {"role": "user", "content": "Q"}


def assistant(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "A"} | keys


@pytest.mark.parametrize(
    ("messages", "reason", "text"),
    [
        ([], "not_a_conversation", "a non-empty list of messages, got an empty list"),
        ("hello", "not_a_conversation", "a non-empty list of messages, got str"),
        (None, "not_a_conversation", "got NoneType"),
        ({"messages": HELLO}, "not_a_conversation", r"got dict; pass its list of messages, e.g. row\['messages'\]"),
        ([USER, "A"], "not_a_conversation", "message 1 is str; a message is a mapping with 'role' and 'content'"),
        (
            [{"content": "Q"}],
            "bad_role",
            "message 0 has role None; allowed: system, developer, user, assistant, tool. Rename",
        ),
        ([{"from": "gpt", "role": "gpt", "content": "Q"}], "bad_role", "message 0 has role 'gpt'"),
        ([USER, {"role": ["user"], "content": "Q"}], "bad_role", r"message 1 has role \['user'\]"),
        (
            [{"role": "user", "content": "Q", "tool_calls": [{"name": "f"}]}],
            "refused_key",
            r"message 0 \(role user\) has 'tool_calls', which would change its meaning .* 'content' or remove",
        ),
        ([USER, assistant(images=["x.png"])], "refused_key", r"message 1 \(role assistant\) has 'images'"),
        ([USER, assistant(tool_calls="f()")], "bad_tool_call", "message 1: 'tool_calls' is str, expected a list"),
        ([USER, assistant(tool_calls=[{"id": 1}])], "bad_tool_call", "message 1, tool call 0: expected {'type'"),
        (
            [USER, assistant(tool_calls=[{"name": "f", "arguments": "{"}])],
            "bad_tool_call",
            "message 1, tool call 0: its arguments are not valid JSON",
        ),
        (
            [USER, assistant(tool_calls=[{"name": "f", "arguments": "[" * 100_000}])],
            "bad_tool_call",
            "message 1, tool call 0: its arguments are not valid JSON",
        ),
        ([USER, assistant(tool_calls=[{"name": "f", "arguments": [1]}])], "bad_tool_call", "arguments are list"),
        ([USER, assistant(reasoning="a", thinking="b")], "bad_content", "different texts under reasoning, thinking"),
        ([USER, assistant(content="a\ufdd0b")], "bad_content", r"noncharacter U\+FDD0 at character 1"),
        ([USER, assistant(weight=-1)], "bad_weight", "message 1 has weight=-1; allowed: a number from 0"),
        ([USER, assistant(weight=10**400)], "bad_weight", "allowed: a number from 0 to 1,000,000"),
        ([USER, assistant(weight=float("nan"))], "bad_weight", "message 1 has weight=nan; allowed: a number from 0"),
        ([USER, assistant(train="no")], "bad_weight", "message 1 has train='no'; allowed: true or false"),
        ([USER, assistant(train=False, weight=1)], "bad_weight", "train=False and weight=1; keep one of them"),
        ([{**USER, "weight": 1}], "bad_weight", r"message 0 \(role user\) is to be trained"),
        (
            [USER, {"role": "assistant"}],
            "bad_content",
            "message 1 has content that is NoneType; allowed: text, or a list",
        ),
        ([USER, assistant(content=7)], "bad_content", "message 1 has content that is int"),
        ([assistant(content=b"x")], "bad_content", "message 0 has content that is bytes"),
        ([assistant(content="ab\ud83d")], "bad_content", "message 0 has content that is not valid .* at character 2"),
        (
            [assistant(content=["x"])],
            "bad_content",
            "message 0, part 0 has a part that is str; allowed: text, or a list",
        ),
        (
            [USER, assistant(content=[{"type": "text", "text": "a"}, {"type": "image", "url": "u"}])],
            "bad_content",
            "message 1, part 1 has a part of type 'image'",
        ),
        ([assistant(content=[{"type": "text", "text": None}])], "bad_content", "part 0 has a part of type 'text'"),
    ],
)
def test_bad_messages_are_refused_with_reason_place_and_what_is_allowed(messages: Any, reason: str, text: str) -> None:
    for use in (check_messages, get_renderer(tokenizer_of("smollm2")).prompt):
        with pytest.raises(DataError, match=rf"^\[{reason}\] .*{text}") as caught:
            use(messages)
        assert skip_reason(caught.value) == reason


@pytest.mark.parametrize(
    ("messages", "reason", "text"),
    [
        ([USER], "no_assistant", "has no assistant message, so there is nothing to train on"),
        ([assistant(), USER, assistant()], "no_prompt", "message 0 is an assistant turn with nothing before it"),
        ([USER, assistant(content=" \n")], "empty_answer", "message 1 is an assistant turn without text"),
        ([USER, assistant(), USER, assistant(content="")], "empty_answer", "message 3 is an assistant turn"),
    ],
)
def test_conversations_that_cannot_be_trained_are_refused_with_reason_and_place(
    tokenizer: Any, messages: Any, reason: str, text: str
) -> None:
    with pytest.raises(DataError, match=rf"^\[{reason}\] .*{text}") as caught:
        conversation_to_datums(messages, tokenizer, 2048)
    assert skip_reason(caught.value) == reason


def test_an_answer_of_only_a_thought_is_empty() -> None:
    renderer = get_renderer(tokenizer_of("qwen3"), thinking=True)
    with pytest.raises(DataError, match=r"^\[empty_answer\] message 1"):
        conversation_to_datums(chat("Q", "<think>\nhm\n</think>\n\n"), renderer, 2048)


def test_a_leading_or_empty_answer_is_fine_where_it_is_not_trained(smollm2: Any) -> None:
    messages = [assistant(content=""), USER, assistant()]
    (datum,) = conversation_to_datums(messages, smollm2, 2048, "last_assistant")
    prompt = get_renderer(smollm2).prompt(messages[:2])
    assert datum.model_input.to_ints()[: len(prompt)] == prompt


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hello "}, {"text": "there", "type": "text"}]
    assert check_messages([assistant(content=parts), assistant(content=[])]) == (
        Message("assistant", "Hello there"),
        Message("assistant", ""),
    )


def test_key_order_metadata_and_empty_keys_do_not_matter(tokenizer: Any) -> None:
    decorated: list[Any] = [
        MappingProxyType(
            {"content": message["content"], "role": message["role"], "id": 7, "name": "x", "tool_calls": None}
        )
        for message in TWO_TURNS
    ]
    assert conversation_to_datums(decorated, tokenizer, 2048) == conversation_to_datums(TWO_TURNS, tokenizer, 2048)
    assert check_messages(tuple(decorated)) == check_messages(TWO_TURNS)


def test_messages_given_are_not_changed(smollm2: Any) -> None:
    messages = chat("  Q ", "A", system="S")
    conversation_to_datums(messages, smollm2, 2048)
    assert messages == chat("  Q ", "A", system="S")


def test_reason_survives_pickling_and_is_other_for_foreign_errors() -> None:
    with pytest.raises(DataError) as caught:
        check_messages([])
    assert skip_reason(pickle.loads(pickle.dumps(caught.value))) == "not_a_conversation"
    assert skip_reason(DataError("no such file")) == "other"
