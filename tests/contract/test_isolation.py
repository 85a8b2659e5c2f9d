"""Runs share a base model and a pass, and nothing else; a tenant neither sees nor touches what is another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mint
from mint import CheckpointNotFoundError, ClosedError, types
from mint.local.service import LocalService
from mint.service import RunSpec, SaveSpec
from mint.types.requests import prepare_sample_input, prepare_training_input
from tests.support.clients import GUARD, LEARNING, Embedded, batch, embedded, logprobs, prompt, same_weights, train

# the update is a smooth function of the gradient, so that a tiny difference of the gradient stays tiny
SMOOTH = types.AdamParams(learning_rate=1e-2, eps=1.0)


def spied_passes(world: Embedded, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The run ids of every forward_backward pass from now on."""
    backend = world.backends[0]()
    assert backend is not None
    passes: list[list[str]] = []
    original = backend.forward_backward

    def forward_backward(parts: Any) -> Any:
        passes.append([part.run_id for part in parts])
        return original(parts)

    monkeypatch.setattr(backend, "forward_backward", forward_backward)
    return passes


def test_two_runs_in_one_pass_compute_what_each_computes_alone(
    world: Embedded, client: mint.ServiceClient, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[dict[str, Any]] = [
        {"rank": 4, "seed": 1},
        {"rank": 8, "seed": 2, "train_mlp": False, "train_unembed": False},
        {"rank": 2, "seed": 3, "train_attn": False},
    ]
    runs = [client.create_lora_training_client(tiny_model, **shape) for shape in shapes]
    train(runs[0], 1)  # a run that has gone further than the others
    passes = spied_passes(world, monkeypatch)
    with world.held():
        together = [run.forward_backward(batch(10 + i)) for i, run in enumerate(runs)]
        steps = [run.optim_step(SMOOTH) for run in runs]
    shared = [logprobs(future.result(GUARD)) for future in together]
    norms = [step.result(GUARD).metrics["grad_norm"] for step in steps]
    assert passes == [[run.model_id for run in runs]]
    for i, shape in enumerate(shapes):
        with embedded(tmp_path / f"alone{i}") as quiet:
            alone = quiet.client().create_lora_training_client(tiny_model, **shape)
            if i == 0:
                train(alone, 1)
            out = logprobs(alone.forward_backward(batch(10 + i)).result(GUARD))
            norm = alone.optim_step(SMOOTH).result(GUARD).metrics["grad_norm"]
            np.testing.assert_allclose(shared[i], out, atol=1e-4)
            assert norms[i] == pytest.approx(norm, rel=1e-4)
            ours, theirs = world.state(runs[i]).tensors, quiet.state(alone).tensors
            assert ours.keys() == theirs.keys()
            for name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_a_tenants_sample_waits_for_one_of_another_tenants_many(
    world: Embedded, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request fills the batch, so that they run one after the other."""
    samplers = [world.client(tenant).create_sampling_client(base_model=tiny_model) for tenant in ("many", "one")]
    backend = world.backends[0]()
    assert backend is not None and len(world.backends) == 1
    ended: list[int] = []
    step = backend.step
    monkeypatch.setattr(backend, "step", lambda: [ended.append(len(g.sequences)) or g for g in step()])
    params = types.SamplingParams(max_tokens=2, seed=0, stop=[])
    with world.held():
        futures = [samplers[0].sample(prompt(i), 64, params) for i in range(10)]
        futures.append(samplers[1].sample(prompt(), 63, params))
    for future in futures:
        future.result(GUARD)
    assert ended == [64, 63, *[64] * 9]


def test_an_adapter_that_a_pass_does_not_involve_keeps_its_bits(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    idle, busy = (client.create_lora_training_client(tiny_model, rank=4, seed=i) for i in range(2))
    train(idle, 1)
    idle.forward_backward(batch(5)).result(GUARD)
    before, scored = world.state(idle), logprobs(idle.forward(batch(6)).result(GUARD))
    train(busy, 3)
    assert same_weights(world.state(idle), before)
    assert np.array_equal(logprobs(idle.forward(batch(6)).result(GUARD)), scored)
    assert idle.optim_step(LEARNING).result(GUARD).metrics["grad_norm"] > 0  # its gradient waited for it


def test_runs_with_different_losses_share_a_pass(
    world: Embedded, client: mint.ServiceClient, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [client.create_lora_training_client(tiny_model, rank=4, seed=0) for _ in range(2)]
    rl = [
        types.Datum(
            model_input=d.model_input,
            loss_fn_inputs={
                "target_tokens": d.loss_fn_inputs["target_tokens"],
                "logprobs": [-3.0] * d.model_input.length,
                "advantages": [1.0] * d.model_input.length,
            },
        )
        for d in batch()
    ]
    passes = spied_passes(world, monkeypatch)
    with world.held():
        futures = [runs[0].forward_backward(batch(), "cross_entropy"), runs[1].forward_backward(rl, "ppo")]
    losses = [future.result(GUARD).metrics["loss:sum"] for future in futures]
    assert len(passes) == 1
    assert losses[0] > 0 > losses[1]


def test_sampling_in_between_changes_no_bit_of_training(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    runs = [client.create_lora_training_client(tiny_model, rank=4, seed=0) for _ in range(2)]
    quiet = train(runs[0], 4)
    sampler = runs[1].save_weights_and_get_sampling_client()
    with world.held():
        sampled = sampler.sample(prompt(length=300), 4, types.SamplingParams(max_tokens=30, stop=[], seed=1))
        scored = sampler.compute_logprobs(prompt(length=300))
        futures = [
            f for step in range(4) for f in (runs[1].forward_backward(batch(step)), runs[1].optim_step(LEARNING))
        ]
    assert np.array_equal(np.concatenate([logprobs(f.result(GUARD)) for f in futures[::2]]), quiet)
    assert same_weights(world.state(runs[0]), world.state(runs[1]))
    assert len(sampled.result(GUARD).sequences) == 4 and len(scored.result(GUARD)) == 300


def test_two_service_clients_share_one_copy_of_a_base(world: Embedded, tiny_model: str) -> None:
    one, other = world.client(), world.client()
    first = one.create_lora_training_client(tiny_model, rank=2, seed=0)
    second = other.create_lora_training_client(f"{tiny_model}/.", rank=2, seed=0)
    other.create_sampling_client(base_model=tiny_model)
    assert len(world.backends) == 1
    assert np.array_equal(train(first, 2), train(second, 2))


# tenants


@pytest.fixture
def stranger(world: Embedded) -> LocalService:
    return world.service("other")


def test_another_tenants_run_does_not_exist(world: Embedded, run: mint.TrainingClient, stranger: LocalService) -> None:
    data = prepare_training_input(batch(), "cross_entropy")
    run_id, before = run.model_id, world.state(run)
    uses: list[Callable[[], Any]] = [
        lambda: stranger.get_info(run_id),
        lambda: stranger.forward(run_id, 1, data),
        lambda: stranger.forward_backward(run_id, 1, data),
        lambda: stranger.forward_backward_custom(run_id, 1, data, lambda p: (p[0].sum(), {})),
        lambda: stranger.optim_step(run_id, 1, LEARNING),
        lambda: stranger.save_weights(run_id, 1, SaveSpec("stolen")),
        lambda: stranger.save_weights_for_sampler(run_id, 1, SaveSpec(None)),
        lambda: stranger.load_weights(run_id, 1, f"tinker://{run_id}/weights/a", optimizer=True),
        lambda: stranger.unload(run_id),
        lambda: stranger.get_run(run_id),
        lambda: stranger.list_checkpoints(run_id),
    ]
    for use in uses:
        with pytest.raises(CheckpointNotFoundError, match=f"^no run '{run_id}'; list what there is with"):
            use().result(GUARD)
    assert same_weights(world.state(run), before)
    train(run, 1)  # seq_id 1 was not taken


def test_another_tenants_checkpoint_does_not_exist(
    world: Embedded, run: mint.TrainingClient, stranger: LocalService, tiny_model: str
) -> None:
    path = run.save_state("a").result(GUARD).path
    sampler = str(run.save_weights_for_sampler("b").result(GUARD).path)
    own = world.client("other").create_lora_training_client(tiny_model, rank=4, seed=1)
    session = stranger.create_session({}).result(GUARD)
    uses: list[Callable[[], Any]] = [
        lambda: stranger.weights_info(path),
        lambda: stranger.delete_checkpoint(path),
        lambda: stranger.delete_checkpoint(sampler),
        lambda: stranger.create_sampling_session(session, None, sampler),
        lambda: stranger.create_sampling_session(session, None, path),
        lambda: own.load_state(path),
        lambda: own.load_state_with_optimizer(path),
    ]
    for use in uses:
        with pytest.raises(CheckpointNotFoundError, match=f"^no run '{run.model_id}'"):
            use().result(GUARD)
    assert len(world.rest().list_checkpoints(run.model_id).result().checkpoints) == 2


def test_listings_show_a_tenants_own_things(world: Embedded, run: mint.TrainingClient, tiny_model: str) -> None:
    run.save_state("mine").result(GUARD)
    theirs = world.client("other").create_lora_training_client(tiny_model, rank=2)
    theirs.save_state("theirs").result(GUARD)
    for tenant, owner, name in (("local", run, "mine"), ("other", theirs, "theirs"), ("third", None, None)):
        rest = world.rest(tenant)
        runs = rest.list_training_runs().result()
        assert [r.training_run_id for r in runs.training_runs] == ([owner.model_id] if owner else [])
        assert [r.model_owner for r in runs.training_runs] == ([tenant] if owner else [])
        assert runs.cursor.total_count == len(runs.training_runs)
        found = [c.checkpoint_id for c in rest.list_user_checkpoints().result().checkpoints]
        assert found == ([f"weights/{name}"] if name else [])


def test_another_tenants_sessions_and_samplers_cannot_be_used(
    run: mint.TrainingClient, client: mint.ServiceClient, stranger: LocalService, tiny_model: str
) -> None:
    sampler = run.save_weights_and_get_sampling_client()
    given = prepare_sample_input(prompt(), 1, types.SamplingParams(max_tokens=1))
    with pytest.raises(ClosedError, match=f"sampling session {sampler._sampling_session_id} is closed"):
        stranger.sample(sampler._sampling_session_id, given)
    spec = RunSpec(client._session.id, tiny_model, types.LoraConfig(rank=1), {})
    for create in (
        lambda: stranger.create_run(spec),
        lambda: stranger.create_sampling_session(client._session.id, tiny_model, None),
    ):
        with pytest.raises(ClosedError, match=f"session {client._session.id} is closed; make a new ServiceClient"):
            create()
    assert sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1)).result(GUARD).sequences


def test_another_tenants_session_cannot_be_closed(run: mint.TrainingClient, stranger: LocalService) -> None:
    session_id = run.model_id.partition(":")[0]  # part of every path that is handed round
    stranger.close_session(session_id).exception(GUARD)
    train(run, 1)


def test_another_tenants_sampler_cannot_be_closed(run: mint.TrainingClient, stranger: LocalService) -> None:
    sampler = run.save_weights_and_get_sampling_client()
    stranger.close_sampling_session(sampler._sampling_session_id).exception(GUARD)
    sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1)).result(GUARD)
