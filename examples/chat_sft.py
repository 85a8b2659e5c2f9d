"""Fine-tune a chat model on conversations, see what it learned, save it and go on from the checkpoint.

    python examples/chat_sft.py --steps 20 --out out/chat_sft

Copy it and change what you like. Without --data it trains on the packaged chat set.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

import mint
from mint import types
from mint.chat import Renderer, convert_conversations, get_renderer
from mint.data import Batches, Cursor, load_demo, load_jsonl
from mint.recipes import mean_nll

QUESTION = "How do I keep basil alive on a windowsill?"


def evaluate(client: mint.TrainingClient, datums: list[types.Datum]) -> float:
    return mean_nll(client.forward(datums).result(), datums)


def train_step(client: mint.TrainingClient, batch: list[types.Datum], learning_rate: float) -> float:
    """The loss before the step. Both calls are sent before either is waited for, so the engine goes straight on."""
    gradient = client.forward_backward(batch, "cross_entropy")
    update = client.optim_step(types.AdamParams(learning_rate=learning_rate))
    update.result()
    return mean_nll(gradient.result(), batch)


def ask(client: mint.TrainingClient, renderer: Renderer, question: str, max_tokens: int) -> str:
    """The likeliest answer with the weights as they are now."""
    prompt = types.ModelInput.from_ints(renderer.prompt([{"role": "user", "content": question}]))
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=renderer.stop_token_ids)
    answer = client.save_weights_and_get_sampling_client().sample(prompt, 1, params).result()
    return renderer.parse(answer.sequences[0].tokens).content.strip()


def plot(losses: list[float], nll_before: float, nll_after: float, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(range(len(losses)), losses, label="train, before each step")
    axes.plot([0, len(losses)], [nll_before, nll_after], "o--", label="held out")
    axes.set(xlabel="steps done", ylabel="nats per trained token", title="Chat fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "example: python examples/chat_sft.py --steps 20 --out out/chat_sft"
    parser = argparse.ArgumentParser(
        description="Fine-tune a chat model with LoRA.",
        epilog=example,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="packaged name, hub id or ./folder")
    parser.add_argument(
        "--data", type=Path, help="JSON Lines with a list 'messages' a line; if not given: the packaged set"
    )
    parser.add_argument("--held-out", type=int, default=32, help="the last rows of --data, kept for the test")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of AdamW, constant")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; answers beyond are left out")
    parser.add_argument("--max-tokens", type=int, default=120, help="of the sampled answer")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and of the order of the data")
    parser.add_argument("--out", type=Path, default=Path("out/chat_sft"), help="folder for loss.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print(f"loading {args.model}", flush=True)
    service = mint.ServiceClient()
    client = service.create_lora_training_client(args.model, rank=args.rank, seed=args.seed)
    renderer = get_renderer(client.get_tokenizer())

    if args.data:
        rows = load_jsonl(args.data)
        train_rows, test_rows = rows[: -args.held_out], rows[-args.held_out :]
    else:
        train_rows, test_rows = load_demo()
    train, report = convert_conversations(train_rows, renderer, args.max_length)
    test, test_report = convert_conversations(test_rows, renderer, args.max_length)
    print(f"to train on\n{report}\n\nheld out\n{test_report}\n", flush=True)

    nll_before = evaluate(client, test)
    print(f"held-out NLL before: {nll_before:.4f}\n{QUESTION}\n{ask(client, renderer, QUESTION, args.max_tokens)}\n")

    batches = Batches(train, args.batch_size, args.seed)
    losses = []
    for step in range(args.steps):
        losses.append(train_step(client, next(batches), args.learning_rate))
        print(f"step {step:3d}  loss {losses[-1]:.4f}", flush=True)

    nll_after = evaluate(client, test)
    print(f"held-out NLL after: {nll_after:.4f}\n{QUESTION}\n{ask(client, renderer, QUESTION, args.max_tokens)}\n")
    args.out.mkdir(parents=True, exist_ok=True)
    plot(losses, nll_before, nll_after, args.out / "loss.png")

    # the checkpoint holds the place in the data too, so this could as well be another process on another day
    path = client.save_state("final", user_metadata={"data_cursor": batches.cursor.to_json()}).result().path
    print(f"saved {path}")
    metadata = service.create_rest_client().get_weights_info_by_tinker_path(path).result().user_metadata or {}
    resumed = service.create_training_client_from_state_with_optimizer(path)
    batches = Batches(train, args.batch_size, args.seed, Cursor.from_json(metadata["data_cursor"]))
    for step in range(args.steps, args.steps + 2):
        loss = train_step(resumed, next(batches), args.learning_rate)
        print(f"step {step:3d}  loss {loss:.4f}  (resumed)", flush=True)


if __name__ == "__main__":
    main()
