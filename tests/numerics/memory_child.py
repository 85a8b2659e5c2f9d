"""What the tests of the plans run in a new process: a training pass; prints planned bytes and by how much it grew."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import psutil

from mint import types
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.hf.backend import GAPS, HfBackend
from mint.engine.packing import num_copies
from tests.support.engine import add_random_run, forward_backward, open_backend, open_hf, weighted_datums

STATUS = Path("/proc/self/status")


def peak() -> int:
    """The largest resident size of this process so far. On Linux rusage will not do: it remembers the parent's."""
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def planned_bytes(backend: DecoderBackend | HfBackend, lengths: tuple[int, ...], common: int) -> int:
    """Of one pass of datums of these lengths, which begin with the same tokens."""
    if isinstance(backend, HfBackend):
        return int(GAPS * backend._pass_bytes(backend._runs["run"].weights(), sum(lengths)))
    num_tokens = lengths[0] + sum(length - common for length in lengths[1:])
    copies = sum(num_copies(length, common) for length in lengths[1:])
    recomputed = backend._recomputed_layers(num_tokens)  # as asked for
    return backend._compute.pass_memory.of_pass(num_tokens, recomputed, max(lengths), copies)


def main(folder: Path, kind: str, dtype: str, recomputed: int, common: int, *lengths: int) -> None:
    options = {"max_tokens_per_pass": sum(lengths), "recompute_layers": recomputed}
    backend = open_hf(folder, dtype) if kind == "hf" else open_backend(folder, dtype, **options)
    add_random_run(backend, "run", types.LoraConfig(rank=8))
    vocab = backend.limits.vocab_size
    small = weighted_datums(np.random.default_rng(0), [16], vocab)
    forward_backward(backend, "run", small)  # kernels and threads allocate what they keep
    before = psutil.Process().memory_info().rss
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    old_peak = peak()
    forward_backward(backend, "run", weighted_datums(np.random.default_rng(1), list(lengths), vocab, common=common))
    assert peak() > old_peak, "the pass did not set a new peak: the model is too large for this measurement"
    grown = peak() - before
    print(planned_bytes(backend, lengths, common), grown)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:]))
