"""Mixtures: how they are written, exact shares, no row twice, every row traced back."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint.data import origin
from mint.data.mixtures import Part, mix, parse_part, row_counts, shares
from mint.data.rows import ChosenRows, JoinedRows, NamedRows
from mint.errors import InputError


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a.jsonl", Part("a.jsonl")),
        ("a.jsonl=0.3", Part("a.jsonl", Fraction(3, 10))),
        ("a=2", Part("a", Fraction(2))),
        ("a=2=1", Part("a=2", Fraction(1))),
        ("x=y.jsonl", Part("x=y.jsonl")),
        ("https://h/a.jsonl?v=x=.5", Part("https://h/a.jsonl?v=x", Fraction(1, 2))),
    ],
)
def test_parts_are_written_as_name_and_share(text, part):
    assert parse_part(text) == part


@pytest.mark.parametrize("text", ["a=0", "a=0.0", "=1"])
def test_a_share_of_nothing_is_refused(text):
    with pytest.raises(InputError, match="expected NAME or NAME=SHARE with a share above 0"):
        parse_part(text)


def test_shares_add_up_to_one():
    one, third = Fraction(1), Fraction(1, 3)
    assert shares([Part("a"), Part("b")], [30, 10]) == [Fraction(3, 4), Fraction(1, 4)]
    assert shares([Part("a", one * 3), Part("b", one)], [5, 5]) == [Fraction(3, 4), Fraction(1, 4)]
    assert shares([Part("a"), Part("b", third), Part("c")], [30, 9, 10]) == [Fraction(1, 2), third, Fraction(1, 6)]
    with pytest.raises(InputError, match=r"add up to 1.5, so nothing is left for a; give every data set a share"):
        shares([Part("a"), Part("b", one), Part("c", one / 2)], [1, 1, 1])


@given(data=st.data(), count=st.integers(1, 4))
def test_a_mixture_keeps_its_shares_repeats_no_row_and_is_as_large_as_it_can_be(data, count):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    parts = [Part(str(i), Fraction(weight)) for i, weight in enumerate(weights)]
    wanted = shares(parts, sizes)
    counts = row_counts(wanted, sizes)
    assert all(1 <= taken <= size for taken, size in zip(counts, sizes, strict=True))
    total = min(int(size / share) for size, share in zip(sizes, wanted, strict=True))
    assert all(abs(taken - total * share) < 1 or taken == 1 for taken, share in zip(counts, wanted, strict=True))

    rows = [[(which, number) for number in range(size)] for which, size in enumerate(sizes)]
    mixed = mix(parts, rows, seed=3)
    assert Counter(which for which, _ in mixed) == Counter(dict(enumerate(counts)))
    assert len(set(mixed)) == len(mixed)
    assert list(mix(parts, rows, seed=3)) == list(mixed)


def test_without_shares_every_row_is_there_once_in_an_order_of_the_seed():
    rows = [[f"{name}{number}" for number in range(20)] for name in "ab"]
    mixed, other = (mix([Part("a"), Part("b")], rows, seed) for seed in (0, 1))
    assert sorted(mixed) == sorted(other) == sorted(rows[0] + rows[1])
    assert list(mixed) != list(other)


def test_every_row_of_a_mixture_is_traced_to_its_set_and_number():
    rows = [NamedRows(name, [(name, number) for number in range(9)]) for name in ("a", "b")]
    mixed = mix([Part("a", Fraction(1)), Part("b", Fraction(2))], rows, seed=0)
    for view in (mixed, mixed[2:7], ChosenRows(mixed, [0, 3])):
        for number in range(len(view)):
            name, position = view[number]
            assert origin(view, number) == f"{name}, row {position}"
    assert origin([1, 2], 1) == "row 1"


def test_joined_rows_are_a_sequence_like_a_list():
    whole = [0, 1, 2, 3, 4]
    joined = JoinedRows([[0, 1], [], [2], [3, 4]])
    assert list(joined) == whole and joined[-1] == 4 and list(joined[1:4]) == whole[1:4]
    assert list(joined[::-2]) == whole[::-2]
    for number in (5, -6):
        with pytest.raises(IndexError):
            joined[number]


def test_an_empty_part_is_refused():
    with pytest.raises(InputError, match="b: no rows to mix"):
        mix([Part("a"), Part("b")], [[1], []], 0)
