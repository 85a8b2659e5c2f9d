"""prompt against each family's own template, token for token."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.chat.conversations import CONVERSATIONS, HELLO, TWO_TURNS, chat, template_ids
from tests.unit.chat.tiny_tokenizers import DATED, FAMILIES, make_tokenizer, tokenizer_of

from mint.chat import convert_conversations, get_renderer

DATE = "14 Feb 2025"
THOUGHT = "<think>\nLet me see.\n\nOne two.\n</think>\n\nThe answer."


def renderer_and_options(name: str, thinking: bool = False) -> tuple[Any, dict[str, Any]]:
    """A renderer and the template options that ask for the same."""
    renderer = get_renderer(tokenizer_of(name), thinking=thinking, date=DATE if name in DATED else None)
    return renderer, {"enable_thinking": thinking, "date_string": DATE}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("as_question", [True, False], ids=["ends with the user", "ends with the assistant"])
def test_prompt_equals_the_template_token_for_token(family: str, conversation: str, as_question: bool) -> None:
    messages = CONVERSATIONS[conversation][: -1 if as_question else None]
    renderer, options = renderer_and_options(family)
    expected = template_ids(tokenizer_of(family), messages, add_generation_prompt=True, **options)
    assert renderer.prompt(messages) == expected


@pytest.mark.parametrize("conversation", [*CONVERSATIONS, "thoughts"])
def test_qwen3_prompt_with_thinking_equals_the_template_as_it_comes(qwen3: Any, conversation: str) -> None:
    messages = CONVERSATIONS.get(conversation) or chat("a", THOUGHT, "b", THOUGHT)
    expected = template_ids(qwen3, messages, add_generation_prompt=True)  # enable_thinking not given: on
    assert get_renderer(qwen3, thinking=True).prompt(messages) == expected


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        chat("a", THOUGHT, "b"),
        chat("a", THOUGHT),
        [*chat("a", THOUGHT), {"role": "assistant", "content": THOUGHT}],
        [*chat("a", THOUGHT), {"role": "tool", "content": "7"}],
        chat("a", "before</think>\n\nafter", "b"),
        chat("a", "<think>x</think>y</think>\nz", "b"),
        chat("a", "<think>\n\n</think>\n\nplain", "b"),
        [{"role": "system", "content": "s"}, {"role": "assistant", "content": THOUGHT}],
    ],
    ids=["history", "last", "in a row", "before a tool's answer", "close only", "two closes", "empty", "no question"],
)
def test_qwen3_thoughts_are_shown_and_hidden_as_the_template_does(messages: Any, thinking: bool) -> None:
    tokenizer = tokenizer_of("qwen3")
    prompt = get_renderer(tokenizer, thinking=thinking).prompt(messages)
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert tokenizer.decode(prompt) == expected


words = st.text(alphabet="ab1 .\n\té世<|>_", max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(FAMILIES)), system=st.none() | words, contents=st.lists(words, min_size=1, max_size=5)
)
def test_any_text_is_rendered_as_the_template_renders_it(name: str, system: str | None, contents: list[str]) -> None:
    messages = chat(*contents, system=system)
    renderer, options = renderer_and_options(name)
    tokenizer = tokenizer_of(name)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert tokenizer.decode(renderer.prompt(messages)) == expected


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(sorted(FAMILIES)), contents=st.lists(words, min_size=1, max_size=5))
def test_any_text_is_tokenized_as_the_template_is_unless_an_answer_starts_with_space(
    name: str, contents: list[str]
) -> None:
    """An answer is encoded apart from its header, as it is sampled: only there may the ids differ."""
    messages = chat(*(text if i % 2 == 0 else text.lstrip() for i, text in enumerate(contents)))
    renderer, options = renderer_and_options(name)
    expected = template_ids(tokenizer_of(name), messages, add_generation_prompt=True, **options)
    assert renderer.prompt(messages) == expected


def test_default_system_text_is_added_exactly_where_the_template_adds_it(family: str, tokenizer: Any) -> None:
    default = FAMILIES[family].default_system
    renderer = get_renderer(tokenizer)
    _, report = convert_conversations([HELLO], renderer, 2048)
    dated = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024" if family in DATED else None
    assert list(report.injected_system) == [text for text in (default, dated) if text]
    if default:
        assert default in tokenizer.decode(renderer.prompt(HELLO[:1]))
        own = tokenizer.decode(renderer.prompt([{"role": "system", "content": "Be kind."}, *HELLO[:1]]))
        assert "Be kind." in own and default not in own


@pytest.mark.parametrize("name", ["llama3", "llama3_1", "llama3_2"])
def test_llama_prompt_has_one_bos_where_encoding_its_text_would_give_two(name: str) -> None:
    tokenizer = tokenizer_of(name)
    prompt = get_renderer(tokenizer).prompt(TWO_TURNS)
    assert tokenizer.encode(tokenizer.decode(prompt)).count(tokenizer.bos_token_id) == 2  # the trap
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id


def test_smollm2_whose_bos_is_the_turn_header_gets_no_second_one(smollm2: Any) -> None:
    prompt = get_renderer(smollm2).prompt(HELLO[:1])  # default system text, user, generation prompt
    assert prompt.count(smollm2.bos_token_id) == 3 and prompt[0] == smollm2.bos_token_id != prompt[1]


@pytest.mark.parametrize("name", DATED)
def test_date_is_frozen_unless_given(name: str) -> None:
    tokenizer = tokenizer_of(name)
    default = tokenizer.decode(get_renderer(tokenizer).prompt(HELLO[:1]))
    assert "Today Date: 26 Jul 2024\n\n<|eot_id|>" in default
    given_date = get_renderer(tokenizer, date="1 Jan 2030")
    assert "Today Date: 01 Jan 2030\n\nBe brief.<|eot_id|>" in tokenizer.decode(
        given_date.prompt([{"role": "system", "content": " Be brief. "}, *HELLO[:1]])
    )
    assert given_date.settings["date"] == "01 Jan 2030"


def test_the_llama_3_2_template_alone_would_name_today() -> None:
    before = f"Today Date: {datetime.now():%d %b %Y}"
    shown = tokenizer_of("llama3_2").apply_chat_template(HELLO[:1], tokenize=False)
    after = f"Today Date: {datetime.now():%d %b %Y}"
    assert (before in shown or after in shown) and "26 Jul 2024" not in shown


def test_the_template_is_run_once_for_a_shape_and_not_for_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("qwen2_5")
    expected = template_ids(tokenizer, HELLO[:1], add_generation_prompt=True)
    renderer = get_renderer(tokenizer)
    renderer.prompt(chat("Another question, much longer than the other?"))
    monkeypatch.setattr(tokenizer, "apply_chat_template", None)
    assert renderer.prompt(HELLO[:1]) == expected
