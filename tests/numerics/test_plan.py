"""How datums are split into passes, how large a pass may be, and whether a pass needs the memory that was planned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint import types
from mint.engine.models.config import DecoderConfig
from mint.engine.models.weights import read_config
from mint.engine.plan import (
    BEST_TOKENS_PER_PASS,
    MIN_TOKENS_PER_PASS,
    PassMemory,
    make_plan,
    split_into_passes,
)
from mint.errors import InputError
from tests.numerics import memory_child
from tests.support.engine import open_backend, run_child

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)
CAPS = st.integers(1, 120)
# the same examples in every run, and no folder of found ones
SETTINGS = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def fewest_passes(lengths: list[int], cap: int) -> int:
    """By dynamic programming over every way to cut: passes of at most `cap`, or of one datum."""
    best = [0]
    for end in range(1, len(lengths) + 1):
        starts = [s for s in range(end) if s == end - 1 or sum(lengths[s:end]) <= cap]
        best.append(1 + min(best[s] for s in starts))
    return best[-1]


def smallest_largest_pass(lengths: list[int], num_passes: int) -> int:
    """The least that the largest of `num_passes` consecutive passes can hold."""
    totals = [0, *accumulate(lengths)]
    best: list[float] = [0, *[float("inf")] * len(lengths)]
    for _ in range(num_passes):
        best = [
            float("inf"),
            *(min(max(best[s], totals[end] - totals[s]) for s in range(end)) for end in range(1, len(totals))),
        ]
    return int(best[-1])


@SETTINGS
@given(LENGTHS, CAPS)
def test_passes_hold_every_datum_once_in_order(lengths: list[int], cap: int) -> None:
    passes = split_into_passes(lengths, cap)
    assert list(chain.from_iterable(passes)) == list(range(len(lengths)))
    assert all(len(p) > 0 for p in passes)
    assert all(a.stop == b.start for a, b in pairwise(passes))


@SETTINGS
@given(LENGTHS, CAPS)
def test_passes_respect_the_cap_and_are_as_few_as_can_be(lengths: list[int], cap: int) -> None:
    passes = split_into_passes(lengths, cap)
    for indices in passes:
        assert len(indices) == 1 or sum(lengths[i] for i in indices) <= cap
    assert len(passes) == fewest_passes(lengths, cap)


@SETTINGS
@given(LENGTHS, CAPS)
def test_passes_are_filled_evenly(lengths: list[int], cap: int) -> None:
    """No other split into as many passes has a smaller largest one (where no datum exceeds the cap)."""
    cap = max(cap, *lengths)
    passes = split_into_passes(lengths, cap)
    assert max(sum(lengths[i] for i in p) for p in passes) == smallest_largest_pass(lengths, len(passes))


@pytest.fixture
def config(tiny: Callable[..., Path]) -> DecoderConfig:
    return read_config(tiny("llama", context=100_000))


def test_more_memory_never_allows_less(config: DecoderConfig) -> None:
    plans = [make_plan(PassMemory(config, 4), mebibytes * 2**20) for mebibytes in range(200, 4000, 50)]
    for small, large in pairwise(plans):
        assert small.max_tokens <= large.max_tokens
        assert small.max_tokens_per_pass <= large.max_tokens_per_pass
    assert len({plan.max_tokens for plan in plans}) > 10
    assert plans[-1].max_tokens_per_pass == BEST_TOKENS_PER_PASS
    assert make_plan(PassMemory(config, 4), 2**60).max_tokens == config.max_context


def test_half_the_element_size_allows_more(config: DecoderConfig) -> None:
    assert make_plan(PassMemory(config, 2), 2**30).max_tokens > make_plan(PassMemory(config, 4), 2**30).max_tokens


def test_too_little_memory_is_refused_with_numbers(config: DecoderConfig) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(PassMemory(config, 4), 2**20)
    text = str(caught.value)
    assert "0.0 GiB beside the base model hold a training pass of 0 tokens" in text
    assert f"at least {MIN_TOKENS_PER_PASS} are needed" in text
    assert "Take a smaller base model or a machine with more memory" in text


def test_an_asked_size_wins_but_not_over_memory(config: DecoderConfig) -> None:
    assert make_plan(PassMemory(config, 4), 2**30, 10).max_tokens_per_pass == 10
    assert make_plan(PassMemory(config, 4), 2**30, 4096).max_tokens_per_pass == 4096
    plan = make_plan(PassMemory(config, 4), 2**28, 10**9)
    assert plan.max_tokens_per_pass == plan.max_tokens < 10**9


def test_a_run_reports_its_plan(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"), max_tokens_per_pass=77)
    plan = backend.add_run("run", types.LoraConfig(rank=1), 0).plan
    assert (plan.max_tokens_per_pass, plan.max_tokens) == (77, backend.limits.max_context)
    assert (plan.dtype, plan.num_threads, plan.torch_version) == ("float32", 1, backend.limits.torch_version)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_needs_the_memory_planned_for_it(
    tiny: Callable[..., Path], dtype: str, record_property: Callable[[str, object], None]
) -> None:
    """Growth of a process's resident memory over a pass of 1,536 tokens, some hundred MiB, against the plan.

    At most 4/3 of it: the plan leaves a quarter of the machine's memory free, so that much stays within the limit (bf16
    kernels keep code and scratch per shape, 20 to 70 MiB, which the plan does not count). At least half: a plan that is
    twice too large would refuse texts that fit.
    """
    folder = tiny("llama", hidden=256, layers=20, intermediate=704, heads=8, kv_heads=4, vocab_size=2000, context=4096)
    planned, measured = map(int, run_child(memory_child, folder, "decoder", dtype, *[384] * 4))
    record_property("measured / planned", measured / planned)
    print(f"{dtype}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert planned / 2 <= measured <= planned * 4 / 3
