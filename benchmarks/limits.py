"""How near MinT comes to what the machine can do, two JSON lines.

`training`: seconds of the frozen model's matrix products alone, at the shapes of the step and one after the other, as a
share of the step. What is missing to 1 is everything else: attention, LoRA, norms, softmax, the optimizer.
`decode`: seconds of a decode step against those of reading every weight once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from peers import BASE_MODEL, LEARNING_RATE, RANK, machine, spread
from sft import datum

from mint import settings
from mint.data import load_demo
from mint.engine.backend import GenerateRequest, Part, drain
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.models.weights import DecoderWeights, load_weights, read_config
from mint.engine.packing import pack_sequences
from mint.hub import load_tokenizer, resolve_model
from mint.types.params import AdamParams, LoraConfig
from mint.types.requests import prepare_training_input


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.inference_mode()
def products(weights: DecoderWeights, num_tokens: int) -> float:
    """Every projection forward and backward by its input, by torch, but the first one's backward, whose input nobody trains."""
    taken = 0.0
    for linear in weights.linears():
        x = torch.randn(num_tokens, linear.weight_OI.shape[1]).to(linear.weight_OI.dtype)
        y = x.new_empty(num_tokens, len(linear.weight_OI))
        taken += seconds(lambda linear=linear, x=x, y=y: torch.mm(x, linear.weight_OI.t(), out=y))
        if linear is not weights.layers[0].qkv:
            taken += seconds(lambda linear=linear, x=x, y=y: linear.backward(y, x))
    return taken


def training(backend: DecoderBackend, weights: DecoderWeights, rows: list[list[int]], pairs: int) -> dict[str, object]:
    backend.add_run("run", LoraConfig(rank=RANK, train_unembed=False), 0)
    given = prepare_training_input([datum(ids) for ids in rows], "cross_entropy", None)
    num_tokens = int(pack_sequences([one.tokens_N for one in given.data], 0)[-1].rows_N[-1]) + 1  # that are computed

    def step() -> None:
        drain(backend.forward_backward([Part("run", given)]))
        backend.optim_step("run", AdamParams(learning_rate=LEARNING_RATE))

    step()
    taken = [(seconds(step), products(weights, num_tokens)) for _ in range(pairs)]
    return {
        "benchmark": "limits", "what": "matrix products of the frozen model / training step", "tokens": num_tokens,
        "share": spread([products / step for step, products in taken]),
        "step_seconds": spread([step for step, _ in taken], 3),
    }  # fmt: skip


@torch.inference_mode()
def read_weights(weights: DecoderWeights) -> float:
    """The fastest plain pass over them that torch offers."""
    tensors = {id(linear.weight_OI): linear.weight_OI for linear in weights.linears()}
    views = [t.view(torch.float32) if t.dtype == torch.bfloat16 else t for t in tensors.values()]
    return seconds(lambda: [view.sum() for view in views])


def decode(
    backend: DecoderBackend, weights: DecoderWeights, rows: list[list[int]], size: int, pairs: int
) -> dict[str, object]:
    steps = 16
    ratios, taken = [], []
    for pair in range(pairs + 1):
        for ids in rows[:size]:
            backend.add_request(GenerateRequest(tuple(ids[:40]), None, 1, steps + 1, 0.7, -1, 1.0, 0, frozenset()))
        times = []
        while backend.num_requests:
            times.append(seconds(backend.step))
        step, read = sorted(times[-steps:])[steps // 2], min(read_weights(weights) for _ in range(5))
        if pair:  # the first is warm-up
            ratios.append(step / read)
            taken.append(step)
    return {
        "benchmark": "limits", "what": "decode step / reading the weights once", "sequences": size,
        "ratio": spread(ratios), "step_ms": spread([1000 * step for step in taken], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4, help="conversations of a training step")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32], help="of a decode step")
    args = parser.parse_args()
    source = resolve_model(BASE_MODEL)
    backend = DecoderBackend(source.path, source.name, settings.load())
    tokenizer = load_tokenizer(BASE_MODEL)
    rows = [tokenizer.apply_chat_template(row, return_dict=False) for row in load_demo()[0]]
    device = torch.device("cpu")
    weights = load_weights(source.path, read_config(source.path), getattr(torch, backend.limits.dtype), device)
    results = [training(backend, weights, rows[: args.batch], args.pairs)]
    results += [decode(backend, weights, rows, size, args.pairs) for size in args.sequences]
    for result in results:
        print(
            json.dumps({**result, "dtype": backend.limits.dtype, "kernels": backend.limits.kernels, **machine()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
