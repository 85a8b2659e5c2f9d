"""A loss of your own: direct preference optimisation with an anchor, which makes a model prefer one answer to another.

    python examples/custom_loss.py --steps 10

Of every answer in the packaged chat set the first paragraph is preferred to the whole, so the model learns to be brief.
The preference is that of Rafailov et al. 2023 (arXiv 2305.18290, equation 7). It only asks for a difference, which a model
can make by spoiling both answers; imitating the preferred one a little, too, keeps it from that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import logsigmoid

import mint
from mint import types
from mint.chat import Renderer, conversation_to_datum, get_renderer
from mint.data import Batches, load_demo

QUESTION = "How do I keep basil alive on a windowsill?"

Pair = tuple[types.Datum, ...]  # preferred, rejected
Datums = Sequence[types.Datum]  # preferred, rejected, preferred, rejected, ...
Loss = Callable[[Datums, Sequence[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


def log_p(data: Datums, logprobs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The log-probability of every datum's answer."""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    return torch.stack([(w * p).sum() for w, p in zip(weights, logprobs, strict=True)])


def margins(answers: torch.Tensor) -> torch.Tensor:
    """log p(preferred) - log p(rejected) of every pair."""
    return answers[0::2] - answers[1::2]


def preference_loss(start: torch.Tensor, beta: float, anchor: float) -> Loss:
    """Sum over pairs of -log sigmoid(beta gain) + anchor NLL. `start`: the margins under the reference model.

    A pair's gain is how far its margin lies above the reference's; its NLL is that of the preferred answer, per token.
    """

    def loss(data: Datums, logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        answers = log_p(data, logprobs)
        gains = margins(answers) - start
        lengths = torch.tensor([sum(datum.loss_fn_inputs["weights"]) for datum in data[0::2]])
        preference, nll = -logsigmoid(beta * gains), -answers[0::2] / lengths
        means = {"preference": preference.mean(), "gain": gains.mean(), "nll": nll.mean()}
        return (preference + anchor * nll).sum(), {name: float(value.detach()) for name, value in means.items()}

    return loss


def make_pairs(rows: Sequence[list[dict[str, str]]], renderer: Renderer, max_length: int) -> list[Pair]:
    """The first question of every conversation with the short and with the whole answer, where the two differ."""
    pairs = []
    for row in rows:
        end = next(i for i, message in enumerate(row) if message["role"] == "assistant")
        answer = row[end]["content"]
        short = answer.split("\n\n")[0]
        if short != answer:
            both = ([*row[:end], {"role": "assistant", "content": text}] for text in (short, answer))
            pairs.append(tuple(conversation_to_datum(messages, renderer, max_length) for messages in both))
    return pairs


def flat(pairs: Sequence[Pair]) -> list[types.Datum]:
    return [datum for pair in pairs for datum in pair]


def score(client: mint.TrainingClient, datums: Datums) -> torch.Tensor:
    """The margins under the model as it is now."""
    outputs = client.forward(datums).result().loss_fn_outputs
    return margins(log_p(datums, [output["logprobs"].to_torch() for output in outputs]))


def ask(client: mint.TrainingClient, renderer: Renderer, question: str, max_tokens: int) -> str:
    prompt = types.ModelInput.from_ints(renderer.prompt([{"role": "user", "content": question}]))
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=renderer.stop_token_ids)
    answer = client.save_weights_and_get_sampling_client().sample(prompt, 1, params).result()
    return renderer.parse(answer.sequences[0].tokens).content.strip()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "example: python examples/custom_loss.py --steps 10"
    parser = argparse.ArgumentParser(
        description="Train on preferences with a loss of your own.",
        epilog=example,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="SmolLM2-135M-Instruct", help="packaged name, hub id or ./folder")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    parser.add_argument("--beta", type=float, default=0.1, help="larger: the model stays closer to where it began")
    parser.add_argument("--anchor", type=float, default=1.0, help="larger: more plain imitation of what is preferred")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of AdamW, constant")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapter")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; what is longer is cut off")
    parser.add_argument("--max-tokens", type=int, default=120, help="of the sampled answer")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and of the order of the data")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print(f"loading {args.model}", flush=True)
    service = mint.ServiceClient()
    client = service.create_lora_training_client(args.model, rank=args.rank, seed=args.seed)
    reference = service.create_lora_training_client(args.model, rank=1)  # never trained: it is the base model
    renderer = get_renderer(client.get_tokenizer())
    train, test = (make_pairs(rows, renderer, args.max_length) for rows in load_demo())
    print(f"{len(train)} pairs to train on, {len(test)} held out")
    print(f"{QUESTION}\n{ask(client, renderer, QUESTION, args.max_tokens)}\n", flush=True)

    batches = Batches(train, args.batch_size, args.seed)
    for step in range(args.steps):
        datums = flat(next(batches))
        loss = preference_loss(score(reference, datums), args.beta, args.anchor)
        gradient = client.forward_backward_custom(datums, loss)
        client.optim_step(types.AdamParams(learning_rate=args.learning_rate)).result()
        found = gradient.result().metrics
        means = "  ".join(f"{name} {found[name]:7.4f}" for name in ("preference", "gain", "nll"))
        print(f"step {step:3d}  {means}", flush=True)

    gains = score(client, flat(test)) - score(reference, flat(test))
    share = float((gains > 0).float().mean())
    print(f"held out: mean gain {float(gains.mean()):.2f}, {share:.0%} of the pairs moved the right way")
    print(f"{QUESTION}\n{ask(client, renderer, QUESTION, args.max_tokens)}")


if __name__ == "__main__":
    main()
