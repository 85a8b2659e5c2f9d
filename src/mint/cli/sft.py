"""`mint sft`."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from mint.cli.common import (
    EXIT_INTERRUPTED,
    OVERLONG_HELP,
    ColumnsOption,
    JsonOption,
    TestOption,
    ThinkingOption,
    TrainOnOption,
    command,
    make_console,
    print_json,
)
from mint.errors import HubUnreachableError, InputError

if TYPE_CHECKING:
    from mint.recipes.config import ChatSftConfig

# what needs no hub, small and quick enough to see the model change within minutes on a laptop
OFFLINE: dict[str, Any] = {
    "base_model": "SmolLM2-135M-Instruct",
    "dataset": "packaged",
    "num_steps": 30,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "check_resume": True,
}
# as the tutorial has it; some of its rows are longer than 2,048 tokens
TULU3: dict[str, Any] = {"num_steps": 100, "max_loss": 0.1}
SHUFFLE_BUFFER = 10_000
MODULES = ("attn", "mlp", "unembed")
DEFAULT_OUT = Path("out/sft")


def sft(
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or packaged model.", show_default="Qwen/Qwen3-0.6B")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="no_robots, tulu3, packaged, chitchat, a file or folder (JSONL, JSON, CSV, parquet), an http(s) address, "
            "or owner/name[:split] on the hub. Several make a mixture; NAME=SHARE sets the share of one.",
            show_default="no_robots",
        ),
    ] = None,
    test: TestOption = None,
    columns: ColumnsOption = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read the dataset's files forward, without unpacking or indexing; for huge sets."
        ),
    ] = False,
    shuffle_buffer: Annotated[
        int | None, typer.Option(min=1, help="Rows that --stream shuffles at a time.", show_default="10000")
    ] = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="No hub: SmolLM2-135M-Instruct (a package), the packaged chat set, 30 steps."),
    ] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="50; tulu3 100")] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the data instead of --steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Conversations a step.", show_default="4")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", show_default="1e-4")] = None,
    schedule: Annotated[Literal["constant", "linear", "cosine"] | None, typer.Option(show_default="constant")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Steps of rising rate.", show_default="0")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="LoRA rank.", show_default="16")] = None,
    modules: Annotated[
        str | None, typer.Option(help="What gets an adapter, of attn,mlp,unembed.", show_default="attn,mlp,unembed")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a conversation.", show_default="2048"),
    ] = None,
    on_overlong: Annotated[
        Literal["drop", "truncate_right", "truncate_left_turns"] | None,
        typer.Option(help=OVERLONG_HELP, show_default="drop"),
    ] = None,
    train_on: TrainOnOption = None,
    thinking: ThinkingOption = False,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of rows and of answers that may be lost.", show_default="0.01; tulu3 0.1"
        ),
    ] = None,
    eval_size: Annotated[int | None, typer.Option(min=1, help="Test rows evaluated.", show_default="32")] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=0, help="Steps between evaluations; 0: before and after.", show_default="0")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=0, help="Steps between checkpoints; 0: at the end.", show_default="50")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that prepare rows ahead; 0: none.", show_default="1 beside a GPU, else 0"),
    ] = None,
    cache: Annotated[
        bool | None, typer.Option("--cache", help="Keep converted rows in MINT_HOME/cache.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Sampled before and after; may be repeated.", show_default="three of ours")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the adapter and the order of the data.", show_default="0")
    ] = None,
    check_resume: Annotated[
        bool | None,
        typer.Option(help="Check that a resumed run takes the same next step.", show_default="only with --offline"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="out/sft, out/sft-2, ...")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder; --steps raises its goal.")
    ] = None,
    data_changed: Annotated[
        bool, typer.Option("--data-changed", help="With --resume: the data is meant to be another than before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Two probe steps, then the plan: tokens, memory, time. Saves nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Chat fine-tuning: train, evaluate, plot, sample, save.

    Results go to a folder: loss.png, samples.md (the same prompts before and after), metrics.jsonl, summary.json and
    config.json. Ctrl-C ends after the step in progress and saves.
    """
    console = make_console(stderr=as_json)
    given = {
        "base_model": model,
        "dataset": (dataset[0] if len(dataset) == 1 else tuple(dataset)) if dataset else None,
        "test": test,
        "columns": tuple(columns) if columns else None,
        "shuffle_buffer": (shuffle_buffer or SHUFFLE_BUFFER) if stream else None,
        "num_steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "rank": rank,
        "max_length": max_length,
        "on_overlong": on_overlong,
        "train_on": train_on,
        "thinking": thinking or None,
        "max_loss": max_loss,
        "eval_size": eval_size,
        "eval_every": eval_every,
        "save_every": save_every,
        "prompts": tuple(prompt) if prompt else None,
        "seed": seed,
        "check_resume": check_resume,
        "workers": workers,
        "cache": cache,
        **_modules(modules),
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    with command(console):
        if shuffle_buffer is not None and not stream:
            raise InputError("--shuffle-buffer belongs to --stream; without it all rows are shuffled")
        if resume is not None:
            others = chosen.keys() - {"num_steps"}
            if others or out is not None or offline or dry_run or epochs is not None:
                raise InputError(
                    "--resume takes its options from the run's config.json; only --steps and --data-changed may be added"
                )
            _resume(resume, chosen, console, data_changed=data_changed, as_json=as_json)
        else:
            if data_changed:
                raise InputError("--data-changed belongs to --resume")
            _start(_config(chosen, offline=offline, epochs=epochs), out, console, dry=dry_run, as_json=as_json)


def _modules(text: str | None) -> dict[str, bool]:
    if text is None:
        return {}
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(MODULES):
        raise typer.BadParameter(f"--modules {text}: choose of {','.join(MODULES)}")
    return {f"train_{name}": name in names for name in MODULES}


def _config(chosen: dict[str, Any], *, offline: bool, epochs: float | None) -> ChatSftConfig:
    from mint.recipes.config import ChatSftConfig

    defaults = OFFLINE if offline else {}
    if chosen.get("dataset") == "tulu3":
        defaults = {**TULU3, **defaults}
    config = ChatSftConfig(**{**defaults, **chosen})
    if epochs is None:
        return config
    if "num_steps" in chosen:
        raise InputError("give --steps or --epochs, not both")
    rows = len(_naming_offline(config.load_chats).train)
    return replace(config, num_steps=max(1, int(epochs * (rows // config.batch_size))))


def _naming_offline(work: Any) -> Any:
    """An unreachable hub is answered with the way to do without."""
    try:
        return work()
    except HubUnreachableError as error:
        raise HubUnreachableError(f"{error}. `mint sft --offline` runs without any hub") from error


def _start(config: ChatSftConfig, out: Path | None, console: Console, *, dry: bool, as_json: bool) -> None:
    from mint.recipes import chat_sft as recipe

    if dry:
        plan = _naming_offline(lambda: recipe.dry_run(config, console))
        print_json(plan) if as_json else _print_plan(plan, console)
        return
    folder = out if out is not None else _free_folder()
    _finish(_naming_offline(lambda: recipe.chat_sft(config, folder, console)), as_json=as_json)


def _resume(out: Path, chosen: dict[str, Any], console: Console, *, data_changed: bool, as_json: bool) -> None:
    from mint.recipes.chat_sft import chat_sft
    from mint.recipes.config import load_config

    config = load_config(out, **chosen)
    _finish(chat_sft(config, out, console, resume=True, data_changed=data_changed), as_json=as_json)


def _finish(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
    if summary["status"] == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)


def _free_folder() -> Path:
    """The default folder, or the next with a number, so that no earlier results are in the way."""
    from mint.recipes.run_folder import RunFolder

    number, folder = 1, DEFAULT_OUT
    while RunFolder(folder).is_used:
        number += 1
        folder = DEFAULT_OUT.with_name(f"{DEFAULT_OUT.name}-{number}")
    return folder


def _pass_text(max_tokens: int) -> str:
    """A datum longer than a pass goes alone, so passes of 1 token mean: every one."""
    return f"at most {max_tokens:,}" if max_tokens > 1 else "those of one conversation"


def _print_plan(plan: dict[str, Any], console: Console) -> None:
    table = Table("what", "planned", title="dry run: nothing was saved")
    shown = {
        "steps": f"{plan['steps']} ({plan['epochs']} epochs)",
        "tokens": f"{plan['tokens']:,} (about {plan['tokens_per_step']:,} a step)",
        "tokens of one pass": _pass_text(plan["max_tokens_per_pass"]),
        "layers computed twice": str(plan["recomputed_layers"]),
        "trained values": f"{plan['trained_values']:,}",
        "memory after two steps": f"{plan['memory_bytes'] / 2**30:.2f} GiB",
        "speed of two steps": f"{plan['tokens_per_second']} tokens/s",
        "time": str(timedelta(seconds=plan["eta_seconds"])),
        "rows skipped": f"{sum(plan['rows_skipped'].values())} of {plan['rows_looked_at']} looked at",
    }
    for name, value in shown.items():
        table.add_row(name, value)
    console.print(table)
