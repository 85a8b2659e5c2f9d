"""Traps of measuring: numbers that look comparable and are not, and rows that are seen twice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import mint
from mint.chat import Converter, convert_conversations, get_renderer
from mint.data import load_chat_set
from mint.recipes import EvaluationSet, evaluation_set, measure
from mint.recipes.evaluation import comparison
from tests.traps.reading import answer_nll, plain_ids
from tests.unit.chat.conversations import HELLO, THREE_TURNS, TWO_TURNS, chat
from tests.unit.chat.tiny_tokenizers import tokenizer_of

MAX = 500
ROWS = [THREE_TURNS, HELLO, TWO_TURNS]
ANSWERS = [[message["content"] for message in row if message["role"] == "assistant"] for row in ROWS]


def held_out(tokenizer: Any, rows: Any = ROWS, **options: Any) -> EvaluationSet:
    converter = Converter(get_renderer(tokenizer, **options), MAX)
    return evaluation_set([converter(number, row) for number, row in enumerate(rows)], tokenizer)


def test_trap_21_nll_is_over_content_and_end_of_turn_alone(run: mint.TrainingClient, tiny_model: str) -> None:
    """Scaffold would make it look lower, datums as rows would weigh conversations by the template: neither happens."""
    tokenizer = run.get_tokenizer()
    renderer = get_renderer(tokenizer)
    data = held_out(tokenizer)
    found = measure(run.forward(data.datums).result(), data)
    stop = renderer.stop_token_ids[0]
    nlls, counts = [], []
    for row in ROWS:
        turns = [turn for turn, message in enumerate(row) if message["role"] == "assistant"]
        written = [[*plain_ids(tokenizer, row[turn]["content"]), stop] for turn in turns]
        nlls.append(
            sum(
                answer_nll(tiny_model, renderer.prompt(row[:turn]), ids)
                for turn, ids in zip(turns, written, strict=True)
            )
        )
        counts.append(sum(map(len, written)))
    assert (found.rows, found.tokens) == (len(ROWS), sum(counts))
    assert len(data.datums) > found.rows  # a datum is no row here
    assert found.nll == pytest.approx(sum(nlls) / sum(counts), rel=1e-5)
    assert found.row_mean_nll == pytest.approx(
        sum(nll / count for nll, count in zip(nlls, counts, strict=True)) / len(ROWS), rel=1e-5
    )
    num_bytes = sum(len(text.encode()) for row in ANSWERS for text in row)
    assert found.bits_per_byte == pytest.approx(sum(nlls) / math.log(2) / num_bytes, rel=1e-5)


def test_trap_21_bytes_do_not_depend_on_the_tokenizer_or_template(family: str, tokenizer: Any) -> None:
    data = held_out(tokenizer)
    assert data.bytes == sum(len(text.encode()) for row in ANSWERS for text in row)


def test_trap_21_numbers_of_other_tokens_are_not_compared(run: mint.TrainingClient) -> None:
    """The same rows give the same tokens and numbers; with one row less there is nothing to compare."""
    tokenizer = run.get_tokenizer()
    sets = [held_out(tokenizer), held_out(tokenizer), held_out(tokenizer, rows=ROWS[1:])]
    found = [measure(run.forward(data.datums).result(), data) for data in sets]
    assert found[0] == found[1]
    assert " -> " in comparison(found[0], found[1])
    other = comparison(found[0], found[2])
    assert " -> " not in other and "other tokens were measured" in other


def test_trap_22_held_out_rows_are_never_trained_and_their_tokens_have_a_name(tmp_path: Path) -> None:
    rows = [chat(f"Question {i}?", f"Answer {i}.") for i in range(40)]
    path = tmp_path / "chats.jsonl"

    def load(written: list[Any]) -> tuple[set[str], set[str], str]:
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in written))
        chats = load_chat_set(str(path), seed=1)
        train, test = ({json.dumps(row) for row in part} for part in (chats.train, chats.test))
        return train, test, held_out(tokenizer_of("qwen3"), chats.test).rendered_hash

    train, test, name = load(rows)
    assert len(test) == 4 and not train & test and len(train | test) == 40
    assert load(rows) == (train, test, name)
    changed = [json.loads(json.dumps(row).replace("Answer", "Reply")) for row in rows]
    assert load(changed)[2] != name


def test_trap_28_duplicates_are_counted(smollm2: Any) -> None:
    """The same messages are the same row, in whatever order their keys come and whatever else they carry."""
    again = [{"content": message["content"], "role": message["role"], "id": 7} for message in HELLO]
    _, report = convert_conversations([HELLO, TWO_TURNS, again, HELLO, chat("Hello!", "Hi.")], smollm2, MAX)
    assert (report.rows, report.duplicate_rows) == (5, 2)
    assert "exact duplicates        2" in str(report)
