"""Adapters compute what PEFT's do, forward and backward, alone and several in one pass (fp32)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    base_tensors,
    cross_entropy_loss,
    drain,
    forward_backward,
    gradient,
    largest_difference,
    open_backend,
    parameters,
    part,
    peft_model,
    reference_gradient,
    relative_error,
    weighted_datums,
    write_variant,
)
from tests.support.tiny_models import FAMILIES

LENGTHS = (5, 150, 1, 40, 33)
ATTN = {"train_mlp": False, "train_unembed": False}
MLP = {"train_attn": False, "train_unembed": False}
UNEMBED = {"train_attn": False, "train_mlp": False}
CHOICES: dict[str, dict[str, bool]] = {
    "all": {},
    "attn": ATTN,
    "mlp": MLP,
    "unembed": UNEMBED,
    "attn+mlp": {"train_unembed": False},
    "mlp+unembed": {"train_attn": False},
}


def _peft(
    folder: Path, tensors: dict[str, np.ndarray], rank: int, data: list[types.Datum]
) -> tuple[list[np.ndarray], Tensor]:
    model, named = peft_model(folder, tensors, rank)
    return reference_gradient(model, named, data, cross_entropy_loss(data))


def _base_logprobs(backend: DecoderBackend, datum: types.Datum) -> np.ndarray:
    """The base model's logprobs of a datum's targets, through the sampler's door."""
    prompt = (*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1]))
    return np.array(drain(backend.score_prompt(prompt, None, 0)).logprobs[1:], np.float32)


def _assert_as_peft(folder: Path, lora: types.LoraConfig) -> None:
    backend = open_backend(folder)
    tensors = add_random_run(backend, "run", lora)
    data = weighted_datums(np.random.default_rng(1), LENGTHS)
    result = forward_backward(backend, "run", data)
    expected, expected_gradient = _peft(folder, tensors, lora.rank, data)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
    # the adapter matters: without it the logprobs are others
    backend.add_run("base", types.LoraConfig(rank=1), seed=0)
    assert largest_difference(forward_backward(backend, "base", data).logprobs, expected) > 100 * FP32_LOGPROB


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradient_equal_peft(tiny: Callable[..., Path], family: str, choice: str) -> None:
    _assert_as_peft(tiny(family), types.LoraConfig(rank=4, **CHOICES[choice]))


@pytest.mark.parametrize("rank", [1, 3, 32])
def test_scale_is_32_over_rank(tiny: Callable[..., Path], rank: int) -> None:
    """PEFT is given alpha 32, the protocol's."""
    assert types.params.LORA_ALPHA == 32
    _assert_as_peft(tiny("qwen3"), types.LoraConfig(rank=rank))


def test_models_with_biases_equal_peft(tmp_path: Path) -> None:
    _assert_as_peft(
        write_variant(tmp_path / "biased", "llama", attention_bias=True, mlp_bias=True), types.LoraConfig(rank=4)
    )


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_head_groups_equal_peft(tiny: Callable[..., Path], kv_heads: int) -> None:
    _assert_as_peft(tiny("llama", kv_heads=kv_heads), types.LoraConfig(rank=4, **ATTN))


def test_gradient_of_wide_rope_scaling_equals_peft(tmp_path: Path) -> None:
    """YaRN scales cos and sin, so its rotation is not orthogonal: the backward must scale too."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    _assert_as_peft(write_variant(tmp_path / "yarn", "llama", rope_parameters=rope), types.LoraConfig(rank=4, **ATTN))


def _runs_of_different_shape(backend: DecoderBackend) -> dict[str, tuple[types.LoraConfig, dict[str, np.ndarray]]]:
    shapes = {
        "a": types.LoraConfig(rank=4),
        "b": types.LoraConfig(rank=7, **MLP),
        "c": types.LoraConfig(rank=2, **UNEMBED),
    }
    return {name: (lora, add_random_run(backend, name, lora, seed=i)) for i, (name, lora) in enumerate(shapes.items())}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_of_different_shape_in_one_pass_equal_their_own_peft_models(
    tiny: Callable[..., Path], family: str
) -> None:
    folder = tiny(family)
    backend = open_backend(folder)
    runs = _runs_of_different_shape(backend)
    generator = np.random.default_rng(2)
    data = {
        name: weighted_datums(generator, lengths)
        for name, lengths in zip(runs, ((20, 3), (9, 140), (50,)), strict=True)
    }
    results = drain(backend.forward_backward([part(name, data[name]) for name in runs]))
    for (name, (lora, tensors)), result in zip(runs.items(), results, strict=True):
        expected, expected_gradient = _peft(folder, tensors, lora.rank, data[name])
        assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
        assert relative_error(gradient(backend, name), expected_gradient) <= FP32_GRADIENT


def test_a_run_that_a_pass_does_not_involve_keeps_every_bit(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    _runs_of_different_shape(backend)
    generator = np.random.default_rng(3)
    forward_backward(backend, "a", weighted_datums(generator, [20]))  # an accumulated gradient to be kept
    before = parameters(backend, "a"), gradient(backend, "a")
    assert before[1].norm() > 0
    drain(
        backend.forward_backward(
            [part("b", weighted_datums(generator, [30])), part("c", weighted_datums(generator, [9]))]
        )
    )
    backend.optim_step("b", types.AdamParams(learning_rate=1e-2))
    backend.discard_gradient("c")
    drain(backend.forward([part("a", weighted_datums(generator, [12]))]))
    assert torch.equal(parameters(backend, "a"), before[0])
    assert torch.equal(gradient(backend, "a"), before[1])


@pytest.mark.parametrize("tied", [True, False])
def test_training_the_unembedding_leaves_the_base_untouched(tiny: Callable[..., Path], tied: bool) -> None:
    """On a tied model too: the embedding keeps its bits, and PEFT with target lm_head gives the same logprobs."""
    folder = tiny("llama", tied=tied)
    backend = open_backend(folder)
    before = [tensor.clone() for tensor in base_tensors(backend)]
    assert len(before) > 10
    lora = types.LoraConfig(rank=4, **UNEMBED)
    add_random_run(backend, "run", lora)
    data = weighted_datums(np.random.default_rng(4), LENGTHS)
    for _ in range(3):
        forward_backward(backend, "run", data)
        backend.optim_step("run", types.AdamParams(learning_rate=1e-2))
    assert all(torch.equal(a, b) for a, b in zip(before, base_tensors(backend), strict=True))
    result = forward_backward(backend, "run", data)
    expected, expected_gradient = _peft(folder, backend.export_state("run").tensors, lora.rank, data)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT


def test_a_new_adapter_is_the_base_model(tiny: Callable[..., Path]) -> None:
    """B is zero at first, A uniform within 1 / sqrt(inputs), PEFT's kaiming_uniform with a = sqrt 5; a seed repeats."""
    backend = open_backend(tiny("qwen2"))
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        backend.add_run(name, types.LoraConfig(rank=16), seed)
    one, same, other = (backend.export_state(name).tensors for name in ("one", "same", "other"))
    data = weighted_datums(np.random.default_rng(5), LENGTHS)
    base = [_base_logprobs(backend, datum) for datum in data]
    assert largest_difference(forward_backward(backend, "one", data).logprobs, base) <= FP32_LOGPROB
    for name, array in one.items():
        assert np.array_equal(array, same[name])
        if ".lora_B." in name:
            assert not array.any()
            continue
        bound = array.shape[1] ** -0.5
        assert not np.array_equal(array, other[name])
        assert np.abs(array).max() <= bound
        # uniform: standard deviation bound / sqrt 3; of >= 1,024 values its relative error is below 10 % (5 sigma)
        assert array.std() == pytest.approx(bound / 3**0.5, rel=0.1)
