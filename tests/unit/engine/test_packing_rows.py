"""Which datums share a pass, and in which rows of it their tokens lie."""

from __future__ import annotations

from itertools import accumulate, chain, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mint.engine.packing import MIN_SHARED, counted_tokens, num_shareable, pack_sequences, split_into_passes

# the same examples in every run, and no folder of found ones
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, database=None)
CAPS = st.integers(1, 120)


@st.composite
def datums(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Lengths, and tokens that each has in common with the one before."""
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=24))
    most = [0, *(min(a, b - 1) for a, b in pairwise(lengths))]
    return lengths, [draw(st.integers(MIN_SHARED, n)) if n >= MIN_SHARED and draw(st.booleans()) else 0 for n in most]


def cost(given: tuple[list[int], list[int]], start: int, end: int) -> int:
    """Of a pass of these datums: the first whole, of the others what they do not share."""
    lengths, shared = given
    return lengths[start] + sum(counted_tokens(lengths[i], shared[i]) for i in range(start + 1, end))


def fewest_passes(given: tuple[list[int], list[int]], cap: int) -> int:
    """By dynamic programming over every way to cut: passes of at most `cap`, or of one datum."""
    best = [0]
    for end in range(1, len(given[0]) + 1):
        starts = [s for s in range(end) if s == end - 1 or cost(given, s, end) <= cap]
        best.append(1 + min(best[s] for s in starts))
    return best[-1]


def smallest_largest_pass(given: tuple[list[int], list[int]], num_passes: int) -> int:
    """The least that the largest of `num_passes` consecutive passes can hold."""
    ends = range(1, len(given[0]) + 1)
    best: list[float] = [0, *[float("inf")] * len(ends)]
    for _ in range(num_passes):
        best = [float("inf"), *(min(max(best[s], cost(given, s, end)) for s in range(end)) for end in ends)]
    return int(best[-1])


def test_what_a_datum_counts_as() -> None:
    """Its own tokens, and a sixteenth of the places of copies and fillings, in steps of 32."""
    assert [counted_tokens(length, 0) for length in (1, 17, 1000)] == [1, 17, 1000]
    assert counted_tokens(164, 64) == 100 + -(-((192 - 100) + (128 - 100)) // 16)
    assert counted_tokens(17, 16) == 1 + -(-(31 + 31) // 16)
    assert counted_tokens(1024 + 32, 1024) == 32 + 1024 // 16
    assert all(counted_tokens(length, n) < length for length in range(17, 200) for n in range(MIN_SHARED, length))


@SETTINGS
@given(datums(), CAPS)
def test_passes_hold_every_datum_once_in_order(given: tuple[list[int], list[int]], cap: int) -> None:
    passes = [indices for indices, _ in split_into_passes(*given, cap)]
    assert list(chain.from_iterable(passes)) == list(range(len(given[0])))
    assert all(len(indices) > 0 for indices in passes)


@SETTINGS
@given(datums(), CAPS)
def test_passes_respect_the_cap_and_are_as_few_as_can_be(given: tuple[list[int], list[int]], cap: int) -> None:
    passes = split_into_passes(*given, cap)
    for indices, num_tokens in passes:
        assert num_tokens == cost(given, indices.start, indices.stop)
        assert len(indices) == 1 or num_tokens <= cap
    assert len(passes) == fewest_passes(given, cap)


@SETTINGS
@given(datums(), CAPS)
def test_passes_are_filled_evenly(given: tuple[list[int], list[int]], cap: int) -> None:
    """No other split into as many passes has a smaller largest one (where no datum exceeds the cap)."""
    passes = split_into_passes(*given, max(cap, *given[0]))
    assert max(num_tokens for _, num_tokens in passes) == smallest_largest_pass(given, len(passes))


def common_beginning(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# tokens of two values, so that many begin alike, after one of three long beginnings
TOKENS = st.builds(
    lambda begin, length, rest: [begin + 2] * length + rest,
    st.integers(0, 2),
    st.integers(0, 40),
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
)


@SETTINGS
@given(st.lists(TOKENS, min_size=1, max_size=20), st.integers(0, 50))
def test_every_token_lies_in_a_row_with_its_own_past(tokens: list[list[int]], first_row: int) -> None:
    """A row holds a token and stands for everything before it: all datums that use the row must begin so."""
    sequences = pack_sequences([np.array(t) for t in tokens], first_row)
    pasts: dict[int, list[int]] = {}
    own = []
    for given_tokens, sequence in zip(tokens, sequences, strict=True):
        rows = sequence.rows_N.tolist()
        assert len(rows) == len(given_tokens)
        for i, row in enumerate(rows):
            assert pasts.setdefault(row, given_tokens[: i + 1]) == given_tokens[: i + 1]
        assert all(row in own for row in rows[: sequence.num_shared])
        own += rows[sequence.num_shared :]
    assert own == list(range(first_row, first_row + len(own)))


@SETTINGS
@given(st.lists(TOKENS, min_size=1, max_size=20))
def test_each_datum_shares_the_longest_beginning_there_is(tokens: list[list[int]]) -> None:
    sequences = pack_sequences([np.array(t) for t in tokens], 0)
    for i, sequence in enumerate(sequences):
        most = max((min(common_beginning(t, tokens[i]), len(tokens[i]) - 1) for t in tokens[:i]), default=0)
        assert sequence.num_shared == (most if most >= MIN_SHARED else 0)
        if i:
            assert num_shareable(np.array(tokens[i - 1]), np.array(tokens[i])) <= sequence.num_shared


def test_token_ids_of_every_size_are_told_apart() -> None:
    """Their order decides who is compared: ids of one, two and three bytes."""
    beginnings = [[value] * 20 for value in (255, 256, 65_535, 65_536, 151_935, 1)]
    tokens = [np.array([*begin, last]) for last in (0, 151_935) for begin in beginnings]
    assert [s.num_shared for s in pack_sequences(tokens, 0)] == [0] * 6 + [20] * 6
    lengths = list(accumulate(len(s.rows_N) - s.num_shared for s in pack_sequences(tokens, 0)))
    assert lengths[-1] == 6 * 21 + 6
