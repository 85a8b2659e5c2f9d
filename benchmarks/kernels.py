"""MinT with compiled kernels against MinT with torch's, in one process and in turn; one JSON line for each kind of work.

Losses of both must agree to the rounding of bf16. How long the kernels take to compile for a new processor is a line of its
own, measured in a process that finds none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from peers import BASE_MODEL, RANK, machine, spread
from sft import datum

from mint import settings
from mint.data import load_demo
from mint.engine.backend import GenerateRequest, Part, drain
from mint.engine.decoder_backend import DecoderBackend
from mint.hub import load_tokenizer, resolve_model
from mint.types.params import AdamParams, LoraConfig
from mint.types.requests import prepare_training_input

KERNELS = ("compiled", "torch")
TINY = 1e-7  # learning rate, so that losses of both stay comparable
COMPILE = "import torch, mint.engine.kernels.head, mint.engine.kernels.decoder, mint.engine.sampling.compiled_passes"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def open_backend(kernels: str) -> DecoderBackend:
    os.environ["MINT_KERNELS"] = kernels
    source = resolve_model(BASE_MODEL)
    backend = DecoderBackend(source.path, source.name, settings.load())
    backend.add_run("run", LoraConfig(rank=RANK, train_unembed=False), 0)
    return backend


def training(backends: dict[str, DecoderBackend], rows: list[list[int]], pairs: int) -> dict[str, object]:
    given = prepare_training_input([datum(ids) for ids in rows], "cross_entropy", None)
    losses: dict[str, float] = {}

    def step(kernels: str) -> None:
        (result,) = drain(backends[kernels].forward_backward([Part("run", given)]))
        losses[kernels] = result.metrics["loss:sum"]
        backends[kernels].optim_step("run", AdamParams(learning_rate=TINY))

    taken = [[seconds(lambda k=k: step(k)) for k in KERNELS] for _ in range(pairs + 1)][1:]
    if abs(losses["compiled"] / losses["torch"] - 1) > 0.02:
        raise SystemExit(f"the two compute different things: {losses}")
    what = f"training, {len(rows)} x {round(float(np.mean([len(ids) for ids in rows])))} tokens"
    return {"what": what, "ratio": spread([torch / ours for ours, torch in taken])}


def sampling(
    backends: dict[str, DecoderBackend], rows: list[list[int]], size: int, pairs: int
) -> list[dict[str, object]]:
    """Decode steps of so many sequences with an adapter, and their prompts."""
    handles = {kernels: backends[kernels].snapshot("run") for kernels in KERNELS}

    def run(kernels: str, pair: int) -> tuple[float, float]:
        backend, times = backends[kernels], []
        for i, ids in enumerate(rows[:size]):
            prompt = (pair + 10, *ids[1:100])  # not a known one
            backend.add_request(GenerateRequest(prompt, handles[kernels], 1, 17, 0.7, -1, 1.0, i, frozenset()))
        while backend.num_requests:
            times.append(seconds(backend.step))
        return sum(times[:-16]), float(np.median(times[-16:]))

    taken = [[run(kernels, pair) for kernels in KERNELS] for pair in range(pairs + 1)][1:]
    return [
        {"what": f"prompts, {size} x 100 tokens", "ratio": spread([torch[0] / ours[0] for ours, torch in taken])},
        {
            "what": f"decode step, {size} sequences", "ratio": spread([torch[1] / ours[1] for ours, torch in taken]),
            "step_ms": spread([1000 * ours[1] for ours, _ in taken], 1),
        },
    ]  # fmt: skip


def compiling() -> dict[str, object]:
    taken = []
    for _ in range(2):  # the second finds them
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "NUMBA_CACHE_DIR": folder}
            cold = seconds(lambda env=env: subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True))
            warm = seconds(lambda env=env: subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True))
            taken.append((cold, warm))
    return {"what": "compiling all kernels, once", "seconds": spread([cold - warm for cold, warm in taken], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(BASE_MODEL)
    rows = [tokenizer.apply_chat_template(row, return_dict=False) for row in load_demo()[0]]
    long = [token for ids in rows for token in ids]
    backends = {kernels: open_backend(kernels) for kernels in KERNELS}
    results = [training(backends, part, args.pairs) for part in (rows[:4], rows[4:5], [long[:2048]], [long[:4096]])]
    for size in (1, 8, 32):
        results += sampling(backends, rows, size, args.pairs)
    results.append(compiling())
    versions = {"kernels": backends["compiled"].limits.kernels, **machine()}
    for result in results:
        print(json.dumps({"benchmark": "kernels", **result, **versions}), flush=True)


if __name__ == "__main__":
    main()
