"""Templates of no known family: used where everything can be verified, refused by name where not."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.chat_cases import cases_of
from tests.unit.chat.conversations import all_tokens, chat, trained_texts
from tests.unit.chat.tiny_tokenizers import make_tokenizer, tokenizer_of

from mint.chat import conversation_to_datums, get_renderer
from mint.errors import DataError, UnsupportedError

# The same plain template twice: with a token that ends turns in no known family, and as ChatML, which is a known one.
OWN = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + m.role + '\n' + m.content + "
    "'<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|>assistant\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BASES = {"own": ("cohere2", OWN, "<|END_OF_TURN_TOKEN|>"), "chatml": ("smollm2", CHATML, "<|im_end|>")}
MESSAGES = chat(
    "What is first?", "Alpha is.", "What is second?", "Beta is.", "And third?", "Gamma is.", system="Be brief."
)


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokenizer_with(base: str, old: str = "", new: str = "") -> Any:
    """A tokenizer with the plain template in which `old` is replaced by `new`."""
    name, template, _ = BASES[base]
    assert old in template
    return make_tokenizer(name, template.replace(old, new) if old else template)


def test_the_plain_template_trains_the_answers(base: str) -> None:
    tokenizer = tokenizer_with(base)
    (datum,) = conversation_to_datums(MESSAGES, tokenizer, 2048)
    end = BASES[base][2]
    assert trained_texts(tokenizer, datum) == [f"Alpha is.{end}", f"Beta is.{end}", f"Gamma is.{end}"]
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert all_tokens(datum) == tokenizer.encode(text, add_special_tokens=False)


def test_generation_tags_train_what_the_plain_template_does() -> None:
    plain, tagged = tokenizer_of("qwen2_5"), tokenizer_of("qwen2_5_training")
    for title, case in cases_of("qwen2_5"):
        row = {"messages": case.messages, "tools": case.tools} if case.tools else case.messages
        assert conversation_to_datums(row, tagged, 4096) == conversation_to_datums(row, plain, 4096), title


CONTENT = "m.content"
EACH = "{% for m in messages %}"
# what a template does -> (text replaced, its replacement, the message that has to be named). A template that raises
# names no message, so the last one that it was given stands for it.
UNFAITHFUL = {
    "drops a question in the middle": (CONTENT, "(m.content if loop.index0 != 3 else '')", 3),
    "drops an answer from the history": (CONTENT, "(m.content if loop.index0 != 2 or loop.last else '')", 2),
    "drops what it does not like": (CONTENT, "(m.content if 'second' not in m.content else '')", 3),
    "drops texts of some length": (CONTENT, "(m.content if m.content|length != 15 else '')", 3),
    "refuses system texts": (
        EACH,
        EACH + "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        1,
    ),
}


@pytest.mark.parametrize("defect", UNFAITHFUL)
def test_a_template_that_changes_a_message_is_refused_naming_the_message(base: str, defect: str) -> None:
    old, new, message = UNFAITHFUL[defect]
    with pytest.raises(DataError, match=rf"message {message}\b"):
        conversation_to_datums(MESSAGES, tokenizer_with(base, old, new), 2048)


def test_what_the_refusing_template_says_is_passed_on(base: str) -> None:
    old, new, _ = UNFAITHFUL["refuses system texts"]
    with pytest.raises(DataError, match="no system"):
        conversation_to_datums(MESSAGES, tokenizer_with(base, old, new), 2048)


@pytest.mark.parametrize(("role", "message"), [("system", 0), ("user", 3)])
def test_a_template_that_changes_letters_of_a_role_is_refused_naming_the_message(
    base: str, role: str, message: int
) -> None:
    changed = f"(m.content|replace('r', 'R') if m.role == '{role}' else m.content)"
    messages = chat("Who?", "I am.", "Sure?", "Yes.", "And then?", "Nothing.", system="Be brief.")
    with pytest.raises(DataError, match=rf"message {message} \({role}\): .* changes its text"):
        conversation_to_datums(messages, tokenizer_with(base, CONTENT, changed), 2048)


@pytest.mark.parametrize(
    "changed",
    [
        "m.content[:5]",
        "(m.content|upper if m.role == 'user' else m.content)",
        "(m.content|upper if m.role == 'assistant' else m.content)",
        "'...'",
    ],
)
def test_a_template_that_changes_all_texts_is_refused_when_the_renderer_is_made(base: str, changed: str) -> None:
    with pytest.raises(UnsupportedError, match="its chat template"):
        get_renderer(tokenizer_with(base, CONTENT, changed))


DISORDERLY = {
    "reverses the messages": ("in messages", "in messages[::-1]"),
    "writes all questions first": (
        "in messages",
        "in messages|selectattr('role', 'ne', 'assistant')|list + messages|selectattr('role', 'eq', 'assistant')|list",
    ),
}


@pytest.mark.parametrize("defect", DISORDERLY)
def test_a_template_that_changes_the_order_of_messages_is_refused(base: str, defect: str) -> None:
    tokenizer = tokenizer_with(base, *DISORDERLY[defect])
    with pytest.raises((DataError, UnsupportedError), match=r"chat template|message \d"):
        conversation_to_datums(MESSAGES, tokenizer, 2048)


def test_a_template_that_writes_answers_twice_is_refused(base: str) -> None:
    twice = "(m.content * (2 if m.role == 'assistant' else 1))"
    with pytest.raises((DataError, UnsupportedError), match=r"chat template|message \d"):
        conversation_to_datums(MESSAGES, tokenizer_with(base, CONTENT, twice), 2048)


def test_a_template_whose_answers_do_not_continue_its_prompts_is_refused(base: str) -> None:
    tokenizer = tokenizer_with(base, "assistant\n", "assistant says\n")
    with pytest.raises(UnsupportedError, match=r"message 1 does not continue its prompt: .* ' says"):
        get_renderer(tokenizer)


def test_a_template_that_ends_turns_without_a_token_is_refused(base: str) -> None:
    tokenizer = tokenizer_with(base, BASES[base][2], "\n\n")
    with pytest.raises(UnsupportedError, match=r"writes no end-of-turn token after an answer"):
        get_renderer(tokenizer)


def test_a_template_that_raises_is_refused_with_what_it_says() -> None:
    tokenizer = make_tokenizer("cohere2", "{{ raise_exception('not today') }}")
    with pytest.raises(UnsupportedError, match=r"its chat template cannot be run on one question.*not today"):
        get_renderer(tokenizer)


def test_a_template_that_is_no_template_is_refused() -> None:
    tokenizer = make_tokenizer("cohere2", "{% for m in messages %}{{ m.content }}")
    with pytest.raises(UnsupportedError, match="chat template"):
        get_renderer(tokenizer)


def test_a_dropped_message_is_noticed_though_another_has_the_same_text(base: str) -> None:
    messages = chat("again", "Yes.", "again", "No.")
    tokenizer = tokenizer_with(base, CONTENT, "(m.content if loop.index0 != 2 else '')")
    with pytest.raises((DataError, UnsupportedError), match=r"message 2\b"):
        conversation_to_datums(messages, tokenizer, 2048)


def test_a_dropped_message_is_noticed_though_another_contains_its_text(base: str) -> None:
    messages = chat("Say a.", "a", "b", "No: b.")
    tokenizer = tokenizer_with(base, CONTENT, "(m.content if m.content != 'b' else '')")
    with pytest.raises((DataError, UnsupportedError), match=r"message 2\b"):
        conversation_to_datums(messages, tokenizer, 2048)
