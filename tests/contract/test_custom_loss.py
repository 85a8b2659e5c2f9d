"""forward_backward_custom: the caller's loss and gradient are used as they are; its errors arrive; it cannot hang MinT."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mint
from mint import InputError, NumericsError, OperationError, types
from mint.types import Datum
from tests.support.clients import GUARD, LEARNING, Embedded, batch, embedded, logprobs, prompt, same_weights, train


def negative_log_likelihood(data: list[Datum], values: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """What cross_entropy computes, by autograd."""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    total = sum((-(w * v).sum() for w, v in zip(weights, values, strict=True)), torch.zeros(()))
    return total, {"datums:sum": float(len(data))}


@pytest.mark.parametrize("max_tokens_per_pass", [None, 8], ids=["one pass", "several passes"])
def test_a_loss_that_equals_cross_entropy_trains_as_it_does(
    mint_home: Any, tiny_model: str, max_tokens_per_pass: Any
) -> None:
    with embedded(mint_home, max_tokens_per_pass=max_tokens_per_pass) as world:
        client = world.client()
        runs = [client.create_lora_training_client(tiny_model, rank=4, seed=0) for _ in range(2)]
        plain = runs[0].forward_backward(batch()).result(GUARD)
        custom = runs[1].forward_backward_custom(batch(), negative_log_likelihood).result(GUARD)
        np.testing.assert_allclose(logprobs(custom), logprobs(plain), atol=1e-5)
        assert custom.metrics["loss:sum"] == pytest.approx(plain.metrics["loss:sum"], rel=1e-6)
        assert custom.metrics["datums:sum"] == 3.0
        smooth = types.AdamParams(learning_rate=1e-2, eps=1.0)
        norms = [run.optim_step(smooth).result(GUARD).metrics["grad_norm"] for run in runs]
        assert norms[1] == pytest.approx(norms[0], rel=1e-5)
        one, other = (world.state(run).tensors for run in runs)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-6)


def test_the_function_gets_the_datums_and_float32_logprobs_of_the_targets_shape(run: mint.TrainingClient) -> None:
    given = batch()
    given.append(
        Datum(
            model_input=types.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": [[3, 4], [5, 6]], "mine": [7.5]},
        )
    )
    seen: dict[str, Any] = {}

    def loss(data: list[Datum], values: list[torch.Tensor]) -> Any:
        seen.update(data=data, shapes=[list(v.shape) for v in values], grads=[v.requires_grad for v in values])
        seen["types"] = {v.dtype for v in values}
        return sum(v.sum() for v in values), {}

    out = run.forward_backward_custom(given, loss).result(GUARD)
    assert seen["data"] == given and seen["data"][-1].loss_fn_inputs["mine"].tolist() == [7.5]
    assert seen["shapes"] == [d.loss_fn_inputs["target_tokens"].shape for d in given]
    assert seen["types"] == {torch.float32} and all(seen["grads"])
    assert [o["logprobs"].shape for o in out.loss_fn_outputs] == seen["shapes"]
    assert np.array_equal(logprobs(out), logprobs(run.forward(_weighted(given)).result(GUARD)))


def _weighted(data: list[Datum]) -> list[Datum]:
    shapes = [d.loss_fn_inputs["target_tokens"].shape for d in data]
    return [
        Datum(
            model_input=d.model_input,
            loss_fn_inputs={"target_tokens": d.loss_fn_inputs["target_tokens"], "weights": np.ones(shape)},
        )
        for d, shape in zip(data, shapes, strict=True)
    ]


def test_a_datum_that_the_loss_ignores_adds_nothing(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    runs = [client.create_lora_training_client(tiny_model, rank=4, seed=0) for _ in range(2)]
    first = runs[0].forward_backward_custom(batch(), lambda data, p: (p[0].sum(), {}))
    only = runs[1].forward_backward_custom(batch()[:1], lambda data, p: (p[0].sum(), {}))
    assert first.result(GUARD).metrics["loss:sum"] == pytest.approx(only.result(GUARD).metrics["loss:sum"], rel=1e-6)
    norms = [run.optim_step(LEARNING).result(GUARD).metrics["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


class OddError(Exception):
    """An exception whose arguments cannot be guessed."""

    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(code, why)
        self.code, self.why = code, why


def test_an_exception_of_the_loss_arrives_unchanged(run: mint.TrainingClient) -> None:
    thrown = OddError(7, why="mine")

    def loss(data: Any, p: Any) -> Any:
        raise thrown

    with pytest.raises(OddError) as caught:
        run.forward_backward_custom(batch(), loss).result(GUARD)
    assert caught.value is thrown
    assert "loss" in [frame.name for frame in caught.traceback]  # the user's own line is shown
    with pytest.raises(OperationError, match="optim_step refused"):
        run.optim_step().result(GUARD)
    train(run, 1)


BAD = "the loss function must return .loss, metrics. with loss a torch scalar computed from the given logprobs, got"


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda data, p: (1.0, {}), InputError, f"{BAD} float"),
        (lambda data, p: (None, {}), InputError, f"{BAD} NoneType"),
        (lambda data, p: (torch.tensor(1.0), {}), InputError, f"{BAD} Tensor"),
        (lambda data, p: (p[0], {}), InputError, f"{BAD} Tensor"),
        (lambda data, p: (p[0].sum().detach(), {}), InputError, f"{BAD} Tensor"),
        (
            lambda data, p: (p[0].sum() * float("nan"), {}),
            NumericsError,
            "the loss or its gradient by the logprobs is not",
        ),
        (lambda data, p: (p[0].sum() * 0 + float("inf"), {}), NumericsError, "is not finite"),
    ],
)
def test_what_is_no_loss_is_refused(run: mint.TrainingClient, loss: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run.forward_backward_custom(batch(), loss).result(GUARD)
    with pytest.raises(OperationError, match="optim_step refused"):
        run.optim_step().result(GUARD)
    train(run, 1)


# A loss runs on the engine's thread. Whatever it asks of MinT there must be refused, because nobody could answer. The
# time-outs let a test end that would otherwise wait for ever.
MOMENT = 0.05
CANNOT = "a loss function runs inside the engine and cannot call MinT; compute outside and pass the numbers in"
REFUSED: dict[str, Callable[[mint.TrainingClient, mint.SamplingClient], Any]] = {
    "forward": lambda r, s: r.forward(batch()).result(MOMENT),
    "optim_step": lambda r, s: r.optim_step().result(MOMENT),
    "save_state": lambda r, s: r.save_state("a").result(MOMENT),
    "snapshot": lambda r, s: r.save_weights_and_get_sampling_client(),
    "compute_logprobs": lambda r, s: s.compute_logprobs(prompt()).result(MOMENT),
    "sample": lambda r, s: s.sample(prompt(), 1, types.SamplingParams(max_tokens=1)).result(MOMENT),
    "create_sampling_session": lambda r, s: r._service.create_sampling_session(
        r.model_id.partition(":")[0], s.get_base_model(), None
    ).result(MOMENT),
}


def loss_that(does: Callable[[], Any]) -> Callable[..., Any]:
    def loss(data: Any, p: Any) -> Any:
        does()
        return p[0].sum(), {}

    return loss


@pytest.mark.parametrize("what", REFUSED)
def test_a_loss_that_calls_mint_is_told_that_it_cannot(world: Embedded, run: mint.TrainingClient, what: str) -> None:
    sampler = run.save_weights_and_get_sampling_client()
    call = REFUSED[what]
    with pytest.raises(OperationError, match=f"^{CANNOT}$"):
        run.forward_backward_custom(batch(), loss_that(lambda: call(run, sampler))).result(GUARD)
    other = world.client().create_lora_training_client(sampler.get_base_model(), rank=2)
    train(other, 1)  # the engine lives


def test_a_loss_that_waits_for_another_result_is_told_that_it_cannot(world: Embedded, run: mint.TrainingClient) -> None:
    later: list[mint.APIFuture[Any]] = []
    with world.held():
        future = run.forward_backward_custom(batch(), loss_that(lambda: later[0].result(MOMENT)))
        later.append(run.forward(batch()))
    with pytest.raises(OperationError, match=f"^{CANNOT}$"):
        future.result(GUARD)


def test_a_loss_that_awaits_another_result_is_told_that_it_cannot(world: Embedded, run: mint.TrainingClient) -> None:
    later: list[mint.APIFuture[Any]] = []
    with world.held():
        waits = loss_that(lambda: asyncio.run(later[0].result_async(MOMENT)))
        future = run.forward_backward_custom(batch(), waits)
        later.append(run.forward(batch()))
    with pytest.raises(OperationError, match=f"^{CANNOT}$"):
        future.result(GUARD)


def test_after_a_refused_call_the_run_goes_on(world: Embedded, run: mint.TrainingClient) -> None:
    with pytest.raises(OperationError):
        run.forward_backward_custom(batch(), loss_that(lambda: run.forward(batch()).result(MOMENT))).result(GUARD)
    later = run.forward(batch())
    world.settle()
    assert later.done()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=["exit", "interrupt"])
def test_a_loss_that_exits_takes_nobody_with_it(run: mint.TrainingClient, error: BaseException) -> None:
    def raise_it() -> None:
        raise error

    with pytest.raises(type(error)):
        run.forward_backward_custom(batch(), loss_that(raise_it)).result(GUARD)
    with pytest.raises(OperationError, match="optim_step refused"):
        run.optim_step().result(GUARD)
    train(run, 1)


def test_the_loss_runs_on_one_thread_that_is_not_the_callers(world: Embedded, run: mint.TrainingClient) -> None:
    threads: list[str] = []
    for _ in range(2):
        run.forward_backward_custom(batch(), loss_that(lambda: threads.append(threading.current_thread().name))).result(
            GUARD
        )
    assert set(threads) == {"mint-engine"}


def test_the_list_of_datums_is_copied(world: Embedded, client: mint.ServiceClient, tiny_model: str) -> None:
    runs = [client.create_lora_training_client(tiny_model, rank=4, seed=0) for _ in range(2)]
    data = batch()
    with world.held():
        future = runs[0].forward_backward_custom(data, negative_log_likelihood)
        data.clear()
    expected = runs[1].forward_backward_custom(batch(), negative_log_likelihood).result(GUARD)
    assert future.result(GUARD).metrics == expected.metrics
    for run in runs:
        run.optim_step(LEARNING).result(GUARD)
    assert same_weights(world.state(runs[0]), world.state(runs[1]))
