"""Sampled tokens/s of MinT against transformers generate: the same prompts, runs in turn, one JSON line per batch size."""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from peers import base, machine, tokenizer
from transformers import AutoModelForCausalLM

import mint
from mint import settings, types
from mint.data import load_demo
from mint.engine.device import choose_device


class Generate:
    """transformers generate on a left-padded batch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer()
        self.tokenizer.padding_side = "left"
        self.model = AutoModelForCausalLM.from_pretrained(base().path, dtype=dtype).eval()

    def run(self, prompts: list[list[int]], new_tokens: int, *, sample: bool) -> tuple[float, list[int]]:
        """(seconds, tokens generated for the first prompt)."""
        padded = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        options = {"do_sample": True, "temperature": 0.7} if sample else {"do_sample": False}
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(**padded, max_new_tokens=new_tokens, min_new_tokens=new_tokens, **options)
        return time.perf_counter() - started, out[0, padded["input_ids"].shape[1] :].tolist()


def mint_run(
    client: mint.SamplingClient, prompts: list[list[int]], new_tokens: int, *, sample: bool
) -> tuple[float, list[int]]:
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
    service = mint.ServiceClient()
    client = service.create_sampling_client(base_model="SmolLM2-135M-Instruct")
    client.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=1)).result()
    device = choose_device(settings.load())
    torch.set_num_threads(device.num_threads)
    peer = Generate(device.dtype)
    train, _ = load_demo()
    rendered = [
        peer.tokenizer.apply_chat_template(row[:1], add_generation_prompt=True, return_dict=False) for row in train
    ]
    greedy = mint_run(client, rendered[:1], 16, sample=False)[1], peer.run(rendered[:1], 16, sample=False)[1]
    for size in map(int, args.batches.split(",")):
        pairs = [
            (mint_run(client, rendered[:size], args.new, sample=True)[0], peer.run(rendered[:size], args.new, sample=True)[0])
            for _ in range(args.pairs + 1)
        ][1:]
        ratios = sorted(theirs / ours for ours, theirs in pairs)
        result = {
            "benchmark": "sampling",
            "peer": "transformers generate",
            "prompts": size,
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min_max": [round(ratios[0], 2), round(ratios[-1], 2)],
            "mint_tokens_per_s": round(size * args.new / statistics.median(p[0] for p in pairs), 1),
            "peer_tokens_per_s": round(size * args.new / statistics.median(p[1] for p in pairs), 1),
            "greedy_agrees_for_tokens": next(
                (i for i, (a, b) in enumerate(zip(*greedy, strict=True)) if a != b), len(greedy[0])
            ),
            "dtype": str(device.dtype).removeprefix("torch."),
            **machine(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
