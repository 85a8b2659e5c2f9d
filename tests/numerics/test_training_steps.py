"""Twenty training steps against the same loop written with PEFT and torch.optim.AdamW (fp32)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mint import types
from tests.support.engine import (
    cross_entropy_loss,
    forward_backward,
    open_backend,
    peft_model,
    reference_logprobs,
    weighted_datums,
)

STEPS = 20
RANK = 4
# numerics contract: losses within 1e-5 at every step, where a wrong beta2 moves them by more
LOSS = 1e-5
LENGTHS = (12, 40, 7, 140)


def _batches(steps: int = STEPS) -> list[list[types.Datum]]:
    """Two batches take turns, so that losses fall and moments mix different gradients."""
    batches = [weighted_datums(np.random.default_rng(seed), LENGTHS) for seed in range(2)]
    return [batches[step % 2] for step in range(steps)]


def _total_weight(data: list[types.Datum]) -> float:
    return sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data)


def _engine_losses(folder: Path, learning_rate: float, **hyper: float) -> tuple[dict[str, np.ndarray], list[float]]:
    """Token-mean losses; the gradient is that of the sum, as the protocol has it."""
    backend = open_backend(folder)
    backend.add_run("run", types.LoraConfig(rank=RANK), seed=0)
    start = backend.export_state("run").tensors
    losses = []
    for data in _batches():
        losses.append(forward_backward(backend, "run", data).metrics["loss:sum"] / _total_weight(data))
        backend.optim_step("run", types.AdamParams(learning_rate=learning_rate, **hyper))
    return start, losses


def _peft_losses(folder: Path, start: dict[str, np.ndarray], learning_rate: float) -> list[float]:
    model, parameters = peft_model(folder, start, RANK)
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    losses = []
    for data in _batches():
        loss = cross_entropy_loss(data)([reference_logprobs(model, datum) for datum in data])
        losses.append(float(loss.detach().double()) / _total_weight(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-3])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_losses_of_twenty_steps_equal_peft(tiny: Callable[..., Path], family: str, learning_rate: float) -> None:
    start, found = _engine_losses(tiny(family), learning_rate)
    expected = _peft_losses(tiny(family), start, learning_rate)
    assert np.abs(np.subtract(found, expected)).max() <= LOSS
    assert found[-2] < found[0] - 100 * LOSS  # it learns: the losses do not agree by standing still


@pytest.mark.parametrize(
    ("learning_rate", "change"),
    [(1e-4, {"beta2": 0.999}), (1e-3, {"beta2": 0.999}), (1e-3, {"beta1": 0.8}), (1e-3, {"weight_decay": 0.1})],
    ids=str,
)
def test_a_wrong_hyperparameter_breaks_that_bound(
    tiny: Callable[..., Path], learning_rate: float, change: dict[str, float]
) -> None:
    start, found = _engine_losses(tiny("qwen3"), learning_rate, **change)
    expected = _peft_losses(tiny("qwen3"), start, learning_rate)
    assert np.abs(np.subtract(found, expected)).max() > 10 * LOSS
