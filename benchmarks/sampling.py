"""Sampled tokens/s of MinT against transformers generate: the same prompts, runs in turn, one JSON line per batch size.

The prompts of a pair have a system prompt in common, and each pair one of its own: MinT, which remembers prompts, has seen
none of them before.
"""

from __future__ import annotations

import argparse
import json
import time

from peers import BASE_MODEL, Peer, machine, ratios

import mint
from mint import settings, types
from mint.data import load_demo
from mint.engine.device import choose_device
from mint.hub import resolve_model


def mint_run(
    client: mint.SamplingClient, prompts: list[list[int]], new_tokens: int, *, sample: bool
) -> tuple[float, list[int]]:
    """(seconds, tokens of the first prompt)."""
    params = types.SamplingParams(max_tokens=new_tokens, temperature=0.7 if sample else 0.0, stop=[], seed=0)
    started = time.perf_counter()
    futures = [client.sample(types.ModelInput.from_ints(ids), 1, params) for ids in prompts]
    sequences = [future.result().sequences[0].tokens for future in futures]
    return time.perf_counter() - started, sequences[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", type=int, default=64, help="tokens to generate for each prompt")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--pairs", type=int, default=5, help="counted pairs of runs, after one warm-up pair")
    args = parser.parse_args()
    client = mint.ServiceClient().create_sampling_client(base_model=BASE_MODEL)
    device, tokenizer, (train, _) = choose_device(settings.load()), client.get_tokenizer(), load_demo()
    peer = Peer("generate", str(resolve_model(BASE_MODEL).path), device.dtype_name, device.num_threads)

    def prompts(size: int, pair: int) -> list[list[int]]:
        system = {
            "role": "system",
            "content": f"Round {pair} with {size}: you are a helpful assistant and answer briefly.",
        }
        rows = [[system, *row[:1]] for row in train[:size]]
        return [tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=False) for row in rows]

    ours = mint_run(client, prompts(1, 0), 16, sample=False)[1]
    theirs = peer.run(prompts=prompts(1, 0), new_tokens=16, sample=False)["first"]
    agreed = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    if not agreed:
        raise SystemExit("the two compute different things: their likeliest first tokens differ")
    for size in map(int, args.batches.split(",")):
        pairs = []
        for pair in range(1, args.pairs + 2):
            given = prompts(size, pair)
            seconds, _ = mint_run(client, given, args.new, sample=True)
            pairs.append((seconds, peer.run(prompts=given, new_tokens=args.new, sample=True)["seconds"]))
        counted = pairs[1:]
        result = {
            "benchmark": "sampling",
            "peer": "transformers generate",
            "prompts": size,
            **ratios(counted),
            "mint_tokens_per_s": round(len(counted) * size * args.new / sum(a for a, _ in counted), 1),
            "peer_tokens_per_s": round(len(counted) * size * args.new / sum(b for _, b in counted), 1),
            "greedy_tokens_agreed": agreed,
            "dtype": device.dtype_name,
            **machine(),
        }
        print(json.dumps(result), flush=True)
    peer.close()


if __name__ == "__main__":
    main()
