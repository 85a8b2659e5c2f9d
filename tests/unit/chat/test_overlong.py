"""What happens to answers that do not fit into max_length."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.chat.conversations import THREE_TURNS, TWO_TURNS, all_tokens, chat, trained_texts
from tests.unit.chat.tiny_tokenizers import tokenizer_of

from mint.chat import (
    Converter,
    conversation_to_datum,
    conversation_to_datums,
    get_renderer,
    skip_reason,
    tokenize_conversation,
)
from mint.errors import DataError

MAX = 2048


def length_of(messages: Any, tokenizer: Any) -> int:
    """Tokens that the last answer of `messages` takes together with its prompt."""
    (datum,) = conversation_to_datums(messages, tokenizer, MAX, "last_assistant")
    return len(all_tokens(datum))


def test_an_answer_fits_up_to_its_end_of_turn_token(family: str, tokenizer: Any) -> None:
    exact = length_of(TWO_TURNS, tokenizer)
    assert conversation_to_datums(TWO_TURNS, tokenizer, exact) == conversation_to_datums(TWO_TURNS, tokenizer, MAX)
    with pytest.raises(DataError, match=r"^\[overlong\]"):
        conversation_to_datums(TWO_TURNS, tokenizer, exact - 1, on_overlong="error")


def test_drop_trains_the_answers_that_fit_and_no_part_of_the_others(family: str, tokenizer: Any) -> None:
    exact = length_of(TWO_TURNS, tokenizer)
    assert conversation_to_datums(TWO_TURNS, tokenizer, exact - 1) == conversation_to_datums(
        TWO_TURNS[:2], tokenizer, MAX
    )


def test_drop_raises_where_no_answer_fits(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"^\[overlong\] no trained token is within max_length=8 .*'drop'.*raise max_length"
    ):
        conversation_to_datums(TWO_TURNS, tokenizer, 8)


def test_truncate_right_keeps_the_first_max_length_tokens(tokenizer: Any) -> None:
    whole = all_tokens(conversation_to_datums(TWO_TURNS, tokenizer, MAX)[-1])
    cut = conversation_to_datums(TWO_TURNS, tokenizer, len(whole) - 3, on_overlong="truncate_right")
    assert all_tokens(cut[-1]) == whole[:-3]
    assert cut[-1].loss_fn_inputs["weights"].tolist()[-1] == 1.0
    assert "Blue is" in trained_texts(tokenizer, cut[-1])[-1]


def test_truncate_right_never_keeps_a_prompt_without_an_answer(family: str, tokenizer: Any) -> None:
    """max_length ends with the second prompt: the turn goes, and with it the tokens that would train nothing."""
    prompt = len(get_renderer(tokenizer).prompt(TWO_TURNS[:3]))
    assert conversation_to_datums(TWO_TURNS, tokenizer, prompt, on_overlong="truncate_right") == (
        conversation_to_datums(TWO_TURNS[:2], tokenizer, MAX)
    )
    with pytest.raises(DataError, match=r"^\[overlong\]"):
        conversation_to_datums(TWO_TURNS, tokenizer, prompt, "last_assistant", on_overlong="truncate_right")


def test_truncate_left_turns_keeps_the_system_message_and_renders_what_is_left_anew(
    family: str, tokenizer: Any
) -> None:
    shorter = [THREE_TURNS[0], *THREE_TURNS[3:]]
    limit = length_of(shorter, tokenizer)
    (datum,) = conversation_to_datums(
        THREE_TURNS, tokenizer, limit, "last_assistant", on_overlong="truncate_left_turns"
    )
    assert all_tokens(datum) == all_tokens(conversation_to_datums(shorter, tokenizer, MAX, "last_assistant")[0])
    prompt = get_renderer(tokenizer).prompt(shorter[:-1])
    assert all_tokens(datum)[: len(prompt)] == prompt


def test_truncate_left_turns_still_trains_every_answer_once(family: str, tokenizer: Any) -> None:
    limit = length_of([THREE_TURNS[0], *THREE_TURNS[3:]], tokenizer)
    datums = conversation_to_datums(THREE_TURNS, tokenizer, limit, on_overlong="truncate_left_turns")
    texts = [text for datum in datums for text in trained_texts(tokenizer, datum)]
    end = tokenizer.decode(get_renderer(tokenizer).stop_token_ids[:1])
    assert texts == [f"1. one\n2. two{end}", f"Two.{end}", f"Three, I think.{end}"]
    assert all(len(all_tokens(datum)) <= limit for datum in datums)


def test_truncate_left_turns_trains_a_repeated_exchange_as_often_as_it_occurs(smollm2: Any) -> None:
    repeated = chat("Q", "A", "Q", "A")
    datums = conversation_to_datums(
        repeated, smollm2, length_of(repeated[:2], smollm2), on_overlong="truncate_left_turns"
    )
    assert datums == conversation_to_datums(repeated[:2], smollm2, MAX) * 2


def test_truncate_left_turns_raises_where_the_last_question_alone_is_too_long(tokenizer: Any) -> None:
    limit = length_of(TWO_TURNS[2:], tokenizer) - 1
    with pytest.raises(DataError, match=r"^\[overlong\] .*'truncate_left_turns'"):
        conversation_to_datums(TWO_TURNS, tokenizer, limit, "last_assistant", on_overlong="truncate_left_turns")


def test_truncate_left_turns_leaves_a_conversation_starting_with_a_question() -> None:
    tokenizer = tokenizer_of("smollm2")
    messages = [*chat("one " * 30, "first"), {"role": "assistant", "content": "more"}, *TWO_TURNS[:2]]
    limit = length_of(messages, tokenizer) - 1
    (datum,) = conversation_to_datums(messages, tokenizer, limit, "last_assistant", on_overlong="truncate_left_turns")
    assert datum == conversation_to_datums(TWO_TURNS[:2], tokenizer, MAX)[0]


def test_error_names_message_length_and_what_to_do(smollm2: Any) -> None:
    length = length_of(TWO_TURNS, smollm2)
    text = f"message 3 and its prompt take {length} tokens, max_length is {length - 1}; raise max_length, or choose"
    with pytest.raises(DataError, match=rf"^\[overlong\] {text}") as caught:
        conversation_to_datums(TWO_TURNS, smollm2, length - 1, on_overlong="error")
    assert skip_reason(caught.value) == "overlong"


@pytest.mark.parametrize("convert", [tokenize_conversation, conversation_to_datum])
def test_tutorial_functions_cut_at_the_right_and_raise_where_nothing_is_trained(smollm2: Any, convert: Any) -> None:
    length = length_of(TWO_TURNS, smollm2)
    tokens, weights = tokenize_conversation(TWO_TURNS, smollm2, length - 2)
    assert len(tokens) == len(weights) == length - 2
    assert conversation_to_datum(TWO_TURNS, smollm2, length - 2).model_input.length == length - 3
    with pytest.raises(DataError, match=r"^\[overlong\]"):
        convert(TWO_TURNS, smollm2, 10)


def test_answers_keep_their_numbers_when_their_history_is_left_out(smollm2: Any) -> None:
    whole = Converter(smollm2, 2048).outcome(0, TWO_TURNS).conversion
    assert whole is not None
    limit = whole.length - 1
    shortened = Converter(smollm2, limit, on_overlong="truncate_left_turns").outcome(0, TWO_TURNS).conversion
    assert shortened is not None
    assert [[number for number, _ in example.answers] for example in shortened.examples] == [[1], [3]]
    assert all(example.answers[-1][1] == len(example.tokens) for example in shortened.examples)
