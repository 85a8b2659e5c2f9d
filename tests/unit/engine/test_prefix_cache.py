"""The prefix cache: what it finds, what it forgets first, and what it never holds."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from mint.engine.sampling.cache import PrefixCache

SIZE = 4
EACH = SIZE * 2 * 4  # bytes of a block: one layer, keys and values of one head of one float32


def keys_values(tokens: tuple[int, ...]) -> Tensor:
    """Of every position the sum of the tokens up to it: what precedes decides, as in a model."""
    sums = torch.tensor(tokens, dtype=torch.float32).cumsum(0)
    return torch.stack([sums, -sums])[None, :, None, :, None]


def put(cache: PrefixCache, tokens: tuple[int, ...], adapter: int | None = None) -> None:
    cache.put(adapter, tokens, SIZE, keys_values(tokens))


def found(cache: PrefixCache, tokens: tuple[int, ...], adapter: int | None = None) -> int:
    """Positions; their keys and values are checked."""
    blocks = cache.find(adapter, tokens, SIZE)
    count = SIZE * len(blocks)
    if blocks:
        assert torch.equal(torch.cat(blocks, 3), keys_values(tokens)[:, :, :, :count])
    return count


def test_whole_blocks_of_the_same_beginning_are_found() -> None:
    cache = PrefixCache(100 * EACH)
    put(cache, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
    assert cache.num_bytes() == 2 * EACH
    assert found(cache, (1, 2, 3, 4, 5, 6, 7, 8, 9)) == 8
    assert found(cache, (1, 2, 3, 4, 5, 6, 7, 8)) == 4  # never the last token
    assert found(cache, (1, 2, 3, 4, 5, 6, 0, 8, 9)) == 4
    assert found(cache, (5, 6, 7, 8, 9)) == 0  # a block counts only after the same beginning
    assert found(cache, (0, 2, 3, 4, 5, 6, 7, 8, 9)) == 0
    assert found(cache, (1, 2, 3, 4, 5), adapter=3) == 0
    put(cache, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12))
    assert cache.num_bytes() == 3 * EACH


def test_an_adapter_is_forgotten_alone() -> None:
    cache = PrefixCache(100 * EACH)
    for adapter in (None, 0, 1):
        put(cache, (1, 2, 3, 4, 5, 6, 7, 8), adapter)
    cache.forget_adapter(0)
    assert cache.num_bytes() == 4 * EACH
    assert [found(cache, (1, 2, 3, 4, 5, 6, 7, 8, 9), adapter) for adapter in (None, 0, 1)] == [8, 0, 8]


def test_the_end_of_what_was_used_longest_ago_goes_first() -> None:
    cache = PrefixCache(4 * EACH)
    old, new = tuple(range(8)), tuple(range(10, 18))
    put(cache, old)
    put(cache, new)
    assert found(cache, (*old, 0)) == 8  # now `new` is the older one
    put(cache, (90, 91, 92, 93))
    assert found(cache, (*new, 0)) == 4
    assert found(cache, (*old, 0)) == 8


def test_a_prompt_that_has_no_room_keeps_its_beginning() -> None:
    """If its own blocks pushed one another out, a prompt longer than the cache would never be found."""
    cache = PrefixCache(3 * EACH)
    tokens = tuple(range(40))
    for _ in range(2):
        put(cache, tokens)
        assert found(cache, tokens) == 12
    put(PrefixCache(EACH - 1), tokens)
    assert found(PrefixCache(0), tokens) == 0


def test_memory_stays_bounded_and_every_block_can_be_reached() -> None:
    """Over random prompts that branch: a block whose beginning is gone would take memory for nothing."""
    chance = random.Random(0)
    cache = PrefixCache(20 * EACH)
    for _ in range(2000):
        tokens = tuple(chance.randrange(2) for _ in range(chance.randrange(1, 40)))
        adapter = chance.choice([None, 0, 1])
        known = found(cache, tokens, adapter)
        if chance.random() < 0.7:
            put(cache, tokens, adapter)
            assert found(cache, (*tokens, 9), adapter) >= known
        if chance.random() < 0.01:
            cache.forget_adapter(0)
        assert cache.num_bytes() == EACH * len(cache._blocks) <= 20 * EACH
        numbers = {block.number for block in cache._blocks.values()}
        assert all(before == 0 or before in numbers for _, before, _ in cache._blocks)
