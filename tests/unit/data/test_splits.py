"""Held-out rows: chosen by content and seed, never on both sides; splits by the names of files."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.chat import UnusableRow
from mint.data.splits import held_out_split, hold_out, row_hash, split_of, training_split
from mint.errors import DataError


def texts(count):
    return [{"text": f"row {number}"} for number in range(count)]


def keys(rows):
    return Counter(row["text"] for row in rows)


@given(numbers=st.lists(st.integers(0, 30), min_size=2, max_size=60), seed=st.integers(-5, 2**63), order=st.randoms())
def test_membership_depends_on_content_and_seed_alone(numbers, seed, order):
    rows = [{"text": str(number)} for number in numbers]
    if len(set(numbers)) == 1:
        with pytest.raises(DataError, match="all of them equal"):
            hold_out(rows, "x", seed, None)
        return
    try:
        train, test = hold_out(rows, "x", seed, 0.2)
    except DataError:  # the rows whose hash is lowest can be nearly all, where they are equal
        assert max(Counter(numbers).values()) > 1
        return
    assert keys(train) + keys(test) == keys(rows)
    assert not keys(train) & keys(test)
    shuffled = order.sample(rows, len(rows))
    again = hold_out(shuffled, "x", seed, 0.2)
    assert (keys(again[0]), keys(again[1])) == (keys(train), keys(test))


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [
        (2, None, 1),
        (40, None, 4),
        (5000, None, 500),
        (9000, None, 500),
        (40, 0.25, 10),
        (9000, 0.25, 2250),
        (3, 0.01, 1),
    ],
)
def test_as_many_as_asked_for_are_held_out(count, fraction, held_out):
    train, test = hold_out(texts(count), "x", 0, fraction)
    assert (len(train), len(test)) == (count - held_out, held_out)


def test_rows_stay_in_the_order_of_the_file_and_seeds_choose_others():
    rows = texts(50)
    train, test = hold_out(rows, "x", 1, None)
    assert list(train) == [row for row in rows if row not in list(test)]
    assert list(hold_out(rows, "x", 2, None)[1]) != list(test)


def test_a_new_row_moves_at_most_one_other():
    rows = texts(400)
    before = keys(hold_out(rows, "x", 0, 0.1)[1])
    after = keys(hold_out([*rows, {"text": "new"}], "x", 0, 0.1)[1])
    assert len(before - after) <= 1 and len(after - before) <= 1


def test_equal_content_has_equal_hashes_however_it_is_written():
    row = [{"role": "user", "content": "q"}]
    assert row_hash(row, 0) == row_hash([{"content": "q", "role": "user", "tool_calls": None}], 0)
    assert row_hash(row, 0) != row_hash(row, 1)
    assert row_hash(row, 0) != row_hash([{"role": "user", "content": "q "}], 0)
    assert row_hash({"text": "\ud800"}, 0) != row_hash({"text": "\ud801"}, 0)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        *[("data/train-00000-of-00003.parquet", "train"), ("data/test_sft-00000-of-00001-ab12.parquet", "test_sft")],
        *[("test.jsonl", "test"), ("en/validation/0000.parquet", "validation"), ("alpaca_train.json.gz", "train")],
        *[("chats.jsonl", "train"), ("contest.jsonl", "train"), ("latest.jsonl", "train"), ("train/test.csv", "test")],
    ],
)
def test_splits_are_read_from_paths(path, split):
    assert split_of(path) == split


def test_which_split_is_trained_and_which_evaluates_it():
    assert training_split(["test", "train"], None, "x") == "train"
    assert training_split(["test"], None, "x") == "test"
    assert training_split(["test", "chats"], None, "x") == "chats"
    assert training_split(["train", "validation"], "validation", "x") == "validation"
    assert held_out_split(["train", "validation", "test"], "train") == "test"
    assert held_out_split(["train_sft", "test_gen", "test_sft"], "train_sft") == "test_sft"
    assert held_out_split(["train", "test_sft"], "train") is None
    assert held_out_split(["test", "validation"], "validation") is None
    with pytest.raises(DataError, match=r"x has the splits train_gen, train_sft; name one of them, e\.g\. x:train_gen"):
        training_split(["train_sft", "train_gen"], None, "x")
    with pytest.raises(DataError, match=r"x has the splits train, no 'dev'; name one of them"):
        training_split(["train"], "dev", "x")


def test_random_is_not_used():
    state = random.getstate()
    hold_out(texts(20), "x", 0, None)
    assert random.getstate() == state


def test_rows_that_cannot_be_read_are_not_held_out():
    rows = [UnusableRow(f"row {i}") for i in range(5)] + texts(20)
    _, test = hold_out(rows, "x", 0, 0.2)
    assert len(test) == 5 and not any(isinstance(row, UnusableRow) for row in test)
