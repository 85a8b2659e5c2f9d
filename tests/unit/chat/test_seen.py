"""Sets of row numbers and digests against Python's own."""

from __future__ import annotations

import hashlib
import random

import pytest

from mint.chat.seen import SeenDigests, SeenNumbers


@pytest.mark.parametrize("highest", [20, 5_000])
def test_numbers_are_new_once(highest: int) -> None:
    seen, known = SeenNumbers(), set()
    for number in random.Random(0).choices(range(highest), k=4_000):
        assert seen.add(number) == (number not in known)
        known.add(number)


def test_digests_are_new_once_while_the_table_grows() -> None:
    digests = [hashlib.blake2b(bytes([n % 256, n // 256]), digest_size=16).digest() for n in range(3_000)]
    digests += [bytes(16), (1).to_bytes(8, "big") + bytes(8)]
    seen, known = SeenDigests(), set()
    for digest in random.Random(0).choices(digests, k=9_000):
        assert seen.add(digest) == (digest not in known)
        known.add(digest)


def test_digests_that_meet_at_one_place_are_kept_apart() -> None:
    """1,024 places at first: these all belong to the last one, and run on from the first."""
    digests = [(1023 + 1024 * n).to_bytes(16, "little") for n in range(50)]
    seen = SeenDigests()
    assert [seen.add(digest) for digest in digests * 2] == [True] * 50 + [False] * 50
