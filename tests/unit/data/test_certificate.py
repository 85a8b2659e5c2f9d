"""The compact form of a certificate, what is said of it, and when data counts as changed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mint.data.certificate import (
    Certificate,
    DroppedRows,
    Lengths,
    ModelFacts,
    RowList,
    SplitCertificate,
    compact_line,
    require_acceptable,
    require_same_data,
)
from mint.data.duplicates import Duplicates
from mint.errors import DataError


def part(sha: str, **changes: Any) -> SplitCertificate:
    found = SplitCertificate(rows_in_set=100, rows=100, used_rows=100, turns=100, tokens=4_000, trained_tokens=1_000)
    return replace(found, lengths=Lengths(30, 50, 60, 70, 90), rendered_sha256=sha, **changes)


def certificate(
    train: SplitCertificate, test: SplitCertificate, *, dataset: str = "chats.jsonl", context: int | None = None
) -> Certificate:
    return Certificate(
        mint_version="1",
        dataset=dataset,
        model=ModelFacts("owner/model", "abc", "1" * 64, "2" * 64, context),
        renderer={"family": "chatml", "date": None},
        rules={"max_length": 80, "train_on": "all_assistant", "on_overlong": "drop"},
        max_loss=0.01,
        is_sample=False,
        is_interrupted=False,
        train=train,
        test=test,
        duplicates=Duplicates(),
    )


def test_the_compact_form_is_small_and_makes_one_line() -> None:
    found = certificate(part("a" * 64), part("b" * 64), dataset="x" * 5_000)
    text = json.dumps(found.compact())
    assert len(text) < 2_000 and json.loads(text)["train"]["rendered_sha256"] == "a" * 64
    line = compact_line(json.loads(json.dumps(certificate(part("a" * 64), part("b" * 64)).compact())))
    assert line == "ok: chats.jsonl, 100 of 100 training rows, 4,000 tokens, 25.0% trained, rendered aaaaaaaaaaaa"


def test_other_data_is_refused_and_named() -> None:
    now = certificate(part("a" * 64), part("b" * 64))
    require_same_data(now.to_json(), now)
    require_same_data(now.compact(), now)
    changed = (
        "data set chats.jsonl: the test rows render to other tokens than when this run began "
        "(bbbbbbbbbbbb, now cccccccccccc)"
    )
    with pytest.raises(DataError) as error:
        require_same_data(now.to_json(), certificate(part("a" * 64), part("c" * 64)))
    assert str(error.value).startswith(changed) and "--data-changed" in str(error.value)
    with pytest.raises(DataError, match="the train and test rows render"):
        require_same_data(now.to_json(), certificate(part("c" * 64), part("c" * 64)))


@pytest.mark.parametrize(
    ("reason", "context", "advice"),
    [
        (
            "overlong",
            None,
            "raise --max-length (the longest row takes 90 tokens; auto proposes a length); shorten the rows; ",
        ),
        ("overlong", 80, "shorten the rows; "),
        ("no_assistant", None, "mend or remove the rows dropped as no_assistant; "),
    ],
)
def test_a_refusal_says_what_can_be_done(reason: str, context: int | None, advice: str) -> None:
    dropped = {reason: DroppedRows("row 1: no", RowList(6, [1, 2, 3, 4, 5, 6]))}
    found = certificate(part("a" * 64, used_rows=94, dropped=dropped), part("b" * 64), context=context)
    with pytest.raises(DataError) as error:
        require_acceptable(found, where="here.json")
    lost = "data set chats.jsonl: 6.00% of the rows would be lost, allowed are 1.00%. "
    assert str(error.value) == f"{lost}{advice}allow it with --max-loss 0.06. All of it: here.json"
    require_acceptable(replace(found, max_loss=0.06), where="here.json")
