"""Chat supervised fine-tuning, start to finish, on the public API only. One flat function; read it top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import mint
from mint import types
from mint.chat import Renderer, TrainOn, convert_conversations, get_renderer
from mint.data import Batches, Cursor

PROMPTS = (
    "How do I keep basil alive on a windowsill?",
    "What is the difference between weather and climate?",
    "My laptop is slow. What should I do first?",
)


@dataclass(frozen=True, slots=True)
class ChatSftConfig:
    """num_steps of batch_size conversations; learning_rate is constant; losses are token means."""

    base_model: str = "SmolLM2-135M-Instruct"
    num_steps: int = 30
    batch_size: int = 8
    learning_rate: float = 5e-4
    rank: int = 16
    max_length: int = 1024
    train_on: TrainOn = "all_assistant"
    seed: int = 0
    sample_tokens: int = 120
    out: Path = Path("out/sft")


@dataclass(frozen=True, slots=True)
class ChatSftResult:
    """NLL in nats per trained token; `resumed_exactly`: one step from the checkpoint had the bits of one step without."""

    first_train_loss: float
    last_train_loss: float
    test_nll_before: float
    test_nll_after: float
    checkpoint: str
    resumed_exactly: bool
    tokens_per_second: float


def token_mean_nll(output: types.ForwardBackwardOutput, datums: Sequence[types.Datum]) -> float:
    """Weighted mean of -logprob over all datums."""
    total = weight = 0.0
    for scored, datum in zip(output.loss_fn_outputs, datums, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        total -= float((scored["logprobs"].to_numpy() * weights).sum())
        weight += float(weights.sum())
    return total / weight


def sample_answers(client: mint.SamplingClient, renderer: Renderer, max_tokens: int) -> list[str]:
    """The model's likeliest answer to each of PROMPTS; they share one running batch."""
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=renderer.stop_token_ids)
    prompts = [renderer.build_prompt([{"role": "user", "content": text}]) for text in PROMPTS]
    futures = [client.sample(types.ModelInput.from_ints(ids), 1, params) for ids in prompts]
    return [renderer.parse_response(f.result().sequences[0].tokens).content.strip() for f in futures]


def chat_sft(
    config: ChatSftConfig,
    train: Sequence[list[dict[str, Any]]],
    test: Sequence[list[dict[str, Any]]],
    console: Console | None = None,
) -> ChatSftResult:
    """Fine-tune, evaluate, plot, sample, save and resume; results go to `config.out` and to the console."""
    console = console or Console()
    config.out.mkdir(parents=True, exist_ok=True)
    service = mint.ServiceClient()
    client = service.create_lora_training_client(config.base_model, rank=config.rank, seed=config.seed)
    info = client.get_info()
    console.print(f"{config.base_model}: {info.dtype} on {info.device}, {info.num_threads} threads, "
                  f"{info.num_parameters:,} trained values in {len(info.lora_modules)} modules")  # fmt: skip

    renderer = get_renderer(client.get_tokenizer())
    train_datums, train_report = convert_conversations(train, renderer, config.max_length, config.train_on)
    test_datums, test_report = convert_conversations(test, renderer, config.max_length, config.train_on)
    for name, report in (("train set", train_report), ("test set", test_report)):
        console.print(f"[bold]{name}[/bold]\n{report}", highlight=False, soft_wrap=True)

    nll_before = token_mean_nll(client.forward(test_datums).result(), test_datums)
    base = service.create_sampling_client(base_model=config.base_model)
    answers_before = sample_answers(base, renderer, config.sample_tokens)
    console.print(f"test NLL before: {nll_before:.4f}")

    batches = Batches(train_datums, config.batch_size, config.seed)
    adam = types.AdamParams(learning_rate=config.learning_rate)
    history: list[dict[str, float]] = []
    started, tokens = time.perf_counter(), 0
    with _progress(console) as progress, (config.out / "metrics.jsonl").open("w", encoding="utf-8") as log:
        bar = progress.add_task("training", total=config.num_steps, loss=float("nan"), speed=0.0)
        for step in range(config.num_steps):
            batch = next(batches)
            gradient = client.forward_backward(batch, "cross_entropy")
            update = client.optim_step(adam)
            loss = token_mean_nll(gradient.result(), batch)
            metrics = update.result().metrics or {}
            tokens += sum(datum.model_input.length for datum in batch)
            speed = tokens / (time.perf_counter() - started)
            history.append({"step": step, "loss": loss, "tokens_per_second": speed, "grad_norm": metrics["grad_norm"]})
            log.write(json.dumps(history[-1]) + "\n")
            progress.update(bar, advance=1, loss=loss, speed=speed)

    nll_after = token_mean_nll(client.forward(test_datums).result(), test_datums)
    console.print(f"train loss: {history[0]['loss']:.4f} -> {history[-1]['loss']:.4f}")
    console.print(f"test NLL:   {nll_before:.4f} -> {nll_after:.4f}  ({len(test_datums)} held-out datums)")
    plot_losses(history, (nll_before, nll_after), config.out / "loss.png")

    answers_after = sample_answers(client.save_weights_and_get_sampling_client(), renderer, config.sample_tokens)
    write_samples(config.out / "samples.md", answers_before, answers_after)
    console.print(
        f"\n[bold]{PROMPTS[0]}[/bold]\n[dim]before:[/dim] {answers_before[0]}\n[dim]after:[/dim]  {answers_after[0]}\n"
    )

    cursor = batches.cursor.to_json()
    checkpoint = client.save_state(f"step-{config.num_steps:06d}", user_metadata={"data_cursor": cursor}).result().path
    exact = resume_one_step(service, client, checkpoint, train_datums, config, console)
    result = ChatSftResult(
        history[0]["loss"],
        history[-1]["loss"],
        nll_before,
        nll_after,
        checkpoint,
        exact,
        history[-1]["tokens_per_second"],
    )
    summary = {**asdict(result), "config": {**asdict(config), "out": str(config.out)}}
    (config.out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    console.print(
        f"checkpoint: {checkpoint}\nresults: {config.out}/ (loss.png, samples.md, metrics.jsonl, summary.json)"
    )
    return result


def resume_one_step(
    service: mint.ServiceClient,
    client: mint.TrainingClient,
    checkpoint: str,
    datums: Sequence[types.Datum],
    config: ChatSftConfig,
    console: Console,
) -> bool:
    """One more step, by the run itself and by a new run from its checkpoint; whether both had the same bits."""
    info = service.create_rest_client().get_weights_info_by_tinker_path(checkpoint).result()
    cursor = Cursor.from_json((info.user_metadata or {})["data_cursor"])
    batch = next(Batches(datums, config.batch_size, config.seed, cursor))
    resumed = service.create_training_client_from_state_with_optimizer(checkpoint)
    adam = types.AdamParams(learning_rate=config.learning_rate)
    outputs = []
    for run in (client, resumed):
        before = run.forward_backward(batch)
        run.optim_step(adam)
        after = run.forward(batch)
        outputs.append((before.result(), after.result()))
    (loss, after_loss), (resumed_loss, resumed_after) = ([token_mean_nll(o, batch) for o in pair] for pair in outputs)
    exact = all(a.loss_fn_outputs == b.loss_fn_outputs for a, b in zip(*outputs, strict=True))
    console.print(f"one step on:             loss {loss:.6f}, then {after_loss:.6f}")
    console.print(f"the same after resuming: loss {resumed_loss:.6f}, then {resumed_after:.6f} "
                  f"({'bit-equal' if exact else '[red]not bit-equal[/red]'})")  # fmt: skip
    return exact


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip


def plot_losses(history: Sequence[dict[str, float]], test_nll: tuple[float, float], path: Path) -> None:
    """Train loss per step and the held-out NLL before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([h["step"] + 1 for h in history], [h["loss"] for h in history], label="train (batch)", linewidth=1.8)
    axes.plot([0, len(history)], test_nll, "o--", label="test", color="tab:orange")
    for x, value in zip((0, len(history)), test_nll, strict=True):
        axes.annotate(f"{value:.3f}", (x, value), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)", title="Chat fine-tuning")
    axes.margins(x=0.06, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def write_samples(path: Path, before: Sequence[str], after: Sequence[str]) -> None:
    parts = ["# The same prompts before and after\n"]
    for prompt, old, new in zip(PROMPTS, before, after, strict=True):
        parts.append(f"## {prompt}\n\n### Before\n\n{old}\n\n### After\n\n{new}\n")
    path.write_text("\n".join(parts), encoding="utf-8")
