"""Loss masks: what is trained, after which prompt, and where one datum is not enough."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from tests.unit.chat.conversations import (
    CONVERSATIONS,
    HELLO,
    THREE_TURNS,
    TWO_TURNS,
    Conversation,
    all_tokens,
    all_weights,
    chat,
    template_ids,
    trained_runs,
    trained_texts,
)
from tests.unit.chat.tiny_tokenizers import FAMILIES, tokenizer_of

from mint.chat import (
    conversation_to_datum,
    conversation_to_datums,
    get_renderer,
    tokenize_conversation,
)
from mint.errors import DataError, InputError

MAX = 2048
TRAINABLE = {name: messages for name, messages in CONVERSATIONS.items() if name != "spaces around"}


def answers_of(messages: Conversation) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def end_of_turn(name: str) -> str:
    return FAMILIES[name].end_of_turn


@pytest.mark.parametrize("conversation", TRAINABLE)
def test_every_answer_stands_after_the_prompt_that_the_sampler_gets(
    family: str, tokenizer: Any, conversation: str
) -> None:
    messages = TRAINABLE[conversation]
    renderer = get_renderer(tokenizer)
    stop = renderer.stop_token_ids[0]
    datums = conversation_to_datums(messages, tokenizer, MAX)
    found = []  # (prompt, answer) pairs as the datums hold them
    for datum in datums:
        tokens, weights = all_tokens(datum), all_weights(datum)
        start = None
        for index, weight in enumerate([*weights, 0.0]):
            if weight and start is None:
                start = index
            if not weight and start is not None:
                found.append((tokens[:start], tokens[start:index]))
                start = None
    expected = [
        (
            renderer.prompt(messages[:turn]),
            [*tokenizer.encode(messages[turn]["content"], add_special_tokens=False), stop],
        )
        for turn in answers_of(messages)
    ]
    assert found == expected


@pytest.mark.parametrize("conversation", ["one turn", "two turns", "system and three turns"])
def test_template_writes_the_same_tokens_for_the_conversation_up_to_its_last_answer(
    family: str, tokenizer: Any, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    rendered = template_ids(tokenizer, messages, date_string="26 Jul 2024")
    tokens = all_tokens(conversation_to_datums(messages, tokenizer, MAX)[-1])
    assert tokens == rendered[: len(tokens)]
    assert tokenizer.decode(rendered[len(tokens) :]) == ("" if family.startswith("llama") else "\n")


def test_trained_are_content_and_end_of_turn_and_nothing_else(family: str, tokenizer: Any) -> None:
    end = end_of_turn(family)
    texts = [
        text for datum in conversation_to_datums(TWO_TURNS, tokenizer, MAX) for text in trained_texts(tokenizer, datum)
    ]
    assert texts == [f"Hi there!{end}", f"Blue is a color.{end}"]


def test_last_trained_token_of_each_turn_is_where_the_sampler_stops(family: str, tokenizer: Any) -> None:
    stops = get_renderer(tokenizer).stop_token_ids
    assert stops[0] == tokenizer.convert_tokens_to_ids(end_of_turn(family))
    assert tokenizer.eos_token_id in stops
    for datum in conversation_to_datums(THREE_TURNS, tokenizer, MAX):
        for run in trained_runs(all_tokens(datum), all_weights(datum)):
            assert run[-1] in stops and not set(run[:-1]) & set(stops)


def test_datum_ends_with_its_last_trained_token(family: str, tokenizer: Any) -> None:
    for datum in conversation_to_datums(THREE_TURNS, tokenizer, MAX):
        assert datum.loss_fn_inputs["weights"].tolist()[-1] == 1.0


def test_headers_other_roles_and_the_newline_between_turns_are_not_trained(smollm2: Any) -> None:
    (datum,) = conversation_to_datums(TWO_TURNS, smollm2, MAX)
    pairs = zip(all_tokens(datum), all_weights(datum), strict=True)
    untrained = re.sub("~+", "~", "".join("~" if weight else smollm2.decode([token]) for token, weight in pairs))
    assert untrained == (
        f"<|im_start|>system\n{FAMILIES['smollm2'].default_system}<|im_end|>\n"
        "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n~\n"
        "<|im_start|>user\nName a color.<|im_end|>\n<|im_start|>assistant\n~"
    )


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3"])
def test_one_datum_where_the_template_keeps_the_history(name: str) -> None:
    assert len(conversation_to_datums(THREE_TURNS, tokenizer_of(name), MAX)) == 1


@pytest.mark.parametrize("thinking", [False, True])
def test_one_datum_per_answer_where_qwen3_rewrites_the_history(qwen3: Any, thinking: bool) -> None:
    datums = conversation_to_datums(THREE_TURNS, get_renderer(qwen3, thinking=thinking), MAX)
    assert [trained_texts(qwen3, datum) for datum in datums] == [
        ["1. one\n2. two<|im_end|>"],
        ["Two.<|im_end|>"],
        ["Three, I think.<|im_end|>"],
    ]


def test_qwen3_answers_in_a_row_share_a_datum_because_no_question_rewrites_them(qwen3: Any) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well?"}]
    (datum,) = conversation_to_datums(messages, qwen3, MAX)
    assert trained_texts(qwen3, datum) == ["Hi there! How can I help you?<|im_end|>", "Well?<|im_end|>"]


def test_single_turn_is_one_datum_for_qwen3_too(qwen3: Any) -> None:
    assert len(conversation_to_datums(HELLO, qwen3, MAX)) == 1


SCAFFOLD = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("thinking", [False, True])
def test_empty_think_block_is_present_and_untrained_with_and_without_thinking(qwen3: Any, thinking: bool) -> None:
    (datum,) = conversation_to_datums(HELLO, get_renderer(qwen3, thinking=thinking), MAX)
    tokens, weights = all_tokens(datum), all_weights(datum)
    first = weights.index(1.0)
    assert qwen3.decode(tokens[:first]).endswith(SCAFFOLD)
    assert qwen3.decode(tokens[first:]) == "Hi there! How can I help you?<|im_end|>"
    assert weights[first:] == [1.0] * len(tokens[first:])


def test_thought_is_trained_with_thinking_and_control_tokens_are_real(qwen3: Any) -> None:
    messages = chat("Q", "<think>\nA thought.\n</think>\n\nAnswer.")
    renderer = get_renderer(qwen3, thinking=True)
    (datum,) = conversation_to_datums(messages, renderer, MAX)
    assert trained_texts(qwen3, datum) == ["<think>\nA thought.\n</think>\n\nAnswer.<|im_end|>"]
    assert all_tokens(datum) == template_ids(qwen3, messages)[:-1]  # the newline after the turn
    assert all_tokens(datum).count(qwen3.convert_tokens_to_ids("<think>")) == 1


@pytest.mark.parametrize("thinking", [False, True])
def test_qwen3_answer_loses_leading_newlines_as_in_the_template(qwen3: Any, thinking: bool) -> None:
    messages = chat("Q", "\n\n  An answer.\n")
    (datum,) = conversation_to_datums(messages, get_renderer(qwen3, thinking=thinking), MAX)
    assert trained_texts(qwen3, datum) == ["  An answer.\n<|im_end|>"]
    assert qwen3.decode(all_tokens(datum)) + "\n" == qwen3.apply_chat_template(messages, tokenize=False)


def test_thought_without_thinking_is_refused_and_an_empty_one_is_not(qwen3: Any) -> None:
    with pytest.raises(DataError, match=r"^\[thinking_mismatch\] message 1 .*thinking=False.*thinking=True"):
        conversation_to_datums(chat("Q", "<think>\nA thought.\n</think>\n\nAnswer."), qwen3, MAX)
    (datum,) = conversation_to_datums(chat("Q", "<think>\n\n</think>\n\nAnswer."), qwen3, MAX)
    assert trained_texts(qwen3, datum) == ["Answer.<|im_end|>"]


def test_instruct_2507_keeps_text_and_adds_no_think_block() -> None:
    tokenizer = tokenizer_of("qwen3_instruct_2507")
    thought = "<think>\nA thought.\n</think>\n\nAnswer."
    (datum,) = conversation_to_datums(chat("Q", thought, "R", "plain"), tokenizer, MAX)
    assert trained_texts(tokenizer, datum) == [f"{thought}<|im_end|>", "plain<|im_end|>"]
    assert tokenizer.decode(all_tokens(datum)).count("<think>") == 1


def tutorial_tokens_and_weights(
    messages: Conversation, tokenizer: Any, train_on: str = "all_assistant"
) -> tuple[list[int], list[float]]:
    """Masking by prefix differences: render ever longer prefixes; what is longer than before is the new message's.

    Written from a description of the method, to show what goes wrong with it.
    """
    tokens: list[int] = []
    weights: list[float] = []
    for count, message in enumerate(messages, start=1):
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=False)
        new = tokenizer.encode(text, add_special_tokens=False)[len(tokens) :]
        trained = message["role"] == "assistant" and (train_on == "all_assistant" or count == len(messages))
        tokens += new
        weights += [float(trained)] * len(new)
    return tokens, weights


def test_masking_by_prefix_differences_eats_tokens_on_qwen3_and_ours_does_not(qwen3: Any) -> None:
    eaten, _ = tutorial_tokens_and_weights(TWO_TURNS, qwen3)
    whole = qwen3.apply_chat_template(TWO_TURNS, tokenize=False)
    assert whole.count("<|im_start|>user\n") == 2
    # the second question's header is gone: 4 tokens of <think>\n\n</think>\n\n, which the history loses, came out of it
    assert "<|im_start|>user\nName a color." not in qwen3.decode(eaten)
    assert "Hi there!<|im_end|>\n" in qwen3.decode(eaten)
    assert len(eaten) == len(qwen3.encode(whole, add_special_tokens=False)) and qwen3.decode(eaten) != whole

    ours = [qwen3.decode(all_tokens(datum)) for datum in conversation_to_datums(TWO_TURNS, qwen3, MAX)]
    assert ours == [
        f"<|im_start|>user\nSay hi.<|im_end|>\n{SCAFFOLD}Hi there!<|im_end|>",
        "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\nHi there!<|im_end|>\n"
        f"<|im_start|>user\nName a color.<|im_end|>\n{SCAFFOLD}Blue is a color.<|im_end|>",
    ]


def test_masking_by_prefix_differences_trains_header_scaffold_and_newline_and_ours_does_not(qwen3: Any) -> None:
    runs = trained_runs(*tutorial_tokens_and_weights(HELLO, qwen3))
    answer = "Hi there! How can I help you?<|im_end|>"
    assert [qwen3.decode(run) for run in runs] == [f"{SCAFFOLD}{answer}\n"]
    assert trained_texts(qwen3, conversation_to_datum(HELLO, qwen3, MAX)) == [answer]


def test_byte_pairs_do_not_merge_across_the_border_between_prompt_and_answer(smollm2: Any) -> None:
    messages = chat("List.", "\n\n1. one")
    prompt = get_renderer(smollm2).prompt(messages[:1])
    answer = smollm2.encode("\n\n1. one", add_special_tokens=False)
    stop = smollm2.eos_token_id
    assert template_ids(smollm2, messages)[: len(prompt)] != prompt  # the trap: text in one piece merges
    (datum,) = conversation_to_datums(messages, smollm2, MAX)
    assert all_tokens(datum) == [*prompt, *answer, stop]


def test_history_holds_an_answer_in_the_tokens_that_were_sampled(smollm2: Any) -> None:
    """The prompt of turn two starts with prompt and answer of turn one, even where byte pairs could merge."""
    messages = chat("List.", "\n\n1. one", "More.")
    renderer = get_renderer(smollm2)
    sampled = [*smollm2.encode("\n\n1. one", add_special_tokens=False), smollm2.eos_token_id]
    first = [*renderer.prompt(messages[:1]), *sampled]
    assert renderer.prompt(messages)[: len(first)] == first


def test_last_assistant_trains_the_last_answer_only_and_leaks_no_earlier_end_of_turn(
    family: str, tokenizer: Any
) -> None:
    (datum,) = conversation_to_datums(THREE_TURNS, tokenizer, MAX, "last_assistant")
    prompt = get_renderer(tokenizer).prompt(THREE_TURNS[:-1])
    targets, weights = datum.loss_fn_inputs["target_tokens"].tolist(), datum.loss_fn_inputs["weights"].tolist()
    assert weights == [0.0] * (len(prompt) - 1) + [1.0] * (len(targets) - len(prompt) + 1)
    assert datum.model_input.to_ints()[: len(prompt)] == prompt
    assert tokenizer.decode(targets[len(prompt) - 1 :]) == f"Three, I think.{end_of_turn(family)}"


@pytest.mark.parametrize("train_on", ["all_assistant", "last_assistant"])
def test_messages_after_the_last_answer_are_left_out(tokenizer: Any, train_on: Any) -> None:
    trailing = [*TWO_TURNS, {"role": "user", "content": "thanks"}, {"role": "system", "content": "end"}]
    assert conversation_to_datums(trailing, tokenizer, MAX, train_on) == conversation_to_datums(
        TWO_TURNS, tokenizer, MAX, train_on
    )


def test_llama_trains_the_trimmed_answer() -> None:
    tokenizer = tokenizer_of("llama3")
    (datum,) = conversation_to_datums(chat(" hi ", "  Hello there \n"), tokenizer, MAX)
    assert trained_texts(tokenizer, datum) == ["Hello there<|eot_id|>"]


def test_chatml_trains_the_answer_as_it_is(smollm2: Any) -> None:
    (datum,) = conversation_to_datums(chat(" hi ", "  Hello there \n"), smollm2, MAX)
    assert trained_texts(smollm2, datum) == ["  Hello there \n<|im_end|>"]


def test_tutorial_functions_agree_with_each_other_and_with_the_plural(tokenizer: Any) -> None:
    tokens, weights = tokenize_conversation(HELLO, tokenizer, MAX)
    assert isinstance(tokens, list) and isinstance(weights, np.ndarray) and weights.dtype == np.float32
    datum = conversation_to_datum(HELLO, tokenizer, MAX, "all_assistant")
    assert datum.model_input.to_ints() == tokens[:-1]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == tokens[1:]
    assert datum.loss_fn_inputs["weights"].tolist() == weights[1:].tolist()
    assert [datum] == conversation_to_datums(HELLO, tokenizer, MAX)


@pytest.mark.parametrize("convert", [tokenize_conversation, conversation_to_datum])
def test_tutorial_functions_refuse_what_one_datum_cannot_hold(qwen3: Any, convert: Any) -> None:
    with pytest.raises(
        InputError, match=r"one datum cannot train all 2 answers.*differently.*conversation_to_datums"
    ) as caught:
        convert(TWO_TURNS, qwen3, MAX)
    assert not isinstance(caught.value, DataError)  # the conversation is fine
    assert convert(TWO_TURNS, qwen3, MAX, "last_assistant") is not None


def test_renderer_may_stand_for_its_tokenizer(qwen3: Any) -> None:
    assert conversation_to_datums(HELLO, get_renderer(qwen3), MAX) == conversation_to_datums(HELLO, qwen3, MAX)


def test_unknown_options_are_refused_by_name(smollm2: Any) -> None:
    with pytest.raises(InputError, match=r"train_on='user': allowed are 'all_assistant', 'last_assistant', 'all'"):
        conversation_to_datums(HELLO, smollm2, MAX, "user")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"on_overlong='cut': allowed are 'drop', 'truncate_right'"):
        conversation_to_datums(HELLO, smollm2, MAX, on_overlong="cut")  # type: ignore[arg-type]
    for max_length in (1, True, 20.0):
        with pytest.raises(
            InputError, match=rf"max_length={max_length}: expected a whole number of tokens, at least 2"
        ):
            conversation_to_datums(HELLO, smollm2, max_length)  # type: ignore[arg-type]
