"""Saving, loading, listing and deleting checkpoints."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mint
from mint import CheckpointError, CheckpointNotFoundError, InputError, types
from tests.support.clients import (
    GUARD,
    LEARNING,
    Embedded,
    batch,
    checkpoint_folder,
    datum,
    embedded,
    logprobs,
    prompt,
    same_weights,
    train,
    write_signed_manifest,
)

SHORT = types.SamplingParams(max_tokens=8, seed=0, stop=[])


def test_a_checkpoint_restores_weights_moments_and_step(world: Embedded, run: mint.TrainingClient) -> None:
    train(run, 3)
    path = run.save_state("a").result(GUARD).path
    saved, scored = world.state(run), logprobs(run.forward(batch(9)).result(GUARD))
    train(run, 2, first=3)
    assert not same_weights(world.state(run), saved)
    run.forward_backward(batch(7))
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), saved)
    assert np.array_equal(logprobs(run.forward(batch(9)).result(GUARD)), scored)
    assert run.optim_step(LEARNING).result(GUARD).metrics["no_gradient"] == 1.0  # loading cleared the gradient


def test_weights_alone_start_adam_anew(world: Embedded, run: mint.TrainingClient) -> None:
    train(run, 3)
    path = run.save_state("a").result(GUARD).path
    saved = world.state(run)
    run.load_state(path).result(GUARD)
    loaded = world.state(run)
    assert all(np.array_equal(loaded.tensors[name], saved.tensors[name]) for name in saved.tensors)
    assert loaded.step == 0
    assert not any(moment.any() for part in (loaded.exp_avg, loaded.exp_avg_sq) for moment in part.values())


def test_going_on_with_the_optimizer_differs_from_going_on_without(
    client: mint.ServiceClient, run: mint.TrainingClient
) -> None:
    train(run, 3)
    path = run.save_state("a").result(GUARD).path
    on = train(run, 3, first=3)
    exact = client.create_training_client_from_state_with_optimizer(path)
    fresh = client.create_training_client_from_state(path)
    assert np.array_equal(train(exact, 3, first=3), on)
    without = train(fresh, 3, first=3)
    first_pass = len(logprobs(run.forward(batch(3)).result(GUARD)))
    assert np.array_equal(without[:first_pass], on[:first_pass])  # the same weights,
    assert not np.array_equal(without, on)  # and other steps from there


@pytest.mark.parametrize(
    "shape",
    [
        {"rank": 2, "train_mlp": False},
        {"rank": 8, "train_attn": False, "train_unembed": False},
        {"rank": 3, "train_mlp": False, "train_attn": False},
    ],
)
def test_a_run_of_the_checkpoints_shape_is_made(
    world: Embedded, client: mint.ServiceClient, tiny_model: str, shape: Any
) -> None:
    run = client.create_lora_training_client(tiny_model, seed=5, **shape)
    train(run, 1)
    path = run.save_state("a").result(GUARD).path
    copy = client.create_training_client_from_state_with_optimizer(
        path, base_model=tiny_model, user_metadata={"k": "v"}
    )
    assert copy.model_id != run.model_id
    assert copy.get_info().lora_modules == run.get_info().lora_modules
    assert copy.get_info().lora_rank == shape["rank"]
    assert same_weights(world.state(copy), world.state(run))
    rest = client.create_rest_client()
    assert rest.get_training_run(copy.model_id).result().user_metadata == {"k": "v"}
    info = rest.get_weights_info_by_tinker_path(path).result()
    given = {"train_attn": True, "train_mlp": True, "train_unembed": True} | shape
    assert (info.base_model, info.lora_rank, info.is_lora) == (tiny_model, given.pop("rank"), True)
    assert {name: getattr(info, name) for name in given} == given


def test_the_plan_of_the_checkpoint_is_used_on_resume(mint_home: Path, tiny_model: str) -> None:
    with embedded(mint_home, max_tokens_per_pass=16) as world:
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        train(run, 1)
        path = run.save_state("a").result(GUARD).path
        on = train(run, 2, first=1)
    with embedded(mint_home) as world:
        client = world.client()
        resumed = client.create_training_client_from_state_with_optimizer(path)
        assert resumed.get_info().max_tokens_per_pass == 16
        assert np.array_equal(train(resumed, 2, first=1), on)
        assert client.create_training_client_from_state(path).get_info().max_tokens_per_pass > 16


def test_sampler_weights_sample_as_the_run_does_and_hold_no_optimizer(
    client: mint.ServiceClient, run: mint.TrainingClient, mint_home: Path, tiny_model: str
) -> None:
    train(run, 2)
    snapshot = run.save_weights_and_get_sampling_client().sample(prompt(), 2, SHORT).result(GUARD)
    path = str(run.save_weights_for_sampler("s").result(GUARD).path)
    state = run.save_state("s").result(GUARD).path  # the same name, of the other kind
    train(run, 1, first=2)
    assert path == f"tinker://{run.model_id}/sampler_weights/s"
    files = {file.name for file in checkpoint_folder(mint_home, path).iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "manifest.json"}
    for saved in (path, state, path.replace("tinker", "mint")):
        sampler = client.create_sampling_client(model_path=saved, base_model="ignored/where-both-are-given")
        assert sampler.get_base_model() == tiny_model
        assert sampler.sample(prompt(), 2, SHORT).result(GUARD).sequences == snapshot.sequences
    untrained = client.create_sampling_client(base_model=tiny_model).sample(prompt(), 2, SHORT).result(GUARD)
    assert untrained.sequences != snapshot.sequences
    run.load_state(path).result(GUARD)
    with pytest.raises(CheckpointError, match=f"{path} holds sampler weights only, no optimizer; load it without"):
        run.load_state_with_optimizer(path).result(GUARD)


def test_a_snapshot_is_what_the_weights_were_when_it_was_asked_for(world: Embedded, run: mint.TrainingClient) -> None:
    train(run, 1)
    expected = run.save_weights_and_get_sampling_client().sample(prompt(), 1, SHORT).result(GUARD)
    sampler = run.save_weights_and_get_sampling_client()
    train(run, 2, first=1)
    assert sampler.sample(prompt(), 1, SHORT).result(GUARD).sequences == expected.sequences
    assert world.rest().list_checkpoints(run.model_id).result().checkpoints == []  # and it is listed nowhere


def test_an_existing_name_is_only_replaced_when_asked(
    world: Embedded, run: mint.TrainingClient, mint_home: Path
) -> None:
    path = run.save_state("a").result(GUARD).path
    first = world.state(run)
    train(run, 1)
    with pytest.raises(CheckpointError) as caught:
        run.save_state("a").result(GUARD)
    assert str(caught.value) == f"checkpoint {path} exists; save under another name or with overwrite=True"
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), first)
    train(run, 1)
    second = world.state(run)
    assert run.save_state("a", overwrite=True).result(GUARD).path == path
    run.load_state_with_optimizer(path).result(GUARD)
    assert same_weights(world.state(run), second)
    assert [p.name for p in checkpoint_folder(mint_home, path).parent.iterdir()] == ["a"]
    run.save_weights_for_sampler("a").result(GUARD)
    run.save_weights_for_sampler("a", overwrite=True).result(GUARD)


def test_a_checkpoint_of_another_shape_or_base_is_refused(
    client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str
) -> None:
    path = run.save_state("a").result(GUARD).path
    fits = f"checkpoint {path} is of {tiny_model}, rank 4, train_attn=True, train_mlp=True, train_unembed=True; this run is "
    for shape, text in (
        ({"base_model": tiny_model, "rank": 8}, f"{tiny_model}, rank 8, train_attn=True"),
        ({"base_model": tiny_model, "rank": 4, "train_mlp": False}, "rank 4, train_attn=True, train_mlp=False"),
        ({"base_model": f"{tiny_model}/.", "rank": 4}, f"{tiny_model}/., rank 4"),
    ):
        other = client.create_lora_training_client(**shape)  # type: ignore[arg-type]
        for load in (other.load_state, other.load_state_with_optimizer):
            with pytest.raises(CheckpointError) as caught:
                load(path).result(GUARD)
            assert fits in str(caught.value) and text in str(caught.value)
            assert "Use create_training_client_from_state(path), which makes a run of the checkpoint's shape" in str(
                caught.value
            )
        train(other, 1)
    with pytest.raises(InputError, match=f"is of base model '{tiny_model}', not 'other/model'; leave base_model out"):
        client.create_training_client_from_state(path, base_model="other/model")


def test_listings_show_the_newest_first_with_all_they_know(
    client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str
) -> None:
    rest, before = client.create_rest_client(), datetime.now(UTC)
    kept = run.save_state("one", user_metadata={"data_cursor": '{"epoch": 1}', "ä": "ö"}).result(GUARD).path
    run.save_weights_for_sampler("two", ttl_seconds=7200).result(GUARD)
    other = client.create_lora_training_client(tiny_model, rank=2, user_metadata={"name": "other"})
    other.save_state("three").result(GUARD)
    listed = rest.list_user_checkpoints().result()
    assert [c.checkpoint_id for c in listed.checkpoints] == ["weights/three", "sampler_weights/two", "weights/one"]
    assert listed.cursor == types.Cursor(offset=0, limit=100, total_count=3)
    own = rest.list_checkpoints(run.model_id).result().checkpoints
    assert own == listed.checkpoints[1:]
    two, one = own
    assert (one.checkpoint_type, one.tinker_path, one.public, one.expires_at) == ("training", kept, False, None)
    assert one.user_metadata == {"data_cursor": '{"epoch": 1}', "ä": "ö"}
    assert one.size_bytes is not None and two.size_bytes is not None and one.size_bytes > 2 * two.size_bytes > 0
    assert two.checkpoint_type == "sampler" and two.user_metadata == {}
    assert two.expires_at is not None and two.expires_at - two.time == timedelta(seconds=7200)
    assert before <= one.time <= two.time <= datetime.now(UTC)


def test_listings_come_in_pages(client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str) -> None:
    rest = client.create_rest_client()
    for i in range(5):
        run.save_state(f"c{i}").result(GUARD)
    pages = [rest.list_user_checkpoints(limit=2, offset=offset).result() for offset in (0, 2, 4, 6)]
    assert [[c.checkpoint_id[-2:] for c in page.checkpoints] for page in pages] == [
        ["c4", "c3"],
        ["c2", "c1"],
        ["c0"],
        [],
    ]
    assert pages[1].cursor == types.Cursor(offset=2, limit=2, total_count=5)
    runs = [client.create_lora_training_client(tiny_model, rank=1).model_id for _ in range(2)]
    newest = rest.list_training_runs(limit=2).result()
    assert [r.training_run_id for r in newest.training_runs] == runs[::-1]
    assert newest.cursor == types.Cursor(offset=0, limit=2, total_count=3)
    last = rest.list_training_runs(limit=2, offset=2).result().training_runs
    assert [r.training_run_id for r in last] == [run.model_id]


def test_a_run_tells_what_it_is_and_its_last_checkpoints(
    client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str
) -> None:
    rest = client.create_rest_client()
    created = rest.get_training_run(run.model_id).result()
    assert (created.base_model, created.lora_rank, created.is_lora, created.model_owner) == (
        tiny_model,
        4,
        True,
        "local",
    )
    assert created.last_checkpoint is None and created.last_sampler_checkpoint is None and not created.corrupted
    run.save_state("one").result(GUARD)
    path = run.save_state("two").result(GUARD).path
    run.save_weights_for_sampler("three").result(GUARD)
    later = rest.get_training_run_by_tinker_path(path).result()
    assert later.last_checkpoint is not None and later.last_checkpoint.tinker_path == path
    assert later.last_sampler_checkpoint is not None
    assert later.last_sampler_checkpoint.checkpoint_id == "sampler_weights/three"
    assert later.last_request_time >= created.last_request_time
    assert later.last_request_time.tzinfo is not None


def test_metrics_of_every_step_are_written_beside_the_run(run: mint.TrainingClient, mint_home: Path) -> None:
    losses = [run.forward_backward(batch(i)).result(GUARD).metrics["loss:sum"] for i in range(2)]
    run.optim_step(LEARNING).result(GUARD)
    run.optim_step(LEARNING).result(GUARD)
    (file,) = (mint_home / "runs").glob("*/metrics.jsonl")
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    assert first["loss:sum"] == pytest.approx(sum(losses)) and first["step"] == 1.0
    assert second["no_gradient"] == 1.0 and "loss:sum" not in second


def test_what_is_deleted_is_gone_and_only_that(
    client: mint.ServiceClient, run: mint.TrainingClient, mint_home: Path
) -> None:
    rest = client.create_rest_client()
    paths = [run.save_state(name).result(GUARD).path for name in ("a", "b", "c")]
    assert rest.delete_checkpoint(run.model_id, "weights/a").result(GUARD) is None
    rest.delete_checkpoint_from_tinker_path(paths[1].replace("tinker://", "mint://")).result(GUARD)
    assert [c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints] == paths[2:]
    assert [p.name for p in checkpoint_folder(mint_home, paths[0]).parent.iterdir()] == ["c"]
    for path in (paths[0], f"tinker://{run.model_id}/sampler_weights/c"):
        with pytest.raises(CheckpointNotFoundError, match=f"no checkpoint {path}; nothing was deleted"):
            rest.delete_checkpoint_from_tinker_path(path).result(GUARD)
    for bad in ("weights", "weights/../c", "weights/", "other/c", "../x"):
        with pytest.raises(InputError, match="checkpoint"):
            rest.delete_checkpoint(run.model_id, bad).result(GUARD)
    run.save_state("a").result(GUARD)
    run.load_state(paths[0]).result(GUARD)


def expire(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    write_signed_manifest(folder, manifest | {"expires_at": "2024-01-01T00:00:00Z"})


def test_an_expired_checkpoint_is_as_if_it_were_not_there(
    client: mint.ServiceClient, run: mint.TrainingClient, mint_home: Path
) -> None:
    path = run.save_state("a", ttl_seconds=3600).result(GUARD).path
    run.load_state(path).result(GUARD)
    expire(checkpoint_folder(mint_home, path))
    rest = client.create_rest_client()
    assert rest.list_user_checkpoints().result().checkpoints == []
    for use in (
        lambda: run.load_state(path).result(GUARD),
        lambda: client.create_training_client_from_state(path),
        lambda: client.create_sampling_client(path),
        lambda: rest.get_weights_info_by_tinker_path(path).result(GUARD),
    ):
        with pytest.raises(CheckpointNotFoundError, match=f"checkpoint {path} expired at 2024-01-01T00:00:00"):
            use()


def test_the_expiry_of_a_checkpoint_can_be_moved_and_lifted(
    client: mint.ServiceClient, run: mint.TrainingClient, mint_home: Path
) -> None:
    path, rest = run.save_state("a").result(GUARD).path, client.create_rest_client()
    before = datetime.now(UTC)
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result(GUARD)
    expires = rest.list_user_checkpoints().result().checkpoints[0].expires_at
    assert expires is not None and before <= expires - timedelta(seconds=7200) <= datetime.now(UTC)
    run.load_state_with_optimizer(path).result(GUARD)  # what it holds is untouched
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result(GUARD)
    assert rest.list_user_checkpoints().result().checkpoints[0].expires_at is None
    folder = checkpoint_folder(mint_home, path)
    assert [entry.name for entry in folder.parent.iterdir()] == ["a"]
    with pytest.raises(mint.InputError, match="ttl_seconds=60: must be None"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 60)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        rest.set_checkpoint_ttl_from_tinker_path(path + "x", 7200).result(GUARD)


def test_the_name_of_an_expired_checkpoint_is_free(run: mint.TrainingClient, mint_home: Path) -> None:
    path = run.save_state("a", ttl_seconds=3600).result(GUARD).path
    expire(checkpoint_folder(mint_home, path))
    run.save_state("a").result(GUARD)


def test_the_files_are_what_they_are_said_to_be(run: mint.TrainingClient, mint_home: Path, tiny_model: str) -> None:
    train(run, 1)
    folder = checkpoint_folder(mint_home, run.save_state("a", user_metadata={"k": "v"}).result(GUARD).path)
    manifest = json.loads((folder / "manifest.json").read_text())
    import hashlib

    files = {file.name for file in folder.iterdir()}
    assert files == {*manifest["sha256"], "manifest.json"}
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    info = run.get_info()
    assert (manifest["format"], manifest["step"], manifest["seed"]) == (1, 1, 0)
    assert (manifest["base_model"], manifest["user_metadata"], manifest["modules"]) == (
        tiny_model,
        {"k": "v"},
        info.lora_modules,
    )
    plan = manifest["plan"]
    assert (plan["dtype"], plan["num_threads"], plan["max_tokens_per_pass"]) == ("float32", 1, info.max_tokens_per_pass)
    assert plan["torch_version"] and manifest["lora"]["rank"] == 4


@pytest.mark.parametrize("length", [1, 2])
def test_datums_of_one_token_survive_the_whole_way(
    client: mint.ServiceClient, run: mint.TrainingClient, length: int
) -> None:
    out = run.forward_backward([datum(1, length), datum(2, 1)]).result(GUARD)
    assert [len(o["logprobs"]) for o in out.loss_fn_outputs] == [length, 1]
    run.optim_step(LEARNING).result(GUARD)
    path = run.save_state("a").result(GUARD).path
    resumed = client.create_training_client_from_state_with_optimizer(path)
    scored = [logprobs(r.forward([datum(1, length)]).result(GUARD)) for r in (run, resumed)]
    assert np.array_equal(*scored)
