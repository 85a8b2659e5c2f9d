"""bf16 on the packaged model and real chat tokens: errors against fp32, held beside those of transformers and PEFT.

The fp32 reference is transformers' and PEFT's own, so nothing of the engine is compared with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.hub import ModelSource
from tests.support.engine import (
    MISSING,
    add_random_run,
    both_kernels,
    cross_entropy_loss,
    forward_backward,
    gradient,
    make_datum,
    open_backend,
    peft_model,
    reference_gradient,
    relative_error,
)

# numerics contract, bf16
MIN_TOKENS = 1000
ERROR_RATIO = 1.25
SIGNED_ERROR = 1e-2
COSINE = 0.99
GRADIENT_RATIO = 1.5

LORA = types.LoraConfig(rank=8)
B_SCALE = 0.02  # B random, so that A has a gradient and the adapter moves the logprobs


@dataclass(frozen=True)
class Measured:
    """Logprobs of every chat token, one after the other, and the flat LoRA gradient."""

    logprobs: np.ndarray
    gradient: Tensor


@pytest.fixture(scope="module")
def data(chats: list[list[int]]) -> list[types.Datum]:
    """Whole conversations, every token weighted, until there are enough."""
    chosen: list[types.Datum] = []
    for chat in chats:
        if sum(datum.model_input.length for datum in chosen) >= MIN_TOKENS:
            break
        chosen.append(make_datum(chat[:-1], chat[1:], weights=np.ones(len(chat) - 1)))
    return chosen


@pytest.fixture(scope="module")
def measured(smollm2: ModelSource, data: list[types.Datum]) -> dict[str, Measured]:
    """The same adapter on the same tokens: PEFT in fp32, PEFT in bf16, the engine in bf16 with each kernels there are."""
    found = {}
    for kernels in ("torch", *(("compiled",) if MISSING is None else ())):
        backend = open_backend(smollm2.path, "bfloat16", kernels=kernels)
        tensors = add_random_run(backend, "run", LORA, scale=B_SCALE)
        result = forward_backward(backend, "run", data)
        found[kernels] = Measured(np.concatenate(result.logprobs), gradient(backend, "run"))
    for name, dtype in (("fp32", torch.float32), ("peft", torch.bfloat16)):
        model, named = peft_model(smollm2.path, tensors, LORA.rank, dtype)
        parts = [reference_gradient(model, named, [datum], cross_entropy_loss([datum])) for datum in data]
        logprobs = np.concatenate([array for arrays, _ in parts for array in arrays])
        found[name] = Measured(logprobs, torch.stack([grad for _, grad in parts]).sum(0))
    return found


@both_kernels
def test_logprob_errors_are_no_larger_than_transformers(
    measured: dict[str, Measured], kernels: str, record_property: Callable[[str, object], None]
) -> None:
    exact = measured["fp32"].logprobs.astype(np.float64)
    assert len(exact) >= MIN_TOKENS
    ours, theirs = (measured[name].logprobs - exact for name in (kernels, "peft"))
    figures = {
        "tokens": len(exact),
        "mean |error|, engine": float(np.abs(ours).mean()),
        "mean |error|, transformers": float(np.abs(theirs).mean()),
        "mean error, engine": float(ours.mean()),
        "mean error, transformers": float(theirs.mean()),
    }
    _report(figures, record_property)
    assert np.abs(ours).mean() > 0  # bf16 was used
    assert np.abs(ours).mean() <= ERROR_RATIO * np.abs(theirs).mean()
    assert abs(ours.mean()) <= SIGNED_ERROR


@both_kernels
def test_lora_gradient_is_as_close_to_fp32_as_pefts(
    measured: dict[str, Measured], kernels: str, record_property: Callable[[str, object], None]
) -> None:
    exact, ours, theirs = (measured[name].gradient for name in ("fp32", kernels, "peft"))
    figures = {
        "cosine, engine": float(torch.nn.functional.cosine_similarity(ours, exact, dim=0)),
        "cosine, PEFT": float(torch.nn.functional.cosine_similarity(theirs, exact, dim=0)),
        "relative error, engine": relative_error(ours, exact),
        "relative error, PEFT": relative_error(theirs, exact),
    }
    _report(figures, record_property)
    assert figures["cosine, engine"] >= COSINE
    assert figures["relative error, engine"] <= GRADIENT_RATIO * figures["relative error, PEFT"]


def _report(figures: dict[str, float], record_property: Callable[[str, object], None]) -> None:
    for name, value in figures.items():
        record_property(name, value)
        print(f"{name}: {value:.6g}")
