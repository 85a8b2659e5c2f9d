"""optim_step is torch's AdamW with the protocol's defaults, and its metrics are the norms they claim to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from tests.support.engine import (
    COMPILED,
    add_random_run,
    flatten,
    forward_backward,
    gradient,
    make_datum,
    open_backend,
    parameters,
    weighted_datums,
)

STEPS = 10
LORA = types.LoraConfig(rank=4)
# Both sides do the same float32 operations in another order: after 10 steps the updates agree to some roundings
# (6e-8 each) of the weights, which are at most 1/sqrt(64), and of the updates
ULPS = 20 * 2**-24
# summed in float32: of equal values, as in a first step, a block of 2**18 is off by 1e-4
UPDATE_NORM = 2e-4
CASES: dict[str, dict[str, float]] = {
    "defaults": {},
    "decay": {"learning_rate": 1e-2, "weight_decay": 0.1},
    "clipping": {"learning_rate": 1e-3, "grad_clip_norm": 5.0},
    "everything": {
        "learning_rate": 3e-3,
        "beta1": 0.8,
        "beta2": 0.99,
        "eps": 1e-3,
        "weight_decay": 0.3,
        "grad_clip_norm": 20.0,
    },
}
PROTOCOL = {
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "weight_decay": 0.0,
    "grad_clip_norm": 0.0,
}


def test_defaults_are_the_protocols() -> None:
    assert types.AdamParams().model_dump() == PROTOCOL


@pytest.fixture(params=["torch", pytest.param("compiled", marks=COMPILED)])
def backend(tiny: Callable[..., Path], request: pytest.FixtureRequest) -> DecoderBackend:
    """Passes differ in type, AdamW is float32's either way."""
    if request.param == "compiled":
        return open_backend(tiny("qwen3", head_dim=32), "bfloat16", kernels="compiled")
    return open_backend(tiny("qwen3"))


def _steps(backend: DecoderBackend) -> list[list[types.Datum]]:
    """Data whose gradient norm changes by a factor of 1,000 from step to step, so that some steps clip and some do not:
    AdamW hides a common factor of all gradients."""
    batches = []
    for step, data in enumerate(weighted_datums(np.random.default_rng(step), [9, 30]) for step in range(STEPS)):
        scale = (0.001, 1.0, 0.05)[step % 3]
        scaled = []
        for datum in data:
            inputs = datum.loss_fn_inputs
            weights = scale * inputs["weights"].to_numpy()
            scaled.append(make_datum(datum.model_input.to_ints(), inputs["target_tokens"], weights=weights))
        batches.append(scaled)
    return batches


def _torch_steps(start: torch.Tensor, gradients: list[torch.Tensor], hyper: dict[str, float]) -> list[torch.Tensor]:
    """torch's own clipping and AdamW on these gradients; the weights after each step."""
    values = {**PROTOCOL, **hyper}
    parameter = torch.nn.Parameter(start.float())
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=values["learning_rate"],
        betas=(values["beta1"], values["beta2"]),
        eps=values["eps"],
        weight_decay=values["weight_decay"],
    )
    seen = []
    for grad in gradients:
        parameter.grad = grad.float()
        if values["grad_clip_norm"]:
            # divides by norm + 1e-6 where the engine divides by the norm: 1e-6 / 5 at most, an ulp or two of a gradient
            torch.nn.utils.clip_grad_norm_([parameter], values["grad_clip_norm"])
        optimizer.step()
        seen.append(parameter.detach().double().clone())
    return seen


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_equal_torch(backend: DecoderBackend, name: str) -> None:
    hyper = CASES[name]
    start = flatten(add_random_run(backend, "run", LORA))
    gradients, found, metrics = [], [], []
    for data in _steps(backend):
        forward_backward(backend, "run", data)
        gradients.append(gradient(backend, "run"))
        metrics.append(backend.optim_step("run", types.AdamParams(**hyper)))
        found.append(parameters(backend, "run"))
    expected = _torch_steps(start, gradients, hyper)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(ULPS * theirs.abs().max()))
    before = start
    for step, (metric, grad, after) in enumerate(zip(metrics, gradients, found, strict=True), 1):
        assert metric["step"] == step
        assert metric["learning_rate"] == types.AdamParams(**hyper).learning_rate
        assert metric["grad_norm"] == pytest.approx(float(grad.norm()), rel=1e-12)  # summed in float64
        assert metric["update_norm"] == pytest.approx(float((after - before).norm()), rel=UPDATE_NORM)
        before = after
    # so that the comparison can fail: a change of any one of these shows
    for change in ({"beta2": 0.9}, {"weight_decay": 0.2}, {"grad_clip_norm": 1.0}, {"beta1": 0.7}):
        other = _torch_steps(start, gradients, {**hyper, **change})[-1]
        assert (other - expected[-1]).abs().max() > 10 * ULPS * expected[-1].abs().max()


def test_a_step_clears_the_gradient_and_an_empty_one_changes_nothing(backend: DecoderBackend) -> None:
    add_random_run(backend, "run", LORA)
    (data,) = [weighted_datums(np.random.default_rng(0), [9])]
    forward_backward(backend, "run", data)
    assert "no_gradient" not in backend.optim_step("run", types.AdamParams())
    assert not gradient(backend, "run").any()
    before = backend.export_state("run")
    metrics = backend.optim_step("run", types.AdamParams(weight_decay=0.5))
    after = backend.export_state("run")
    assert metrics == {"step": 1.0, "learning_rate": 1e-4, "grad_norm": 0.0, "update_norm": 0.0, "no_gradient": 1.0}
    assert after.step == before.step == 1
    for name in ("tensors", "exp_avg", "exp_avg_sq"):
        assert torch.equal(flatten(getattr(before, name)), flatten(getattr(after, name)))


def test_a_gradient_that_is_zero_is_still_a_step(backend: DecoderBackend) -> None:
    """Weights that are all 0 are data too: the step counts and decays, as torch's would."""
    start = flatten(add_random_run(backend, "run", LORA))
    forward_backward(backend, "run", [make_datum([1, 2, 3], [2, 3, 4], weights=[0, 0, 0])])
    metrics = backend.optim_step("run", types.AdamParams(learning_rate=0.1, weight_decay=0.5))
    assert (metrics["step"], metrics["grad_norm"]) == (1.0, 0.0)
    torch.testing.assert_close(parameters(backend, "run"), start * (1 - 0.1 * 0.5), rtol=2**-23, atol=0)


def test_state_restored_is_state_kept(backend: DecoderBackend) -> None:
    """Saved and resumed equals uninterrupted bit for bit; without the optimizer the moments start anew."""
    batches = _steps(backend)
    hyper = types.AdamParams(learning_rate=1e-3)
    backend.add_run("whole", LORA, 0)
    backend.add_run("resumed", LORA, 1)
    for data in batches[:2]:
        forward_backward(backend, "whole", data)
        backend.optim_step("whole", hyper)
    saved = backend.export_state("whole")
    finals = []
    for run_id, optimizer in (("whole", None), ("resumed", True), ("resumed", False)):
        if optimizer is not None:
            forward_backward(backend, "resumed", batches[5])  # a gradient that the import must clear
            backend.import_state("resumed", saved, optimizer=optimizer)
        for data in batches[2:4]:
            forward_backward(backend, run_id, data)
            metrics = backend.optim_step(run_id, hyper)
        finals.append((parameters(backend, run_id), metrics["step"]))
    assert torch.equal(finals[0][0], finals[1][0])
    assert not torch.equal(finals[0][0], finals[2][0])
    assert [step for _, step in finals] == [4.0, 4.0, 2.0]
