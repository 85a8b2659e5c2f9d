"""Operations run in the order of their calls, results arrive in threads and coroutines, and no waiter cancels work."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import mint
from mint import ResultTimeoutError, types
from tests.support.clients import GUARD, LEARNING, Embedded, batch, logprobs, prompt, same_weights, train

LONG = types.SamplingParams(max_tokens=64, stop=[], seed=1)


def test_results_arrive_in_the_order_of_the_calls(world: Embedded, run: mint.TrainingClient) -> None:
    order: list[str] = []
    with world.held():
        futures = {
            "gradient": run.forward_backward(batch()),
            "step": run.optim_step(LEARNING),
            "after": run.forward(batch()),
            "save": run.save_state("a"),
            "custom": run.forward_backward_custom(batch(), lambda data, p: (p[0].sum(), {})),
            "load": run.load_state(f"tinker://{run.model_id}/weights/a"),
            "last": run.optim_step(LEARNING),
        }
        for name, future in futures.items():
            future._future.add_done_callback(lambda _, name=name: order.append(name))
        assert not any(future.done() for future in futures.values())
    futures["last"].result(GUARD)
    world.settle()
    assert order == list(futures)
    assert futures["last"].result().metrics["no_gradient"] == 1.0  # loading cleared what the custom loss had added


def test_calls_before_the_first_result_equal_calls_one_by_one(
    world: Embedded, run: mint.TrainingClient, tiny_model: str
) -> None:
    other = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    with world.held():
        futures = [f for step in range(3) for f in (run.forward_backward(batch(step)), run.optim_step(LEARNING))]
    together = np.concatenate([logprobs(future.result(GUARD)) for future in futures[::2]])
    np.testing.assert_array_equal(together, train(other, 3))
    assert same_weights(world.state(run), world.state(other))


def test_many_threads_may_use_one_client(world: Embedded, run: mint.TrainingClient) -> None:
    before = logprobs(run.forward(batch()).result(GUARD))
    start = threading.Barrier(8)

    def work(number: int) -> tuple[Any, Any]:
        start.wait(GUARD)
        scored = [run.forward(batch()) for _ in range(5)]
        run.optim_step(LEARNING)  # without gradient
        return [logprobs(f.result(GUARD)) for f in scored], run.get_info().model_id

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    for scored, model_id in answers:
        assert model_id == run.model_id
        assert all(np.array_equal(values, before) for values in scored)


def test_a_result_may_be_asked_for_by_many_and_again(world: Embedded, run: mint.TrainingClient) -> None:
    with ThreadPoolExecutor(4) as pool, world.held():
        future = run.forward(batch())
        waiting = [pool.submit(future.result, GUARD) for _ in range(4)]
        assert not any(w.done() for w in waiting)
    first = waiting[0].result(GUARD)
    assert all(w.result(GUARD) is first for w in waiting)
    assert future.result() is first and future.done()
    assert asyncio.run(future.result_async()) is first


def test_a_time_out_says_so_and_the_work_takes_effect(world: Embedded, run: mint.TrainingClient) -> None:
    run.forward_backward(batch())
    before = world.state(run)
    with world.held():
        future = run.optim_step(LEARNING)
        for wait in (lambda: future.result(timeout=0.01), lambda: asyncio.run(future.result_async(timeout=0.01))):
            with pytest.raises(ResultTimeoutError) as caught:
                wait()
            assert str(caught.value) == (
                f"optim_step of {run.model_id}: no result within 0.01 s; it is still running, ask again later"
            )
        assert not future.done()
    assert future.result(GUARD).metrics["step"] == 1.0
    assert not same_weights(world.state(run), before)


def test_time_out_zero_asks_without_waiting(world: Embedded, run: mint.TrainingClient) -> None:
    with world.held():
        future = run.optim_step()
        with pytest.raises(TimeoutError):
            future.result(timeout=0)
    future.result(GUARD)
    assert future.result(timeout=0).metrics["no_gradient"] == 1.0


@pytest.mark.parametrize(
    "wait", [lambda future: future, lambda future: future.result_async()], ids=["await", "result_async"]
)
def test_wait_for_around_a_pending_step_cancels_nothing(world: Embedded, run: mint.TrainingClient, wait: Any) -> None:
    gradient = run.forward_backward(batch())
    before = world.state(run)

    async def give_up() -> mint.APIFuture[types.OptimStepResponse]:
        future = await run.optim_step_async(LEARNING)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait(future), 0.01)
        task = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return future

    with world.held():
        future = asyncio.run(give_up())
        assert not future.done()
    assert future.result(GUARD).metrics["step"] == 1.0
    assert gradient.result().metrics["loss:sum"] > 0
    assert not same_weights(world.state(run), before)
    train(run, 1, first=1)
    assert world.state(run).step == 2


def test_nobody_can_cancel_the_future_under_a_result(world: Embedded, run: mint.TrainingClient) -> None:
    with world.held():
        futures = [run.forward(batch()), run.optim_step(), run.save_state("a")]
        assert not any(future._future.cancel() for future in futures)
    for future in futures:
        future.result(GUARD)


def test_the_event_loop_turns_while_a_coroutine_waits(world: Embedded, run: mint.TrainingClient) -> None:
    async def go() -> list[str]:
        seen: list[str] = []
        with world.held():
            waiting = asyncio.gather(run.forward(batch()), run.optim_step())
            await asyncio.sleep(0)
            seen.append("turned")
        await waiting
        return [*seen, "done"]

    assert asyncio.run(go()) == ["turned", "done"]


def test_a_loop_may_close_before_the_result_arrives(world: Embedded, run: mint.TrainingClient) -> None:
    async def ask() -> mint.APIFuture[Any]:
        future = run.forward(batch())
        waiting = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        assert not waiting.done()
        return future

    with world.held():
        future = asyncio.run(ask())
    assert len(future.result(GUARD).loss_fn_outputs) == len(batch())


def test_samples_of_several_clients_are_in_flight_at_once(
    world: Embedded, client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str, monkeypatch: Any
) -> None:
    samplers = [client.create_sampling_client(base_model=tiny_model), run.save_weights_and_get_sampling_client()]
    backend = world.backends[0]()
    assert backend is not None
    in_flight, step = set(), backend.step
    monkeypatch.setattr(backend, "step", lambda: (in_flight.add(backend.num_requests), step())[1])
    with world.held():
        futures = [sampler.sample(prompt(i), 2, LONG) for sampler in samplers for i in range(2)]
    for future in futures:
        assert [len(s.tokens) for s in future.result(GUARD).sequences] == [64, 64]
    assert max(in_flight) == 4


def test_arguments_are_copied_when_the_call_is_made(world: Embedded, run: mint.TrainingClient) -> None:
    expected = logprobs(run.forward(batch()).result(GUARD))
    data = batch()
    tokens = np.array(data[0].model_input.to_ints())
    targets = data[0].loss_fn_inputs["target_tokens"].to_numpy().copy()
    weights = data[0].loss_fn_inputs["weights"].tolist()
    data[0] = types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )
    with world.held():
        future = run.forward_backward(data)
        tokens[:], targets[:], weights[:] = 0, 0, [9.0] * len(weights)
        data[0].loss_fn_inputs["target_tokens"] = types.TensorData([0])
        data.clear()
    np.testing.assert_array_equal(logprobs(future.result(GUARD)), expected)


def test_a_training_client_dropped_while_its_future_is_pending_still_completes(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    run_id = run.model_id
    with world.held():
        run.forward_backward(batch())
        run.optim_step(LEARNING)
        run.save_state("kept")  # nobody holds its future
        future = run.forward(batch())
        dropped = weakref.ref(run)
        del run
        gc.collect()
        assert dropped() is not None
    assert len(future.result(GUARD).loss_fn_outputs) == len(batch())
    del future
    world.settle()
    assert dropped() is None
    assert run_id not in world.core.runs
    assert [c.checkpoint_id for c in world.rest().list_checkpoints(run_id).result().checkpoints] == ["weights/kept"]


def test_what_a_dropped_client_was_told_is_done_first(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    run = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    run_id = run.model_id
    with world.held():
        run.save_state("fire-and-forget")
        del run
        gc.collect()
    world.settle()
    assert run_id not in world.core.runs
    assert len(world.rest().list_checkpoints(run_id).result().checkpoints) == 1


def test_a_future_lets_go_of_its_client_once_the_result_is_there(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    sampler = client.create_sampling_client(base_model=tiny_model)
    future = sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=1))
    future.result(GUARD)
    dropped = weakref.ref(sampler)
    del sampler
    gc.collect()
    assert dropped() is None


def test_ctrl_c_while_waiting_leaves_the_client_usable(
    world: Embedded, run: mint.TrainingClient, ctrl_c_interrupts: None
) -> None:
    interrupted = threading.Event()

    def loss(data: Any, p: Any) -> Any:
        waiting.wait(GUARD)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        while not interrupted.wait(2):  # it came a moment before the wait began, which nothing then interrupts
            signal.pthread_kill(main, signal.SIGINT)
        return sum(x.sum() for x in p), {}

    waiting = threading.Event()
    future = run.forward_backward_custom(batch(), loss)
    raw_exception = future._future.exception

    def exception(timeout: float | None = None) -> BaseException | None:
        waiting.set()  # from here on the main thread is inside .result()
        return raw_exception(timeout)

    future._future.exception = exception  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        try:
            future.result(GUARD)
        finally:
            interrupted.set()
    assert np.isfinite(future.result(GUARD).metrics["loss:sum"])
    assert run.optim_step(LEARNING).result(GUARD).metrics["step"] == 1.0
    train(run, 1)


def test_a_long_wait_is_reported(world: Embedded, run: mint.TrainingClient, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr("mint.client.futures.REMIND_AFTER_SECONDS", 0.01)
    caplog.set_level("INFO", "mint")
    with world.held():
        future = run.forward(batch())
        with pytest.raises(ResultTimeoutError):
            future.result(timeout=0.05)
    future.result(GUARD)
    line = f"forward of {run.model_id}: still waiting after 0 s; the engine is at work"
    assert line in [record.getMessage() for record in caplog.records]
