"""convert_conversations: what is converted, what is counted, what is printed."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.chat.conversations import HELLO, TWO_TURNS, chat
from tests.unit.chat.tiny_tokenizers import FAMILIES, make_tokenizer, tokenizer_of

from mint.chat import Converter, conversation_to_datums, convert_conversations, get_renderer
from mint.errors import DataError, InputError

MAX = 150
LONG = chat("long " * 200, "answer")
ROWS: list[Any] = [
    HELLO,
    TWO_TURNS,
    LONG,
    None,
    [{"role": "user", "content": "Q"}],
    HELLO,
    [{"content": message["content"], "role": message["role"], "id": 1} for message in HELLO],
    [*HELLO, {"role": "user", "content": "thanks"}],
    [{"role": "assistant", "content": "7"}],
    LONG,
    chat("own", "system", system="S"),
]


def test_datums_are_those_of_the_usable_rows_in_order(tokenizer: Any) -> None:
    datums, _ = convert_conversations(ROWS, tokenizer, MAX)
    usable = [ROWS[number] for number in (0, 1, 5, 6, 7, 10)]
    assert datums == [datum for row in usable for datum in conversation_to_datums(row, tokenizer, MAX)]


def test_report_counts_every_kind(qwen3: Any) -> None:
    datums, report = convert_conversations(ROWS, qwen3, MAX)
    assert report.rows == len(ROWS)
    assert report.datums == len(datums) == 7  # one row of two turns
    assert report.tokens == sum(datum.model_input.length for datum in datums)
    assert report.trained_tokens == sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in datums)
    assert report.skipped == {"overlong": 2, "not_a_conversation": 1, "no_assistant": 1, "no_prompt": 1}
    assert report.skipped_rows == {
        "overlong": [2, 9],
        "not_a_conversation": [3],
        "no_assistant": [4],
        "no_prompt": [8],
    }
    assert report.skipped_fraction == pytest.approx(5 / 11)
    assert report.first_errors["no_prompt"].startswith("row 8: [no_prompt] message 0")
    assert report.duplicate_rows == 3  # rows 5 and 6 equal row 0, row 9 equals row 2
    assert report.trailing_messages == 1
    assert (report.truncated_rows, report.dropped_turns, report.control_text_rows) == (0, 0, 0)
    assert report.injected_system == {}


def test_report_counts_answers_that_do_not_fit_beside_others_that_do(smollm2: Any) -> None:
    row = [*HELLO, *LONG]
    _, report = convert_conversations([row, HELLO], smollm2, MAX)
    assert (report.dropped_turns, report.truncated_rows, report.skipped) == (1, 0, {})


@pytest.mark.parametrize("on_overlong", ["truncate_right", "truncate_left_turns"])
def test_report_counts_truncated_rows(smollm2: Any, on_overlong: Any) -> None:
    too_long_answer = chat("Q", "answer " * 200)
    long_history = [*LONG, *HELLO, *chat("And you?", "Fine.")]
    _, report = convert_conversations([HELLO, too_long_answer, long_history], smollm2, MAX, on_overlong=on_overlong)
    expected = {"truncate_right": (1, {"overlong": 1}, 0), "truncate_left_turns": (1, {"overlong": 1}, 1)}
    assert (report.truncated_rows, report.skipped, report.dropped_turns) == expected[on_overlong]


def test_report_counts_the_system_text_that_the_template_adds() -> None:
    default = FAMILIES["smollm2"].default_system
    _, report = convert_conversations(ROWS, tokenizer_of("smollm2"), MAX)
    assert report.injected_system == {default: 5}  # not the row with a system message of its own
    _, report = convert_conversations([HELLO, ROWS[-1]], get_renderer(tokenizer_of("llama3_2"), date="1 Jan 2030"), MAX)
    assert report.injected_system == {"Cutting Knowledge Date: December 2023\nToday Date: 01 Jan 2030": 2}


def test_report_prints_counts_reasons_rows_and_an_example(smollm2: Any) -> None:
    rows = [*ROWS, *[None] * 12]
    lines = str(convert_conversations(rows, smollm2, MAX)[1]).splitlines()
    assert lines[:2] == ["rows                    23", "datums                  6"]
    assert lines[2].startswith("tokens                  ") and lines[2].endswith("trained)")
    assert lines[lines.index("skipped: overlong       2 (rows 2, 9)") + 1].startswith(
        "    row 2: [overlong] no trained"
    )
    assert "skipped: not_a_conversation 13 (rows 3, 11, 12, 13, 14, 15, 16, 17, 18, 19, ...)" in lines
    assert "trailing messages       1" in lines
    assert "exact duplicates        3" in lines
    assert f"system text added       5 x {FAMILIES['smollm2'].default_system!r}" in lines
    assert not any(line.startswith(("truncated", "control", "answers too long")) for line in lines)  # nothing to say


def test_the_report_lists_the_first_hundred_numbers_of_a_reason(smollm2: Any) -> None:
    _, report = convert_conversations([None] * 250, smollm2, MAX)
    assert report.skipped == {"not_a_conversation": 250} and report.skipped_fraction == 1.0
    assert report.skipped_rows == {"not_a_conversation": list(range(100))}


def test_the_first_token_of_a_plain_text_is_no_target(smollm2: Any) -> None:
    datums, report = convert_conversations([{"text": "As it stands."}], smollm2, MAX)
    assert report.trained_tokens == report.tokens == datums[0].model_input.length > 1


def test_a_text_of_one_token_is_skipped() -> None:
    tokenizer = make_tokenizer("smollm2")
    tokenizer.eos_token = None
    datums, report = convert_conversations([{"text": "a"}, {"text": "Hello there"}], tokenizer, 2048)
    assert report.skipped_rows == {"untrained": [0]} and len(datums) == 1


def test_a_row_is_counted_once_however_often_it_comes(smollm2: Any) -> None:
    converter = Converter(smollm2, MAX)
    for number, row in [*enumerate(ROWS), *enumerate(ROWS)]:
        converter(number, row)
    assert converter.report == convert_conversations(ROWS, smollm2, MAX)[1]


def test_the_outcome_of_an_overlong_row_tells_how_long_it_is(smollm2: Any) -> None:
    outcome = Converter(smollm2, MAX).outcome(0, LONG)
    uncut = Converter(smollm2, 10_000).outcome(0, LONG)
    assert outcome.conversion is not None and uncut.conversion is not None
    assert outcome.conversion.examples == [] and str(outcome.error).startswith("[overlong]")
    assert outcome.conversion.length == len(uncut.conversion.examples[0].tokens) > MAX


def test_error_mode_stops_at_the_overlong_row_and_names_it(smollm2: Any) -> None:
    with pytest.raises(DataError, match=r"^\[overlong\] message 1 and its prompt take .* \(row 2\)$"):
        convert_conversations(ROWS, smollm2, MAX, on_overlong="error")
    with_bad_rows = [row for row in ROWS if row is not LONG]
    _, report = convert_conversations(with_bad_rows, smollm2, MAX, on_overlong="error")
    assert sum(report.skipped.values()) == 3  # rows that are bad for another reason are still skipped


def test_no_rows_make_an_empty_report(smollm2: Any) -> None:
    datums, report = convert_conversations([], smollm2, MAX)
    assert (datums, report.rows, report.skipped_fraction) == ([], 0, 0.0)


def test_a_wrong_option_raises_before_any_row_is_read(smollm2: Any) -> None:
    def rows() -> Any:
        raise AssertionError("read a row")
        yield

    with pytest.raises(InputError, match="train_on='user'"):
        convert_conversations(rows(), smollm2, MAX, "user")  # type: ignore[arg-type]
