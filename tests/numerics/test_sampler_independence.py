"""A sequence depends on its prompt, adapter, options and seed alone: not on neighbours, siblings or the prefix cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.models.attention import attend
from mint.engine.models.weights import read_config
from mint.engine.sampling import grouping, torch_passes
from mint.engine.sampling.cache import PrefixCache
from mint.engine.sampling.grouping import Grouping, positions_are_independent
from mint.engine.workspace import Workspace
from mint.hub import ModelSource
from mint.types.results import SampledSequence
from tests.support.engine import (
    FP32_LOGPROB,
    add_random_run,
    both_kernels,
    generate,
    open_backend,
    random_prompt,
    request,
)

LORA = types.LoraConfig(rank=8)
ODD = types.LoraConfig(rank=5)
# hidden and MLP sizes at which a bf16 kernel sums one row in another order than many, as in the packaged model
WIDE = {"hidden": 192, "intermediate": 1536, "layers": 8}


def _backend(
    folder: Path, dtype: str, lora: types.LoraConfig = LORA, kernels: str | None = None
) -> tuple[DecoderBackend, int]:
    backend = open_backend(folder, dtype, kernels=kernels)
    add_random_run(backend, "run", lora, scale=0.02)
    return backend, backend.snapshot("run")


def _among(backend: DecoderBackend, adapter: int | None, num_others: int, **options: Any) -> SampledSequence:
    """The same sequence in the middle of so many others of other lengths, seeds and options."""
    vocab = backend.limits.vocab_size
    given = request(random_prompt(20, vocab_size=vocab), adapter=adapter, seed=7, **options)
    others = [
        request(random_prompt(5 + 3 * i, seed=1, vocab_size=vocab), adapter=adapter, seed=i, temperature=0.5 + i / 10)
        for i in range(num_others)
    ]
    middle = num_others // 2
    (sequence,) = generate(backend, *others[:middle], given, *others[middle:])[middle].sequences
    return sequence


def _assert_bit_equal(found: Sequence[SampledSequence], expected: Sequence[SampledSequence]) -> None:
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert [s.logprobs for s in found] == [s.logprobs for s in expected]  # floats: equal means every bit


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@both_kernels
def test_neighbours_change_no_bit_in_bf16(
    tiny: Callable[..., Path], family: str, with_adapter: bool, kernels: str
) -> None:
    backend, adapter = _backend(tiny(family, head_dim=32), "bfloat16", kernels=kernels)
    alone = _among(backend, adapter if with_adapter else None, 0)
    for num_others in (1, 2, 7, 16, 40):
        _assert_bit_equal([_among(backend, adapter if with_adapter else None, num_others)], [alone])


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@both_kernels
def test_prompts_prefilled_together_change_no_bit(tiny: Callable[..., Path], with_adapter: bool, kernels: str) -> None:
    """Prompts that arrive together may share a pass: seen in the likeliest first tokens, before any decode step."""
    backend, adapter = _backend(tiny("llama", head_dim=32), "bfloat16", kernels=kernels)
    options = {"adapter": adapter if with_adapter else None, "max_new": 1, "num_topk": 50}
    prompts = [random_prompt(length) for length in (3, 20, 33, 100, 256, 300)]
    for prompt in prompts:
        (alone,) = generate(backend, request(prompt, **options))
        for num_others in (1, 3, 7):
            others = [request(random_prompt(5 + 11 * i, seed=1), **options) for i in range(num_others)]
            found = generate(backend, *others, request(prompt, **options))[-1]
            assert found.sequences == alone.sequences


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
@both_kernels
def test_neighbours_change_no_bit_of_a_wide_model(tiny: Callable[..., Path], with_adapter: bool, kernels: str) -> None:
    backend, adapter = _backend(tiny("llama", **WIDE, head_dim=64), "bfloat16", kernels=kernels)
    alone = _among(backend, adapter if with_adapter else None, 0, max_new=40)
    for num_others in (1, 7, 40):
        _assert_bit_equal([_among(backend, adapter if with_adapter else None, num_others, max_new=40)], [alone])


@both_kernels
def test_neighbours_change_no_bit_of_the_packaged_model(smollm2: ModelSource, kernels: str) -> None:
    """An odd rank, for which kernels of the low-rank products differ by row count as well."""
    backend, adapter = _backend(smollm2.path, "bfloat16", ODD, kernels)
    for chosen in (None, adapter):
        alone = _among(backend, chosen, 0)
        for num_others in (1, 7, 40):
            _assert_bit_equal([_among(backend, chosen, num_others)], [alone])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_neighbours_in_fp32(tiny: Callable[..., Path], family: str) -> None:
    """fp32 kernels change with the number of rows: tokens equal, logprobs within the contract's 1e-4."""
    backend, adapter = _backend(tiny(family), "float32")
    alone = _among(backend, adapter, 0)
    for num_others in (1, 7, 40):
        found = _among(backend, adapter, num_others)
        assert found.tokens == alone.tokens
        assert np.abs(np.subtract(found.logprobs, alone.logprobs)).max() <= FP32_LOGPROB


@pytest.mark.parametrize(
    "count", [7, 12]
)  # odd and even numbers of an adapter's rows: with and without padding between
@both_kernels
def test_neighbours_with_other_adapters_change_no_bit(tiny: Callable[..., Path], count: int, kernels: str) -> None:
    """Sequences of one adapter are gathered within a step, so company also changes a row's place."""
    backend, first = _backend(tiny("qwen3"), "bfloat16", kernels=kernels)
    add_random_run(backend, "other", types.LoraConfig(rank=3, train_attn=False), seed=4)
    handles = [None, first, backend.snapshot("other")]
    requests = [request(random_prompt(8 + i), adapter=handles[i % 3], seed=i) for i in range(count)]
    together = generate(backend, *requests)
    for given, generation in zip(requests, together, strict=True):
        (alone,) = generate(backend, given)
        _assert_bit_equal(generation.sequences, alone.sequences)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sample_i_does_not_depend_on_how_many_there_are(tiny: Callable[..., Path], dtype: str) -> None:
    backend, adapter = _backend(tiny("llama"), dtype)
    one, two, four = (
        generate(backend, request(random_prompt(30), adapter=adapter, seed=3, num_samples=n))[0].sequences
        for n in (1, 2, 4)
    )
    for few, many in ((one, two), (two, four)):
        if dtype == "bfloat16":
            _assert_bit_equal(many[: len(few)], few)
        assert [s.tokens for s in many[: len(few)]] == [s.tokens for s in few]
    assert len({tuple(s.tokens) for s in four}) == 4  # each has a random stream of its own


def test_a_seed_repeats_and_another_differs(tiny: Callable[..., Path]) -> None:
    """Negative and 64-bit seeds are seeds like any other."""
    backend, adapter = _backend(tiny("llama"), "float32")
    seen = []
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 2):
        first, again = (
            generate(backend, request(random_prompt(10), adapter=adapter, seed=seed))[0].sequences for _ in range(2)
        )
        _assert_bit_equal(again, first)
        seen.append(tuple(first[0].tokens))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("dtype", "known", "common"), [("float32", 512, 256), ("bfloat16", 592, 288)])
def test_a_prefix_found_in_the_cache_gives_the_same_bits(
    tiny: Callable[..., Path], dtype: str, known: int, common: int
) -> None:
    """Whole blocks of what is known: of 16 positions, or where prompts may not be cut anywhere of 256."""
    backend, adapter = _backend(tiny("qwen3", context=1024), dtype)
    prompt = random_prompt(600)
    given = request(prompt, adapter=adapter, num_samples=2)
    first, again = generate(backend, given)[0], generate(backend, given)[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, known)
    _assert_bit_equal(again.sequences, first.sequences)
    # a prompt that shares the beginning only, against a backend that has never seen it
    cousin = request([*prompt[:300], *random_prompt(200, seed=5)], adapter=adapter)
    (partly,) = generate(backend, cousin)
    fresh, same_adapter = _backend(tiny("qwen3", context=1024), dtype)
    (unseen,) = generate(fresh, request(cousin.prompt, adapter=same_adapter))
    assert (partly.cached_tokens, unseen.cached_tokens) == (common, 0)
    _assert_bit_equal(partly.sequences, unseen.sequences)


@pytest.mark.parametrize("length", [17, 32, 256, 512])
def test_the_last_token_of_a_known_prompt_is_computed_again(tiny: Callable[..., Path], length: int) -> None:
    """Of a prompt of whole blocks, all of them known, too: it is needed for its logits."""
    backend = open_backend(tiny("llama", context=1024), "bfloat16")
    given = request(random_prompt(length))
    first, again = generate(backend, given)[0], generate(backend, given)[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, (length - 1) // 16 * 16)
    _assert_bit_equal(again.sequences, first.sequences)


def _computed_rows(backend: DecoderBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompt positions of every prefill pass from now on."""
    rows: list[int] = []
    prefill = backend._sampler._prefill
    monkeypatch.setattr(
        backend._sampler, "_prefill", lambda chunks: (rows.append(sum(c.length for c in chunks)), prefill(chunks))
    )
    return rows


@both_kernels
@pytest.mark.parametrize("common", [1, 40, 128, 150])
def test_what_prompts_of_one_pass_have_in_common_is_computed_once(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, common: int, kernels: str
) -> None:
    """Down to the token; a prompt that comes twice computes its last token again, one that goes on from another's end
    all that follows."""
    backend, adapter = _backend(tiny("qwen3"), "bfloat16", kernels=kernels)
    beginning = random_prompt(common, seed=9)
    prompts = [[*beginning, *random_prompt(7 + i, seed=i)] for i in range(4)]
    prompts += [prompts[0], [*prompts[1], 5, 6, 7]]
    options = {"max_new": 6, "num_topk": 20}
    requests = [request(ids, adapter=a, seed=i, **options) for a in (None, adapter) for i, ids in enumerate(prompts)]
    alone = []
    for given in requests:
        fresh, same_adapter = _backend(tiny("qwen3"), "bfloat16", kernels=kernels)
        fresh_request = request(given.prompt, adapter=given.adapter and same_adapter, seed=given.seed, **options)
        alone.append(generate(fresh, fresh_request)[0])
    rows = _computed_rows(backend, monkeypatch)
    together = generate(backend, *requests)
    own = [common + 7, 8, 9, 10, 1, 3]  # computed for each
    assert sum(rows) == 2 * sum(own)
    assert [g.cached_tokens for g in together] == [len(r.prompt) - n for r, n in zip(requests, 2 * own, strict=True)]
    for generation, expected in zip(together, alone, strict=True):
        assert expected.cached_tokens == 0
        assert generation.sequences == expected.sequences  # floats: equal means every bit


@both_kernels
def test_prompts_cut_anywhere_fill_every_pass(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    backend, adapter = _backend(tiny("llama", head_dim=32), "bfloat16", kernels=kernels)
    requests = [request(random_prompt(150 + i, seed=i), adapter=adapter, seed=i) for i in range(7)]
    alone = []
    for given in requests:
        alone.append(generate(backend, given)[0].sequences)
        backend._sampler._prefixes = PrefixCache(0)
    rows = _computed_rows(backend, monkeypatch)
    together = generate(backend, *requests)
    total = sum(len(given.prompt) for given in requests)
    assert rows == [256] * (total // 256) + [total % 256]
    for generation, expected in zip(together, alone, strict=True):
        _assert_bit_equal(generation.sequences, expected)


@pytest.mark.parametrize("packs", [True, False])
def test_where_kernels_forbid_it_prompts_are_not_cut_anywhere(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    found = Grouping(32, 4, 32, 32 if packs else 1, packs, False, False)
    monkeypatch.setattr(torch_passes, "find_grouping", lambda *_, **__: found)
    backend, adapter = _backend(tiny("llama", context=1024), "bfloat16", kernels="torch")
    beginning = random_prompt(270, seed=9)
    requests = [request([*beginning, *random_prompt(20, seed=i)], adapter=adapter, seed=i) for i in range(4)]
    rows = _computed_rows(backend, monkeypatch)
    (first,) = generate(backend, requests[0])
    together = generate(backend, *requests)
    assert rows == [256, 34, *([4 * 34] if packs else [34] * 4)]
    assert [generation.cached_tokens for generation in together] == [256] * 4
    _assert_bit_equal(together[0].sequences, first.sequences)


def test_whether_positions_are_independent_is_found_out(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel whose sums depend on the number of rows is noticed."""
    config = read_config(tiny("llama"))
    assert positions_are_independent(config, torch.bfloat16, torch.device("cpu"))

    def other_bits(ws: Workspace, q: Tensor, k: Tensor, v: Tensor, past: int, out: Tensor) -> None:
        attend(ws, q, k, v, past, out)
        if q.shape[2] == 41:
            out[-1, -1, -1, -1] *= 1.01

    monkeypatch.setattr(grouping, "attend", other_bits)
    assert not positions_are_independent(config, torch.bfloat16, torch.device("cpu"))


def test_prefixes_of_another_adapter_are_not_used(tiny: Callable[..., Path]) -> None:
    """Keys and values depend on the adapter: the same prompt under another one starts anew."""
    backend, adapter = _backend(tiny("llama"), "float32")
    prompt = random_prompt(300)
    (with_adapter,) = generate(backend, request(prompt, adapter=adapter))
    (base,) = generate(backend, request(prompt))
    assert (with_adapter.cached_tokens, base.cached_tokens) == (0, 0)
    (fresh,) = generate(open_backend(tiny("llama")), request(prompt))
    _assert_bit_equal(base.sequences, fresh.sequences)
    assert base.sequences[0].logprobs != with_adapter.sequences[0].logprobs
    (again,) = generate(backend, request(prompt))
    assert again.cached_tokens == 256  # float32
