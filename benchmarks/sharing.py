"""What it saves that answers to one prompt share its tokens: steps in turn with as many of the same lengths whose prompts
differ from their first token on. One JSON line.

Pairs (as for a preference loss) and groups (as for policy gradients). Only the answers have a loss term. Of the answers
that share, the loss is compared with that of each as a pass of its own.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from peers import BASE_MODEL, LEARNING_RATE, RANK, machine, spread

import mint
from mint import types
from mint.data import load_demo

# (tokens of the prompt, tokens of an answer, answers)
GROUPS = [(256, 128, 2), (256, 128, 8), (1024, 128, 8)]


def answers(prompts: list[np.ndarray], texts: list[np.ndarray]) -> list[types.Datum]:
    data = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = np.concatenate([prompt, text])
        weights = np.concatenate([np.zeros(len(prompt) - 1), np.ones(len(text))])
        data.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(ids[:-1]),
                loss_fn_inputs={"target_tokens": ids[1:], "weights": weights},
            )
        )
    return data


def step(client: mint.TrainingClient, data: list[types.Datum]) -> float:
    started = time.perf_counter()
    client.forward_backward(data)
    client.optim_step(types.AdamParams(learning_rate=LEARNING_RATE)).result()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    client = mint.ServiceClient().create_lora_training_client(BASE_MODEL, rank=RANK, seed=0, train_unembed=False)
    tokenizer = client.get_tokenizer()
    text = np.array([i for row in load_demo()[0] for i in tokenizer.encode(row[-1]["content"])])
    results = []
    for prompt_size, answer_size, count in GROUPS:
        first = np.random.default_rng(0).integers(0, len(text) - 2048, 2 * count)
        prompts = [text[start : start + prompt_size] for start in first[:count]]
        for i, prompt in enumerate(prompts):
            prompts[i] = np.concatenate([[i], prompt[1:]])  # unlike from the first token on
        texts = [text[start : start + answer_size] for start in first[count:]]
        apart, shared = answers(prompts, texts), answers(prompts[:1] * count, texts)
        together = client.forward(shared).result().metrics["loss:sum"]
        alone = sum(client.forward([datum]).result().metrics["loss:sum"] for datum in shared)
        if abs(together - alone) > 0.005 * alone:
            raise SystemExit(f"the two compute different things: losses {together:.1f} and {alone:.1f}")
        step(client, apart)
        step(client, shared)
        ratios = [step(client, apart) / step(client, shared) for _ in range(args.pairs)]
        tokens = [count * (prompt_size + answer_size - 1), prompt_size + count * (answer_size - 1)]
        results.append(
            {
                "prompt": prompt_size,
                "answer": answer_size,
                "answers": count,
                "ratio": spread(ratios),
                "tokens_given_and_computed_at_least": tokens,
            }
        )
    print(json.dumps({"benchmark": "sharing", "groups": results, **machine()}))


if __name__ == "__main__":
    main()
