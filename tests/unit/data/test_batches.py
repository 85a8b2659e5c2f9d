"""Batches: seeded order, no row twice in a batch, unusable rows replaced, resumable by cursor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.data import Batches, Cursor
from mint.errors import DataError, InputError


def make(rows, batch_size, seed=0, cursor=None, prepare=lambda number, row: [row]):
    return Batches(rows, batch_size, seed, cursor, prepare=prepare)


def take(batches, count):
    return [next(batches) for _ in range(count)]


@given(num_rows=st.integers(1, 40), seed=st.integers(-(2**63), 2**63), data=st.data())
def test_an_epoch_holds_every_row_at_most_once_and_all_but_the_remainder(num_rows, seed, data):
    batch_size = data.draw(st.integers(1, num_rows))
    batches = make(range(num_rows), batch_size, seed)
    for number in range(2):
        epoch = [row for batch in take(batches, batches.batches_per_epoch) for row in batch]
        assert len(set(epoch)) == len(epoch) == num_rows // batch_size * batch_size
        assert batches.cursor == Cursor(number, len(epoch))


@given(stop=st.integers(0, 25))
def test_a_stream_resumed_at_any_cursor_goes_on_as_the_uninterrupted_one(stop):
    usable = lambda number, row: [row] if row % 3 else []  # noqa: E731
    whole = take(make(range(23), 4, seed=5, prepare=usable), 30)
    first = make(range(23), 4, seed=5, prepare=usable)
    taken = take(first, stop)
    resumed = make(range(23), 4, seed=5, cursor=Cursor.from_json(first.cursor.to_json()), prepare=usable)
    assert taken + take(resumed, 30 - stop) == whole


def test_epochs_and_seeds_have_orders_of_their_own():
    batches = make(range(100), 100, seed=1)
    first, second = next(batches), next(batches)
    other = next(make(range(100), 100, seed=2))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(100))
    assert first != second and first != other


def test_a_row_that_cannot_be_used_is_replaced_by_the_next_and_asked_for_by_its_number():
    asked = []

    def prepare(number, row):
        asked.append((number, row))
        return [] if row in "bd" else [row, row.upper()]

    batch = next(make("abcdef", 4, prepare=prepare))
    assert sorted(batch) == sorted("aAcCeEfF")
    assert all("abcdef"[number] == row for number, row in asked)


def test_rows_are_prepared_only_when_their_turn_comes():
    asked = []
    next(make(range(1000), 3, prepare=lambda number, row: asked.append(number) or [row]))
    assert len(asked) == 3


def test_an_epoch_that_fills_no_batch_is_an_error_that_says_so():
    batches = make(range(10), 4, prepare=lambda number, row: [row] if row < 3 else [])
    with pytest.raises(DataError, match="fewer than batch_size=4 of the 10 rows can be used; see the report"):
        next(batches)


def test_the_end_of_an_epoch_that_fills_no_batch_is_passed_over():
    batches = make(range(8), 4, seed=3, prepare=lambda number, row: [row] if row < 5 else [])
    taken = take(batches, 6)
    assert all(sorted(set(batch)) == sorted(batch) and len(batch) == 4 for batch in taken)
    assert batches.cursor.epoch == 5


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_size_that_the_rows_cannot_fill_is_refused(size):
    with pytest.raises(InputError, match=rf"batch_size={size}: must lie in 1\.\.3"):
        make([1, 2, 3], size)


@pytest.mark.parametrize("text", ["", "[]", '{"epoch": "x"}', '{"other": 1}', "3"])
def test_a_cursor_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="data cursor"):
        Cursor.from_json(text)
