"""Numbers that overflow are reported to the run that made them, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mint import types
from mint.engine.backend import AdapterState, PartResult
from mint.engine.decoder_backend import DecoderBackend
from mint.errors import NumericsError
from tests.support.engine import (
    add_random_run,
    both_kernels,
    drain,
    flatten,
    forward_backward,
    generate,
    gradient,
    make_datum,
    open_backend,
    parameters,
    part,
    request,
    weighted_datums,
)

LORA = types.LoraConfig(rank=4)
TOKENS = np.arange(40, 61)


@pytest.fixture
def backend(tiny: Callable[..., Path]) -> DecoderBackend:
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "bad", LORA)
    add_random_run(backend, "good", LORA, seed=1)
    return backend


def _weights(size: float) -> types.Datum:
    return make_datum(TOKENS[:-1], TOKENS[1:], weights=np.full(20, size))


def _policy(q: float, advantage: float) -> types.Datum:
    return make_datum(TOKENS[:-1], TOKENS[1:], logprobs=np.full(20, q), advantages=np.full(20, advantage))


def _beside_a_good_run(backend: DecoderBackend, datum: types.Datum, loss_fn: str) -> PartResult:
    """The bad part's result; the good run's result and gradient have the bits of a pass with a harmless neighbour."""
    good = part("good", weighted_datums(np.random.default_rng(0), [30, 12]))
    harmless = part("bad", [_weights(1.0)])
    _, expected = drain(backend.forward_backward([harmless, good]))
    expected_gradient = gradient(backend, "good")
    for run_id in ("bad", "good"):
        backend.discard_gradient(run_id)
    bad, found = drain(backend.forward_backward([part("bad", [datum], loss_fn), good]))
    assert found.error is None
    assert found.metrics == expected.metrics
    assert all(np.array_equal(a, b) for a, b in zip(found.logprobs, expected.logprobs, strict=True))
    assert torch.equal(gradient(backend, "good"), expected_gradient)
    before = parameters(backend, "good")
    assert backend.optim_step("good", types.AdamParams())["grad_norm"] > 0
    assert not torch.equal(parameters(backend, "good"), before)
    return bad


def _assert_same_state(found: AdapterState, expected: AdapterState) -> None:
    assert found.step == expected.step
    for name in ("tensors", "exp_avg", "exp_avg_sq"):
        assert torch.equal(flatten(getattr(found, name)), flatten(getattr(expected, name)))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_loss_that_overflows_fails_its_own_part_only(backend: DecoderBackend, advantage: float) -> None:
    forward_backward(backend, "bad", [_weights(1.0)])  # what had been accumulated goes too
    before = backend.export_state("bad")
    result = _beside_a_good_run(backend, _policy(-1e30, advantage), "importance_sampling")
    assert isinstance(result.error, NumericsError)
    assert "importance_sampling: the loss is" in str(result.error)
    assert "the run's gradient is discarded" in str(result.error)
    assert "Look for extreme weights, advantages or logprobs, or lower the learning rate" in str(result.error)
    assert (result.logprobs, result.metrics) == ([], {})
    assert not gradient(backend, "bad").any()
    assert backend.optim_step("bad", types.AdamParams())["no_gradient"] == 1.0
    _assert_same_state(backend.export_state("bad"), before)


def test_an_overflow_raises_no_warning(backend: DecoderBackend) -> None:
    _beside_a_good_run(backend, _policy(-1e30, 1.0), "importance_sampling")


def test_weights_that_overflow_the_gradient_fail_their_part(backend: DecoderBackend) -> None:
    result = _beside_a_good_run(backend, _weights(1e38), "cross_entropy")
    assert isinstance(result.error, NumericsError)
    assert not gradient(backend, "bad").any()


def test_a_gradient_that_is_not_finite_is_never_applied(backend: DecoderBackend) -> None:
    """Whatever let it through: optim_step refuses, changes nothing, clears it, and the run goes on."""
    before = backend.export_state("bad")
    drain(backend.forward_backward([part("bad", [_weights(1e38)])]))
    run = backend._trainer.runs["bad"]
    with torch.inference_mode():
        run.gradient.flat_P[3] = torch.nan
    run.has_gradient = True
    with pytest.raises(
        NumericsError, match=r"the gradient norm is .*; nothing was changed and the gradient was cleared"
    ):
        backend.optim_step("bad", types.AdamParams())
    _assert_same_state(backend.export_state("bad"), before)
    assert backend.optim_step("bad", types.AdamParams())["no_gradient"] == 1.0
    forward_backward(backend, "bad", [_weights(1.0)])
    assert backend.optim_step("bad", types.AdamParams())["step"] == 1.0


def test_negative_losses_and_large_finite_ones_are_fine(backend: DecoderBackend) -> None:
    """Only what is not finite is refused."""
    for weight in (-1.0, 1e20, -1e20):
        result = forward_backward(backend, "bad", [_weights(weight)])
        assert np.sign(result.metrics["loss:sum"]) == np.sign(weight)
        assert torch.isfinite(gradient(backend, "bad")).all()
        backend.discard_gradient("bad")


def test_a_learning_rate_that_moves_nothing_is_an_error_and_no_step(backend: DecoderBackend) -> None:
    before = backend.export_state("bad")
    forward_backward(backend, "bad", [_weights(1.0)])
    with pytest.raises(
        NumericsError, match=r"gradient norm [\d.e+]+ moved no weight at learning rate 1e-30; raise the"
    ):
        backend.optim_step("bad", types.AdamParams(learning_rate=1e-30))
    _assert_same_state(backend.export_state("bad"), before)
    assert not gradient(backend, "bad").any()
    forward_backward(backend, "bad", [_weights(1.0)])
    assert backend.optim_step("bad", types.AdamParams())["step"] == 1.0


def test_a_learning_rate_of_zero_was_asked_for(backend: DecoderBackend) -> None:
    forward_backward(backend, "bad", [_weights(1.0)])
    metrics = backend.optim_step("bad", types.AdamParams(learning_rate=0.0))
    assert (metrics["step"], metrics["update_norm"]) == (1.0, 0.0)


@both_kernels
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_an_adapter_that_blew_up_fails_its_own_samples_only(
    tiny: Callable[..., Path], kernels: str, temperature: float
) -> None:
    backend = open_backend(tiny("llama", head_dim=32), "bfloat16", kernels=kernels)
    add_random_run(backend, "bad", LORA)
    add_random_run(backend, "good", LORA, seed=1)
    good = backend.snapshot("good")
    with torch.inference_mode():
        backend._trainer.runs["bad"].params_P[-1] = torch.nan  # one token's logit
    backend._trainer.runs["bad"]._weights = None
    given = [request([5, 6, 7], adapter=a, temperature=temperature) for a in (backend.snapshot("bad"), good, None)]
    alone = [generate(backend, one)[0] for one in given[1:]]
    bad, *others = generate(backend, *given)
    assert isinstance(bad.error, NumericsError) and bad.sequences == []
    assert "sample: this adapter gives logits that are not finite numbers for this prompt" in str(bad.error)
    assert [generation.sequences for generation in others] == [generation.sequences for generation in alone]
    assert backend.num_requests == 0
