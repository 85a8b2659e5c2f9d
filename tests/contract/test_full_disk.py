"""A MINT_HOME that cannot be written, full or read-only: clear errors, nothing lost, and the run goes on.

The disk is filled for real as far as one process sees it: the system lets no file grow beyond a limit (RLIMIT_FSIZE), so
that writes stop short in the middle. Read-only is a MINT_HOME below a regular file, which binds root, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mint
from mint import StorageError, types
from tests.support.clients import (
    GUARD,
    LEARNING,
    Embedded,
    batch,
    checkpoint_folder,
    embedded,
    prompt,
    same_weights,
    train,
)
from tests.support.disk import full_disk

SHORT = types.SamplingParams(max_tokens=4, seed=0)
WHAT_TO_DO = "make it writable, then try again; or start again with MINT_HOME set to another folder"


def listed(run: mint.TrainingClient) -> list[str]:
    rest = mint.RestClient(service=run._service)
    return [c.checkpoint_id for c in rest.list_checkpoints(run.model_id).result().checkpoints]


@pytest.mark.parametrize("where", ["at the first byte", "in the adapter", "in the optimizer"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_does_not_fit_loses_nothing_and_a_later_one_succeeds(
    world: Embedded, run: mint.TrainingClient, mint_home: Path, overwrite: bool, where: str
) -> None:
    train(run, 1)
    kept = run.save_state("kept").result(GUARD).path
    saved, folder = world.state(run), checkpoint_folder(mint_home, kept)
    train(run, 1, first=1)
    world.settle()
    size = (folder / "adapter_model.safetensors").stat().st_size
    name = "kept" if overwrite else "fresh"
    path = f"tinker://{run.model_id}/weights/{name}"
    with (
        full_disk({"at the first byte": 0, "in the adapter": size // 2, "in the optimizer": size}[where]),
        pytest.raises(StorageError) as caught,
    ):
        run.save_state(name, overwrite=overwrite).result(GUARD)
    text = str(caught.value)
    assert text.startswith(f"saving {path} failed, and what was saved before is kept: File too large ({mint_home}/runs")
    needed = 3 * sum(array.nbytes for array in saved.tensors.values()) / 1e6
    assert f"; {needed:.1f} MB are needed, " in text and re.search(r", \d+\.\d MB are free there\)\. ", text)
    assert text.endswith(f"Make room in MINT_HOME ({mint_home}) or {WHAT_TO_DO}")
    assert listed(run) == ["weights/kept"]
    assert [p.name for p in folder.parent.iterdir()] == ["kept"]  # no rubbish
    now = world.state(run)
    resumed = world.client().create_training_client_from_state_with_optimizer(kept)
    assert same_weights(world.state(resumed), saved)
    assert run.save_state(name, overwrite=overwrite).result(GUARD).path == path
    train(run, 1, first=2)
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), now)


def test_sampler_weights_and_expiries_that_do_not_fit_are_told_and_leave_nothing(
    run: mint.TrainingClient, mint_home: Path
) -> None:
    rest = mint.RestClient(service=run._service)
    path = run.save_weights_for_sampler("a").result(GUARD).path
    assert path is not None
    before = sorted((p, p.read_bytes()) for p in mint_home.rglob("*") if p.is_file())
    calls: dict[str, Callable[[], Any]] = {
        f"saving tinker://{run.model_id}/sampler_weights/b failed": lambda: run.save_weights_for_sampler("b"),
        f"setting the expiry of {path} failed": lambda: rest.set_checkpoint_ttl_from_tinker_path(path, 3600),
    }
    for text, call in calls.items():
        with full_disk(), pytest.raises(StorageError, match=f"^{text}, and what was saved before is kept: File too"):
            call().result(GUARD)
        assert sorted((p, p.read_bytes()) for p in mint_home.rglob("*") if p.is_file()) == before
    assert run.create_sampling_client(path).sample(prompt(), 1, SHORT).result(GUARD).sequences


def test_steps_on_a_full_disk_are_taken_and_their_metrics_written_when_there_is_room(
    world: Embedded, run: mint.TrainingClient, mint_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run, 1)
    world.settle()
    (file,) = (mint_home / "runs").glob("*/metrics.jsonl")
    before = file.read_bytes()
    returned = []
    with full_disk(len(before) + 10):  # the line stops in its middle
        for step in (1, 2):
            loss = run.forward_backward(batch(step)).result(GUARD).metrics["loss:sum"]
            returned.append(run.optim_step(LEARNING).result(GUARD).metrics | {"loss:sum": loss})
        assert file.read_bytes() == before
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]  # once
    text = told.getMessage()
    assert text.startswith(f"writing the metrics of {run.model_id} failed, and what was saved before is kept: File too")
    assert text.endswith(f"{WHAT_TO_DO}. Training goes on; the lines are kept and written with a later step's")
    train(run, 1, first=3)
    world.settle()
    first, *others, last = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["step"], last["step"]) == (1.0, 4.0) and last["time"] > others[1]["time"] > others[0]["time"]
    assert [{key: row[key] for key in row if key in returned[0]} for row in others] == returned


def test_metrics_that_could_not_be_written_to_the_end_are_told(
    world: Embedded, run: mint.TrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = run.model_id
    with full_disk():
        train(run, 2)
        world.settle()
    world.service().unload(run_id).result(GUARD)
    assert caplog.messages[-1] == f"{run_id}: the metrics of its last 2 steps were never written"


def test_a_run_that_cannot_be_written_is_not_made_and_the_client_goes_on(
    world: Embedded, client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str, mint_home: Path
) -> None:
    with full_disk(), pytest.raises(StorageError, match=r"^creating run \w+:train:1 failed, .*File too large"):
        client.create_lora_training_client(tiny_model, rank=2)
    assert [p.name for p in (mint_home / "runs").iterdir()] == [run.model_id.replace(":", "_")]
    assert list(world.core.runs) == [run.model_id]
    train(client.create_lora_training_client(tiny_model, rank=2), 1)


def test_a_home_that_cannot_be_made_is_named_and_base_models_can_be_sampled(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "file").write_text("no folder")
    home = tmp_path / "file" / "home"
    with embedded(home) as world:
        client, rest = world.client(), world.rest()
        with pytest.raises(StorageError) as caught:
            client.create_lora_training_client(tiny_model, rank=2)
        text = str(caught.value)
        assert re.match(r"creating run \w+:train:0 failed, and what was saved before is kept: Not a directory \(", text)
        assert text.endswith(f"Make room in MINT_HOME ({home}) or {WHAT_TO_DO}")
        assert world.core.runs == {}
        assert rest.list_training_runs().result().training_runs == []
        assert rest.list_user_checkpoints().result().checkpoints == []
        session = client._session.id
        with pytest.raises(mint.CheckpointNotFoundError, match="no run"):
            rest.list_checkpoints(f"{session}:train:0").result()
        with pytest.raises(mint.CheckpointNotFoundError, match="no run"):
            client.create_training_client_from_state(f"tinker://{session}:train:0/weights/a")
        sampler = client.create_sampling_client(base_model=tiny_model)
        assert sampler.sample(prompt(), 1, SHORT).result(GUARD).sequences


def test_a_run_whose_folder_has_become_unwritable_says_so_and_trains_on(
    world: Embedded, run: mint.TrainingClient, mint_home: Path
) -> None:
    train(run, 1)
    weights = mint_home / "runs" / run.model_id.replace(":", "_") / "weights"
    weights.write_text("in the way")
    with pytest.raises(StorageError, match=r"weights/a failed, .*: Not a directory \(.*/weights/\.new-"):
        run.save_state("a").result(GUARD)
    assert listed(run) == []
    train(run, 1, first=1)
    weights.unlink()
    run.save_state("a").result(GUARD)
    assert listed(run) == ["weights/a"] and world.state(run).step == 2
