from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.chat import shift
from mint.errors import InputError


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from([0.0, 1.0, 0.5, -2.0])), min_size=2, max_size=30))
def test_shift_equals_brute_force(pairs: list[tuple[int, float]]) -> None:
    tokens, weights = [token for token, _ in pairs], [weight for _, weight in pairs]
    inputs, targets, target_weights = shift(tokens, weights)
    assert len(inputs) == len(targets) == len(target_weights) == len(tokens) - 1
    for position in range(len(tokens) - 1):
        assert inputs[position] == tokens[position]
        assert targets[position] == tokens[position + 1]
        assert target_weights[position] == weights[position + 1]


@given(st.integers(2, 20), st.data())
def test_the_token_that_is_weighted_is_the_one_that_is_predicted(length: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(1, length - 1))
    tokens = list(range(100, 100 + length))
    _, targets, target_weights = shift(tokens, [float(i == place) for i in range(length)])
    assert [target for target, weight in zip(targets, target_weights, strict=True) if weight] == [tokens[place]]


def test_shift_refuses_unequal_lengths_and_a_single_token() -> None:
    with pytest.raises(InputError, match="3 tokens but 2 weights; expected one weight per token"):
        shift([1, 2, 3], [0.0, 1.0])
    with pytest.raises(InputError, match=r"got 1 token\(s\); next-token prediction needs at least 2"):
        shift([1], [1.0])
