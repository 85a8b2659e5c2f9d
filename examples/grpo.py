"""Reinforcement learning on a task that checks itself: sums, to be answered with the number and nothing else.

    python examples/grpo.py --steps 20

Every step samples a group of answers to each question. An answer's advantage is its reward compared with its own group
(GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1), so no value model is needed.
"""

from __future__ import annotations

import argparse
import random

import numpy as np

import mint
from mint import types
from mint.chat import get_renderer


def make_question(rng: random.Random) -> tuple[str, str]:
    """The question and its answer."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return f"What is {a} + {b}? Reply with the number only.", str(a + b)


def reward(answer: str, expected: str) -> float:
    """0..1: one half for the share of characters that are digits, one half for the right number."""
    answer = answer.strip()
    digits = sum(character in "0123456789" for character in answer)
    return 0.5 * digits / max(len(answer), 1) + 0.5 * (answer == expected)


def advantages(rewards: list[float]) -> list[float]:
    """The group's rewards with mean 0 and standard deviation 1; all 0 where they are all equal."""
    centred = np.array(rewards) - np.mean(rewards)
    return (centred / (centred.std() + 1e-6)).tolist()


def to_datum(prompt: list[int], sampled: types.SampledSequence, advantage: float) -> types.Datum:
    """Every sampled token gets the answer's advantage, the prompt's tokens 0: they have no term in the loss."""
    tokens, unsampled = prompt + sampled.tokens, [0.0] * (len(prompt) - 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": unsampled + sampled.logprobs,
            "advantages": unsampled + [advantage] * len(sampled.tokens),
        },
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "example: python examples/grpo.py --steps 20"
    parser = argparse.ArgumentParser(
        description="Reinforcement learning with a verifiable reward.",
        epilog=example,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="packaged name, hub id or ./folder")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--questions", type=int, default=4, help="a step")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each question")
    parser.add_argument("--max-tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of AdamW, constant")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter, the questions and the answers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[float]:
    """The mean reward of every step."""
    args = parse_args(argv)
    print(f"loading {args.model}", flush=True)
    client = mint.ServiceClient().create_lora_training_client(args.model, rank=args.rank, seed=args.seed)
    renderer = get_renderer(client.get_tokenizer())
    stop, rng, history = renderer.stop_token_ids, random.Random(args.seed), []
    for step in range(args.steps):
        sampler = client.save_weights_and_get_sampling_client()
        asked = []
        for _ in range(args.questions):  # all are sent before the first is waited for: they share the running batch
            question, expected = make_question(rng)
            prompt = renderer.prompt([{"role": "user", "content": question}])
            params = types.SamplingParams(max_tokens=args.max_tokens, seed=rng.getrandbits(32), stop_token_ids=stop)
            future = sampler.sample(types.ModelInput.from_ints(prompt), args.group_size, params)
            asked.append((prompt, expected, future))
        datums, rewards = [], []
        for prompt, expected, future in asked:
            group = future.result().sequences
            answers = [renderer.parse(sampled.tokens).content for sampled in group]
            group_rewards = [reward(answer, expected) for answer in answers]
            pairs = zip(group, advantages(group_rewards), strict=True)
            datums += [to_datum(prompt, sampled, advantage) for sampled, advantage in pairs]
            rewards += group_rewards
        client.forward_backward(datums, "importance_sampling")
        client.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
        history.append(float(np.mean(rewards)))
        print(f"step {step:3d}  mean reward {history[-1]:.3f}  {question} {answers[-1].strip()!r}", flush=True)
    return history


if __name__ == "__main__":
    main()
