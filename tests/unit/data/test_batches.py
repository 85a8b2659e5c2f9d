"""Batches: seeded order, no row twice in a batch, resumable by cursor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.data import Batches, Cursor
from mint.errors import InputError


def take(batches, count):
    return [next(batches) for _ in range(count)]


@given(num_rows=st.integers(1, 40), seed=st.integers(-(2**63), 2**63), data=st.data())
def test_an_epoch_holds_every_row_at_most_once_and_all_but_the_remainder(num_rows, seed, data):
    batch_size = data.draw(st.integers(1, num_rows))
    batches = Batches(range(num_rows), batch_size, seed)
    for _ in range(2):
        epoch = [row for batch in take(batches, batches.batches_per_epoch) for row in batch]
        assert len(set(epoch)) == len(epoch) == num_rows - batches.left_out
    assert batches.cursor == Cursor(2, 0)


@given(stop=st.integers(0, 25))
def test_a_stream_resumed_at_any_cursor_goes_on_as_the_uninterrupted_one(stop):
    whole = take(Batches(range(23), 4, seed=5), 30)
    first = Batches(range(23), 4, seed=5)
    taken = take(first, stop)
    resumed = Batches(range(23), 4, seed=5, cursor=Cursor.from_json(first.cursor.to_json()))
    assert taken + take(resumed, 30 - stop) == whole


def test_epochs_and_seeds_have_orders_of_their_own():
    batches = Batches(range(100), 100, seed=1)
    first, second = next(batches), next(batches)
    other = next(Batches(range(100), 100, seed=2))
    assert sorted(first) == sorted(second) == sorted(other) == list(range(100))
    assert first != second and first != other


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_size_that_the_rows_cannot_fill_is_refused(size):
    with pytest.raises(InputError, match=rf"batch_size={size}: must lie in 1\.\.3"):
        Batches([1, 2, 3], size)


@pytest.mark.parametrize("text", ["", "[]", '{"epoch": "x"}', '{"other": 1}', "3"])
def test_a_cursor_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="data cursor"):
        Cursor.from_json(text)
