"""What sharing a base costs: runs with one conversation each, in one pass, against one run with all of them.

One JSON line: tokens/s of the many as a share of the one's (the same conversations, steps in turn, losses compared), and
the memory that one more run takes, against its own state: weights, two moments and gradient, 16 bytes a parameter. Each
conversation begins in its own way: what datums have in common a run computes once, which runs cannot do for each other.
"""

from __future__ import annotations

import argparse
import gc
import json
import time

import psutil
from peers import BASE_MODEL, RANK, machine, spread
from sft import datum

import mint
from mint import types
from mint.data import load_demo
from mint.hub import resolve_model

TINY = 1e-7  # learning rate: eight runs and one stay comparable


def step(clients: list[mint.TrainingClient], shares: list[list[types.Datum]]) -> tuple[float, float]:
    """(seconds, summed loss): everybody's step is asked for before anybody's result is waited for."""
    started = time.perf_counter()
    outputs, updates = [], []
    for client, share in zip(clients, shares, strict=True):
        outputs.append(client.forward_backward(share))
        updates.append(client.optim_step(types.AdamParams(learning_rate=TINY)))
    for update in updates:
        update.result()
    seconds = time.perf_counter() - started
    return seconds, sum(output.result().metrics["loss:sum"] for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    service, process = mint.ServiceClient(), psutil.Process()
    one = service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=0, train_unembed=False)
    tokenizer = one.get_tokenizer()
    rows = [
        tokenizer.apply_chat_template([{"role": "system", "content": f"Conversation {i}"}, *row], return_dict=False)
        for i, row in enumerate(load_demo()[0][: args.runs])
    ]
    shares = [[datum(ids)] for ids in rows]
    together = [[datum for share in shares for datum in share]]
    step([one], together)
    sizes, many = [], []
    for number in range(args.runs):
        many.append(service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=number, train_unembed=False))
        step(many[-1:], shares[:1])
        gc.collect()
        sizes.append(process.memory_info().rss)
    ratios = []
    for pair in range(args.pairs + 1):
        alone, first_loss = step([one], together)
        shared, second_loss = step(many, shares)
        if abs(first_loss - second_loss) > 0.05 * first_loss:
            raise SystemExit(f"the two compute different things: losses {first_loss:.1f} and {second_loss:.1f}")
        if pair:
            ratios.append(alone / shared)
    own_mb = 16 * (one.get_info().num_parameters or 0) / 1e6
    added_mb = (sizes[-1] - sizes[0]) / (args.runs - 1) / 1e6
    base_mb = (resolve_model(BASE_MODEL).path / "model.safetensors").stat().st_size / 1e6
    result = {
        "benchmark": "tenants",
        "runs": args.runs,
        "speed_share": spread(ratios, 3),
        "mb_of_one_more": round(added_mb, 1),
        "mb_of_its_own_state": round(own_mb, 1),
        "beyond_its_own_state_as_share_of_the_base": round((added_mb - own_mb) / base_mb, 3),
        "tokens": sum(len(ids) - 1 for ids in rows),
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
