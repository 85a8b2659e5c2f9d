"""What test_determinism.py runs here and in a new process: a fixed series of calls, reduced to one digest."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from mint import types
from tests.support.engine import (
    add_random_run,
    forward,
    forward_backward,
    generate,
    gradient,
    open_backend,
    parameters,
    random_prompt,
    request,
    weighted_datums,
)

STEPS = 3


def digest(folder: Path, dtype: str) -> str:
    """Three training steps in micro-batches, a gradient left over, a forward and some samples."""
    seen = hashlib.sha256()
    backend = open_backend(folder, dtype, max_tokens_per_pass=100)
    add_random_run(backend, "run", types.LoraConfig(rank=4))
    generator = np.random.default_rng(0)
    for _ in range(STEPS):
        result = forward_backward(backend, "run", weighted_datums(generator, [30, 60, 5, 200, 17]))
        seen.update(b"".join(array.tobytes() for array in result.logprobs))
        backend.optim_step("run", types.AdamParams(learning_rate=1e-3, weight_decay=0.01, grad_clip_norm=1.0))
    forward_backward(backend, "run", weighted_datums(generator, [40]))
    seen.update(gradient(backend, "run").numpy().tobytes())
    seen.update(parameters(backend, "run").numpy().tobytes())
    seen.update(forward(backend, "run", weighted_datums(generator, [50])).logprobs[0].tobytes())
    adapter = backend.snapshot("run")
    for generation in generate(
        backend, request(random_prompt(30), adapter=adapter, num_samples=3), request(random_prompt(9))
    ):
        for sequence in generation.sequences:
            seen.update(repr((sequence.tokens, sequence.logprobs)).encode())
    return seen.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(digest(Path(sys.argv[1]), name))
