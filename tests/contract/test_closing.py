"""close() gives memory back and says so to whoever comes later; what is dropped frees itself."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

import mint
from mint import ClosedError, types
from mint.service import RunSpec
from tests.support.clients import GUARD, LEARNING, Embedded, batch, prompt, train

SHORT = types.SamplingParams(max_tokens=4, seed=0)
ENDLESS = types.SamplingParams(max_tokens=500, stop=[], seed=0)


def test_the_base_model_goes_with_the_last_session(world: Embedded, tiny_model: str) -> None:
    one, other = world.client(), world.client()
    run = one.create_lora_training_client(tiny_model, rank=4, seed=0)
    train(run, 1)
    sampler = run.save_weights_and_get_sampling_client()
    sampler.sample(prompt(), 2, SHORT).result(GUARD)
    kept = other.create_sampling_client(base_model=tiny_model)
    one.close()
    assert world.core.runs == {} and len(world.core.samplers) == 1
    assert kept.sample(prompt(), 1, SHORT).result(GUARD).sequences
    assert world.backends[0]() is not None
    other.close()
    gc.collect()
    assert world.backends[0]() is None
    assert (world.core.sessions, world.core.backends, world.core.samplers) == ({}, {}, {})


def test_after_the_last_session_a_new_one_loads_anew(world: Embedded, tiny_model: str) -> None:
    results = []
    for _ in range(2):
        with world.client() as client:
            results.append(train(client.create_lora_training_client(tiny_model, rank=4, seed=0), 2))
    assert len(world.backends) == 2
    assert (results[0] == results[1]).all()


def test_whoever_comes_later_is_told_what_is_closed(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    path = run.save_state("a").result(GUARD).path
    sampler = run.save_weights_and_get_sampling_client()
    client.close()
    client.close()  # twice is once
    unloaded = (
        f"run {run.model_id} is not loaded: its client was closed. Continue from a checkpoint with create_training_"
    )
    closed_client = "this ServiceClient is closed; make a new one"
    closed_sampler = f"sampling session {sampler._sampling_session_id} is closed; make a new sampling client"
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: run.forward(batch()), unloaded),
        (lambda: run.forward_backward(batch()), unloaded),
        (lambda: run.forward_backward_custom(batch(), print), unloaded),
        (lambda: run.optim_step(), unloaded),
        (lambda: run.save_state("b"), unloaded),
        (lambda: run.load_state(path), unloaded),
        (lambda: run.save_weights_for_sampler("b"), unloaded),
        (lambda: run.save_weights_and_get_sampling_client(), unloaded),
        (lambda: run.get_info(), unloaded),
        (lambda: run.create_sampling_client(path), "is closed; make a new ServiceClient"),
        (lambda: sampler.sample(prompt()), closed_sampler),
        (lambda: sampler.compute_logprobs(prompt()), closed_sampler),
        (lambda: client.create_lora_training_client(tiny_model), closed_client),
        (lambda: client.create_training_client_from_state(path), closed_client),
        (lambda: client.create_training_client_from_state_with_optimizer(path), closed_client),
        (lambda: client.create_sampling_client(base_model=tiny_model), closed_client),
        (lambda: client.create_rest_client(), closed_client),
        (lambda: client.get_server_capabilities(), closed_client),
    ]
    for call, text in calls:
        with pytest.raises(ClosedError) as caught:
            call()
        assert text in str(caught.value)
    assert world.client().create_training_client_from_state(path).get_info().lora_rank == 4
    assert run.get_tokenizer() is not None and sampler.get_base_model() == tiny_model  # these ask nobody


def test_what_was_accepted_before_close_is_done(world: Embedded, client: mint.ServiceClient, tiny_model: str) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    with world.held():
        futures = [run.forward_backward(batch()), run.optim_step(LEARNING), run.save_state("a")]
        closing = threading.Thread(target=client.close)
        closing.start()
    closing.join(GUARD)
    assert futures[0].result(GUARD).metrics["loss:sum"] > 0
    assert futures[1].result(GUARD).metrics["step"] == 1.0
    assert futures[2].result(GUARD).path == f"tinker://{run.model_id}/weights/a"


def test_what_is_submitted_behind_the_close_is_told(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    with world.held():
        closing = client._service.close_session(client._session.id)
        late = run.forward(batch())
    closing.result(GUARD)
    with pytest.raises(ClosedError, match=f"run {run.model_id} was unloaded before this operation ran"):
        late.result(GUARD)


@pytest.mark.parametrize("other_stays", [False, True])
def test_a_score_that_is_asked_for_behind_the_close_is_told(
    world: Embedded, client: mint.ServiceClient, tiny_model: str, other_stays: bool
) -> None:
    other = world.client() if other_stays else None
    sampler = client.create_lora_training_client(tiny_model, rank=2).save_weights_and_get_sampling_client()
    with world.held():
        closing = client._service.close_session(client._session.id)
        late = sampler.compute_logprobs(prompt())
    closing.result(GUARD)
    told = (
        "the sampling session was closed before this prompt" if other else "the base model was unloaded: every session"
    )
    with pytest.raises(ClosedError, match=told):
        late.result(GUARD)


def test_a_sample_in_flight_hears_that_its_model_is_gone(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    sampler = client.create_sampling_client(base_model=tiny_model)
    with world.held():
        future = sampler.sample(prompt(), 4, ENDLESS)
        closing = client._service.close_session(client._session.id)
    closing.result(GUARD)
    with pytest.raises(ClosedError, match="the session was closed while this sample was waiting or running"):
        future.result(GUARD)
    gc.collect()
    assert world.backends[0]() is None


def test_a_dropped_sampling_client_frees_its_snapshot(world: Embedded, run: mint.TrainingClient) -> None:
    backend = world.backends[0]()
    sampler = run.save_weights_and_get_sampling_client()
    other = run.create_sampling_client(str(run.save_weights_for_sampler("a").result(GUARD).path))
    sampler.sample(prompt(length=300), 1, SHORT).result(GUARD)  # leaves a prefix in the cache, too
    assert len(world.core.samplers) == 2 == len(backend._adapters)  # type: ignore[union-attr]
    del sampler
    world.settle()
    assert len(world.core.samplers) == 1 == len(backend._adapters)  # type: ignore[union-attr]
    assert other.sample(prompt(), 1, SHORT).result(GUARD).sequences
    del other
    world.settle()
    assert world.core.samplers == {} and backend._adapters == {}  # type: ignore[union-attr]


def test_a_dropped_sampling_client_finishes_what_it_was_asked(world: Embedded, run: mint.TrainingClient) -> None:
    sampler = run.save_weights_and_get_sampling_client()
    expected = sampler.sample(prompt(), 2, SHORT).result(GUARD)
    with world.held():
        future = sampler.sample(prompt(), 2, SHORT)
        del sampler
        gc.collect()
    assert future.result(GUARD).sequences == expected.sequences


def test_a_dropped_training_client_frees_its_run(world: Embedded, client: mint.ServiceClient, tiny_model: str) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    run_id = run.model_id
    train(run, 1)
    del run
    world.settle()
    assert world.core.runs == {}
    assert world.rest().get_training_run(run_id).result().training_run_id == run_id  # its folder stays


def test_a_closed_core_refuses_and_fails_what_waits(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    sampler = client.create_sampling_client(base_model=tiny_model)
    with world.held():
        waiting = [run.forward(batch()), run.optim_step(), sampler.sample(prompt(), 1, SHORT)]
        closing = threading.Thread(target=world.core.close)
        closing.start()
        with world.core.scheduler._changed:
            world.core.scheduler._changed.wait_for(lambda: world.core.scheduler._closing, GUARD)
    closing.join(GUARD)
    for future in waiting:
        with pytest.raises(
            ClosedError, match="the MinT service was closed while this operation was waiting or running"
        ):
            future.result(GUARD)
    for call in (lambda: run.forward(batch()), lambda: sampler.sample(prompt(), 1, SHORT)):
        with pytest.raises(ClosedError, match="this MinT service is closed; make a new ServiceClient"):
            call()


def test_a_run_whose_session_closes_while_it_loads_is_not_left_behind(
    world: Embedded, client: mint.ServiceClient, tiny_model: str, monkeypatch: Any
) -> None:
    from mint.local import training

    resolving, go_on, resolve = threading.Event(), threading.Event(), training.resolve_model

    def slow(*args: Any, **kwargs: Any) -> Any:
        resolving.set()
        go_on.wait(GUARD)
        return resolve(*args, **kwargs)

    monkeypatch.setattr(training, "resolve_model", slow)
    future = client._service.create_run(RunSpec(client._session.id, tiny_model, types.LoraConfig(rank=2), {}))
    assert resolving.wait(GUARD)
    client.close()
    go_on.set()
    with pytest.raises(ClosedError):
        future.result(GUARD)
    assert world.core.runs == {} and world.core.backends == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_sample_that_meets_the_close_of_its_sampler_is_told_and_the_engine_lives(
    world: Embedded, run: mint.TrainingClient, monkeypatch: Any
) -> None:
    sampler = run.save_weights_and_get_sampling_client()
    submit = world.core.scheduler.submit_sample

    def late(*args: Any) -> Any:  # the session is closed between its look-up and the submission
        run._service.close_sampling_session(sampler._sampling_session_id).result(GUARD)
        return submit(*args)

    monkeypatch.setattr(world.core.scheduler, "submit_sample", late)
    with pytest.raises(ClosedError):
        sampler.sample(prompt(), 1, SHORT).result(2)
    train(run, 1)


def test_a_run_that_cannot_be_made_is_not_listed(
    world: Embedded, client: mint.ServiceClient, run: mint.TrainingClient
) -> None:
    backend, model = world.backends[0](), str(run.get_info().model_name)

    def refuse(*args: Any) -> Any:
        raise mint.InputError("memory: too little")

    backend.add_run = refuse  # type: ignore[union-attr, method-assign]
    with pytest.raises(mint.InputError, match="memory: too little"):
        client.create_lora_training_client(model, rank=2)
    listed = client.create_rest_client().list_training_runs().result().training_runs
    assert [r.training_run_id for r in listed] == [run.model_id]


def test_a_heartbeat_of_a_closed_session_says_so(client: mint.ServiceClient) -> None:
    client.close()
    with pytest.raises(ClosedError):
        client._service.heartbeat(client._session.id).result(GUARD)


def test_a_base_model_goes_with_the_last_client_that_is_dropped(world: Embedded, tiny_model: str) -> None:
    run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    sampler, other = run.save_weights_and_get_sampling_client(), world.client()
    del run
    world.settle()
    assert world.core.runs == {} and len(world.core.sessions) == 2
    text = types.SamplingParams(max_tokens=4, seed=0, stop=["no such text"])  # has the tokenizer loaded, too
    assert sampler.sample(prompt(), 1, text).result(GUARD).sequences
    del sampler
    world.settle()
    assert len(world.core.sessions) == 1 and world.backends[0]() is not None  # the open client may want it again
    del other
    world.settle()
    gc.collect()
    assert world.backends[0]() is None
    assert (world.core.sessions, world.core.backends, world.core.samplers, world.core._decoders) == ({}, {}, {}, {})


def test_a_dropped_client_is_not_closed_before_its_operations_are_done(world: Embedded, tiny_model: str) -> None:
    run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    sampler = world.client().create_sampling_client(base_model=tiny_model)
    with world.held():
        run.forward_backward(batch())
        futures = [
            run.optim_step(LEARNING).future(),
            run.save_state("a").future(),
            sampler.sample(prompt(), 2, ENDLESS).future(),
        ]
        del run, sampler
        gc.collect()
    assert futures[0].result(GUARD).metrics["step"] == 1.0
    assert world.client().create_rest_client().get_weights_info_by_tinker_path(futures[1].result(GUARD).path).result()
    assert [len(s.tokens) for s in futures[2].result(GUARD).sequences] == [500, 500]
    futures.clear()
    world.settle()
    gc.collect()
    assert world.core.sessions == {} and world.backends[0]() is None


def test_clients_may_be_dropped_on_the_engine_thread(world: Embedded, run: mint.TrainingClient) -> None:
    """Where a finaliser that waited for the engine would wait for ever."""
    other = world.client()
    held = [other, other.create_lora_training_client(run.get_info().model_name, rank=2)]  # type: ignore[arg-type]
    del other

    def loss(data: Any, p: Any) -> Any:
        held.clear()
        gc.collect()
        return p[0].sum(), {}

    run.forward_backward_custom(batch(), loss).result(GUARD)
    world.settle()
    assert len(world.core.sessions) == 1 and list(world.core.runs) == [run.model_id]


def test_a_loss_cannot_close_its_client(client: mint.ServiceClient, run: mint.TrainingClient) -> None:
    def loss(data: Any, p: Any) -> Any:
        client.close()
        return p[0].sum(), {}

    with pytest.raises(mint.OperationError, match="a loss function runs inside the engine and cannot call MinT"):
        run.forward_backward_custom(batch(), loss).result(GUARD)
    train(run, 1)
