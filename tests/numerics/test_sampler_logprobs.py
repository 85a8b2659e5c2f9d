"""What the sampler says about its tokens is what the model says: cached decoding against whole forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.backend import Generation
from mint.engine.decoder_backend import DecoderBackend
from tests.support.engine import (
    FP32_LOGPROB,
    add_random_run,
    both_kernels,
    continuation,
    drain,
    forward,
    forward_backward,
    generate,
    make_datum,
    open_backend,
    peft_model,
    random_prompt,
    request,
    weighted_datums,
)

LORA = types.LoraConfig(rank=4)
# attention blocks end at 128, prefill chunks at 256; the caches grow by 256
PROMPT_LENGTHS = (1, 2, 100, 127, 128, 129, 250, 256, 257, 300)
NEW = 24
BF16_RATIO = 1.5  # numerics contract: error to fp32 against that of `forward`


def _all_logprobs(model: Any, tokens: list[int]) -> np.ndarray:
    """log softmax of every position, by transformers."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1).numpy()


def _generated(backend: DecoderBackend, adapter: int | None, **options: Any) -> list[tuple[list[int], Generation]]:
    prompts = [random_prompt(length) for length in PROMPT_LENGTHS]
    requests = [request(p, adapter=adapter, max_new=NEW, seed=i, **options) for i, p in enumerate(prompts)]
    return list(zip(prompts, generate(backend, *requests), strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_cached_decoding_equals_transformers_and_forward(tiny: Callable[..., Path], family: str) -> None:
    """With an adapter on every module; prompts of all lengths grow side by side."""
    folder = tiny(family)
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", LORA)
    model, _ = peft_model(folder, tensors, LORA.rank)
    for prompt, generation in _generated(backend, backend.snapshot("run")):
        (sequence,) = generation.sequences
        assert len(sequence.tokens) == len(sequence.logprobs) == NEW
        whole = _all_logprobs(model, [*prompt, *sequence.tokens])
        expected = [whole[len(prompt) - 1 + i, token] for i, token in enumerate(sequence.tokens)]
        assert np.abs(np.subtract(sequence.logprobs, expected)).max() <= FP32_LOGPROB
        (scored,) = forward(backend, "run", [continuation(prompt, sequence.tokens)]).logprobs
        assert np.abs(np.subtract(sequence.logprobs, scored[len(prompt) - 1 :])).max() <= FP32_LOGPROB


@both_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_decoding_errs_no_more_than_forward(tiny: Callable[..., Path], family: str, kernels: str) -> None:
    """Mean error to fp32 over the generated tokens."""
    folder = tiny(family, head_dim=32)
    backend = open_backend(folder, "bfloat16", kernels=kernels)
    tensors = add_random_run(backend, "run", LORA)
    model, _ = peft_model(folder, tensors, LORA.rank)
    sampled, scored = [], []
    for prompt, generation in _generated(backend, backend.snapshot("run"), num_samples=2):
        for sequence in generation.sequences:
            whole = _all_logprobs(model, [*prompt, *sequence.tokens])
            exact = np.array([whole[len(prompt) - 1 + i, token] for i, token in enumerate(sequence.tokens)])
            (again,) = forward(backend, "run", [continuation(prompt, sequence.tokens)]).logprobs
            sampled.append(sequence.logprobs - exact)
            scored.append(again[len(prompt) - 1 :] - exact)
    assert np.abs(scored).mean() > 0
    print(f"{family}: mean |error| sampler {np.abs(sampled).mean():.4g}, forward {np.abs(scored).mean():.4g}")
    assert np.abs(sampled).mean() <= BF16_RATIO * np.abs(scored).mean()


def test_temperature_zero_takes_the_likeliest_token(tiny: Callable[..., Path]) -> None:
    folder = tiny("llama")
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", LORA)
    model, _ = peft_model(folder, tensors, LORA.rank)
    for prompt, generation in _generated(backend, backend.snapshot("run"), temperature=0.0):
        (sequence,) = generation.sequences
        whole = _all_logprobs(model, [*prompt, *sequence.tokens])[len(prompt) - 1 : -1]
        assert (whole.max(-1) - whole[range(NEW), sequence.tokens]).max() <= FP32_LOGPROB


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.3}], ids=str)
def test_logprobs_and_top_logprobs_are_the_models_own(tiny: Callable[..., Path], options: dict[str, Any]) -> None:
    """At temperature 1 and over the whole vocabulary, however the token was chosen."""
    folder, k = tiny("qwen3"), 4
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", LORA)
    model, _ = peft_model(folder, tensors, LORA.rank)
    for prompt, generation in _generated(backend, backend.snapshot("run"), num_topk=k, **options):
        (sequence,) = generation.sequences
        whole = _all_logprobs(model, [*prompt, *sequence.tokens])[len(prompt) - 1 : -1]
        expected = whole[range(NEW), sequence.tokens]
        assert np.abs(np.subtract(sequence.logprobs, expected)).max() <= FP32_LOGPROB
        assert sequence.topk_logprobs is not None
        _assert_top(sequence.topk_logprobs, whole, k)


def _assert_top(rows: list[Any], whole: np.ndarray, k: int) -> None:
    """k different tokens a row with their logprobs, which are the k largest, largest first."""
    assert len(rows) == len(whole)
    for row, logprobs in zip(rows, whole, strict=True):
        tokens, values = zip(*row, strict=True)
        assert len(set(tokens)) == k
        assert np.abs(logprobs[list(tokens)] - values).max() <= FP32_LOGPROB
        assert np.abs(np.sort(logprobs)[::-1][:k] - values).max() <= FP32_LOGPROB


@pytest.mark.parametrize("with_adapter", [False, True])
def test_prompt_scores_equal_transformers(tiny: Callable[..., Path], with_adapter: bool) -> None:
    folder, k = tiny("llama"), 3
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", LORA)
    model, _ = peft_model(folder, tensors, LORA.rank)
    adapter = backend.snapshot("run") if with_adapter else None
    prompt = random_prompt(300)
    scores = drain(backend.score_prompt(tuple(prompt), adapter, k))
    with torch.no_grad():
        if with_adapter:
            whole = _all_logprobs(model, prompt)
        else:
            with model.disable_adapter():
                whole = _all_logprobs(model, prompt)
    assert len(scores.logprobs) == len(prompt)
    assert scores.logprobs[0] is None
    expected = whole[range(len(prompt) - 1), prompt[1:]]
    assert np.abs(np.subtract(scores.logprobs[1:], expected)).max() <= FP32_LOGPROB
    assert scores.topk is not None
    assert scores.topk[0] is None
    _assert_top(scores.topk[1:], whole[:-1], k)
    assert drain(backend.score_prompt(tuple(prompt), adapter, 0)).topk is None


def test_a_prompt_of_one_token_has_nothing_to_score(tiny: Callable[..., Path]) -> None:
    scores = drain(open_backend(tiny("llama")).score_prompt((5,), None, 2))
    assert scores.logprobs == [None]
    assert scores.topk == [None]


def test_adapters_and_the_base_share_a_decode_step(tiny: Callable[..., Path]) -> None:
    """Adapters of different rank and modules, and none: each as its own PEFT model has it."""
    folder = tiny("qwen3")
    backend = open_backend(folder)
    shapes = {"a": types.LoraConfig(rank=4), "b": types.LoraConfig(rank=7, train_attn=False, train_unembed=False)}
    models: dict[str | None, Any] = {}
    for seed, (name, lora) in enumerate(shapes.items()):
        models[name], _ = peft_model(folder, add_random_run(backend, name, lora, seed), lora.rank)
    handles: dict[str | None, int | None] = {name: backend.snapshot(name) for name in shapes}
    handles[None] = None
    order: list[str | None] = ["a", None, "b", "a", "b", None]
    prompts = [random_prompt(20 + i) for i in range(len(order))]
    requests = [
        request(p, adapter=handles[name], seed=i) for i, (name, p) in enumerate(zip(order, prompts, strict=True))
    ]
    for name, prompt, given, generation in zip(order, prompts, requests, generate(backend, *requests), strict=True):
        (sequence,) = generation.sequences
        (alone,) = generate(backend, given)
        assert alone.sequences[0].tokens == sequence.tokens
        assert np.abs(np.subtract(alone.sequences[0].logprobs, sequence.logprobs)).max() <= FP32_LOGPROB
        if name is None:
            with models["a"].disable_adapter():
                whole = _all_logprobs(models["a"], [*prompt, *sequence.tokens])
        else:
            whole = _all_logprobs(models[name], [*prompt, *sequence.tokens])
        expected = whole[len(prompt) - 1 : -1][range(len(sequence.tokens)), sequence.tokens]
        assert np.abs(np.subtract(sequence.logprobs, expected)).max() <= FP32_LOGPROB


def test_a_snapshot_keeps_still_while_training_goes_on(tiny: Callable[..., Path]) -> None:
    """Before, in the middle of a generation, and from saved weights; the run itself has moved."""
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "run", LORA)
    snapshot, saved = backend.snapshot("run"), backend.export_state("run")
    given = request(random_prompt(40), adapter=snapshot, num_samples=2)
    (before,) = generate(backend, given)
    backend.add_request(given)
    for _ in range(5):
        assert backend.step() == []
    forward_backward(backend, "run", weighted_datums(np.random.default_rng(0), [30]))
    backend.optim_step("run", types.AdamParams(learning_rate=0.05))
    during = []
    while not during:
        during = backend.step()
    (after,) = generate(backend, given)
    (restored,) = generate(
        backend, request(random_prompt(40), adapter=backend.add_snapshot(LORA, saved), num_samples=2)
    )
    for generation in (during[0], after, restored):
        assert generation.sequences == before.sequences
    (moved,) = generate(backend, request(random_prompt(40), adapter=backend.snapshot("run"), num_samples=2))
    assert moved.sequences != before.sequences


def test_a_snapshot_may_be_dropped_while_it_is_in_use(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "run", LORA)
    adapter = backend.snapshot("run")
    given = request(random_prompt(300), adapter=adapter)
    (expected,) = generate(backend, given)
    backend.add_request(given)
    backend.drop_snapshot(adapter)
    done = []
    while not done:
        done = backend.step()
    assert done[0].sequences == expected.sequences
    assert done[0].cached_tokens == 0  # its prefixes went with it


def test_forward_of_what_was_sampled_has_ratio_one(tiny: Callable[..., Path]) -> None:
    """The start of on-policy training: p from training, q from sampling, ratio within 1e-4 of 1."""
    backend = open_backend(tiny("mistral"))
    add_random_run(backend, "run", LORA)
    prompt = random_prompt(50)
    (generation,) = generate(backend, request(prompt, adapter=backend.snapshot("run"), num_samples=4))
    data = []
    for sequence in generation.sequences:
        whole, pad = [*prompt, *sequence.tokens], [0.0] * (len(prompt) - 1)
        advantages = [*pad, *[1.0] * len(sequence.tokens)]
        data.append(make_datum(whole[:-1], whole[1:], logprobs=[*pad, *sequence.logprobs], advantages=advantages))
    result = forward_backward(backend, "run", data, "importance_sampling")
    num_tokens = sum(len(s.tokens) for s in generation.sequences)
    assert result.metrics["loss:sum"] == pytest.approx(-num_tokens, rel=FP32_LOGPROB)
