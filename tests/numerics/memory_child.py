"""What test_plan.py runs in a new process: one training pass; prints planned bytes and by how much the process grew."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import psutil

from mint import types
from mint.engine.plan import bytes_per_token, fixed_bytes
from tests.support.engine import add_random_run, forward_backward, open_backend, weighted_datums

STATUS = Path("/proc/self/status")


def peak() -> int:
    """The largest resident size of this process so far. On Linux rusage will not do: it remembers the parent's."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(folder: Path, dtype: str, *lengths: int) -> None:
    backend = open_backend(folder, dtype, max_tokens_per_pass=sum(lengths))
    config = backend._trainer.decoder.config
    add_random_run(backend, "run", types.LoraConfig(rank=8))
    vocab = config.vocab_size
    small = weighted_datums(np.random.default_rng(0), [16], vocab)
    forward_backward(backend, "run", small)  # kernels and threads allocate what they keep
    before, old_peak = psutil.Process().memory_info().rss, peak()
    forward_backward(backend, "run", weighted_datums(np.random.default_rng(1), list(lengths), vocab))
    assert peak() > old_peak, "the pass did not set a new peak: the model is too large for this measurement"
    element = 2 if dtype == "bfloat16" else 4
    planned = bytes_per_token(config, element) * sum(lengths) + fixed_bytes(config, element)
    print(planned, peak() - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
