"""SFT tokens/s and memory of MinT against a transformers + PEFT loop or TRL: the same rows, steps in turn, one JSON line.

The peer pads, so the ratio depends on how unequal the rows of a batch are: `padding` in the output is the peer's share
of padded positions, and `without_padding` the ratio of positions computed per second.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from peers import BASE_MODEL, LEARNING_RATE, RANK, TRL, Peer, machine, peak_mb, ratios

import mint
from mint import types
from mint.data import load_demo, load_jsonl
from mint.hub import resolve_model


def datum(ids: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)},
    )


def mint_step(client: mint.TrainingClient, rows: list[list[int]]) -> tuple[float, float]:
    """(seconds, token-mean loss) of one forward_backward and optim_step. Adam does not see the loss's scale."""
    datums = [datum(ids) for ids in rows]
    started = time.perf_counter()
    output = client.forward_backward(datums)
    client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
    seconds = time.perf_counter() - started
    return seconds, output.result().metrics["loss:sum"] / sum(len(ids) - 1 for ids in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="counted pairs of steps, after one warm-up pair")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--data", help="JSONL with messages instead of the packaged chat set")
    parser.add_argument("--peer", choices=["peft", "trl"], default="peft")
    args = parser.parse_args()
    client = mint.ServiceClient().create_lora_training_client(BASE_MODEL, rank=RANK, seed=0, train_unembed=False)
    tokenizer, info = client.get_tokenizer(), client.get_info()
    train = load_jsonl(Path(args.data)) if args.data else load_demo()[0]
    rows = [tokenizer.apply_chat_template(row, return_dict=False) for row in train]
    batches = [[rows[(step * args.batch + i) % len(rows)] for i in range(args.batch)] for step in range(args.steps + 1)]
    peer = Peer(args.peer, str(resolve_model(BASE_MODEL).path), str(info.dtype), int(info.num_threads or 1))
    if args.peer == "trl":
        peer.run(batches=batches)
    pairs, tokens, positions, losses = [], 0, 0, []
    for step, batch in enumerate(batches):
        ours, our_loss = mint_step(client, batch)
        answer = peer.run(rows=batch)
        losses.append((our_loss, answer["loss"]))
        # before the first update both are the base model; afterwards their random A matrices differ
        if abs(our_loss - answer["loss"]) > (0.02 if step == 0 else 0.1):
            raise SystemExit(
                f"step {step}: the two compute different things: losses {our_loss:.4f} and {answer['loss']:.4f}"
            )
        if step:
            pairs.append((ours, answer["seconds"]))
            tokens += sum(len(ids) - 1 for ids in batch)
            positions += args.batch * (max(map(len, batch)) - 1)
    peer.close()
    our_speed, peer_speed = (tokens / sum(pair[i] for pair in pairs) for i in (0, 1))
    result = {
        "benchmark": "sft",
        "peer": TRL if args.peer == "trl" else "transformers+peft",
        **ratios(pairs),
        "mint_tokens_per_s": round(our_speed, 1),
        "peer_tokens_per_s": round(peer_speed, 1),
        "ratio_overall": round(our_speed / peer_speed, 2),
        "padding": round(1 - tokens / positions, 2),
        "without_padding": round(our_speed / (peer_speed * positions / tokens), 2),
        "mint_peak_mb": peak_mb(),
        "peer_peak_mb": answer["peak_mb"],
        "memory_ratio": round(peak_mb() / answer["peak_mb"], 3),
        "data": Path(args.data).name if args.data else "packaged",
        "batch": args.batch,
        "tokens": tokens,
        "dtype": info.dtype,
        "threads": info.num_threads,
        "losses_first_last": [[round(x, 4) for x in losses[0]], [round(x, 4) for x in losses[-1]]],
        **machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
