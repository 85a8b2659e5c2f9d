"""The transformers Backend against transformers and PEFT themselves, over kinds of model that the decoder does not cover."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mint import types
from mint.engine.hf.backend import GAPS, HfBackend
from mint.engine.hf.linears import find_linears, group_of
from mint.engine.models.config import uncovered
from mint.errors import InputError, NumericsError, UnsupportedError
from mint.settings import Settings
from tests.numerics import memory_child
from tests.support.clients import GUARD, batch, checkpoint_folder, embedded, logprobs
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    continuation,
    cross_entropy_loss,
    edit_config,
    forward,
    forward_backward,
    generate,
    gradient,
    largest_difference,
    open_hf,
    peft_model,
    random_prompt,
    reference_gradient,
    reference_logprobs,
    relative_error,
    request,
    run_child,
    transformers_model,
    weighted_datums,
)
from tests.support.tiny_models import write_tiny_transformers

WEIGHTS = "model.safetensors"
LENGTHS = (5, 150, 1, 40)
# 3 layers: one with global attention in the Gemmas
OTHERS = ("gemma2", "gemma3_text", "phi3", "qwen3_moe", "mixtral", "gpt_neox", "opt", "gpt2")
MIXTURES = ("qwen3_moe", "mixtral")
ATTENTION = {
    "gemma2": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gemma3_text": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi3": {"qkv_proj", "o_proj"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "gpt2": {"c_attn", "c_proj"},
}
MLP = {
    "gemma2": {"gate_proj", "up_proj", "down_proj"},
    "gemma3_text": {"gate_proj", "up_proj", "down_proj"},
    "phi3": {"gate_up_proj", "down_proj"},
    "qwen3_moe": set(),
    "mixtral": set(),
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
    "gpt2": {"c_fc", "c_proj"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of that kind, which nobody changes."""
    root = tmp_path_factory.mktemp("others")

    def make(kind: str) -> Path:
        return root / kind if (root / kind).is_dir() else write_tiny_transformers(root / kind, kind)

    return make


def _groups(train: str) -> dict[str, bool]:
    return {f"train_{group}": group in train for group in ("attn", "mlp", "unembed")}


@pytest.mark.parametrize("kind", OTHERS)
def test_logprobs_equal_transformers_and_gradients_peft(made: Callable[[str], Path], kind: str) -> None:
    folder = made(kind)
    assert uncovered(json.loads((folder / "config.json").read_text())) is not None
    backend = open_hf(folder)
    tensors = add_random_run(backend, "run", types.LoraConfig(rank=4))
    data = weighted_datums(np.random.default_rng(1), LENGTHS)
    result = forward_backward(backend, "run", data)
    model, named = peft_model(folder, tensors, rank=4)
    expected, expected_gradient = reference_gradient(model, named, data, cross_entropy_loss(data))
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
    # without the adapter it is the base model, and that is another
    backend.add_run("new", types.LoraConfig(rank=1), seed=0)
    base = transformers_model(folder)
    plain = [reference_logprobs(base, datum).detach().numpy() for datum in data]
    assert largest_difference(forward(backend, "new", data).logprobs, plain) <= FP32_LOGPROB
    assert largest_difference(plain, expected) > 100 * FP32_LOGPROB


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "mixtral"])
def test_bf16_logprobs_of_a_new_adapter_are_those_of_transformers(made: Callable[[str], Path], kind: str) -> None:
    """Its B is zero, so the logits have the same bits; what is left is the softmax in float32."""
    backend = open_hf(made(kind), "bfloat16")
    backend.add_run("run", types.LoraConfig(rank=4), seed=0)
    data = weighted_datums(np.random.default_rng(6), (40, 7))
    base = transformers_model(made(kind), torch.bfloat16)
    plain = [reference_logprobs(base, datum).detach().numpy() for datum in data]
    assert largest_difference(forward(backend, "run", data).logprobs, plain) <= 1e-5
    forward_backward(backend, "run", data)
    assert backend.optim_step("run", types.AdamParams(learning_rate=1e-2))["update_norm"] > 0


@pytest.mark.parametrize("kind", OTHERS)
def test_groups_choose_the_modules_by_their_paths(made: Callable[[str], Path], kind: str) -> None:
    backend = open_hf(made(kind))

    def wrapped(train: str) -> set[str]:
        names = backend.add_run(train, types.LoraConfig(rank=1, **_groups(train)), 0).modules
        assert len(set(names)) == len(names)
        return {name.rpartition(".")[2] for name in names}

    assert wrapped("attn") == ATTENTION[kind]
    assert wrapped("unembed") == {"lm_head"}
    assert wrapped("attn+unembed") == ATTENTION[kind] | {"lm_head"}
    if kind not in MIXTURES:
        assert wrapped("mlp") == MLP[kind]
        assert wrapped("attn+mlp") == ATTENTION[kind] | MLP[kind]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.self_attn.q_proj", "attn"),
        ("transformer.h.0.attention.dense", "attn"),
        ("model.layers.0.linear_attn.in_proj_ba", "attn"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("model.layers.0.mlp.shared_expert.up_proj", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.7.w1", "mlp"),
        ("model.decoder.layers.0.fc1", "mlp"),
        ("model.layers.0.block_sparse_moe.gate", None),
        ("model.layers.0.mlp.shared_expert_gate", None),
        ("model.layers.0.self_attention.experts.router.layer", None),
        ("model.decoder.project_in", None),
    ],
)
def test_a_path_decides_the_group(name: str, group: str | None) -> None:
    assert group_of(name) == group


def test_a_vision_tower_is_left_alone() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 160}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model("gemma3", text_config={**text, "vocab_size": 384}, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config)
    assert any("vision_tower" in name and "q_proj" in name for name, _ in model.named_modules())
    found = find_linears(model)
    assert [linear.name for linear in found if linear.group == "unembed"] == ["lm_head"]
    layers = {linear.name.partition(".layers.")[0] for linear in found if linear.group != "unembed"}
    assert (layers, len(found)) == ({"model.language_model"}, 8)


def test_what_a_group_lacks_is_said(made: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    backend = open_hf(made("qwen3_moe"))
    # per layer and expert: gate and up in one matrix, down in another
    assert "Qwen3MoeForCausalLM: 24 expert matrices are fused tensors, which adapters do not wrap" in caplog.messages
    backend.add_run("run", types.LoraConfig(rank=1), 0)
    assert "Qwen3MoeForCausalLM has no Linear module for train_mlp: the others are trained" in caplog.messages
    with pytest.raises(UnsupportedError, match=r"has no Linear module for train_mlp: there is nothing to train"):
        backend.add_run("none", types.LoraConfig(rank=1, train_attn=False, train_unembed=False), 0)


def test_training_a_tied_unembedding_leaves_the_embedding_alone(made: Callable[[str], Path]) -> None:
    backend = open_hf(made("gemma2"))
    before = {name: tensor.clone() for name, tensor in backend._model._model.state_dict().items()}
    assert torch.equal(before["lm_head.weight"], before["model.embed_tokens.weight"])
    add_random_run(backend, "run", types.LoraConfig(rank=4, **_groups("unembed")))
    data = weighted_datums(np.random.default_rng(2), (9, 30))
    seen = [forward_backward(backend, "run", data).metrics["loss:sum"]]
    backend.optim_step("run", types.AdamParams(learning_rate=1e-2))
    seen.append(forward(backend, "run", data).metrics["loss:sum"])
    assert seen[1] < seen[0]
    after = backend._model._model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", OTHERS)
def test_sampled_and_prompt_logprobs_are_those_of_forward(made: Callable[[str], Path], kind: str) -> None:
    """Past the window of the sliding layers (32) too. Each sequence has the bits that it has alone."""
    backend = open_hf(made(kind))
    add_random_run(backend, "run", types.LoraConfig(rank=4))
    adapter, given = backend.snapshot("run"), random_prompt(40)
    asked = request(given, adapter=adapter, num_samples=2, max_new=12)
    (alone,) = generate(backend, asked)
    (together, _) = generate(backend, asked, request(random_prompt(7), max_new=30))
    assert together.sequences == alone.sequences
    for sequence in alone.sequences:
        scored = forward(backend, "run", [continuation(given, sequence.tokens)]).logprobs[0]
        np.testing.assert_allclose(np.array(sequence.logprobs), scored[-12:], atol=FP32_LOGPROB)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_adapter_that_blew_up_fails_its_own_samples_only(made: Callable[[str], Path], temperature: float) -> None:
    backend = open_hf(made("phi3"))
    for run_id, scale in (("bad", torch.nan), ("good", 0.05)):
        add_random_run(backend, run_id, types.LoraConfig(rank=4), scale=scale)
    good, bad = (
        request([5, 6, 7], adapter=backend.snapshot(run_id), temperature=temperature, num_samples=2)
        for run_id in ("good", "bad")
    )
    (alone,) = generate(backend, good)
    beside, failed, base = generate(backend, good, bad, request([5, 6, 7]))
    assert beside.sequences == alone.sequences and len(base.sequences) == 1 and beside.error is base.error is None
    assert isinstance(failed.error, NumericsError) and failed.sequences == []
    assert "sample: this adapter gives logits that are not finite numbers for this prompt" in str(failed.error)
    assert backend.num_requests == 0


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "qwen3_moe", "gpt_neox"])
def test_a_few_steps_lower_the_loss_and_the_adapter_loads_in_peft(
    made: Callable[[str], Path], mint_home: Path, kind: str
) -> None:
    with embedded(mint_home) as world:
        run = world.client().create_lora_training_client(str(made(kind)), rank=4, seed=0)
        losses = []
        for _ in range(8):
            losses.append(run.forward_backward(batch(9)).result(GUARD).metrics["loss:sum"])
            run.optim_step(types.AdamParams(learning_rate=1e-2)).result(GUARD)
        ours = logprobs(run.forward(batch(9)).result(GUARD))
        path = run.save_state("a").result(GUARD).path
    assert losses[-1] < 0.7 * losses[0]
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: about tied unembeddings, and what transformers deprecates
        model = PeftModel.from_pretrained(transformers_model(made(kind)), checkpoint_folder(mint_home, path)).eval()
    theirs = [reference_logprobs(model, datum).detach().numpy() for datum in batch(9)]
    np.testing.assert_allclose(np.concatenate(theirs), ours, atol=FP32_LOGPROB)


# the plan


# gemma2's attention is not computed in blocks, so its memory grows with the square
@pytest.mark.parametrize(("kind", "mebibytes"), [("gemma2", 256), ("gpt_neox", 24)])
def test_the_plan_extrapolates_what_a_pass_keeps(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str, mebibytes: int
) -> None:
    """The longest datum of the plan, run, keeps three quarters of the memory: a pass of 32 and one of 64 told."""
    backend = open_hf(made(kind))
    given = mebibytes * 2**20
    backend._device = replace(backend._device, memory_bytes=given + backend._base_bytes)
    plan = backend.add_run("run", types.LoraConfig(rank=4), 0).plan
    assert 512 < plan.max_tokens == plan.max_tokens_per_pass < backend.limits.max_context
    needed = GAPS * backend._pass_bytes(backend._runs["run"].weights(), plan.max_tokens)
    assert needed == pytest.approx(given * 3 / 4, rel=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pass_needs_the_memory_planned_for_it(tiny: Callable[..., Path], dtype: str) -> None:
    """Growth of a process's resident memory over a pass of 1,536 tokens, at most 4/3 and at least half of the plan."""
    folder = tiny("llama", hidden=256, layers=20, intermediate=704, heads=8, kv_heads=4, vocab_size=2000, context=4096)
    planned, measured = map(int, run_child(memory_child, folder, "hf", dtype, 0, 0, 1536))
    assert planned / 2 <= measured <= planned * 4 / 3


def test_too_little_memory_is_refused_with_numbers(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_hf(made("phi3"))
    backend._device = replace(backend._device, memory_bytes=2**20 + backend._base_bytes)
    with pytest.raises(InputError, match=r"memory: 0\.0 GiB beside the base model hold a training pass of \d+ tokens"):
        backend.add_run("run", types.LoraConfig(rank=4), 0)


# refusals


@pytest.fixture
def folder(made: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny GPT-NeoX that a test may change."""
    return Path(shutil.copytree(made("gpt_neox"), tmp_path / "model"))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def test_what_transformers_cannot_load_is_refused_by_name(folder: Path) -> None:
    edit_config(folder, model_type="mystery", architectures=["MysteryLM"], auto_map={"AutoModelForCausalLM": "m.M"})
    with pytest.raises(
        UnsupportedError, match=r"^architecture 'mystery' \(MysteryLM\): transformers .* has no causal language model"
    ):
        open_hf(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"quantised weights \(gptq\) are not supported"):
        open_hf(edit_config(folder, quantization_config={"quant_method": "gptq"}))


def test_a_tensor_that_is_missing_or_misshapen_is_named(folder: Path) -> None:
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    _edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(3, 64)}))
    with pytest.raises(
        InputError, match=r"dense_h_to_4h\.weight' has shape \[3, 64\], GPTNeoXForCausalLM expects \[160"
    ):
        open_hf(folder)
    _edit_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=r"lack 1 tensors of GPTNeoXForCausalLM, e\.g\. gpt_neox\.layers\.1\.mlp"):
        open_hf(folder)


def test_a_tensor_without_use_is_announced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _edit_weights(folder, lambda tensors: tensors.update({"gpt_neox.extra.weight": torch.zeros(3)}))
    open_hf(folder)
    assert any("does not use 1 tensors of its files, e.g. gpt_neox.extra.weight" in m for m in caplog.messages)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"transformers cannot load the model in .*GPTNeoXForCausalLM"):
        open_hf(folder)


def test_a_part_of_another_model_is_refused(made: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match="TrOCRForCausalLM is a part of another model"):
        open_hf(made("trocr"))


def test_a_model_that_looks_ahead_or_keeps_no_cache_is_refused(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match="BertLMHeadModel keeps no key/value cache"):
        open_hf(made("bert"))
    with pytest.raises(UnsupportedError, match=r"MambaForCausalLM: its config\.json names no context length"):
        open_hf(made("mamba"))
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    whole = GPTNeoXAttention.forward

    def looks_ahead(self: Any, hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        return whole(self, hidden_states + hidden_states.mean(1, keepdim=True), *args, **options)

    monkeypatch.setattr(GPTNeoXAttention, "forward", looks_ahead)
    with pytest.raises(
        UnsupportedError, match=r"logits with a key/value cache differ by \d+\.\d% from those of a whole"
    ):
        open_hf(made("gpt_neox"))


def test_a_context_ends_where_longrope_changes_its_frequencies(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made("phi3"), tmp_path / "longrope"))
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    edit_config(folder, rope_parameters=rope, original_max_position_embeddings=256, max_position_embeddings=1024)
    assert open_hf(folder).limits.max_context == 256


def test_a_setting_without_effect_is_announced(made: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mint")
    HfBackend(made("phi3"), "m", Settings(made("phi3"), "cpu", "float32", 1, 64))
    assert any("MINT_MAX_TOKENS_PER_PASS is not used" in message for message in caplog.messages)
