"""Orders of epochs: every row once; with a shuffle buffer, no row far from its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.data import Batches, Cursor
from mint.data.orders import epoch_order
from mint.errors import InputError


@given(num_rows=st.integers(0, 60), seed=st.integers(0, 2**64), epoch=st.integers(0, 9), block=st.integers(1, 70))
def test_an_order_of_blocks_is_a_permutation_that_moves_no_row_by_a_block(num_rows, seed, epoch, block):
    order = epoch_order(num_rows, seed, epoch, block)
    numbers = [int(order[position]) for position in range(len(order))]
    assert sorted(numbers) == list(range(num_rows))
    assert all(abs(number - position) < block for position, number in enumerate(numbers))
    backwards = epoch_order(num_rows, seed, epoch, block)
    assert [backwards[position] for position in reversed(range(num_rows))] == numbers[::-1]


def test_epochs_seeds_and_blocks_are_shuffled_differently():
    orders = [epoch_order(400, seed, epoch, 100) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    numbers = [[int(order[position]) for position in range(400)] for order in orders]
    assert numbers[0] != numbers[1] and numbers[0] != numbers[2]
    shift = next(i for i in range(1, 101) if sorted(numbers[0][:i]) == list(range(i)))
    first, second = ([n - shift - start for n in numbers[0][shift + start :][:100]] for start in (0, 100))
    assert sorted(first) == sorted(second) == list(range(100)) and first != second


def test_a_position_outside_and_a_buffer_of_nothing_are_refused():
    with pytest.raises(IndexError, match="position 5 of 5"):
        epoch_order(5, 0, 0, 2)[5]
    with pytest.raises(InputError, match="shuffle_buffer=0: must be at least 1"):
        Batches(range(9), 2, shuffle_buffer=0)


@given(stop=st.integers(0, 25), block=st.integers(1, 30))
def test_batches_with_a_buffer_resume_at_any_cursor(stop, block):
    def make(cursor=None):
        return Batches(range(23), 4, 5, cursor, prepare=lambda n, row: [row] if row % 3 else [], shuffle_buffer=block)

    uninterrupted, first = make(), make()
    whole = [next(uninterrupted) for _ in range(30)]
    taken = [next(first) for _ in range(stop)]
    resumed = make(Cursor.from_json(first.cursor.to_json()))
    assert taken + [next(resumed) for _ in range(30 - stop)] == whole
