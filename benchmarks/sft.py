"""SFT tokens/s of MinT against a transformers + PEFT loop: the same rows, steps in turn, one JSON line."""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from peers import LEARNING_RATE, RANK, PeftLoop, chat_batches, machine

import mint
from mint import types


def datum(ids: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)},
    )


def mint_step(client: mint.TrainingClient, rows: list[list[int]]) -> tuple[float, float]:
    """(token-mean loss, seconds) of one forward_backward and optim_step. Adam does not see the loss's scale."""
    datums = [datum(ids) for ids in rows]
    started = time.perf_counter()
    output = client.forward_backward(datums)
    client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
    seconds = time.perf_counter() - started
    return output.result().metrics["loss:sum"] / sum(len(ids) - 1 for ids in rows), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="counted pairs of steps, after one warm-up pair")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    batches = chat_batches(args.steps + 1, args.batch)
    service = mint.ServiceClient()
    client = service.create_lora_training_client("SmolLM2-135M-Instruct", rank=RANK, seed=0, train_unembed=False)
    info = client.get_info()
    torch.set_num_threads(info.num_threads)
    peer = PeftLoop(getattr(torch, info.dtype))
    pairs = []
    for rows in batches:
        (our_loss, ours), (peer_loss, theirs) = mint_step(client, rows), peer.step(rows)
        if abs(our_loss - peer_loss) > 0.02:
            raise SystemExit(f"the two compute different things: losses {our_loss:.4f} and {peer_loss:.4f}")
        pairs.append((ours, theirs, sum(len(ids) - 1 for ids in rows), our_loss, peer_loss))
    counted = pairs[1:]
    ratios = sorted(theirs / ours for ours, theirs, *_ in counted)
    tokens = sum(pair[2] for pair in counted)
    result = {
        "benchmark": "sft",
        "peer": "transformers+peft",
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min_max": [round(ratios[0], 2), round(ratios[-1], 2)],
        "mint_tokens_per_s": round(tokens / sum(pair[0] for pair in counted), 1),
        "peer_tokens_per_s": round(tokens / sum(pair[1] for pair in counted), 1),
        "batch": args.batch,
        "tokens": tokens,
        "dtype": info.dtype,
        "threads": info.num_threads,
        "last_losses": [round(pairs[-1][3], 4), round(pairs[-1][4], 4)],
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
