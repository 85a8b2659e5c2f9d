"""A failed forward_backward: the next optim_step refuses, naming it, changes nothing, clears the mark; then all is well."""

from __future__ import annotations

import re
from typing import Any

import pytest

import mint
from mint import Datum, InputError, ModelInput, NumericsError, OperationError, types
from tests.support.clients import CONTEXT, GUARD, LEARNING, Embedded, batch, datum, logprobs, same_weights, train

TOO_LONG = [datum(length=CONTEXT + 1)]
INFINITE = [
    Datum(
        model_input=ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [1, 2], "logprobs": [-1e4, -1e4], "advantages": [1.0, 1.0]},
    )
]
HUGE = [
    Datum(model_input=ModelInput.from_ints([1, 2]), loss_fn_inputs={"target_tokens": [1, 2], "weights": [3e38, 3e38]})
]


def refuses(run: mint.TrainingClient) -> str:
    with pytest.raises(OperationError) as caught:
        run.optim_step(LEARNING).result(GUARD)
    return str(caught.value)


def test_the_next_step_refuses_naming_it_and_the_one_after_works(world: Embedded, run: mint.TrainingClient) -> None:
    train(run, 1)
    before = world.state(run)
    run.forward_backward(batch()).result(GUARD)  # what was added before is lost with it
    failed = run.forward_backward(TOO_LONG)
    with pytest.raises(InputError, match="the context allows"):
        failed.result(GUARD)
    assert refuses(run) == (
        f"optim_step refused: forward_backward (operation 4) failed: data[0]: {CONTEXT + 1} tokens; the context allows "
        f"{CONTEXT}. Shorten or drop it. Nothing was changed and the gradient was cleared; repeat the forward_backward, "
        "then step"
    )
    assert same_weights(world.state(run), before)
    assert run.optim_step(LEARNING).result(GUARD).metrics["no_gradient"] == 1.0  # the mark and the gradient are gone
    assert same_weights(world.state(run), before)
    train(run, 1)
    assert world.state(run).step == 2


def test_after_a_failure_training_gives_what_it_would_have_given(
    world: Embedded, run: mint.TrainingClient, tiny_model: str
) -> None:
    other = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    run.forward_backward(TOO_LONG)
    refuses(run)
    assert (train(run, 2) == train(other, 2)).all()
    assert same_weights(world.state(run), world.state(other))


def test_the_first_failure_is_the_one_that_is_named(run: mint.TrainingClient) -> None:
    run.forward_backward(TOO_LONG)
    run.forward_backward(batch())
    run.forward_backward([datum(length=CONTEXT + 2)])
    text = refuses(run)
    assert "(operation 1)" in text and f"{CONTEXT + 1} tokens" in text


def test_what_is_added_after_the_failure_is_not_stepped_either(world: Embedded, run: mint.TrainingClient) -> None:
    before = world.state(run)
    run.forward_backward(TOO_LONG)
    run.forward_backward(batch()).result(GUARD)
    refuses(run)
    assert run.optim_step(LEARNING).result(GUARD).metrics["no_gradient"] == 1.0
    assert same_weights(world.state(run), before)


@pytest.mark.parametrize("clear", ["load_state", "load_state_with_optimizer"])
def test_loading_a_checkpoint_clears_the_mark(run: mint.TrainingClient, clear: str) -> None:
    path = run.save_state("a").result(GUARD).path
    run.forward_backward(TOO_LONG)
    getattr(run, clear)(path).result(GUARD)
    assert run.optim_step(LEARNING).result(GUARD).metrics["no_gradient"] == 1.0


def test_a_failed_forward_or_save_or_load_does_not_stop_a_step(run: mint.TrainingClient) -> None:
    run.forward_backward(batch()).result(GUARD)
    for failed in (run.forward(TOO_LONG), run.load_state("tinker://x/weights/y")):
        with pytest.raises(InputError):
            failed.result(GUARD)
    run.save_state("a").result(GUARD)
    with pytest.raises(mint.CheckpointError, match="exists; save under another name or with overwrite=True"):
        run.save_state("a").result(GUARD)
    assert run.optim_step(LEARNING).result(GUARD).metrics["step"] == 1.0


def test_a_refused_step_is_an_operation_like_any_other(world: Embedded, run: mint.TrainingClient) -> None:
    with world.held():
        run.forward_backward(TOO_LONG)
        refused = run.optim_step(LEARNING)
        gradient = run.forward_backward(batch())
        step = run.optim_step(LEARNING)
    with pytest.raises(OperationError, match="operation 1"):
        refused.result(GUARD)
    assert gradient.result(GUARD).metrics["loss:sum"] > 0
    assert step.result(GUARD).metrics["step"] == 1.0


def test_a_failed_custom_loss_marks_the_run_as_any_other(run: mint.TrainingClient) -> None:
    def loss(data: Any, p: Any) -> Any:
        raise ZeroDivisionError("of mine")

    with pytest.raises(ZeroDivisionError, match=r"^of mine$"):
        run.forward_backward_custom(batch(), loss).result(GUARD)
    assert re.search(r"forward_backward \(operation 1\) failed: of mine", refuses(run))
    train(run, 1)


def test_a_step_without_gradient_says_so_and_changes_nothing(world: Embedded, run: mint.TrainingClient) -> None:
    train(run, 1)
    before = world.state(run)
    run.forward(batch())
    metrics = run.optim_step(LEARNING).result(GUARD).metrics
    assert metrics == {"step": 1.0, "learning_rate": 1e-2, "grad_norm": 0.0, "update_norm": 0.0, "no_gradient": 1.0}
    assert same_weights(world.state(run), before)


def test_forward_touches_no_gradient(world: Embedded, run: mint.TrainingClient, tiny_model: str) -> None:
    other = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    for with_forward in (True, False):
        trained = run if with_forward else other
        trained.forward_backward(batch(1)).result(GUARD)
        if with_forward:
            run.forward(batch(2)).result(GUARD)
        trained.forward_backward(batch(3)).result(GUARD)
        trained.optim_step(LEARNING).result(GUARD)
    assert same_weights(world.state(run), world.state(other))


def test_an_infinite_loss_is_refused_without_a_warning_and_its_gradient_discarded(
    world: Embedded, run: mint.TrainingClient
) -> None:
    before = world.state(run)
    run.forward_backward(batch()).result(GUARD)
    with pytest.raises(
        NumericsError, match="importance_sampling: the loss is -inf, not a finite number; the run's gradient"
    ):
        run.forward_backward(INFINITE, "importance_sampling").result(GUARD)
    assert "the loss is -inf" in refuses(run)
    assert same_weights(world.state(run), before)
    train(run, 1)


def test_an_infinite_gradient_is_refused_and_discarded(world: Embedded, run: mint.TrainingClient) -> None:
    before = world.state(run)
    with pytest.raises(NumericsError, match="cross_entropy: the gradient is not a finite number; the run's gradient"):
        run.forward_backward(HUGE).result(GUARD)
    assert "the gradient is not a finite number" in refuses(run)
    assert same_weights(world.state(run), before)
    assert run.optim_step(LEARNING).result(GUARD).metrics["no_gradient"] == 1.0
    train(run, 1)


def test_a_run_that_fails_within_a_shared_pass_fails_alone(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    runs = [client.create_lora_training_client(tiny_model, rank=4, seed=i) for i in range(3)]
    alone = logprobs(runs[2].forward(batch()).result(GUARD))
    with world.held():
        long, infinite = runs[0].forward_backward(TOO_LONG), runs[1].forward_backward(INFINITE, "importance_sampling")
        good = runs[2].forward_backward(batch())
    with pytest.raises(InputError, match="the context allows"):
        long.result(GUARD)
    with pytest.raises(NumericsError, match="the loss is -inf"):
        infinite.result(GUARD)
    assert abs(logprobs(good.result(GUARD)) - alone).max() <= 1e-4
    assert runs[2].optim_step(LEARNING).result(GUARD).metrics["step"] == 1.0
    for run in runs[:2]:
        refuses(run)
        train(run, 1)


def test_a_step_that_moves_no_weight_changes_nothing(world: Embedded, run: mint.TrainingClient) -> None:
    before = world.state(run)
    run.forward_backward(batch())
    with pytest.raises(NumericsError, match="moved no weight at learning rate 1e-60; raise the learning rate"):
        run.optim_step(types.AdamParams(learning_rate=1e-60)).result(GUARD)
    assert same_weights(world.state(run), before)
    assert run.optim_step(LEARNING).result(GUARD).metrics["no_gradient"] == 1.0
