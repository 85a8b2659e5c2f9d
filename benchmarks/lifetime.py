"""What a long session keeps: cycles of create, train, save, sample, resume, delete; one JSON line of what is held.

First all cycles share one ServiceClient, which stays open; then each has its own and closes it, so that the base model is
loaded and freed again. Numbers are taken between cycles, after a garbage collection: what is then held was kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import threading
import time
from collections.abc import Callable

import psutil
from peers import BASE_MODEL, machine

import mint
from mint import types


def datum(seed: int, length: int) -> types.Datum:
    tokens = random.Random(seed).choices(range(300), k=length + 1)
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * length}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def cycle(client: mint.ServiceClient, model: str, seed: int) -> None:
    rest, data = client.create_rest_client(), [datum(seed + i, 8 + 5 * i) for i in range(3)]
    run = client.create_lora_training_client(model, rank=4)
    run.forward_backward(data)
    run.optim_step()
    path = run.save_state("a").result().path
    sampler = run.save_weights_and_get_sampling_client()
    # a prompt that fills a chunk of the prefix cache, and a stop string, which needs the tokenizer
    params = types.SamplingParams(max_tokens=4, seed=seed, stop=["no such text"])
    sampler.sample(datum(seed, 300).model_input, 2, params).result()
    resumed = client.create_training_client_from_state_with_optimizer(path)
    resumed.forward_backward(data)
    resumed.optim_step().result()
    rest.delete_checkpoint_from_tinker_path(path).result()


def settled_objects() -> int:
    """The engine frees what clients let go of on a thread of its own: counted when two looks agree."""
    before = -1
    while True:
        gc.collect()
        if (count := len(gc.get_objects())) == before:
            return count
        before = count
        time.sleep(0.05)


def held(started: float) -> dict[str, float]:
    num_objects = settled_objects()
    process = psutil.Process()
    return {
        "rss_mb": round(process.memory_info().rss / 1e6, 2),
        "open_files": process.num_fds(),
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
        "python_objects": num_objects,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=BASE_MODEL)
    parser.add_argument("--at", default="20,50,100,200", help="cycles after which to look; the last is the end")
    args = parser.parse_args()
    marks, started = [int(mark) for mark in args.at.split(",")], time.perf_counter()

    def watch(one_cycle: Callable[[int], None]) -> dict[int, dict[str, float]]:
        seen = {}
        for number in range(1, marks[-1] + 1):
            one_cycle(number)
            if number in marks:
                seen[number] = held(started)
        return seen

    def with_its_own_client(number: int) -> None:
        with mint.ServiceClient() as client:
            cycle(client, args.model, number)

    with mint.ServiceClient() as client:
        shared = watch(lambda number: cycle(client, args.model, number))
    result = {"one_client": shared, "a_client_each": watch(with_its_own_client)}
    print(json.dumps({"benchmark": "lifetime", "model": args.model, **result, **machine()}))


if __name__ == "__main__":
    main()
