"""Duplicates: the similarity against Python's sets, the search against all pairs, what is listed where."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from typing import Any

import numpy as np
import pytest

from mint.data import duplicates
from mint.data.duplicates import (
    BANDS,
    MINIMA,
    DuplicateFinder,
    Duplicates,
    Pair,
    band_hashes,
    candidates,
    jaccard,
    shingles,
)

WORDS = [f"w{number}" for number in range(2_000)]


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def digest(row: Any) -> bytes:
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=16).digest()


def find(train: list[Any], test: list[Any] | None = None) -> Duplicates:
    sides = {"train": train, "test": test or []}
    finder = DuplicateFinder()
    for side, rows in sides.items():
        for number, row in enumerate(rows):
            finder.add(side, number, row, digest(row))  # type: ignore[arg-type]
    return finder.find(lambda side, number: sides[side][number])


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return set(zip(words, words[1:], words[2:], strict=False))


def changed(text: str, count: int, source: random.Random) -> str:
    words = text.split()
    for place in source.sample(range(len(words)), count):
        words[place] = "changed"
    return " ".join(words)


def test_similarity_is_that_of_the_sets_of_word_triples() -> None:
    source = random.Random(0)
    for count in (0, 1, 5, 20):
        one = " ".join(source.choices(WORDS[:30], k=80))
        other = changed(one, count, source)
        expected = len(triples(one) & triples(other)) / len(triples(one) | triples(other))
        assert jaccard(shingles(say(one)), shingles(say(other))) == expected
        assert len(shingles(say(one))) == len(triples(one))


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (say("Hello, THERE my friend!"), say("hello there  my (friend)")),
        (say("only two"), {"text": "Only two."}),
        (say("a b c d"), [{"role": "system", "content": "Be short."}, *say("a b c d")]),
        (say("a b c d"), {"messages": say("a b c d"), "tools": []}),
        (say("a b c d"), [*say("a b"), {"role": "assistant", "content": "c d"}]),
        (say("天気はいい"), say("天 気 は い い")),
    ],
    ids=["case and punctuation", "plain text", "system text", "with tools", "roles", "no spaces"],
)
def test_rows_that_say_the_same_have_the_same_shingles(row: Any, same: Any) -> None:
    assert len(shingles(row)) and shingles(row).tolist() == shingles(same).tolist()


def test_rows_of_any_other_form_have_no_shingles_or_those_of_their_text() -> None:
    for row in (None, 7, [], [None], {}, {"messages": None}, say("..."), [{"role": "user"}]):
        assert shingles(row).tolist() == []
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "get weather"}}]}]
    assert shingles(call).tolist() != shingles(say("")).tolist()


def test_bands_agree_as_often_as_the_similarity_says() -> None:
    """Of 300 pairs with 16 bands each; five standard deviations, false alarm 6e-7 were the texts drawn anew."""
    source, agreeing, expected = random.Random(1), 0, 0.0
    for _ in range(300):
        one = " ".join(source.choices(WORDS, k=100))
        pair = [shingles(say(text)) for text in (one, changed(one, 4, source))]
        agreeing += int((band_hashes(pair[0]) == band_hashes(pair[1])).sum())
        expected += BANDS * jaccard(*pair) ** MINIMA
    assert abs(agreeing - expected) < 5 * (300 * BANDS * 0.25) ** 0.5


def test_long_rows_are_hashed_in_parts_to_the_same_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = shingles(say(" ".join(random.Random(2).choices(WORDS, k=500))))
    whole = band_hashes(hashes)
    monkeypatch.setattr(duplicates, "_AT_ONCE", 7)
    assert band_hashes(hashes).tolist() == whole.tolist()


def test_candidates_are_the_rows_that_agree_in_a_band() -> None:
    bands = np.arange(6 * BANDS, dtype=np.uint32).reshape(6, BANDS)
    bands[[1, 3, 4], 2] = 7  # three agree in band 2
    bands[[0, 3], 5] = 9
    bands[[2, 5], 0] = 3  # of which 2 is not chosen
    chosen = np.array([0, 1, 3, 4, 5])
    assert candidates(bands, chosen).tolist() == [[3, 0], [3, 1], [4, 1], [4, 3]]


def test_exact_duplicates_are_listed_with_the_earliest_equal_row() -> None:
    a, b, c = say("the first of the rows"), say("quite another one here"), say("the third thing said")
    found = find([a, b, a, a], [c, b, c, b])
    assert found.train_exact.first == [Pair(2, 0, 1.0), Pair(3, 0, 1.0)] and found.train_exact.count == 2
    assert found.overlap_exact.first == [Pair(1, 1, 1.0), Pair(3, 1, 1.0)]
    assert found.test_exact.first == [Pair(2, 0, 1.0)]
    assert (found.train_near.count, found.test_near.count, found.overlap_near.count) == (0, 0, 0)


def test_near_duplicates_are_those_of_a_search_through_all_pairs() -> None:
    source = random.Random(3)
    texts = [" ".join(source.choices(WORDS, k=120)) for _ in range(30)]
    texts += [changed(text, count, source) for text in texts for count in (1, 3, 6, 15)]
    rows = [say(text) for text in texts]
    sets = [triples(text) for text in texts]
    expected = {
        late
        for early, late in itertools.combinations(range(len(rows)), 2)
        if len(sets[early] & sets[late]) / len(sets[early] | sets[late]) >= duplicates.NEAR
    }
    found = find(rows)
    assert len(expected) > 50
    assert found.train_near.count == len(expected) and {pair.row for pair in found.train_near.first} <= expected
    for pair in found.train_near.first:
        one, other = sets[pair.row], sets[pair.of]
        assert pair.of < pair.row and pair.similarity == round(len(one & other) / len(one | other), 4)


def test_a_test_row_near_a_training_row_is_overlap() -> None:
    source = random.Random(4)
    texts = [" ".join(source.choices(WORDS, k=200)) for _ in range(2)]
    train = [say(text) for text in texts]
    test = [
        say(changed(texts[1], 1, source)),
        say("something else altogether, really"),
        say(changed(texts[1], 2, source)),
    ]
    found = find(train, test)
    assert [(pair.row, pair.of) for pair in found.overlap_near.first] == [(0, 1), (2, 1)]
    assert (found.test_near.count, found.train_near.count, found.overlap_exact.count) == (0, 0, 0)


def test_rows_are_read_again_in_their_order_and_once_also_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_IN_MEMORY", 1_000)
    source = random.Random(5)
    texts = [" ".join(source.choices(WORDS, k=100)) for _ in range(20)]
    sides = {"train": [say(text) for text in texts], "test": [say(changed(text, 1, source)) for text in texts[::-1]]}
    sides["train"].append(say("something of its own"))
    finder, read = DuplicateFinder(), []
    for side, rows in sides.items():
        for number, row in enumerate(rows):
            finder.add(side, number, row, digest([side, row]))  # type: ignore[arg-type]
    found = finder.find(lambda side, number: (read.append((side, number)), sides[side][number])[1])
    assert [(pair.row, pair.of) for pair in found.overlap_near.first] == [(number, 19 - number) for number in range(20)]
    assert read == [(side, number) for side in ("train", "test") for number in range(20)]


def test_lists_are_bounded_and_so_are_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(WORDS[:300])
    rows = [say(f"{text} {WORDS[300 + number]}") for number in range(140)]
    found = find([*rows, *rows])
    assert found.train_exact.count == 140 and len(found.train_exact.first) == duplicates.LISTED_PAIRS
    assert found.train_near.count == 139 and found.uncompared == 0
    monkeypatch.setattr(duplicates, "MAX_COMPARISONS", 50)
    found = find(rows)
    assert 0 < found.train_near.count <= 50 and found.uncompared > 0


def test_no_rows_have_no_duplicates() -> None:
    assert find([]) == Duplicates()
