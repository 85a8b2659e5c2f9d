"""Several processes on one MINT_HOME: each sees what the others save, and whatever they delete, nobody trips over it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import mint
from mint.local import checkpoints
from tests.support.clients import GUARD, Embedded, checkpoint_folder, same_weights, start_child, train

STEPS = 12

# Trains and saves while others list, load, delete and set expiries; says its run's name first and waits to be let go.
WRITER = f"""
    import sys
    import mint
    from tests.support.clients import GUARD, train

    client = mint.ServiceClient()
    run = client.create_lora_training_client(sys.argv[1], rank=4, seed=int(sys.argv[2]))
    run.save_state("latest").result(GUARD)
    print(run.model_id, flush=True)
    sys.stdin.readline()
    seen = client.create_rest_client().list_user_checkpoints().result().checkpoints
    assert {{c.checkpoint_id for c in seen}} == {{"weights/latest"}} and len(seen) == 2, seen
    for step in range({STEPS}):
        train(run, 1, first=step)
        run.save_state(f"step-{{step}}").result(GUARD)
        run.save_state("latest", overwrite=True).result(GUARD)
"""


@pytest.fixture
def writers(tiny_model: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of WRITER; a test that fails waits for them, too."""
    with contextlib.ExitStack() as running:
        yield [
            running.enter_context(start_child(WRITER, tiny_model, str(seed), MINT_DTYPE="float32")) for seed in (0, 1)
        ]


def test_two_processes_train_and_save_while_a_third_lists_loads_and_deletes(
    world: Embedded, writers: list[subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    runs = [writer.stdout.readline().strip() for writer in writers if writer.stdout]
    rest = world.rest()
    latest = [f"tinker://{run}/weights/latest" for run in runs]

    def paths() -> list[str]:
        return [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints]

    assert sorted(paths()) == sorted(latest)
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        found = paths()
        assert set(latest) <= set(found)  # at every moment of its overwrites
        for path in found:
            with contextlib.nullcontext() if path in latest else contextlib.suppress(mint.CheckpointNotFoundError):
                rest.get_weights_info_by_tinker_path(path).result()  # reads and checks every file
                rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result(GUARD)
            if path not in latest:
                rest.delete_checkpoint_from_tinker_path(path).result(GUARD)
    for writer in writers:
        assert writer.communicate()[1] == "" and writer.returncode == 0
    left = set(paths())
    for run, path in zip(runs, latest, strict=True):
        assert left.issuperset({path}) and rest.get_training_run(run).result().corrupted is False
        resumed = world.client().create_training_client_from_state_with_optimizer(path)
        assert world.state(resumed).step == STEPS
        assert not list(checkpoint_folder(world.core.settings.home, path).parent.glob(".*"))  # nothing half-written
    assert caplog.messages == []  # nothing was "not listed"


def meanwhile(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, does: Callable[[], None]) -> None:
    """Another process does something just before this one calls `module.name` for the first time."""
    original, calls = getattr(module, name), itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            monkeypatch.setattr(module, name, original)
            does()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(
    "does",
    [
        "sets the expiry of another",
        "sets the expiry of what is replaced",
        "deletes another",
        "deletes what is replaced",
    ],
)
@pytest.mark.parametrize("when", ["fsync", "rename", "rmtree"])
def test_a_save_does_not_mind_what_another_process_does(
    world: Embedded,
    run: mint.TrainingClient,
    mint_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    does: str,
    when: str,
) -> None:
    paths = [run.save_state(name).result(GUARD).path for name in ("saved", "other")]
    saved, other = (checkpoint_folder(mint_home, path) for path in paths)
    train(run, 1)
    actions: dict[str, Callable[[], None]] = {
        "sets the expiry of another": lambda: checkpoints.write_expiry(other, paths[1], None),
        "sets the expiry of what is replaced": lambda: checkpoints.write_expiry(saved, paths[0], None),
        "deletes another": lambda: checkpoints.delete_checkpoint(other, paths[1]),
        "deletes what is replaced": lambda: checkpoints.delete_checkpoint(saved, paths[0]),
    }
    meanwhile(monkeypatch, shutil if when == "rmtree" else os, when, actions[does])
    deletes_the_new = does == "deletes what is replaced" and when == "rmtree"  # which has its name by then
    run.save_state("saved", overwrite=True).result(GUARD)
    left = {p.name for p in saved.parent.iterdir()}
    assert left == {"saved", "other"} - ({"other"} if does == "deletes another" else set()) - (
        {"saved"} if deletes_the_new else set()
    )
    if not deletes_the_new:
        expected = world.state(run)
        resumed = world.client().create_training_client_from_state_with_optimizer(paths[0])
        assert same_weights(world.state(resumed), expected)


def test_a_save_removes_what_it_replaced_although_another_process_writes_there(
    run: mint.TrainingClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when it sets the expiry of the checkpoint that this one overwrites."""
    folder = checkpoint_folder(mint_home, run.save_state("saved").result(GUARD).path)
    written = checkpoints._old(folder) / ".new-expiry"
    meanwhile(monkeypatch, os, "rmdir", lambda: written.write_text("{}"))
    run.save_state("saved", overwrite=True).result(GUARD)
    assert os.listdir(folder.parent) == ["saved"]


@pytest.mark.parametrize("when", ["rename", "rmtree"])
def test_two_processes_may_delete_the_same(
    run: mint.TrainingClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = run.save_state("a").result(GUARD).path
    folder = checkpoint_folder(mint_home, path)

    def other() -> None:
        if when == "rename":
            checkpoints.delete_checkpoint(folder, path)
        else:  # the owner tidies up before a save
            checkpoints._tidy(folder)

    meanwhile(monkeypatch, os if when == "rename" else shutil, when, other)
    checkpoints.delete_checkpoint(folder, path)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize("is_removed", [True, False])
@pytest.mark.parametrize(("module", "name"), [(checkpoints, "_signed"), (os, "fsync"), (os, "replace")])
def test_an_expiry_is_set_for_the_checkpoint_that_another_process_has_just_replaced(
    world: Embedded, run: mint.TrainingClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, is_removed: bool,
) -> None:  # fmt: skip
    """Whether the manifest that it changes was only read by then, or the new one written, or flushed; whether or not the
    old checkpoint is removed already."""
    path = run.save_state("a").result(GUARD).path
    folder, expires = checkpoint_folder(mint_home, path), datetime(2100, 1, 1, tzinfo=UTC)
    train(run, 1)

    def replace() -> None:
        with pytest.MonkeyPatch.context() as patch:
            if not is_removed:
                patch.setattr(checkpoints, "_remove", lambda _: None)
            run.save_state("a", overwrite=True).result(GUARD)

    meanwhile(monkeypatch, module, name, replace)
    checkpoints.write_expiry(folder, path, expires)
    assert world.rest().list_checkpoints(run.model_id).result().checkpoints[0].expires_at == expires
    assert len(list(folder.iterdir())) == 4
    assert [p.name for p in folder.parent.iterdir() if is_removed or p.name != ".old-a"] == ["a"]
    run.load_state_with_optimizer(path).result(GUARD)
    assert world.state(run).step == 1


def test_a_listing_does_not_mix_two_saves(
    run: mint.TrainingClient, mint_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is replaced once its manifest was read would have files of no size at all."""
    path = run.save_state("a").result(GUARD).path
    folder = checkpoint_folder(mint_home, path)
    meanwhile(monkeypatch, os, "listdir", lambda: run.save_state("a", overwrite=True).result(GUARD) and None)
    found = checkpoints.describe(folder, path)
    assert found.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert found.time == checkpoints.read_manifest(folder, path).time
