"""A checkpoint that is damaged, foreign or incomplete is refused by name, changes nothing and is not listed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import mint
from mint import CheckpointError, CheckpointNotFoundError
from tests.support.clients import GUARD, Embedded, checkpoint_folder, same_weights, train, write_signed_manifest

ADAPTER, OPTIMIZER, MANIFEST = "adapter_model.safetensors", "optimizer.safetensors", "manifest.json"


@pytest.fixture
def path(run: mint.TrainingClient) -> str:
    """A checkpoint after one step; the run has taken one more since."""
    train(run, 1)
    saved = run.save_state("a").result(GUARD).path
    train(run, 1, first=1)
    return saved


def flip(file: Path, position: int = -1) -> None:
    """Change one bit of one byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(bytes(data))


def edit_manifest(folder: Path, **changes: Any) -> None:
    write_signed_manifest(folder, json.loads((folder / MANIFEST).read_text()) | changes)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def flipped(name: str, position: int = -1) -> Callable[[Path], None]:
    return lambda folder: flip(folder / name, position)


def edited(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, **changes)


def written(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_text(text) and None


DIFFERS = r"is missing or damaged \(its SHA-256 differs from the manifest's\)"
FOREIGN = "its manifest is damaged or from another program"
DAMAGE: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "adapter, last byte": (flipped(ADAPTER), CheckpointError, f"{ADAPTER} {DIFFERS}"),
    "adapter, first byte": (flipped(ADAPTER, 0), CheckpointError, f"{ADAPTER} {DIFFERS}"),
    "adapter, middle": (flipped(ADAPTER, 5000), CheckpointError, f"{ADAPTER} {DIFFERS}"),
    "adapter, cut": (lambda f: (f / ADAPTER).write_bytes(b"") and None, CheckpointError, f"{ADAPTER} {DIFFERS}"),
    "adapter, none": (without(ADAPTER), CheckpointError, f"{ADAPTER} {DIFFERS}"),
    "optimizer, last byte": (flipped(OPTIMIZER), CheckpointError, f"{OPTIMIZER} {DIFFERS}"),
    "optimizer, none": (without(OPTIMIZER), CheckpointError, f"{OPTIMIZER} {DIFFERS}"),
    "manifest, byte": (flipped(MANIFEST, 0), CheckpointError, FOREIGN),
    "manifest, cut": (written('{"format": 1'), CheckpointError, FOREIGN),
    "manifest, empty": (written(""), CheckpointError, FOREIGN),
    "manifest, another program's": (written('{"name": "x"}'), CheckpointError, FOREIGN),
    "manifest, spare key": (edited(extra=1), CheckpointError, f"{FOREIGN} .Extra inputs are not permitted"),
    "manifest, no hash": (edited(sha256={}), CheckpointError, f"{ADAPTER} {DIFFERS}"),
    "manifest, other format": (edited(format=2), CheckpointError, "format 2, this MinT reads format 1"),
    "manifest, none": (without(MANIFEST), CheckpointNotFoundError, "no checkpoint tinker://"),
}
STILL_LISTED = ("adapter", "optimizer", "manifest, no hash")  # their manifest is whole; listings read no weights


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_before_anything_is_used(
    world: Embedded,
    run: mint.TrainingClient,
    client: mint.ServiceClient,
    path: str,
    mint_home: Path,
    name: str,
    caplog: Any,
) -> None:
    damage, error, text = DAMAGE[name]
    before = world.state(run)
    damage(checkpoint_folder(mint_home, path))
    with pytest.raises(error, match=text) as caught:
        run.load_state_with_optimizer(path).result(GUARD)
    assert path in str(caught.value)
    assert same_weights(world.state(run), before)
    with pytest.raises(error, match=text):
        client.create_training_client_from_state_with_optimizer(path)
    if not name.startswith("optimizer"):
        with pytest.raises(error, match=text):
            client.create_sampling_client(path)
    caplog.set_level(logging.WARNING, "mint")
    listed = client.create_rest_client().list_checkpoints(run.model_id).result().checkpoints
    assert bool(listed) == name.startswith(STILL_LISTED)
    told = [
        record.getMessage() for record in caplog.records if record.getMessage().startswith("not listed: checkpoint")
    ]
    assert bool(told) == (not listed and error is CheckpointError)
    train(run, 1, first=2)
    run.save_state("a", overwrite=True).result(GUARD)  # saving again repairs it
    run.load_state_with_optimizer(path).result(GUARD)


def test_a_damaged_optimizer_does_not_keep_the_weights_back(
    run: mint.TrainingClient, path: str, mint_home: Path
) -> None:
    flip(checkpoint_folder(mint_home, path) / OPTIMIZER)
    run.load_state(path).result(GUARD)
    train(run, 1)


def with_new_hash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    write_signed_manifest(folder, manifest)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_leaves_no_new_run_behind(
    client: mint.ServiceClient, path: str, mint_home: Path, name: str
) -> None:
    file = checkpoint_folder(mint_home, path) / name
    file.write_bytes(file.read_bytes()[:-1])
    rest = client.create_rest_client()
    before = rest.list_training_runs().result()
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        client.create_training_client_from_state_with_optimizer(path)
    assert rest.list_training_runs().result() == before


def test_tensors_that_do_not_fit_the_run_are_named(
    world: Embedded, run: mint.TrainingClient, path: str, mint_home: Path
) -> None:
    """Hashes that agree do not make an adapter of other modules fit."""
    folder = checkpoint_folder(mint_home, path)
    before, tensors = world.state(run), load_file(folder / ADAPTER)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    shape = list(tensors[name].shape)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {k: v for k, v in tensors.items() if k != name},
            f"adapter weights: {name} should have shape .*, found no such tensor",
        ),
        (
            tensors | {name: tensors[name][:, 1:].copy()},
            rf"{name} should have shape .*, found shape \[{shape[0]}, {shape[1] - 1}\]",
        ),
        (
            tensors | {"spare.lora_A.weight": tensors[name]},
            "1 tensors belong to no trained module, e.g. spare.lora_A.weight",
        ),
    ]
    for changed, text in cases:
        save_file(changed, folder / ADAPTER)
        with_new_hash(folder, ADAPTER)
        with pytest.raises(CheckpointError, match=text):
            run.load_state(path).result(GUARD)
        assert same_weights(world.state(run), before)


def test_a_file_that_is_no_safetensors_is_refused(run: mint.TrainingClient, path: str, mint_home: Path) -> None:
    folder = checkpoint_folder(mint_home, path)
    (folder / ADAPTER).write_bytes(b"\x80\x04pickle")
    with_new_hash(folder, ADAPTER)
    with pytest.raises(CheckpointError, match=f"checkpoint {path}: "):
        run.load_state(path).result(GUARD)


def test_strange_things_in_the_folders_are_no_checkpoints(
    client: mint.ServiceClient, run: mint.TrainingClient, path: str, mint_home: Path
) -> None:
    rest, weights = client.create_rest_client(), checkpoint_folder(mint_home, path).parent
    (weights / "notes.txt").write_text("x")
    (weights / "empty").mkdir()
    (weights / ".new-half").mkdir()
    (weights / ".deleted-b").mkdir()
    runs = mint_home / "runs"
    (runs / "strange").mkdir()
    (runs / "strange" / "run.json").write_text("{}")
    (runs / "file").write_text("x")
    (runs / "renamed").mkdir()
    (runs / "renamed" / "run.json").write_text((weights.parent / "run.json").read_text())
    assert [c.tinker_path for c in rest.list_checkpoints(run.model_id).result().checkpoints] == [path]
    with pytest.raises(CheckpointNotFoundError, match="no run 'strange'"):
        rest.get_training_run("strange").result()
    with pytest.raises(CheckpointNotFoundError, match="no run 'renamed'"):  # the record inside is another's
        rest.get_training_run("renamed").result()


def test_a_copied_run_folder_is_not_listed_twice(client: mint.ServiceClient, path: str, mint_home: Path) -> None:
    (original,) = (mint_home / "runs").glob("*/run.json")
    (mint_home / "runs" / "copy").mkdir()
    (mint_home / "runs" / "copy" / "run.json").write_text(original.read_text())
    assert len(client.create_rest_client().list_user_checkpoints().result().checkpoints) == 1


def test_a_checkpoint_under_a_foreign_name_is_refused(run: mint.TrainingClient, path: str, mint_home: Path) -> None:
    folder = checkpoint_folder(mint_home, path)
    folder.rename(folder.with_name("b"))
    with pytest.raises(CheckpointError, match=path):
        run.load_state(f"tinker://{run.model_id}/weights/b").result(GUARD)


def test_a_later_format_with_other_fields_is_called_by_its_number(
    run: mint.TrainingClient, path: str, mint_home: Path
) -> None:
    edit_manifest(checkpoint_folder(mint_home, path), format=2, data_cursor="new")
    with pytest.raises(CheckpointError) as caught:
        run.load_state(path).result(GUARD)
    assert "format 2, this MinT reads format 1" in str(caught.value)


def test_a_checkpoint_from_before_kernels_were_recorded_is_read(
    run: mint.TrainingClient, path: str, mint_home: Path
) -> None:
    """As it was written and signed then, without the plan's last field."""
    file = checkpoint_folder(mint_home, path) / MANIFEST
    manifest = json.loads(file.read_text())
    assert manifest["plan"].pop("kernels") == "torch"
    unsigned = json.dumps({**manifest, "digest": ""}, separators=(",", ":"), ensure_ascii=False)
    file.write_text(json.dumps({**manifest, "digest": hashlib.sha256(unsigned.encode()).hexdigest()}))
    assert run.load_state_with_optimizer(path).result(GUARD).path == path


@pytest.mark.parametrize("name", ["adapter_config.json", MANIFEST])
def test_a_wrong_digit_is_found_in_every_file(run: mint.TrainingClient, path: str, mint_home: Path, name: str) -> None:
    file = checkpoint_folder(mint_home, path) / name
    before = file.read_text()
    file.write_text(before.replace('"r": 4', '"r": 5').replace('"step": 1', '"step": 3'))
    assert file.read_text() != before
    with pytest.raises(CheckpointError, match=name):
        run.load_state_with_optimizer(path).result(GUARD)


def test_a_damaged_checkpoint_can_be_deleted(
    client: mint.ServiceClient, run: mint.TrainingClient, path: str, mint_home: Path
) -> None:
    folder = checkpoint_folder(mint_home, path)
    (folder / MANIFEST).unlink()
    client.create_rest_client().delete_checkpoint_from_tinker_path(path).result(GUARD)
    assert not folder.exists()
