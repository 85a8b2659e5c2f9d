"""Weight files with an adapter merged in: every number by the formula, rounded once, and transformers agrees with PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mint import types
from mint.engine.backend import AdapterState
from mint.engine.merge import Merged, merge_adapter
from mint.errors import CheckpointError, InputError, UnsupportedError
from tests.support.engine import (
    FP32_LOGPROB,
    add_random_run,
    largest_difference,
    open_backend,
    peft_model,
    reference_logprobs,
    transformers_model,
    weighted_datums,
)

ALL = types.LoraConfig(rank=4)
INNER = types.LoraConfig(rank=4, train_unembed=False)
UNEMBED = types.LoraConfig(rank=4, train_attn=False, train_mlp=False)
# family, tied, which modules
CASES: dict[str, tuple[str, bool, types.LoraConfig]] = {
    "tied, all": ("qwen3", True, ALL),
    "tied, without unembedding": ("qwen3", True, INNER),
    "tied, unembedding only": ("smollm", True, UNEMBED),
    "untied, all": ("llama", False, ALL),
    "untied, biases": ("qwen2", False, ALL),
    "untied, without unembedding": ("mistral", False, INNER),
}
WHOLE = 10**12


def random_adapter(base: Path, lora: types.LoraConfig, scale: float = 0.05) -> AdapterState:
    return AdapterState(add_random_run(open_backend(base), "run", lora, scale=scale))


def merged_folder(base: Path, folder: Path, lora: types.LoraConfig, state: AdapterState, **options: Any) -> Merged:
    folder.mkdir()
    return merge_adapter(base, folder, lora, state, **{"shard_bytes": WHOLE, **options})


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, read by the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def cast(base: Path, folder: Path, *dtypes: torch.dtype) -> Path:
    """A copy of the model folder whose tensors are stored in these dtypes in turn."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(tensors.items())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def by_the_formula(base: Path, lora: types.LoraConfig, state: AdapterState) -> dict[str, Tensor]:
    """What every merged weight should be, in float64 and not rounded."""
    tensors = stored(base)
    made = {}
    for name, array in state.tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = tensors.get(f"{module}.weight", tensors["model.embed_tokens.weight"])
            b = torch.from_numpy(state.tensors[name.replace(".lora_A.", ".lora_B.")]).double()
            made[f"{module}.weight"] = weight.double() + 32 / lora.rank * b @ torch.from_numpy(array).double()
    return made


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_in_transformers_is_base_and_adapter_in_peft(
    tiny: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, tied, lora = CASES[case]
    base, folder = tiny(family, tied=tied), tmp_path / "merged"
    state = random_adapter(base, lora)
    assert merged_folder(base, folder, lora, state) == Merged(2.0**-23, untied=tied and lora.train_unembed)
    data = weighted_datums(np.random.default_rng(1), [40, 150, 7])
    peft, _ = peft_model(base, dict(state.tensors), lora.rank)
    merged, plain = transformers_model(folder), transformers_model(base)
    with torch.no_grad():
        expected, found, untouched = (
            [reference_logprobs(model, datum) for datum in data] for model in (peft, merged, plain)
        )
    assert largest_difference(found, expected) <= FP32_LOGPROB
    assert largest_difference(untouched, expected) > 100 * FP32_LOGPROB  # the adapter matters


@pytest.mark.parametrize("case", CASES)
def test_what_no_adapter_touches_keeps_its_bytes_and_the_config_says_whether_the_embedding_is_shared(
    tiny: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, tied, lora = CASES[case]
    base, folder = tiny(family, tied=tied), tmp_path / "merged"
    state = random_adapter(base, lora)
    merged_folder(base, folder, lora, state)
    before, after, changed = stored(base), stored(folder), by_the_formula(base, lora, state)
    assert after.keys() == before.keys() | ({"lm_head.weight"} if lora.train_unembed else set())
    assert "model.embed_tokens.weight" not in changed
    for name in before.keys() - changed.keys():
        assert torch.equal(before[name], after[name]), name
    configs = [json.loads((place / "config.json").read_text()) for place in (base, folder)]
    assert configs[1] == {**configs[0], "tie_word_embeddings": tied and not lora.train_unembed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_the_formula_s_rounded_once_to_the_stored_dtype(
    tiny: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Against float64. float32 arithmetic is off by some 2^-23, so a 16-bit weight is another than the nearest only
    where the exact value lies that close to the middle of two: in fewer than 1 of 1,000, and then it is the next."""
    base = cast(tiny("qwen3"), tmp_path / "base", dtype)
    folder, state = tmp_path / "merged", random_adapter(base, ALL)
    assert merged_folder(base, folder, ALL, state).eps == torch.finfo(dtype).eps
    after, expected = stored(folder), by_the_formula(base, ALL, state)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert len(expected) == 2 * 7 + 1
    for name, exact in expected.items():
        found = after[name].double()
        assert (found - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max() + 1e-6
        if dtype != torch.float32:
            assert (found != exact.to(dtype).double()).double().mean() < 1e-3, name
        assert (found - stored(base).get(name, torch.zeros(())).double()).abs().max() > 1e-2


def byte_offsets(file: Path) -> dict[str, int]:
    """Where in the file every tensor begins, read by the format's description."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def test_dtypes_may_be_mixed_and_every_tensor_is_aligned(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = cast(
        tiny("llama", hidden=63, heads=3, kv_heads=1, head_dim=16),
        tmp_path / "base",
        torch.bfloat16,
        torch.float32,
        torch.float16,
    )
    folder, state = tmp_path / "merged", random_adapter(base, ALL)
    assert merged_folder(base, folder, ALL, state).eps == 2.0**-7
    before, after = stored(base), stored(folder)
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    offsets = byte_offsets(folder / "model.safetensors")
    assert [name for name, tensor in after.items() if offsets[name] % tensor.dtype.itemsize] == []
    for name, exact in by_the_formula(base, ALL, state).items():
        torch.testing.assert_close(
            after[name].double(), exact, rtol=0.51 * torch.finfo(after[name].dtype).eps, atol=1e-6
        )


@pytest.mark.parametrize("limit", [1, 60_000, 100_000, 400_000])
def test_a_small_shard_size_gives_shards_that_transformers_and_mint_read(
    tiny: Callable[..., Path], tmp_path: Path, limit: int
) -> None:
    base, state = tiny("qwen3"), random_adapter(tiny("qwen3"), ALL)
    whole, folder = tmp_path / "whole", tmp_path / "shards"
    merged_folder(base, whole, ALL, state)
    merged_folder(base, folder, ALL, state, shard_bytes=limit)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 1
    tensors = stored(whole)
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        shard = load_file(folder / file)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= limit
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored(folder).items())
    datum = weighted_datums(np.random.default_rng(2), [30])[0]
    with torch.no_grad():
        one, other = (reference_logprobs(transformers_model(place), datum) for place in (whole, folder))
    assert torch.equal(one, other)
    # a merged model is a base like any other, and its shards can be merged again
    merged_folder(folder, tmp_path / "again", ALL, random_adapter(folder, ALL, scale=0.0))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in stored(tmp_path / "again").items())


def test_the_library_s_shards_of_a_base_are_read(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, sharded = tiny("llama"), tmp_path / "base"
    transformers_model(base).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    state = random_adapter(base, ALL)
    merged_folder(base, tmp_path / "one", ALL, state)
    merged_folder(sharded, tmp_path / "other", ALL, state)
    one, other = stored(tmp_path / "one"), stored(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tied_base_s_unembedding_is_its_embedding_whatever_the_file_holds_under_that_name(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny("qwen3"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    spare = {**tensors, "lm_head.weight": torch.zeros_like(tensors["model.embed_tokens.weight"])}
    save_file(spare, base / "model.safetensors", {"format": "pt"})
    state = random_adapter(base, ALL)
    merged_folder(base, tmp_path / "merged", ALL, state)
    merged_folder(tiny("qwen3"), tmp_path / "plain", ALL, state)
    one, other = stored(tmp_path / "merged"), stored(tmp_path / "plain")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    state, folder = random_adapter(tiny("llama"), ALL), tmp_path / "merged"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for lora, tensors, message in (
        (types.LoraConfig(rank=5), state.tensors, rf"{name} should have shape \[5, 64\], found shape \[4, 64\]"),
        (INNER, state.tensors, "2 tensors belong to no trained module"),
        (ALL, {k: v for k, v in state.tensors.items() if k != name}, f"{name} should have .*, found no such tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merged_folder(tiny("llama"), folder, lora, AdapterState(tensors))
        assert list(folder.iterdir()) == []
        folder.rmdir()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].double()}),
            UnsupportedError,
            r"tensor 'model\.norm\.weight' is stored as F64; merging knows F32, F16, BF16\. Export the adapter",
        ),
        (lambda tensors: tensors.pop("lm_head.weight"), InputError, r"hold no tensor 'lm_head\.weight'"),
    ],
    ids=["dtype", "missing"],
)
def test_a_base_that_cannot_be_merged_into_is_refused_before_anything_is_written(
    tiny: Callable[..., Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], error: Any, message: str
) -> None:
    base, folder = Path(shutil.copytree(tiny("llama"), tmp_path / "base")), tmp_path / "merged"
    state = random_adapter(base, ALL)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=message):
        merged_folder(base, folder, ALL, state)
    assert list(folder.iterdir()) == []
