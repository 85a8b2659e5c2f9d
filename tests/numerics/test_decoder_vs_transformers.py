"""The decoder computes what transformers computes, in fp32, for every family, variant and RoPE scaling it accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from mint.errors import InputError
from mint.hub import ModelSource
from tests.support.engine import (
    FP32_LOGPROB,
    VOCAB,
    add_random_run,
    edit_config,
    forward,
    forward_backward,
    largest_difference,
    make_datum,
    open_backend,
    part,
    reference_logprobs,
    transformers_model,
    weighted_datums,
    write_variant,
)
from tests.support.tiny_models import FAMILIES

# one row of several datums; attention works in blocks of 128 query rows, so lengths lie on both sides of 128 and 256
LENGTHS = (300, 1, 129, 128, 40, 257)
HEAD_DIM = 16  # of the tiny llama: 8 rotary frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of 8 frequencies: one kept, one blended, six slowed
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-attention-factor": {**YARN, "attention_factor": 1.4},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-no-truncation": {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-query": ("llama", {"kv_heads": 1}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-small-heads": ("qwen3", {"head_dim": 16}),
    "mistral-window-beyond-the-text": ("mistral", {"sliding_window": 400}),
    "llama-large-epsilon": ("llama", {"rms_norm_eps": 0.05}),
}


def _assert_as_transformers(folder: Path) -> DecoderBackend:
    backend = open_backend(folder)
    backend.add_run("base", types.LoraConfig(rank=1), seed=0)  # B is zero: the base model itself
    data = weighted_datums(np.random.default_rng(0), LENGTHS)
    model = transformers_model(folder)
    with torch.no_grad():
        expected = [reference_logprobs(model, datum).numpy() for datum in data]
    found = forward(backend, "base", data).logprobs
    assert largest_difference(found, expected) <= FP32_LOGPROB
    assert np.concatenate(expected).std() > 1  # logits far from flat: a wrong one would show
    return backend


@pytest.mark.parametrize("kv_heads", [2, 4], ids=["gqa", "mha"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(tiny: Callable[..., Path], family: str, tied: bool, kv_heads: int) -> None:
    folder = tiny(family, tied=tied, kv_heads=kv_heads)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied
    backend = _assert_as_transformers(folder)
    assert backend.limits.vocab_size == VOCAB


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_family_equal_transformers(tmp_path: Path, name: str) -> None:
    family, overrides = VARIANTS[name]
    _assert_as_transformers(write_variant(tmp_path / name, family, **overrides))


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings_equal_transformers(tmp_path: Path, name: str) -> None:
    _assert_as_transformers(write_variant(tmp_path / name, "llama", rope_parameters=ROPES[name]))


def test_rope_scalings_are_told_apart(tmp_path: Path) -> None:
    """So that the test above can fail: every scaling moves the logprobs by more than its tolerance."""
    (datum,) = weighted_datums(np.random.default_rng(0), [300])
    rows = []
    for name, rope in {"plain": {"rope_type": "default", "rope_theta": 1e4}, **ROPES}.items():
        model = transformers_model(write_variant(tmp_path / name, "llama", rope_parameters=rope))
        with torch.no_grad():
            rows.append(reference_logprobs(model, datum).numpy())
    for i, row in enumerate(rows):
        assert all(np.abs(row - other).max() > 100 * FP32_LOGPROB for other in rows[:i])


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}, {**LLAMA3, "rope_theta": None}])
def test_older_config_files_mean_the_same(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    """Files written before `rope_parameters` hold rope_theta at the top and the scaling in rope_scaling."""
    folder = write_variant(tmp_path / "old", "llama")
    if scaling is not None:
        scaling = {key: value for key, value in scaling.items() if value is not None}
    edit_config(folder, "rope_parameters", rope_theta=5e5, rope_scaling=scaling)
    _assert_as_transformers(folder)


def test_sharded_files_are_read_whole(tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "whole", "llama")
    sharded = tmp_path / "sharded"
    transformers_model(folder).save_pretrained(sharded, max_shard_size="100KB")
    assert not (sharded / "model.safetensors").exists()
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    _assert_as_transformers(sharded)


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    """Full attention equals a sliding window only up to its length; a longer text is refused, not miscomputed."""
    backend = open_backend(write_variant(tmp_path / "window", "mistral", sliding_window=100))
    assert backend.limits.max_context == 100
    add_random_run(backend, "run", types.LoraConfig(rank=1))
    fits, too_long = weighted_datums(np.random.default_rng(0), [100, 101])
    forward_backward(backend, "run", [fits])
    with pytest.raises(InputError, match="101 tokens; the context allows 100"):
        backend.micro_batches("run", part("run", [too_long]).input)


def test_packaged_model_equals_transformers_on_chat(smollm2: ModelSource, chats: list[list[int]]) -> None:
    backend = open_backend(smollm2.path)
    backend.add_run("base", types.LoraConfig(rank=1), seed=0)
    data = [make_datum(chat[:-1], chat[1:], weights=np.ones(len(chat) - 1)) for chat in chats[:2]]
    assert sum(datum.model_input.length for datum in data) >= 200
    model = transformers_model(smollm2.path)
    with torch.no_grad():
        expected = [reference_logprobs(model, datum).numpy() for datum in data]
    assert largest_difference(forward(backend, "base", data).logprobs, expected) <= FP32_LOGPROB
