"""kill -9 at every step of a save: what stood there before still stands, or the new one does; nothing half is listed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load

import mint
from mint.engine.backend import AdapterState
from mint.local import checkpoints
from tests.support.clients import GUARD, Embedded, checkpoint_folder, child, embedded, same_weights, train

# For every step k of the save of NEW as TARGET: a process of its own on a copy of the folder, which kills itself before
# step k. Steps are the calls that change the disk in an order that matters. The process holds no torch, so it may fork.
KILLED = """
    import json, os, shutil, signal, sys
    from pathlib import Path
    from mint.local.checkpoints import read_checkpoint, write_checkpoint

    home, copies, new, target = (Path(argument) for argument in sys.argv[1:])
    run = json.loads((home / new).parents[1].joinpath("run.json").read_text())["run_id"]
    manifest, state = read_checkpoint(home / new, f"tinker://{run}/weights/{new.name}", optimizer=True)
    path = manifest.path.rpartition("/")[0] + "/" + target.name
    manifest = manifest.model_copy(update={"path": path, "sha256": {}})
    steps = []

    def counted(name):
        original = getattr(os, name)

        def call(*arguments, **keywords):
            steps.append(name)
            if len(steps) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    for name in ("fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(name))
    for kill_before in range(1, 100):
        copy = copies / f"{kill_before:02d}"
        shutil.copytree(home, copy)
        if (pid := os.fork()) == 0:
            write_checkpoint(copy / target, manifest, state, overwrite=True)
            (copy / "steps.json").write_text(json.dumps(steps))
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            break
"""


def killed_at_every_step(mint_home: Path, copies: Path, new: str, target: str) -> list[tuple[str, Path]]:
    """Pairs of (the step before which the save was killed, its MINT_HOME); the last was not killed and has no step."""
    relative = [str(checkpoint_folder(mint_home, path).relative_to(mint_home)) for path in (new, target)]
    copies.mkdir()
    done = child(KILLED, str(mint_home), str(copies), *relative)
    assert done.returncode == 0, done.stderr
    homes = sorted(copies.iterdir())
    steps = json.loads((homes[-1] / "steps.json").read_text())
    assert len(steps) == len(homes) - 1
    return list(zip([*steps, ""], homes, strict=True))


def state_of(home: Path, path: str) -> AdapterState:
    """What a new process gets from the checkpoint."""
    folder = checkpoint_folder(home, path)
    return checkpoints.read_checkpoint(folder, path, optimizer=True)[1]


@pytest.fixture
def two_states(mint_home: Path, tiny_model: str) -> tuple[str, str]:
    """Checkpoints "old" after one step and "new" after two, of a service that is gone."""
    with embedded(mint_home) as world:
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        paths = []
        for step, name in enumerate(("old", "new")):
            train(run, 1, first=step)
            paths.append(run.save_state(name).result(GUARD).path)
        return paths[0], paths[1]


def test_an_overwrite_that_is_killed_leaves_the_old_or_the_new_checkpoint(
    two_states: tuple[str, str], mint_home: Path, tmp_path: Path, tiny_model: str
) -> None:
    path, new = two_states
    run_id = path.removeprefix("tinker://").partition("/")[0]
    before, after = state_of(mint_home, path), state_of(mint_home, new)
    homes = killed_at_every_step(mint_home, tmp_path / "copies", new, path)
    renames = [i for i, (step, _) in enumerate(homes) if step == "rename"]
    assert len(renames) == 2 and len(homes) >= 10
    for i, (step, home) in enumerate(homes):
        with embedded(home) as world:  # a new process: lists first, then loads
            client = world.client()
            listed = client.create_rest_client().list_checkpoints(run_id).result().checkpoints
            assert sorted(c.tinker_path for c in listed) == sorted([path, new])
            resumed = client.create_training_client_from_state_with_optimizer(path)
            expected = after if i > renames[1] else before
            assert same_weights(world.state(resumed), expected), f"killed before step {i}, {step}"
        assert same_weights(state_of(home, path), expected)  # and without a listing before


def test_reading_what_an_interrupted_overwrite_left_changes_nothing(
    two_states: tuple[str, str], mint_home: Path, tmp_path: Path
) -> None:
    path, new = two_states
    before = state_of(mint_home, path)
    homes = killed_at_every_step(mint_home, tmp_path / "copies", new, path)
    second = [i for i, (step, _) in enumerate(homes) if step == "rename"][1]
    home = homes[second][1]
    folder = checkpoint_folder(home, path)
    assert not folder.exists() and folder.with_name(".old-old").is_dir()
    for _ in range(2):
        assert same_weights(state_of(home, path), before)
    assert not folder.exists() and folder.with_name(".old-old").is_dir()
    checkpoints.delete_checkpoint(folder, path)
    with pytest.raises(mint.CheckpointNotFoundError):
        state_of(home, path)


def test_a_first_save_that_is_killed_leaves_nothing_or_all(
    two_states: tuple[str, str], mint_home: Path, tmp_path: Path
) -> None:
    _, new = two_states
    run_id, _, kept = new.removeprefix("tinker://").partition("/weights/")
    path = f"tinker://{run_id}/weights/fresh"
    homes = killed_at_every_step(mint_home, tmp_path / "copies", new, path)
    (rename,) = [i for i, (step, _) in enumerate(homes) if step == "rename"]
    for i, (step, home) in enumerate(homes):
        with embedded(home) as world:
            listed = world.rest().list_checkpoints(run_id).result().checkpoints
        names = {c.checkpoint_id.removeprefix("weights/") for c in listed}
        assert names - {"old", kept} == ({"fresh"} if i > rename else set()), f"killed before step {i}, {step}"
        if i > rename:
            assert same_weights(state_of(home, path), state_of(mint_home, new))
        else:
            with pytest.raises(mint.CheckpointNotFoundError):
                state_of(home, path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_everything_is_flushed_before_it_gets_its_name_and_the_name_after(
    run: mint.TrainingClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        run.save_state("a").result(GUARD)
    flushed: list[int] = []
    missing: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def checking_rename(source: Path, target: Path) -> None:
        rename(source, target)
        if source.name.startswith(".new-"):
            parts = [target, *target.iterdir()]
            missing.extend(part.name for part in parts if part.stat().st_ino not in flushed)
            assert len(parts) == 5
            flushed.clear()

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", checking_rename)
    folder = checkpoint_folder(mint_home, run.save_state("a", overwrite=overwrite).result(GUARD).path)
    assert missing == []
    assert folder.parent.stat().st_ino in flushed


def test_the_next_save_cleans_up_after_a_killed_one(run: mint.TrainingClient, mint_home: Path) -> None:
    folder = checkpoint_folder(mint_home, run.save_state("a").result(GUARD).path)
    (folder.parent / ".new-a-0123456789abcdef").mkdir()
    run.save_state("a", overwrite=True).result(GUARD)
    assert [p.name for p in folder.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_rubbish(
    world: Embedded, run: mint.TrainingClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = run.save_state("a").result(GUARD).path
    saved = world.state(run)
    train(run, 1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space left on device"):
            run.save_state("a", overwrite=True).result(GUARD)
    assert [p.name for p in checkpoint_folder(mint_home, path).parent.iterdir()] == ["a"]
    train(run, 1, first=1)
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), saved)


def test_a_delete_that_was_killed_does_not_keep_the_name(
    run: mint.TrainingClient, client: mint.ServiceClient, mint_home: Path
) -> None:
    folder = checkpoint_folder(mint_home, run.save_state("a").result(GUARD).path)
    shutil.copytree(folder, folder.with_name(".deleted-a"))  # killed after the rename
    client.create_rest_client().delete_checkpoint(run.model_id, "weights/a").result(GUARD)
    assert not folder.exists()


def test_what_a_save_that_failed_between_the_renames_left_is_kept_by_the_next(
    world: Embedded, run: mint.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.save_state("a").result(GUARD).path
    saved, rename = world.state(run), os.rename
    train(run, 1)

    def fails_for_the_new(source: Path, target: Path) -> None:
        if source.name.startswith(".new-"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for name, failing in (("rename", fails_for_the_new), ("fsync", full)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with pytest.raises(OSError):
                run.save_state("a", overwrite=True).result(GUARD)
        assert [c.tinker_path for c in world.rest().list_checkpoints(run.model_id).result().checkpoints] == [path]
    with pytest.raises(mint.CheckpointError, match=f"checkpoint {path} exists"):
        run.save_state("a").result(GUARD)
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), saved)


def run_elsewhere(function: Callable[[], Any]) -> None:
    """In another thread, as another process would."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(GUARD)


@pytest.mark.parametrize("number", [1, 2], ids=["between the renames", "before the old one is removed"])
def test_a_listing_during_an_overwrite_does_not_disturb_it(
    world: Embedded, run: mint.TrainingClient, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = run.save_state("a").result(GUARD).path
    train(run, 1)
    saved, rename, renames, listed = world.state(run), os.rename, [], []
    rest = world.rest()

    def slow(*args: Any) -> None:
        rename(*args)
        renames.append(args)
        if len(renames) == number:
            monkeypatch.setattr(os, "rename", rename)
            run_elsewhere(lambda: listed.extend(rest.list_checkpoints(run.model_id).result().checkpoints))

    monkeypatch.setattr(os, "rename", slow)
    assert run.save_state("a", overwrite=True).result(GUARD).path == path
    assert [c.tinker_path for c in listed] == [path]
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), saved)


def test_a_listing_that_began_during_an_overwrite_ends_after_it(
    world: Embedded, run: mint.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run.save_state("a").result(GUARD).path
    rename, locate = os.rename, checkpoints.locate
    between, go_on = threading.Event(), threading.Event()

    def slow_rename(*args: Any) -> None:
        monkeypatch.setattr(os, "rename", rename)
        rename(*args)
        between.set()
        go_on.wait(GUARD)

    def slow_locate(folder: Path) -> Path:
        monkeypatch.setattr(checkpoints, "locate", locate)
        place = locate(folder)
        go_on.set()
        saved.result(GUARD)
        return place

    monkeypatch.setattr(os, "rename", slow_rename)
    saved = run.save_state("a", overwrite=True)
    assert between.wait(GUARD)
    monkeypatch.setattr(checkpoints, "locate", slow_locate)
    assert [c.tinker_path for c in world.rest().list_checkpoints(run.model_id).result().checkpoints] == [path]


@pytest.mark.parametrize("opened", ["manifest.json", "adapter_model.safetensors", "adapter_config.json"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(
    world: Embedded, run: mint.TrainingClient, monkeypatch: pytest.MonkeyPatch, mint_home: Path, opened: str
) -> None:
    path = run.save_state("a").result(GUARD).path
    folder = checkpoint_folder(mint_home, path)
    old = (folder / "adapter_model.safetensors").read_bytes()
    train(run, 1)
    plain, found = os.open, []

    def then_replace(name: Any, *arguments: Any, **options: Any) -> int:
        descriptor = plain(name, *arguments, **options)
        if name == opened:
            monkeypatch.setattr(os, "open", plain)
            run.save_state("a", overwrite=True).result(GUARD)
        return descriptor

    def keep(content: bytes) -> Any:
        found.append(content)
        return load(content)

    monkeypatch.setattr(checkpoints, "load", keep)
    monkeypatch.setattr(os, "open", then_replace)
    world.rest().get_weights_info_by_tinker_path(path).result(GUARD)
    new = (folder / "adapter_model.safetensors").read_bytes()
    # what was open was held, but is of a save that is gone
    assert old != new and found == ([old, new] if opened == "adapter_config.json" else [new])


def test_a_delete_that_is_killed_does_not_bring_an_older_one_back(
    run: mint.TrainingClient, client: mint.ServiceClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(mint_home, run.save_state("a").result(GUARD).path)
    shutil.copytree(folder, folder.with_name(".old-a"))  # an overwrite was killed before it removed what it replaced
    rest = client.create_rest_client()

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            rest.delete_checkpoint(run.model_id, "weights/a").result(GUARD)
    left = [c.checkpoint_id for c in rest.list_checkpoints(run.model_id).result().checkpoints]
    assert not folder.exists() and left == []
