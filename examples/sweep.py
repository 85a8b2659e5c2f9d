"""Eight adapters trained at once over one copy of the model: which rank, learning rate and seed does best?

    python examples/sweep.py --steps 15 --out out/sweep

Each step sends the work of all runs before it waits for any. What is in the queue together goes through the model
together, and every run still gets the numbers that it would get alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt

import mint
from mint import types
from mint.chat import convert_conversations, get_renderer
from mint.data import Batches, load_demo
from mint.recipes import mean_nll


@dataclass
class Run:
    """One adapter and what became of it."""

    rank: int
    learning_rate: float
    seed: int
    client: mint.TrainingClient
    losses: list[float] = field(default_factory=list)  # nats per trained token, before each step
    test_nll: float = float("nan")

    def __str__(self) -> str:
        return f"rank {self.rank}, learning rate {self.learning_rate:g}, seed {self.seed}"


def train(runs: Sequence[Run], batches: Batches[types.Datum], num_steps: int) -> None:
    """Every run sees the same batches, so that their losses can be compared."""
    for step in range(num_steps):
        batch = next(batches)
        gradients = [run.client.forward_backward(batch, "cross_entropy") for run in runs]
        updates = [run.client.optim_step(types.AdamParams(learning_rate=run.learning_rate)) for run in runs]
        for run, gradient, update in zip(runs, gradients, updates, strict=True):
            update.result()
            run.losses.append(mean_nll(gradient.result(), batch))
        print(f"step {step:3d}  losses {' '.join(f'{run.losses[-1]:.4f}' for run in runs)}", flush=True)


def evaluate(runs: Sequence[Run], test: Sequence[types.Datum]) -> None:
    outputs = [run.client.forward(test) for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        run.test_nll = mean_nll(output.result(), test)


def print_table(runs: Sequence[Run]) -> None:
    print("rank  learning rate  seed  train loss  test NLL")
    for run in sorted(runs, key=lambda run: run.test_nll):
        values = f"{run.rank:4d}  {run.learning_rate:13g}  {run.seed:4d}  {run.losses[-1]:10.4f}  {run.test_nll:8.4f}"
        print(values)


def plot(runs: Sequence[Run], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for run in runs:
        axes.plot(run.losses, label=f"{run}: {run.test_nll:.3f}")
    axes.set(xlabel="steps done", ylabel="train loss (nats per token)", title="Adapters of one sweep")
    axes.grid(alpha=0.3)
    figure.legend(title="test NLL at the end", fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "example: python examples/sweep.py --ranks 4 16 --learning-rates 2e-4 1e-3 --seeds 0 1 --steps 15"
    parser = argparse.ArgumentParser(
        description="Train many adapters at once.",
        epilog=example,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="packaged name, hub id or ./folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16], help="of the LoRA adapters")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 1e-3], help="of AdamW, constant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the adapters")
    parser.add_argument("--steps", type=int, default=15, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4, help="conversations a step and run")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; answers beyond are left out")
    parser.add_argument("--out", type=Path, default=Path("out/sweep"), help="folder for sweep.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Run]:
    """The runs, in the order of their options."""
    args = parse_args(argv)
    print(f"loading {args.model}", flush=True)
    service = mint.ServiceClient()
    runs = [
        Run(rank, learning_rate, seed, service.create_lora_training_client(args.model, rank=rank, seed=seed))
        for rank, learning_rate, seed in itertools.product(args.ranks, args.learning_rates, args.seeds)
    ]
    renderer = get_renderer(runs[0].client.get_tokenizer())
    (train_set, report), (test_set, _) = (
        convert_conversations(rows, renderer, args.max_length) for rows in load_demo()
    )
    print(f"{report}\n")
    for number, run in enumerate(runs):
        print(f"run {number}: {run}", flush=True)

    train(runs, Batches(train_set, args.batch_size), args.steps)
    evaluate(runs, test_set)
    print_table(runs)
    best = min(runs, key=lambda run: run.test_nll)
    path = best.client.save_state("best").result().path
    print(f"best: {best}; saved {path}")
    args.out.mkdir(parents=True, exist_ok=True)
    plot(runs, args.out / "sweep.png")
    return runs


if __name__ == "__main__":
    main()
