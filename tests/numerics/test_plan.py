"""How large a pass may be, and whether a pass needs the memory that was planned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.models.config import DecoderConfig, decoder_config
from mint.engine.models.weights import read_config
from mint.engine.plan import (
    BEST_TOKENS_PER_PASS,
    GOOD_TOKENS_PER_PASS,
    MIN_TOKENS_PER_PASS,
    make_plan,
    pass_budget,
    torch_pass_memory,
)
from mint.errors import InputError
from mint.settings import Settings
from tests.numerics import memory_child
from tests.support.engine import add_random_run, forward_backward, gradient, open_backend, run_child, weighted_datums

QWEN3_0_6B = decoder_config(
    {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
     "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960}
)  # fmt: skip


@pytest.fixture
def config(tiny: Callable[..., Path]) -> DecoderConfig:
    return read_config(tiny("llama", context=100_000))


def test_more_memory_never_allows_less(config: DecoderConfig) -> None:
    plans = [make_plan(torch_pass_memory(config, 4), mebibytes * 2**20) for mebibytes in range(200, 4000, 50)]
    for small, large in pairwise(plans):
        assert small.max_tokens <= large.max_tokens
        assert small.max_tokens_per_pass <= large.max_tokens_per_pass
    assert len({plan.max_tokens for plan in plans}) > 10
    assert plans[-1].max_tokens_per_pass == BEST_TOKENS_PER_PASS
    assert make_plan(torch_pass_memory(config, 4), 2**60).max_tokens == config.max_context


def test_half_the_element_size_allows_more() -> None:
    plans = [make_plan(torch_pass_memory(QWEN3_0_6B, element), 2**32) for element in (2, 4)]
    assert plans[0].max_tokens > 1.5 * plans[1].max_tokens


def test_too_little_memory_is_refused_with_numbers(config: DecoderConfig) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(torch_pass_memory(config, 4), 2**20)
    text = str(caught.value)
    assert "0.0 GiB beside the base model hold a training pass of 0 tokens" in text
    assert f"at least {MIN_TOKENS_PER_PASS} are needed" in text
    assert "Take a smaller base model or a machine with more memory" in text


def test_an_asked_size_wins_but_not_over_memory(config: DecoderConfig) -> None:
    assert make_plan(torch_pass_memory(config, 4), 2**30, 10).max_tokens_per_pass == 10
    assert make_plan(torch_pass_memory(config, 4), 2**30, 4096).max_tokens_per_pass == 4096
    plan = make_plan(torch_pass_memory(config, 4), 2**28, 10**9)
    assert plan.max_tokens_per_pass == plan.max_tokens < 10**9


def test_a_run_reports_its_plan(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"), max_tokens_per_pass=77)
    plan = backend.add_run("run", types.LoraConfig(rank=1), 0).plan
    assert (plan.max_tokens_per_pass, plan.max_tokens) == (77, backend.limits.max_context)
    assert (plan.dtype, plan.num_threads, plan.torch_version) == ("float32", 1, backend.limits.torch_version)


SIZES = {
    "hidden": 256,
    "layers": 20,
    "intermediate": 704,
    "heads": 8,
    "kv_heads": 4,
    "vocab_size": 2000,
    "context": 4096,
}
# (family, sizes, dtype, lengths, layers recomputed, tokens with which all datums begin)
PASSES: dict[str, tuple[str, dict[str, int], str, list[int], int, int]] = {
    "four datums": ("llama", SIZES, "float32", [384] * 4, 0, 0),
    "half of the layers recomputed": ("llama", SIZES, "bfloat16", [384] * 4, 10, 0),
    "a long datum, all recomputed": ("llama", SIZES, "bfloat16", [2500], 20, 0),
    "normalised heads": ("qwen3", SIZES, "bfloat16", [700, 600], 0, 0),
    "a large vocabulary": ("llama", {**SIZES, "vocab_size": 150_000}, "bfloat16", [1024] * 2, 0, 0),
    "many short datums": ("llama", SIZES, "float32", [40] * 40, 0, 0),
    "answers to one prompt": ("llama", SIZES, "bfloat16", [600] * 16, 0, 512),
    "answers to one prompt, all recomputed": ("qwen3", SIZES, "bfloat16", [550] * 32, 20, 500),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_needs_the_memory_planned_for_it(
    tiny: Callable[..., Path], name: str, record_property: Callable[[str, object], None]
) -> None:
    """Growth of a process's resident memory over a pass, against the plan: within 15 %."""
    family, sizes, dtype, lengths, recomputed, common = PASSES[name]
    folder = tiny(family, **sizes)
    planned, measured = map(int, run_child(memory_child, folder, "decoder", dtype, recomputed, common, *lengths))
    record_property("planned / measured", planned / measured)
    print(f"{name}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recomputing_layers_changes_no_bit(tiny: Callable[..., Path], family: str, dtype: str) -> None:
    data = weighted_datums(np.random.default_rng(0), (7, 130, 33))
    found = []
    for recomputed in (0, 1, 2, 9):  # of two layers
        backend = open_backend(tiny(family), dtype, recompute_layers=recomputed)
        add_random_run(backend, "run", types.LoraConfig(rank=4))
        found.append((forward_backward(backend, "run", data).logprobs, gradient(backend, "run")))
    for logprobs, grad in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(logprobs, found[0][0], strict=True))
        assert torch.equal(grad, found[0][1]) and grad.any()


def test_recomputing_takes_as_little_as_memory_asks_for(config: DecoderConfig) -> None:
    memory = torch_pass_memory(config, 4)
    needs = [memory.of_pass(1000, n) for n in range(config.num_layers + 1)]
    for budget in range(min(needs) // 2, 2 * max(needs), max(needs) // 50):
        recomputed = memory.recomputed_layers(1000, budget)
        fitting = [n for n, need in enumerate(needs) if need <= budget]
        assert recomputed == (min(fitting) if fitting else config.num_layers)
    assert memory.recomputed_layers(1000, max(needs)) == 0


def test_scarce_memory_makes_passes_smaller_before_layers_are_recomputed() -> None:
    memory = torch_pass_memory(QWEN3_0_6B, 2)
    for mebibytes in range(300, 8000, 100):
        budget = pass_budget(mebibytes * 2**20)
        plan = make_plan(memory, mebibytes * 2**20)
        recomputed = memory.recomputed_layers(plan.max_tokens_per_pass, budget)
        assert plan.max_tokens_per_pass <= GOOD_TOKENS_PER_PASS or recomputed == 0
        assert memory.of_pass(plan.max_tokens, memory.config.num_layers) <= budget
        assert memory.of_pass(plan.max_tokens_per_pass, recomputed) <= budget
    assert make_plan(memory, 4 * 10**9).max_tokens > 8192  # a long datum beside 4 GB
    assert memory.of_pass(2048, 0) < 3 * 10**9


def test_the_memory_setting_takes_the_place_of_the_machines(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama", context=10**6)
    plans = [
        DecoderBackend(folder, "tiny", Settings(folder, memory_gb=gb)).add_run("run", types.LoraConfig(rank=1), 0).plan
        for gb in (1, 2)
    ]
    assert plans[0].max_tokens < plans[1].max_tokens < 2.5 * plans[0].max_tokens
