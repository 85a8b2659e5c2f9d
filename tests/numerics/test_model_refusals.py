"""A model that the decoder would compute wrongly is refused before it computes anything, and the message names why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mint.errors import InputError, ModelNotFoundError, UnsupportedError
from tests.support.engine import edit_config, open_backend, write_variant

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny llama that a test may change."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


ROPE = {"rope_theta": 1e4, "factor": 2.0}
UNCOVERED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
        r"model type 'gemma' \(GemmaForCausalLM\); covered: llama, mistral, qwen2, qwen3",
    ),
    "dynamic rope": (
        {"rope_parameters": {"rope_type": "dynamic", **ROPE}},
        "RoPE scaling 'dynamic'; covered: default, linear, llama3, yarn",
    ),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", **ROPE}}, "RoPE scaling 'longrope'"),
    "old longrope": ({"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "RoPE scaling 'longrope'"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial rotary embeddings"),
    "partial rotary, new form": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "partial rotary embeddings",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'; covered: silu"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_the_decoder_does_not_cover_is_refused_by_name(folder: Path, name: str) -> None:
    fields, gap = UNCOVERED[name]
    (edit_config(folder, **fields) / WEIGHTS).unlink()  # refused before any weight is read
    said = f"^MinT's own decoder does not cover {gap}.*Unset MINT_BACKEND to run it through transformers$"
    with pytest.raises(UnsupportedError, match=said):
        open_backend(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    (edit_config(folder, quantization_config={"quant_method": "gptq"}) / WEIGHTS).unlink()
    with pytest.raises(UnsupportedError, match=r"^quantised weights \(gptq\) are not supported; use the model's bf16"):
        open_backend(folder)


def test_a_tensor_that_would_be_ignored_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(3)}))
    with pytest.raises(UnsupportedError, match=r"has 1 tensors that a llama decoder does not use.*layers\.0\.extra"):
        open_backend(folder)


def test_biases_that_the_config_does_not_announce_are_refused(tmp_path: Path) -> None:
    folder = edit_config(write_variant(tmp_path / "biased", "llama", attention_bias=True), attention_bias=False)
    with pytest.raises(UnsupportedError, match=r"has 8 tensors that a llama decoder does not use.*k_proj\.bias"):
        open_backend(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"hold no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        open_backend(folder)


def test_a_missing_unembedding_of_an_untied_model_is_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"hold no tensor 'lm_head\.weight'"):
        open_backend(folder)


def test_a_wrong_shape_names_both_shapes(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(16, 64)}))
    with pytest.raises(InputError, match=r"k_proj\.weight' has shape \[16, 64\], config\.json says \[32, 64\]"):
        open_backend(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks the weight file 'model\.safetensors'"):
        open_backend(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
        open_backend(folder)


def test_impossible_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="4 heads, 3 key/value heads"):
        open_backend(edit_config(folder, num_key_value_heads=3))
    with pytest.raises(InputError, match="hidden_size=0, expected a positive whole number"):
        open_backend(edit_config(folder, hidden_size=0))
