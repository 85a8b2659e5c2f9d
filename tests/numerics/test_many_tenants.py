"""Many runs on one base: passes shared by runs of different ranks, modules, losses and learning rates, each as if alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.backend import Part
from mint.engine.decoder_backend import DecoderBackend
from mint.losses import LOSSES
from mint.types.requests import prepare_training_input
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    gradient,
    in_passes,
    largest_difference,
    make_datum,
    open_backend,
    parameters,
    record_passes,
    relative_error,
)

NUM_RUNS = 64
MODULES = [
    {"train_attn": True, "train_mlp": True, "train_unembed": True},
    {"train_attn": True, "train_mlp": False, "train_unembed": False},
    {"train_attn": False, "train_mlp": True, "train_unembed": False},
]


def _lora(number: int) -> types.LoraConfig:
    return types.LoraConfig(rank=1 + number % 5, **MODULES[number % 3])


def _part(number: int) -> Part:
    """Of one to three datums, with one of the losses."""
    generator = np.random.default_rng(number)
    loss_fn = ["cross_entropy", "importance_sampling", "ppo"][number % 3]
    data = []
    for length in generator.integers(1, 30, 1 + number % 3):
        tokens, targets = generator.integers(0, 90, (2, length))
        values = {name: generator.uniform(-1, 0, length) for name in LOSSES[loss_fn].inputs}
        values |= {name: generator.uniform(0.5, 1, length) for name in ("weights", "advantages") if name in values}
        data.append(make_datum(tokens.tolist(), targets.tolist(), **values))
    return Part(f"run{number}", prepare_training_input(data, loss_fn))


def _state_bytes(backend: DecoderBackend) -> int:
    runs = backend._trainer.runs.values()
    tensors = [t for r in runs for t in (r.params_P, r.gradient.flat_P, r.adam.exp_avg_P, r.adam.exp_avg_sq_P)]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_64_runs_in_shared_passes_are_what_each_is_alone(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")
    together = open_backend(folder, max_tokens_per_pass=256)
    for number in range(NUM_RUNS):
        add_random_run(together, f"run{number}", _lora(number), seed=number)
    parts = [_part(number) for number in range(NUM_RUNS)]
    seen = record_passes(together, monkeypatch)
    results = in_passes(together, "forward_backward", parts)
    assert len(seen) < NUM_RUNS / 4 and max(seen) <= 256  # they did share
    gradients = [gradient(together, f"run{number}") for number in range(NUM_RUNS)]
    rates = [types.AdamParams(learning_rate=1e-3 * (1 + number % 7)) for number in range(NUM_RUNS)]
    for number, rate in enumerate(rates):
        together.optim_step(f"run{number}", rate)
    alone = open_backend(folder)
    for number in range(0, NUM_RUNS, 5):
        name = f"run{number}"
        add_random_run(alone, name, _lora(number), seed=number)
        (expected,) = in_passes(alone, "forward_backward", [parts[number]])
        assert largest_difference(results[number].logprobs, expected.logprobs) <= FP32_LOGPROB
        assert relative_error(gradients[number], gradient(alone, name)) <= FP32_GRADIENT
        alone.optim_step(name, rates[number])
        # a first step of AdamW is rate times the gradient's sign, which a gradient of nearly 0 does not determine
        settled = gradients[number].abs() > 1e-4 * gradients[number].abs().max()
        moved = parameters(together, name) - parameters(alone, name)
        assert float(moved[settled].abs().max()) <= 1e-3 * rates[number].learning_rate


def test_a_further_run_costs_its_own_state(tiny: Callable[..., Path]) -> None:
    """16 bytes a parameter: weights, gradient and two moments in float32; nothing of the base."""
    backend = open_backend(tiny("llama"))
    sizes = []
    for number in range(NUM_RUNS):
        report = backend.add_run(f"run{number}", _lora(number), seed=0)
        sizes.append(16 * report.num_parameters)
        assert _state_bytes(backend) == sum(sizes)
    backend.remove_run("run0")
    assert _state_bytes(backend) == sum(sizes[1:])


def test_a_run_in_a_shared_pass_leaves_the_others_bits(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    for number in range(3):
        add_random_run(backend, f"run{number}", _lora(number), seed=number)
    before = parameters(backend, "run2")
    in_passes(backend, "forward_backward", [_part(0), _part(1)])
    backend.optim_step("run0", types.AdamParams(learning_rate=1e-2))
    assert torch.equal(parameters(backend, "run2"), before) and not gradient(backend, "run2").any()
