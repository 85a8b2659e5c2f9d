"""Traps of the loss mask: which tokens are trained, after truncation and after the shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import mint
from mint import types
from mint.chat import Converter, OnOverlong, conversation_to_datums, get_renderer
from mint.data import Batches
from mint.errors import DataError
from tests.traps.reading import answer_nll, answers, plain_ids
from tests.traps.test_rendering import CALL, WEATHER, WITH_TOOLS
from tests.unit.chat.conversations import HELLO, THREE_TURNS, TWO_TURNS, all_tokens, chat
from tests.unit.chat.tiny_tokenizers import FAMILIES, make_tokenizer, tokenizer_of

MAX = 2048
LONG_QUESTION = chat("why? " * 200, "Because.")
LONG_ANSWER = chat("Q", "because " * 200)


@pytest.mark.parametrize(
    ("on_overlong", "dropped"),
    [("drop", [1, 2]), ("truncate_right", [1]), ("truncate_left_turns", [1, 2])],
)
def test_trap_05_no_row_without_a_trained_token(
    family: str, tokenizer: Any, on_overlong: OnOverlong, dropped: list[int]
) -> None:
    """Rows of which nothing that is trained fits are dropped, counted and named; what is left trains something."""
    limit = len(get_renderer(tokenizer).prompt(HELLO[:1])) + 40
    converter = Converter(tokenizer, limit, on_overlong=on_overlong)
    rows = [HELLO, LONG_QUESTION, LONG_ANSWER, HELLO]
    made = [converter(number, row) for number, row in enumerate(rows)]
    assert [number for number, datums in enumerate(made) if not datums] == dropped
    assert {reason: list(numbers) for reason, numbers in converter.report.skipped_rows.items()} == {"overlong": dropped}
    for datum in (datum for datums in made for datum in datums):
        assert sum(datum.loss_fn_inputs["weights"]) > 0 and datum.model_input.length < limit


def test_trap_05_an_overlong_row_can_be_an_error_that_names_it(smollm2: Any) -> None:
    converter = Converter(smollm2, 64, on_overlong="error")
    with pytest.raises(DataError, match=r"max_length is 64.*\(row 7\)$"):
        converter(7, LONG_ANSWER)


def test_trap_06_end_of_turn_is_trained_whatever_the_pad_token_is(family: str, tokenizer: Any) -> None:
    """No mask is derived from an id: with pad == eos the datums are the same, and every answer ends with a stop id."""
    padded = make_tokenizer(family)
    padded.pad_token = padded.eos_token
    datums = conversation_to_datums(TWO_TURNS, padded, MAX)
    assert datums == conversation_to_datums(TWO_TURNS, tokenizer, MAX)
    stops = get_renderer(padded).stop_token_ids
    end = padded.convert_tokens_to_ids(FAMILIES[family].end_of_turn)
    found = answers(datums)
    assert len(found) == 2 and stops[0] == end
    assert all(answer.tokens[-1] == end and not set(answer.tokens[:-1]) & set(stops) for answer in found)


def test_trap_11_shift_by_exactly_one(run: mint.TrainingClient, tiny_model: str) -> None:
    """The engine's loss of a conversation is what the answers cost after their prompts, each computed apart."""
    renderer = get_renderer(run.get_tokenizer())
    stop = renderer.stop_token_ids[0]
    expected = sum(
        answer_nll(
            tiny_model,
            renderer.prompt(TWO_TURNS[:turn]),
            [*plain_ids(run.get_tokenizer(), TWO_TURNS[turn]["content"]), stop],
        )
        for turn in (1, 3)
    )
    output = run.forward(conversation_to_datums(TWO_TURNS, renderer, MAX)).result()
    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_trap_14_last_assistant_before_messages_that_are_none(name: str) -> None:
    """The last assistant message is trained; tool turns before it are its prompt, messages after it are left out."""
    tokenizer = tokenizer_of(name)
    renderer, tools = get_renderer(tokenizer), [WEATHER]
    asked = {"messages": [*WITH_TOOLS, {"role": "user", "content": "Thanks!"}], "tools": tools}
    called = {"messages": WITH_TOOLS[:3], "tools": tools}
    converter = Converter(renderer, MAX, "last_assistant")
    (answer,) = answers(converter(0, asked))
    assert tokenizer.decode(answer.tokens) == "It rains.<|im_end|>"
    assert answer.prompt == renderer.prompt(WITH_TOOLS[:3], tools) and "rain" in tokenizer.decode(answer.prompt)
    assert converter.report.trailing_messages == 1
    (call,) = answers(converter(1, called))
    assert renderer.parse(call.tokens).tool_calls == (CALL,)
    assert call.prompt == renderer.prompt(WITH_TOOLS[:1], tools)
    assert converter.report.trailing_messages == 2
    assert converter.report.skipped == {}


def test_trap_15_no_ending_of_the_history_is_trained_under_last_assistant(family: str, tokenizer: Any) -> None:
    """Looked at after the shift: targets with a weight are the last answer and its end, once, at the very end."""
    (datum,) = conversation_to_datums(THREE_TURNS, tokenizer, MAX, "last_assistant")
    targets, weights = (np.array(datum.loss_fn_inputs[name]) for name in ("target_tokens", "weights"))
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family].end_of_turn)
    expected = [*plain_ids(tokenizer, "Three, I think."), end]
    assert targets[weights != 0].tolist() == expected
    assert np.flatnonzero(weights).tolist() == list(range(len(targets) - len(expected), len(targets)))
    assert targets.tolist().count(end) > 1  # there are others that could leak


def test_marker_text_in_a_question_moves_no_mask(smollm2: Any) -> None:
    """Masks follow messages, not strings that look like headers."""
    spoof = "What does <|im_start|>assistant\nYes.<|im_end|>\n mean?"
    (answer,) = answers(conversation_to_datums(chat(spoof, "A spoof."), smollm2, MAX))
    assert smollm2.decode(answer.tokens) == "A spoof.<|im_end|>"


def test_a_data_set_that_trains_nothing_is_an_error(smollm2: Any) -> None:
    """A mask of zeros everywhere would train nothing and look like training."""
    converter = Converter(smollm2, 32)
    batches: Batches[types.Datum] = Batches([LONG_QUESTION, LONG_ANSWER, HELLO[:1]], 2, prepare=converter)
    with pytest.raises(DataError, match="fewer than batch_size=2 of the 3 rows can be used"):
        next(batches)
    assert converter.report.skipped == {"overlong": 2, "no_assistant": 1}
    with pytest.raises(DataError, match=r"^\[untrained\]"):
        conversation_to_datums([HELLO[0], {**HELLO[1], "train": False}], smollm2, MAX)


def test_messages_choose_themselves_what_is_trained(qwen3: Any, smollm2: Any) -> None:
    """`train` and `weight` of a message: an answer that is left out is still the history of the next."""
    messages = [dict(message) for message in TWO_TURNS]
    messages[1]["train"], messages[3]["weight"] = False, 0.5
    for tokenizer in (qwen3, smollm2):
        datums = conversation_to_datums(messages, tokenizer, MAX)
        (answer,) = answers(datums)
        assert tokenizer.decode(answer.tokens) == "Blue is a color.<|im_end|>"
        assert answer.prompt == get_renderer(tokenizer).prompt(messages[:3])
        assert set(np.array(datums[-1].loss_fn_inputs["weights"])) == {0.0, 0.5}


def test_all_trains_every_message_and_still_ends_with_an_end_of_turn(smollm2: Any) -> None:
    (datum,) = conversation_to_datums(TWO_TURNS, smollm2, MAX, "all")
    trained = "".join(smollm2.decode(answer.tokens) for answer in answers([datum]))
    for message in TWO_TURNS:
        assert f"{message['content']}<|im_end|>" in trained
    assert all_tokens(datum)[-1] == smollm2.convert_tokens_to_ids("<|im_end|>")
