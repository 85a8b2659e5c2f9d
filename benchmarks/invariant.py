"""The price of the batch-invariant mode: tokens/s of a training step with it, as a share of the default's. JSON lines.

Conversations, then datums of 16 tokens, of which many share a pass by default and none in the mode. Steps in turn, losses
compared; the gradients are those of the numerics contract.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import numpy as np
from peers import BASE_MODEL, RANK, machine, spread
from sft import datum

from mint import settings, types
from mint.data import load_demo
from mint.engine.backend import Part, drain, join_results
from mint.engine.decoder_backend import DecoderBackend
from mint.hub import load_tokenizer, resolve_model
from mint.types.requests import TrainingInput, prepare_training_input


def step(backend: DecoderBackend, given: TrainingInput) -> tuple[float, float]:
    """(seconds, summed loss) of all micro-batches and an update."""
    started = time.perf_counter()
    results = []
    for share in backend.micro_batches("run", given):
        results += drain(backend.forward_backward([Part("run", share.input)]))
    backend.optim_step("run", types.AdamParams(learning_rate=0.0))
    return time.perf_counter() - started, join_results(results).metrics["loss:sum"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    source = resolve_model(BASE_MODEL)
    tokenizer = load_tokenizer(source)
    rows = [tokenizer.apply_chat_template(row, return_dict=False) for row in load_demo()[0][:16]]
    short = np.random.default_rng(0).integers(0, 40_000, (64, 17)).tolist()
    usual = settings.load()
    backends = []
    for invariant in (False, True):
        backend = DecoderBackend(source.path, BASE_MODEL, replace(usual, batch_invariant=invariant))
        backend.add_run("run", types.LoraConfig(rank=RANK, train_unembed=False), 0)
        backends.append(backend)
    for name, batch in (("conversations, 8 a step", rows[:8]), ("64 datums of 16 tokens", short)):
        given = prepare_training_input([datum(ids) for ids in batch], "cross_entropy")
        shares = []
        for pair in range(args.pairs + 1):
            (plain, first), (tied, second) = (step(backend, given) for backend in backends)
            if abs(first - second) > 0.01 * first:
                raise SystemExit(f"the two compute different things: losses {first:.2f} and {second:.2f}")
            if pair:
                shares.append(plain / tied)
        result = {
            "benchmark": "invariant",
            "data": name,
            "speed_share": spread(shares),
            "default_tokens_per_s": round(sum(len(ids) - 1 for ids in batch) / plain, 1),
            "dtype": backends[0].limits.dtype,
            **machine(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
