"""Chat supervised fine-tuning, start to finish, on the public API only. `chat_sft` is one flat function: read it top down.

Losses are NLL in nats per trained token. metrics.jsonl has two kinds of rows. A training step: `step` (how many were done
with it), `loss` (of its batch), `learning_rate`, `grad_norm`, `tokens`, `seconds`, `wait_seconds` (of those, until its
batch was there). An evaluation: `step` (done before it) and `test_nll`, `test_row_nll`, `test_perplexity`,
`test_bits_per_byte`, `test_tokens`, `test_hash`, the fields of an `Evaluation`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

import mint
from mint import types
from mint.chat import Converter, Renderer, get_renderer
from mint.data import Batches, CachedConverter, ChatSet, Conversation, Cursor, cached
from mint.data.certificate import Certificate
from mint.errors import DataError, InputError
from mint.recipes.config import ChatSftConfig
from mint.recipes.data_certificate import accept, certify, checkpoint_metadata
from mint.recipes.evaluation import Evaluation, EvaluationSet, evaluation_set, mean_nll, measure
from mint.recipes.interrupt import StopOnCtrlC
from mint.recipes.plots import plot_losses
from mint.recipes.progress import TrainingProgress
from mint.recipes.run_folder import PLOT, RunFolder
from mint.recipes.schedule import learning_rate_at
from mint.recipes.summary import print_summary


@dataclass(frozen=True, slots=True)
class Prepared:
    """What training and a dry run begin with."""

    chats: ChatSet
    renderer: Renderer
    converter: Converter | CachedConverter
    held_out: EvaluationSet
    certificate: Certificate

    def batches(self, config: ChatSftConfig, start: Cursor, workers: int = 0) -> Batches[types.Datum]:
        return Batches(
            self.chats.train, config.batch_size, config.seed, start,
            prepare=self.converter, workers=workers, shuffle_buffer=config.shuffle_buffer,
        )  # fmt: skip


def chat_sft(
    config: ChatSftConfig, out: Path, console: Console | None = None,
    *, resume: bool = False, data_changed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tune, evaluate, plot, sample and save; results go to the folder `out`, and the summary is returned.

    resume: go on from the last checkpoint of the run in `out`, with its cursor, to `config.num_steps` in all.
    data_changed: for a resumed run whose data is another than before, which is an error otherwise.
    Ctrl-C during training ends it after the step in progress; everything is saved and the summary's status is
    "interrupted". A second Ctrl-C is a KeyboardInterrupt.
    """
    console, folder = console or Console(emoji=False), RunFolder(out)
    if resume:
        summary = folder.read_summary()
        done = int(summary["step"])
        if config.num_steps <= done:
            raise InputError(f"{out}: {done} steps are done; to go on, ask for more than that (--steps)")
    else:
        folder.require_unused()
        summary, done = {}, 0

    # the run and its data; a new folder is made once both are there
    chats = config.load_chats()
    console.print(f"data: {chats.name}, {len(chats.train):,} conversations to train on, {len(chats.test):,} held out")
    service = mint.ServiceClient()
    if resume:
        client = service.create_training_client_from_state_with_optimizer(summary["checkpoint"])
        folder.write_config(asdict(config))  # a raised goal holds for the next time, too
        metrics = folder.forget_metrics_after(done)
    else:
        client = create_run(service, config, chats)
        folder.create(asdict(config))
        metrics = []
    prepared = prepare(config, chats, client, console)
    renderer, held_out, certificate = prepared.renderer, prepared.held_out, prepared.certificate
    accept(certificate, folder, resume=resume, data_changed=data_changed)
    cursor = saved_cursor(service, summary["checkpoint"]) if resume else Cursor()
    workers = worker_count(config, client)
    batches = prepared.batches(config, cursor, workers)

    # before
    if not resume:
        before = evaluate(client, held_out)
        base = service.create_sampling_client(base_model=config.base_model)
        answers = sample_answers(base, renderer, config)
        summary = {
            "status": "training",
            "base_model": config.base_model,
            "dataset": chats.name,
            "test_rows": before.rows,
            "test_nll_before": before.nll,
            "evaluation_before": asdict(before),
            "samples": [{"prompt": p, "before": a, "after": ""} for p, a in zip(config.prompts, answers, strict=True)],
        }
        metrics.append(before.row(0))
        folder.append_metrics(metrics[-1])
    console.print(f"test NLL before: {summary['test_nll_before']:.4f}")
    if summary["evaluation_before"]["rendered_hash"] != held_out.rendered_hash:
        console.print(
            "the test rows do not give the tokens that were measured before training (other rows, or rendered "
            "otherwise), so numbers from here on are not comparable with those before", style="yellow",
        )  # fmt: skip

    # train
    step, after = done, None
    with TrainingProgress(console, config.num_steps, done) as progress, StopOnCtrlC(console) as stop:
        while step < config.num_steps and not stop.requested:
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            rate = learning_rate_at(step, config.num_steps, config.learning_rate, config.schedule, config.warmup_steps)
            gradient = client.forward_backward(batch, "cross_entropy")
            update = client.optim_step(types.AdamParams(learning_rate=rate))
            loss = mean_nll(gradient.result(), batch)
            optimizer = update.result().metrics or {}
            step += 1
            metrics.append({
                "step": step, "loss": loss, "learning_rate": rate, "grad_norm": optimizer["grad_norm"],
                "tokens": sum(datum.model_input.length for datum in batch), "seconds": time.perf_counter() - started,
                "wait_seconds": waited,
            })  # fmt: skip
            folder.append_metrics(metrics[-1])
            progress.step_done(metrics[-1])
            last = step == config.num_steps
            if last or (config.eval_every and step % config.eval_every == 0):
                after = evaluate(client, held_out)
                metrics.append(after.row(step))
                folder.append_metrics(metrics[-1])
                progress.evaluated(metrics[-1])
            if config.save_every and step % config.save_every == 0:
                summary |= {"checkpoint": save(client, step, batches.cursor, certificate), "step": step}
                folder.write_summary(summary)
    if summary.get("step") != step:
        summary |= {"checkpoint": save(client, step, batches.cursor, certificate), "step": step}
        folder.write_summary(summary)

    # after
    seconds = max(sum(row.get("seconds", 0.0) for row in metrics), 1e-9)
    losses = [row["loss"] for row in metrics if "loss" in row]
    trained = [row for row in metrics if "tokens" in row]
    summary |= {
        "status": "finished" if step == config.num_steps else "interrupted",
        "first_train_loss": losses[0] if losses else None,
        "last_train_loss": losses[-1] if losses else None,
        "test_nll_after": after.nll if after and step == config.num_steps else None,  # of the last step
        "evaluation_after": asdict(after) if after and step == config.num_steps else None,
        "tokens": sum(row["tokens"] for row in trained),
        "tokens_per_second": sum(row["tokens"] for row in trained) / seconds,
        "wait_share": sum(row.get("wait_seconds", 0.0) for row in trained) / seconds,
        "rows_skipped": prepared.converter.report.skipped,
    }
    plot_losses(metrics, out / PLOT, title=f"{config.base_model} on {chats.name}")
    if summary["status"] == "finished":
        tuned = client.save_weights_and_get_sampling_client()
        answers = sample_answers(tuned, renderer, config)
        summary["samples"] = [
            {**sample, "after": answer} for sample, answer in zip(summary["samples"], answers, strict=True)
        ]
        folder.write_samples(summary["samples"])
        if config.check_resume:
            summary["resumed_exactly"] = resume_one_step(
                service, client, summary["checkpoint"], config, batches, console
            )
    folder.write_summary(summary)
    print_summary(console, prepared.converter.report, summary, out)
    batches.close()
    service.close()
    return summary


def create_run(service: mint.ServiceClient, config: ChatSftConfig, chats: ChatSet) -> mint.TrainingClient:
    return service.create_lora_training_client(
        config.base_model,
        rank=config.rank,
        seed=config.seed,
        train_mlp=config.train_mlp,
        train_attn=config.train_attn,
        train_unembed=config.train_unembed,
        user_metadata={"recipe": "chat_sft", "dataset": chats.name},
    )


def prepare(config: ChatSftConfig, chats: ChatSet, client: mint.TrainingClient, console: Console) -> Prepared:
    """Renderer, converter and the datums of every evaluation."""
    info = client.get_info()
    console.print(
        f"{config.base_model}: {info.dtype} on {info.device}, {info.num_threads} threads; rank {info.lora_rank}, "
        f"{info.num_parameters or 0:,} trained values in {len(info.lora_modules)} modules",
        highlight=False,
    )
    renderer = get_renderer(client.get_tokenizer(), thinking=config.thinking)
    train_on = config.train_on or chats.train_on
    console.print(
        f"rendered as {renderer.settings['family']}, trained on {train_on}, at most {config.max_length} tokens"
    )
    testing = Converter(renderer, config.max_length, train_on, on_overlong=config.on_overlong)
    held_out = evaluation_set(first_usable(chats.test, config.eval_size, testing), client.get_tokenizer())
    if testing.report.skipped:
        console.print(f"test rows skipped: {testing.report.skipped}", style="yellow")
    plain = Converter(renderer, config.max_length, train_on, on_overlong=config.on_overlong)
    converter = cached(plain) if config.cache else plain
    certificate = certify(chats, converter, config.base_model, client.get_tokenizer(), config.max_loss, console)
    return Prepared(chats, renderer, converter, held_out, certificate)


def worker_count(config: ChatSftConfig, client: mint.TrainingClient) -> int:
    """As configured, else one beside an accelerator. Where the processor trains, preparing a batch takes well under a
    hundredth of its step, and a worker would cost memory and a second's start to save that.
    """
    if config.workers is not None:
        return config.workers
    return 0 if str(client.get_info().device) == "cpu" else 1


def first_usable(rows: Sequence[Conversation], count: int, converter: Converter) -> list[list[types.Datum]]:
    """The datums of each of the first `count` rows that give any."""
    usable = (made for number in range(len(rows)) if (made := converter(number, rows[number])))
    found = list(islice(usable, count))
    if not found:
        raise DataError(f"none of the {len(rows)} test rows can be used:\n{converter.report}")
    return found


def evaluate(client: mint.TrainingClient, held_out: EvaluationSet) -> Evaluation:
    return measure(client.forward(held_out.datums, "cross_entropy").result(), held_out)


def sample_answers(client: mint.SamplingClient, renderer: Renderer, config: ChatSftConfig) -> list[str]:
    """The model's likeliest answer to each prompt; they share one running batch."""
    params = types.SamplingParams(
        max_tokens=config.sample_tokens, temperature=0.0, stop_token_ids=renderer.stop_token_ids
    )
    prompts = [renderer.prompt([{"role": "user", "content": text}]) for text in config.prompts]
    futures = [client.sample(types.ModelInput.from_ints(ids), 1, params) for ids in prompts]
    return [renderer.parse(f.result().sequences[0].tokens).content.strip() for f in futures]


def save(client: mint.TrainingClient, step: int, cursor: Cursor, certificate: Certificate) -> str:
    metadata = {"step": str(step), "data_cursor": cursor.to_json(), **checkpoint_metadata(certificate)}
    # a resumed run may come to a step that it has saved before
    return client.save_state(f"step-{step:06d}", overwrite=True, user_metadata=metadata).result().path


def saved_cursor(service: mint.ServiceClient, checkpoint: str) -> Cursor:
    info = service.create_rest_client().get_weights_info_by_tinker_path(checkpoint).result()
    return Cursor.from_json((info.user_metadata or {}).get("data_cursor", ""))


def resume_one_step(
    service: mint.ServiceClient,
    client: mint.TrainingClient,
    checkpoint: str,
    config: ChatSftConfig,
    batches: Batches[types.Datum],
    console: Console,
) -> bool:
    """One more step, by the run itself and by a new run from its checkpoint; whether both had the same bits."""
    batch = next(batches)
    resumed = service.create_training_client_from_state_with_optimizer(checkpoint)
    adam = types.AdamParams(learning_rate=config.learning_rate)
    outputs = []
    for run in (client, resumed):
        before = run.forward_backward(batch)
        run.optim_step(adam)
        after = run.forward(batch)
        outputs.append((before.result(), after.result()))
    (loss, after_loss), (resumed_loss, resumed_after) = ([mean_nll(o, batch) for o in pair] for pair in outputs)
    exact = all(a.loss_fn_outputs == b.loss_fn_outputs for a, b in zip(*outputs, strict=True))
    console.print(f"one step on:             loss {loss:.6f}, then {after_loss:.6f}")
    console.print(f"the same after resuming: loss {resumed_loss:.6f}, then {resumed_after:.6f} "
                  f"({'bit-equal' if exact else '[red]not bit-equal[/red]'})")  # fmt: skip
    return exact


def dry_run(config: ChatSftConfig, console: Console | None = None) -> dict[str, Any]:
    """Two probe steps on the first batches: what the whole run will take. Writes no results; returns the plan."""
    console = console or Console(emoji=False)
    chats = config.load_chats()
    with mint.ServiceClient() as service:
        client = create_run(service, config, chats)
        prepared = prepare(config, chats, client, console)
        batches = prepared.batches(config, Cursor())
        steps = []
        for _ in range(2):
            batch = next(batches)
            started = time.perf_counter()
            client.forward_backward(batch, "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=config.learning_rate)).result()
            steps.append((sum(datum.model_input.length for datum in batch), time.perf_counter() - started))
        lengths = [sum(datum.model_input.length for datum in next(batches)) for _ in range(min(20, config.num_steps))]
        info = client.get_info()
    tokens_per_step = sum(lengths) / len(lengths)
    speed = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
    test_tokens = sum(datum.model_input.length for datum in prepared.held_out.datums)
    evaluations = 2 + (config.num_steps // config.eval_every if config.eval_every else 0)
    return {
        "steps": config.num_steps,
        "epochs": round(config.num_steps / batches.batches_per_epoch, 2),
        "tokens_per_step": round(tokens_per_step),
        "tokens": round(tokens_per_step * config.num_steps),
        "max_tokens_per_pass": info.max_tokens_per_pass,
        "recomputed_layers": info.recomputed_layers,
        "trained_values": info.num_parameters,
        "tokens_per_second": round(speed, 1),
        # a forward pass costs about a third of forward and backward
        "eta_seconds": round((tokens_per_step * config.num_steps + evaluations * test_tokens / 3) / speed),
        "memory_bytes": psutil.Process().memory_info().rss,  # the engine keeps its buffers, so this is near the peak
        "rows_looked_at": prepared.converter.report.rows,
        "rows_skipped": prepared.converter.report.skipped,
    }
