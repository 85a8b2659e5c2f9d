"""Which datums share a pass, and which of their tokens it computes: what begins alike is computed once.

Datums of one run that have their first tokens in common (a system prompt, the question of a pair, the prompt of several
answers) share the rows of those tokens: their hidden states are the same numbers, and their gradients add up. Pure
functions of token ids. Shape letter: N tokens of a datum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mint.engine.models.packed_attention import STEP, PackedSequence

TokenIds = npt.NDArray[np.int64]
MIN_SHARED = 16  # with fewer tokens, arranging it costs about what it saves
COPIES_PER_TOKEN = (
    16  # so many places in attention, of queries or of keys and values, count as one token of torch's pass
)


def num_shareable(a_N: TokenIds, b_N: TokenIds) -> int:
    """Of the tokens with which both begin, those that b can take from a: its last one stays its own."""
    length = min(len(a_N), len(b_N) - 1)
    differs = a_N[:length] != b_N[:length]
    found = int(differs.argmax()) if differs.any() else length
    return found if found >= MIN_SHARED else 0


def pack_sequences(tokens: Sequence[TokenIds], first_row: int) -> list[PackedSequence]:
    """Rows of a run's datums from `first_row` on, in order. Each takes the longest beginning that an earlier one has."""
    packed: list[PackedSequence] = []
    keys: list[bytes] = []  # of those packed, sorted: who has most in common with another is beside it
    members: list[int] = []
    row = first_row
    for i, tokens_N in enumerate(tokens):
        key = tokens_N.astype(">u4").tobytes()
        at = bisect_left(keys, key)
        shared, source = 0, 0
        for neighbour in members[max(at - 1, 0) : at + 1]:
            if (found := num_shareable(tokens[neighbour], tokens_N)) > shared:
                shared, source = found, neighbour
        own = np.arange(row, row + len(tokens_N) - shared)
        packed.append(PackedSequence(np.concatenate([packed[source].rows_N[:shared], own]) if shared else own, shared))
        row += len(own)
        keys.insert(at, key)
        members.insert(at, i)
    return packed


def num_copies(length: int, num_shared: int) -> int:
    """What attention holds of a datum beside its own tokens where it shares its beginning: copies of shared keys and values,
    and fillings."""
    if not num_shared:
        return 0
    keys = -(-length // STEP) * STEP
    queries = keys - num_shared // STEP * STEP
    return keys + queries - 2 * (length - num_shared)


def counted_tokens(length: int, num_shared: int, copies_per_token: int = COPIES_PER_TOKEN) -> int:
    """What a datum counts as in a pass: its own tokens, and a part of the copies. That is what they take where every layer is
    recomputed; elsewhere tokens take more and the copies as much, so that the pass needs less than it counts as."""
    return length - num_shared + -(-num_copies(length, num_shared) // copies_per_token)


def split_into_passes(
    lengths: Sequence[int], shared: Sequence[int], max_tokens: int, copies_per_token: int = COPIES_PER_TOKEN
) -> list[tuple[range, int]]:
    """Consecutive datums per pass, at most `max_tokens` as they count together; a longer datum goes alone. With each pass
    what it counts as.

    shared: tokens that each datum can take from the one before it, if both are in one pass. The number of passes is the
    fewest that filling in order allows; then, unless some datum is longer than a pass, the cap is lowered while that
    number holds, so that passes are filled evenly.
    """
    added = [counted_tokens(length, common, copies_per_token) for length, common in zip(lengths, shared, strict=True)]

    def fill(cap: int) -> list[tuple[range, int]]:
        passes, start, total = [], 0, 0
        for i, length in enumerate(lengths):
            if i > start and total + added[i] > cap:
                passes.append((range(start, i), total))
                start, total = i, 0
            total += added[i] if i > start else length
        passes.append((range(start, len(lengths)), total))
        return passes

    best = fill(max_tokens)
    low, high = max(max(lengths), -(-sum(added) // len(best))), max_tokens
    while low < high:  # the smallest cap with the same number of passes
        middle = (low + high) // 2
        if len(fill(middle)) == len(best):
            high = middle
        else:
            low = middle + 1
    return fill(high)
