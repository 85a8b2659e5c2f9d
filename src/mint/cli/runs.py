"""`mint runs` and `mint checkpoints`: what was trained and what was kept."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from mint import settings as settings_module
from mint.cli.common import JsonOption, checkpoint_named, command, make_console, print_json, run_named
from mint.errors import InputError

if TYPE_CHECKING:
    from mint.types import Checkpoint, TrainingRun

runs_app = typer.Typer(no_args_is_help=True, help="Runs: list, show, plot.")
checkpoints_app = typer.Typer(no_args_is_help=True, help="Checkpoints: list, show, delete.")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id that `mint runs list` shows, or a run's folder.")]
PathArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="tinker://RUN/weights/NAME, or a run's folder.")
]


@runs_app.command("list", epilog="Example: mint runs list --limit 5")
def list_runs(
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    everything: Annotated[bool, typer.Option("--all", help="Those that saved nothing, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Runs with checkpoints, the newest first."""
    import mint

    console = make_console(stderr=as_json)
    with command(console, verbose=False):
        rest = mint.RestClient()
        total = rest.list_training_runs(limit=1).result().cursor.total_count
        found = rest.list_training_runs(limit=max(1, total)).result().training_runs
        shown = [run for run in found if everything or run.last_checkpoint or run.last_sampler_checkpoint]
        hidden = len(found) - len(shown)
        if as_json:
            print_json([_run_facts(run) for run in shown[:limit]])
            return
        names = _names("run", [run.training_run_id for run in shown[:limit]])
        table = Table(names, Column("base model", overflow="fold"), "rank", "steps", "loss", "used")
        for run in shown[:limit]:
            facts = _run_facts(run)
            table.add_row(
                run.training_run_id, run.base_model, str(run.lora_rank), str(facts["steps"]),
                "" if facts["loss"] is None else f"{facts['loss']:.4f}", _time(run.last_request_time),
            )  # fmt: skip
        console.print(table)
        if hidden:
            console.print(f"{hidden} runs that saved nothing are not shown (--all)", style="dim")


@runs_app.command("show", epilog="Example: mint runs show out/first")
def show_run(run: RunArgument, as_json: JsonOption = False) -> None:
    """One run: what it is, how far it came, its checkpoints."""
    import mint

    console = make_console(stderr=as_json)
    with command(console, verbose=False):
        rest, run = mint.RestClient(), run_named(run)
        facts = _run_facts(rest.get_training_run(run).result())
        saved = rest.list_checkpoints(run).result().checkpoints
        if as_json:
            print_json({**facts, "checkpoints": [checkpoint.model_dump(mode="json") for checkpoint in saved]})
            return
        table = Table(show_header=False, box=None)
        for key, value in facts.items():
            table.add_row(key, str(value))
        console.print(table)
        _print_checkpoints(saved, console)


@runs_app.command("plot", epilog="Example: mint runs plot out/first --out loss.png")
def plot_run(
    run: RunArgument, out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("loss.png")
) -> None:
    """Draw the loss of every step of a run."""
    import mint
    from mint.recipes.plots import plot_losses

    console = make_console()
    with command(console, verbose=False):
        run = run_named(run)
        mint.RestClient().get_training_run(run).result()
        steps = _steps(run)
        if not any("loss" in step for step in steps):
            raise InputError(f"run {run}: no loss was recorded; it took no step with a forward_backward before it")
        plot_losses(steps, out, title=run)
        console.print(f"{out}: {len(steps)} steps", highlight=False)


@checkpoints_app.command("list", epilog="Example: mint checkpoints list --run out/first")
def list_checkpoints(
    run: Annotated[str | None, typer.Option(help="Of this run only.")] = None, as_json: JsonOption = False
) -> None:
    """Checkpoints, the newest first."""
    import mint

    console = make_console(stderr=as_json)
    with command(console, verbose=False):
        rest = mint.RestClient()
        if run is not None:
            saved = rest.list_checkpoints(run_named(run)).result().checkpoints
        else:
            saved = rest.list_user_checkpoints(limit=10_000).result().checkpoints
        if as_json:
            print_json([checkpoint.model_dump(mode="json") for checkpoint in saved])
        else:
            _print_checkpoints(saved, console)


@checkpoints_app.command("show", epilog="Example: mint checkpoints show out/first")
def show_checkpoint(path: PathArgument, as_json: JsonOption = False) -> None:
    """One checkpoint, after all its files were found whole."""
    import mint
    from mint.types import ParsedCheckpointTinkerPath

    console = make_console(stderr=as_json)
    with command(console, verbose=False):
        rest, path = mint.RestClient(), checkpoint_named(path)
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        facts = rest.get_weights_info_by_tinker_path(path).result().model_dump(mode="json")
        saved = rest.list_checkpoints(parsed.training_run_id).result().checkpoints
        facts |= next(c.model_dump(mode="json") for c in saved if c.tinker_path == parsed.tinker_path)
        if as_json:
            print_json(facts)
            return
        table = Table(show_header=False, box=None)
        for key, value in _with_data_line(facts).items():
            table.add_row(key, f"{value:,} bytes" if key == "size_bytes" else str(value))
        console.print(table)


@checkpoints_app.command("delete", epilog="Example: mint checkpoints delete tinker://RUN/weights/step-000010 --yes")
def delete_checkpoints(
    paths: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="tinker:// paths.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete checkpoints for good."""
    import mint
    from mint.types import ParsedCheckpointTinkerPath

    console = make_console()
    with command(console, verbose=False):
        rest = mint.RestClient()
        known = [ParsedCheckpointTinkerPath.from_tinker_path(path) for path in paths]
        for parsed in known:  # all of them, before the first is gone
            rest.get_training_run(parsed.training_run_id).result()
        if not yes:
            typer.confirm(f"delete {len(known)} checkpoint(s) for good?", abort=True)
        for parsed in known:
            rest.delete_checkpoint_from_tinker_path(parsed.tinker_path).result()
            console.print(f"deleted {parsed.tinker_path}", soft_wrap=True, highlight=False)


def _run_facts(run: TrainingRun) -> dict[str, Any]:
    steps = _steps(run.training_run_id)
    return {
        "run": run.training_run_id,
        "base_model": run.base_model,
        "rank": run.lora_rank,
        "steps": steps[-1]["step"] if steps else 0,
        "loss": steps[-1].get("loss") if steps else None,
        "last_used": run.last_request_time.isoformat(),
        "user_metadata": run.user_metadata,
        "last_checkpoint": run.last_checkpoint.tinker_path if run.last_checkpoint else None,
    }


def _steps(run_id: str) -> list[dict[str, Any]]:
    """A run's own record of its optimizer steps; `loss` is the mean over the positions with a weight."""
    from mint.client.connect import EMBEDDED_TENANT
    from mint.local.runs import METRICS_FILE, RunStore

    file = RunStore(settings_module.load().runs_dir, EMBEDDED_TENANT).folder(run_id) / METRICS_FILE
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    for row in rows:
        row["step"] = int(row["step"])
        if row.get("active_positions:sum"):
            row["loss"] = row["loss:sum"] / row["active_positions:sum"]
    return rows


def _with_data_line(facts: dict[str, Any]) -> dict[str, Any]:
    """With the data certificate that `mint sft` puts into the metadata as one line of its own."""
    from mint.data.certificate import METADATA_KEY, compact_line

    metadata = dict(facts.get("user_metadata") or {})
    try:
        line = compact_line(json.loads(metadata.pop(METADATA_KEY)))
    except (KeyError, TypeError, ValueError):  # metadata is the user's: there is none, or it is something else
        return facts
    return {**facts, "user_metadata": metadata, "data": line}


def _print_checkpoints(saved: list[Checkpoint], console: Console) -> None:
    table = Table(_names("checkpoint", [checkpoint.tinker_path for checkpoint in saved]), "saved", "MB")
    for checkpoint in saved:
        expiry = f", expires {_time(checkpoint.expires_at)}" if checkpoint.expires_at else ""
        size = f"{(checkpoint.size_bytes or 0) / 1e6:.1f}"
        table.add_row(checkpoint.tinker_path, _time(checkpoint.time) + expiry, size)
    console.print(table)


def _names(header: str, names: list[str]) -> Column:
    """A column that is never cut: what stands in it is copied into the next command."""
    return Column(header, no_wrap=True, min_width=max(map(len, names), default=0))


def _time(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")
