"""The same calls in the same order give the same bits, in a new process too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mint import types
from tests.numerics import determinism_child
from tests.support.engine import (
    add_random_run,
    forward_backward,
    gradient,
    open_backend,
    parameters,
    run_child,
    weighted_datums,
)

DTYPES = ("float32", "bfloat16")


def test_a_new_process_computes_the_same_bits(tiny: Callable[..., Path]) -> None:
    """Against this process, in which dozens of other models have run and left their memory."""
    folder = tiny("qwen3")
    there = run_child(determinism_child, folder, *DTYPES)
    here = [determinism_child.digest(folder, dtype) for dtype in DTYPES]
    assert there == here
    assert here[0] != here[1]


def test_leftovers_of_other_work_change_no_bit(tiny: Callable[..., Path]) -> None:
    """Buffers are reused uninitialised: what other runs and longer passes left in them must not matter."""
    states = []
    for busy in (False, True):
        backend = open_backend(tiny("llama"))
        add_random_run(backend, "run", types.LoraConfig(rank=4))
        if busy:
            add_random_run(backend, "other", types.LoraConfig(rank=9), seed=3)
            forward_backward(backend, "other", weighted_datums(np.random.default_rng(9), [300, 200]))
        for step in range(2):
            forward_backward(backend, "run", weighted_datums(np.random.default_rng(step), [30, 60]))
            backend.optim_step("run", types.AdamParams())
            if busy:
                forward_backward(backend, "other", weighted_datums(np.random.default_rng(9), [301]))
        forward_backward(backend, "run", weighted_datums(np.random.default_rng(5), [21]))
        states.append((parameters(backend, "run"), gradient(backend, "run")))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
