"""A checkpoint is a PEFT adapter as it lies on disk: PeftModel.from_pretrained loads it and computes the same logprobs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.support.clients import GUARD, Embedded, batch, checkpoint_folder, logprobs, train
from tests.support.tiny_models import write_tiny_model

SHAPES: list[dict[str, Any]] = [
    {"rank": 4},
    {"rank": 8, "train_mlp": False, "train_unembed": False},
    {"rank": 2, "train_attn": False, "train_mlp": False},
]


def peft_logprobs(base: str, adapter: Path) -> np.ndarray:
    """The logprobs of batch(9) under transformers and PEFT, each datum alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        # PEFT uses names that transformers deprecates, and points out that lm_head is tied to the embedding: adapting
        # the one without the other is what we want
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, adapter).eval()
    found = []
    for datum in batch(9):
        with torch.inference_mode():
            logits = peft(torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize("family", ["qwen3", "llama"], ids=["tied", "untied"])
def test_peft_loads_a_checkpoint_and_agrees(
    world: Embedded, tiny_model: str, tmp_path: Path, mint_home: Path, family: Any
) -> None:
    base = tiny_model if family == "qwen3" else str(write_tiny_model(tmp_path / "llama", "llama", tokenizer=False))
    client = world.client()
    untrained = logprobs(client.create_lora_training_client(base, rank=1, seed=0).forward(batch(9)).result(GUARD))
    for i, shape in enumerate(SHAPES):
        run = client.create_lora_training_client(base, seed=i, **shape)
        train(run, 3)
        ours = logprobs(run.forward(batch(9)).result(GUARD))
        assert abs(ours - untrained).max() > 0.05  # the adapter matters
        saved = [run.save_state("a").result(GUARD).path, str(run.save_weights_for_sampler("a").result(GUARD).path)]
        for path in saved[: 2 if i == 0 else 1]:
            np.testing.assert_allclose(peft_logprobs(base, checkpoint_folder(mint_home, path)), ours, atol=1e-4)


def test_an_adapter_holds_only_lora_pairs_and_the_config_peft_needs(
    world: Embedded, tiny_model: str, mint_home: Path
) -> None:
    run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    folder = checkpoint_folder(mint_home, run.save_state("a").result(GUARD).path)
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = run.get_info().lora_modules
    assert set(tensors) == {f"base_model.model.{m}.lora_{part}.weight" for m in modules for part in "AB"}
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float32"}
    assert sum(tensor.size for tensor in tensors.values()) == run.get_info().num_parameters
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": tiny_model,
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
        "inference_mode": True,
    }
