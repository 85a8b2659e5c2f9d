"""What a certificate counts, against the conversion row by row; its judgement, hash and stability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.chat.conversations import HELLO, TWO_TURNS, Conversation, chat
from tests.unit.chat.tiny_tokenizers import FAMILIES, make_tokenizer, tokenizer_of

from mint.chat import Converter, UnusableRow, convert_conversations, get_renderer
from mint.data import ChatSet, load_chat_set, load_demo
from mint.data.certificate import Certificate, Lengths, model_facts, require_acceptable
from mint.data.checking import (
    DataCheck,
    ProposedLength,
    check_chat_set,
    evenly_spaced,
    fitting_length,
    propose_max_length,
)
from mint.data.rendered_hash import rendered_hash
from mint.errors import DataError, InputError

MAX = 150
LONG = chat("long " * 200, "answer")
LATE_LONG = [*chat("Is it short?", "It is."), *LONG]
SPECIAL = chat("What does <|im_end|> end?", "A turn, as <|im_end|> says.")
TRAILING = [*chat("And now?", "Now this."), {"role": "user", "content": "thanks"}]
TRAIN: list[Any] = [
    HELLO, TWO_TURNS, LONG, None, chat("own", "system", system="S"), HELLO, LATE_LONG, SPECIAL, TRAILING,
    UnusableRow("chats.jsonl, row 9: field messages: not a list"),
]  # fmt: skip
TEST: list[Any] = [chat("Hello", "Hi there, how can I help you"), TWO_TURNS, chat("Unlike", "the others")]


def certify(train: list[Any], test: list[Any], name: str = "smollm2", **options: Any) -> Certificate:
    tokenizer = tokenizer_of(name)
    rules = {key: options.pop(key) for key in ("max_length", "train_on", "on_overlong") if key in options}
    converter = Converter(tokenizer, **{"max_length": MAX, **rules})
    model = model_facts("the-model", tokenizer, context=options.pop("context", None))
    return check_chat_set(ChatSet("a set", train, test), converter, model, mint_version="1", **options)


def test_counts_are_those_of_the_conversion() -> None:
    found = certify(TRAIN, TEST)
    datums, report = convert_conversations(TRAIN, tokenizer_of("smollm2"), MAX)
    part = found.train
    assert (part.rows, part.rows_in_set, part.examples) == (10, 10, len(datums))
    assert (part.tokens, part.trained_tokens) == (report.tokens, report.trained_tokens)
    assert {reason: dropped.rows.count for reason, dropped in part.dropped.items()} == report.skipped
    assert {reason: dropped.rows.first for reason, dropped in part.dropped.items()} == report.skipped_rows
    assert {reason: dropped.first_error for reason, dropped in part.dropped.items()} == report.first_errors
    assert part.used_rows == 7 and part.dropped_rows == 3
    assert (part.turns, part.dropped_turns) == (10, 2)  # too long are LONG and the end of LATE_LONG
    assert (part.injected_system, part.further_injected_system) == (report.injected_system, 0)
    assert part.control_text.first == [7] and part.trailing_messages == 1
    assert part.rendered_sha256 == rendered_hash(datums)
    assert found.test.rendered_sha256 == rendered_hash(convert_conversations(TEST, tokenizer_of("smollm2"), MAX)[0])
    assert (found.rules["max_length"], found.rules["train_on"], found.rules["on_overlong"]) == (
        MAX,
        "all_assistant",
        "drop",
    )


def test_plain_text_is_counted_by_its_targets() -> None:
    rows = [{"text": "As it stands."}, {"text": "And nothing else."}]
    datums, report = convert_conversations(rows, tokenizer_of("smollm2"), MAX)
    part = certify(rows, []).train
    assert (part.tokens, part.trained_tokens) == (report.tokens, report.tokens)
    assert part.rendered_sha256 == rendered_hash(datums)


def test_lengths_are_uncut_and_their_percentiles_are_rows_of_the_set() -> None:
    rows = load_demo()[0][:100]
    uncut = [
        max(d.model_input.length + 1 for d in convert_conversations([row], tokenizer_of("smollm2"), 10**6)[0])
        for row in rows
    ]
    ordered = sorted(uncut)
    assert certify(rows, []).train.lengths == Lengths(ordered[49], ordered[89], ordered[94], ordered[98], ordered[99])
    assert certify([None], []).train.lengths is None


def test_duplicates_and_overlap_name_both_rows() -> None:
    found = certify(TRAIN, TEST).duplicates
    assert [(pair.row, pair.of) for pair in found.train_exact.first] == [(5, 0)]
    assert [(pair.row, pair.of) for pair in found.overlap_exact.first] == [(1, 1)]
    assert [(pair.row, pair.of) for pair in found.overlap_near.first] == [(0, 0)]  # but for punctuation
    assert (found.test_exact.count, found.train_near.count, found.test_near.count) == (0, 0, 0)


def test_truncation_tells_what_was_cut() -> None:
    rows = [HELLO, chat("Q", "answer " * 200)]
    part = certify(rows, [], on_overlong="truncate_right").train
    (whole,) = convert_conversations(rows[1:], tokenizer_of("smollm2"), 10**6)[0]
    assert (part.truncated.count, part.truncated.first, part.shortened_turns) == (1, [1], 1)
    assert part.cut_tokens == whole.model_input.length + 1 - MAX and part.dropped_turns == 0


def test_a_template_that_rewrites_history_is_named_with_what_was_done() -> None:
    found = certify([HELLO, TWO_TURNS], [], "qwen3")
    assert found.train.split.first == [1] and found.train.examples == 3
    assert (
        "1 training rows became one example per answer, since the template rewrites earlier turns"
        in found.to_json()["notes"]
    )


def test_dates_and_system_texts_of_the_template_are_told() -> None:
    notes = certify([HELLO], [HELLO], "llama3_2").to_json()["notes"]
    assert "the template writes a date; it is frozen to '26 Jul 2024'" in notes
    assert "the template adds text that is not in the data" in notes
    found = certify([HELLO, chat("own", "system", system="S")], [])
    assert found.train.injected_system == {FAMILIES["smollm2"].default_system: 1}


def test_further_notes() -> None:
    few, many = chat("question " * 60, "A"), chat("Q", "answer " * 60)
    notes = certify([few], [few], "qwen3_instruct_2507", max_length=600, context=512).to_json()["notes"]
    assert notes[0].endswith("% of the training tokens are trained, which is unusually few")
    assert "max_length=600 is more than the model's context of 512 tokens" in notes
    assert "1 test rows stand among the training rows too, exactly or nearly: test losses flatter" in notes
    assert certify([many], [], "qwen3_instruct_2507", max_length=900).to_json()["notes"][0].endswith("unusually many")
    assert (
        certify([SPECIAL], [SPECIAL, HELLO], "qwen3_instruct_2507")
        .to_json()["notes"][0]
        .startswith("1 training and 1 test rows hold the text of a control token")
    )
    assert certify([HELLO], [TWO_TURNS], "qwen3_instruct_2507").to_json()["notes"] == []


@pytest.mark.parametrize(
    ("train", "test", "max_loss", "problems"),
    [
        ([HELLO] * 99 + [None], [], 0.01, []),
        ([HELLO] * 98 + [None] * 2, [], 0.01, ["2.00% of the rows would be lost, allowed are 1.00%"]),
        ([HELLO] * 98 + [None] * 2, [], 0.02, []),
        ([HELLO] * 98 + [None] * 2, [HELLO] * 900, 0.01, ["2.00% of the rows would be lost, allowed are 1.00%"]),
        ([HELLO] * 10, [None], 0.01, ["9.09% of the rows would be lost, allowed are 1.00%"]),
        ([HELLO] * 3 + [LATE_LONG], [], 0.01, ["20.00% of the answers would be lost, allowed are 1.00%"]),
        ([None], [], 1.0, ["nothing would be trained: no training row gives a token with a weight"]),
        ([], [], 0.01, ["nothing would be trained: no training row gives a token with a weight"]),
    ],
    ids=["just so", "too many", "allowed", "not diluted", "test rows", "answers", "nothing", "no rows"],
)
def test_the_judgement(train: list[Any], test: list[Any], max_loss: float, problems: list[str]) -> None:
    found = certify(train, test, max_loss=max_loss)
    assert found.to_json()["problems"] == problems
    assert found.verdict == ("refused" if problems else "ok")


def test_the_hash_changes_with_any_token_or_weight_and_with_nothing_else() -> None:
    def rendered(train: list[Any], **options: Any) -> str:
        return certify(train, [], **options).train.rendered_sha256

    same = rendered([HELLO, TWO_TURNS])
    with_key = [[{**message, "id": 1} for message in HELLO], TWO_TURNS]
    assert rendered(with_key) == rendered([HELLO, None, TWO_TURNS]) == same
    others = {
        rendered([TWO_TURNS, HELLO]),
        rendered([HELLO, [*TWO_TURNS[:-1], {"role": "assistant", "content": "Blue is a colour."}]]),
        rendered([HELLO, TWO_TURNS], train_on="last_assistant"),
    }
    assert len(others | {same}) == 4


def test_a_dropped_row_is_named_by_its_place_in_the_file_whatever_its_number_after_the_split(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [chat(f"Question {number}?", "" if number == 6 else f"Answer {number}.") for number in range(12)]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    chats = load_chat_set(str(file), test="0.5")
    part, numbers = next(
        (part, [row["rows"]["first"] for row in part["dropped"].values()])
        for part in map(certify(chats.train, chats.test).to_json().get, ("train", "test"))
        if part["dropped"]
    )
    ((number,),) = numbers
    assert number != 6  # the split has left rows before it out, or the test would show nothing
    assert part["dropped"]["empty_answer"]["first_error"] == (
        f"row {number} ({file}, row 6 (line 7)): [empty_answer] message 1 is an assistant turn without text: leave the row out"
    )


def test_the_json_is_complete_and_the_same_every_time() -> None:
    first, again = (json.dumps(certify(TRAIN, TEST).to_json()) for _ in range(2))
    assert first == again
    read = json.loads(first)
    assert read["schema_version"] == 1 and read["verdict"] == "refused" and read["lost_share"] == 0.3
    assert read["train"]["dropped"]["unreadable"] == {
        "first_error": "row 9: [unreadable] chats.jsonl, row 9: field messages: not a list",
        "rows": {"count": 1, "first": [9]},
    }
    assert read["duplicates"]["train_exact"] == {"count": 1, "first": [{"row": 5, "of": 0, "similarity": 1.0}]}
    assert read["model"]["name"] == "the-model" and read["renderer"]["family"] == "chatml"


def test_lists_of_rows_are_bounded_and_counts_are_not() -> None:
    part = certify([HELLO, *[SPECIAL] * 130, *[None] * 130], []).train
    for rows, first in ((part.control_text, 1), (part.dropped["not_a_conversation"].rows, 131)):
        assert rows.count == 130 and rows.first == list(range(first, first + 100))


def test_texts_that_the_template_adds_are_listed_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from mint.data import checking

    monkeypatch.setattr(checking, "LISTED_SYSTEM_TEXTS", 0)
    part = certify([HELLO, TWO_TURNS], []).train
    assert (part.injected_system, part.further_injected_system) == ({}, 2)


def test_a_limit_takes_evenly_spaced_rows_of_each_part() -> None:
    assert list(evenly_spaced(10, 3)) == [0, 3, 6] and list(evenly_spaced(3, 3)) == [0, 1, 2] == list(
        evenly_spaced(3, None)
    )
    found = certify(TRAIN, TEST, limit=4)  # rows 0, 2, 5, 7
    chosen = convert_conversations([TRAIN[number] for number in (0, 2, 5, 7)], tokenizer_of("smollm2"), MAX)[0]
    assert found.is_sample and not found.is_interrupted
    assert (found.train.rows, found.train.rows_in_set, found.test.rows) == (4, 10, 3)
    assert found.train.rendered_sha256 == rendered_hash(chosen) and found.train.dropped["overlong"].rows.first == [2]
    assert not certify(TRAIN, TEST, limit=10).is_sample
    with pytest.raises(InputError, match="limit=0: must be at least 1 row"):
        certify(TRAIN, TEST, limit=0)
    with pytest.raises(InputError, match=r"max_loss=5: must be a share between 0 and 1, e\.g\. 0\.05 for 5 %"):
        certify(TRAIN, TEST, max_loss=5)


def test_a_check_that_is_stopped_tells_what_it_saw() -> None:
    tokenizer = tokenizer_of("smollm2")
    model = model_facts("m", tokenizer)
    check = DataCheck(ChatSet("a set", [HELLO] * 5, [TWO_TURNS]), Converter(tokenizer, MAX), model, mint_version="1")
    steps = check.steps()
    for _ in range(3):
        next(steps)
    found = check.certificate()
    assert (found.train.rows, found.test.rows, check.total_rows) == (3, 0, 6)
    assert found.is_interrupted and found.verdict == "incomplete"
    assert found.duplicates.train_exact.count == 2


def test_rows_are_read_when_their_turn_comes() -> None:
    class Rows(list[Conversation]):
        def __iter__(self) -> Any:
            raise AssertionError("read as a whole")

    assert certify(Rows([HELLO, TWO_TURNS]), Rows([HELLO])).train.used_rows == 2


@pytest.mark.parametrize(
    ("lengths", "context", "proposed"),
    [
        ([10, 20], None, ProposedLength(256, 0.0)),
        ([10] * 99 + [257], None, ProposedLength(384, 0.0)),
        ([10] * 199 + [257], None, ProposedLength(256, 0.005)),
        ([385], None, ProposedLength(512, 0.0)),
        ([513], None, ProposedLength(768, 0.0)),
        ([769], None, ProposedLength(1024, 0.0)),
        ([3000], 4096, ProposedLength(3072, 0.0)),
        ([3000, 10], 2048, ProposedLength(2048, 0.5)),
        ([10, 20], 128, ProposedLength(128, 0.0)),
    ],
)
def test_the_proposed_length(lengths: list[int], context: int | None, proposed: ProposedLength) -> None:
    assert fitting_length(lengths, 0.01, context) == proposed


def test_the_proposed_length_is_that_of_the_uncut_rows() -> None:
    renderer = get_renderer(tokenizer_of("smollm2"))
    found = propose_max_length(ChatSet("a set", [HELLO] * 5, [LONG]), renderer, "all_assistant")
    longest = certify([], [LONG]).test.lengths
    assert longest is not None and found.longer_share == 0.0
    assert found.max_length == fitting_length([longest.max], 0.01, None).max_length > 256
    with pytest.raises(DataError, match="a set: no row can be read, so no length can be proposed; give --max-length N"):
        propose_max_length(ChatSet("a set", [None], []), renderer, "all_assistant")


def test_the_facts_of_a_model_follow_its_tokenizer_and_template() -> None:
    facts = model_facts("m", tokenizer_of("qwen3"))
    assert facts == model_facts("m", make_tokenizer("qwen3"))
    other_template = model_facts("m", make_tokenizer("qwen3", FAMILIES["qwen3"].eos))
    assert other_template.template_sha256 != facts.template_sha256
    assert (
        other_template.tokenizer_sha256
        == facts.tokenizer_sha256
        != model_facts("m", tokenizer_of("llama3")).tokenizer_sha256
    )
    tokenizer = make_tokenizer("qwen3")
    tokenizer("a text", truncation=True, max_length=2)
    assert model_facts("m", tokenizer) == facts


def test_a_set_whose_rows_are_all_refused_as_too_long_is_told_a_way_out() -> None:
    found = certify([LONG], [LONG], on_overlong="error")
    assert found.train.lengths is None
    with pytest.raises(DataError, match=r"nothing would be trained: .*raise --max-length \(auto proposes a length\)"):
        require_acceptable(found, "here")
