"""forward_backward_custom: any loss over the logprobs of all datums, its gradient that of one autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.engine.backend import Part, PartResult
from mint.engine.decoder_backend import DecoderBackend
from mint.errors import InputError, NumericsError
from mint.types.requests import prepare_custom_input
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    drain,
    forward_backward,
    gradient,
    largest_difference,
    make_datum,
    open_backend,
    peft_model,
    record_passes,
    reference_gradient,
    relative_error,
    weighted_datums,
)

LORA = types.LoraConfig(rank=4)
LENGTHS = (30, 25, 9, 140, 1, 17)
# all datums in one pass (their activations are kept), in several passes, and each in its own
CAPS = [4096, 160, 16]


def _data(width: int | None = None) -> list[types.Datum]:
    """Datums with nothing but targets: the loss is the caller's affair."""
    generator = np.random.default_rng(0)
    plain = weighted_datums(generator, LENGTHS)
    data = []
    for datum in plain:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        if width is not None:
            targets = generator.integers(0, 384, (len(targets), width))
        data.append(make_datum(datum.model_input.to_ints(), targets))
    return data


def preference(logprobs: Sequence[Tensor]) -> Tensor:
    """DPO-like: neighbours are pairs, every pair's margin is compared with the next one's, so all datums are coupled."""
    sums = [p.sum() for p in logprobs]
    margins = torch.stack([0.05 * (a - b) for a, b in zip(sums[::2], sums[1::2], strict=True)])
    return -torch.nn.functional.logsigmoid(margins).sum() + 0.1 * (margins - margins.roll(1)).square().sum()


def only_the_second(logprobs: Sequence[Tensor]) -> Tensor:
    """Five of six datums do not matter, nor do most positions of the second."""
    return (logprobs[1][-3:] ** 2).sum()


def _custom(backend: DecoderBackend, data: list[types.Datum], loss: Callable[[Sequence[Tensor]], Tensor]) -> PartResult:
    seen: list[list[int]] = []

    def with_metrics(logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        seen.append([len(p) for p in logprobs])
        return loss(logprobs), {"answer": 42.0}

    result = drain(backend.forward_backward_custom(Part("run", prepare_custom_input(data)), with_metrics))
    assert seen == [list(LENGTHS)]  # called once, with every datum in order
    return result


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("loss", [preference, only_the_second])
@pytest.mark.parametrize("width", [None, 3], ids=["N", "NxK"])
def test_gradient_equals_autograd_through_peft(
    tiny: Callable[..., Path], loss: Callable[[Sequence[Tensor]], Tensor], cap: int, width: int | None
) -> None:
    folder = tiny("qwen3")
    backend = open_backend(folder, max_tokens_per_pass=cap)
    tensors = add_random_run(backend, "run", LORA)
    data = _data(width)
    result = _custom(backend, data, loss)
    model, named = peft_model(folder, tensors, LORA.rank)
    expected, expected_gradient = reference_gradient(model, named, data, loss)
    assert largest_difference(result.logprobs, expected) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected_gradient) <= FP32_GRADIENT
    value = float(loss([torch.from_numpy(p).double() for p in expected]))
    # both losses are sums of some hundred logprobs, each within FP32_LOGPROB, times factors of the size of the loss
    assert result.metrics["loss:sum"] == pytest.approx(value, rel=1e-3)
    assert result.metrics["answer"] == 42.0
    assert "no_gradient" not in backend.optim_step("run", types.AdamParams())


@pytest.mark.parametrize("cap", CAPS)
def test_passes_hold_no_more_than_planned(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    """One pass where everything fits, else every datum forward and then once more with its gradient."""
    backend = open_backend(tiny("llama"), max_tokens_per_pass=cap)
    add_random_run(backend, "run", LORA)
    seen = record_passes(backend, monkeypatch)
    _custom(backend, _data(), preference)
    assert max(seen) <= max(cap, *LENGTHS)
    assert sum(seen) == sum(LENGTHS) * (1 if cap >= sum(LENGTHS) else 2)


def test_cross_entropy_written_by_hand_equals_cross_entropy(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "run", LORA)
    data = weighted_datums(np.random.default_rng(1), LENGTHS)
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    plain = forward_backward(backend, "run", data)
    expected = gradient(backend, "run")
    backend.discard_gradient("run")
    stripped = [make_datum(d.model_input.to_ints(), d.loss_fn_inputs["target_tokens"]) for d in data]
    result = _custom(
        backend, stripped, lambda p: -torch.stack([(w * x).sum() for w, x in zip(weights, p, strict=True)]).sum()
    )
    assert largest_difference(result.logprobs, plain.logprobs) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected) <= FP32_GRADIENT


def test_gradients_of_custom_and_built_in_losses_accumulate(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    add_random_run(backend, "run", LORA)
    built_in = weighted_datums(np.random.default_rng(2), [12])
    forward_backward(backend, "run", built_in)
    first = gradient(backend, "run")
    backend.discard_gradient("run")
    _custom(backend, _data(), preference)
    second = gradient(backend, "run")
    forward_backward(backend, "run", built_in)
    assert relative_error(gradient(backend, "run"), first + second) <= FP32_GRADIENT


class _CallersError(Exception):
    pass


def _raises(logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    raise _CallersError("in the loss")


def _detached(logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.tensor(1.0), {}


def _not_scalar(logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return logprobs[0], {}


def _infinite(logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return logprobs[0].sum() * torch.inf, {}


@pytest.mark.parametrize("cap", [4096, 16])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (_raises, _CallersError, "in the loss"),
        (_detached, InputError, "must return .loss, metrics. with loss a torch scalar"),
        (_not_scalar, InputError, "must return .loss, metrics. with loss a torch scalar"),
        (_infinite, NumericsError, "the loss or its gradient by the logprobs is not finite"),
    ],
)
def test_a_loss_that_fails_raises_and_leaves_no_gradient(
    tiny: Callable[..., Path], loss: Callable[..., object], error: type[Exception], message: str, cap: int
) -> None:
    backend = open_backend(tiny("llama"), max_tokens_per_pass=cap)
    add_random_run(backend, "run", LORA)
    with pytest.raises(error, match=message):
        drain(backend.forward_backward_custom(Part("run", prepare_custom_input(_data())), loss))
    assert not gradient(backend, "run").any()
    assert backend.optim_step("run", types.AdamParams())["no_gradient"] == 1.0
    _custom(backend, _data(), preference)  # and the run is usable
    assert gradient(backend, "run").any()
