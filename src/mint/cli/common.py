"""What every command shares: where it writes, how it fails, what a checkpoint or model is called on the command line."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler

from mint.errors import MintError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts; everything else goes to stderr.")]

TestOption = Annotated[
    str | None,
    typer.Option(
        "--test",
        "--test-file",
        help="Rows to evaluate on: a fraction, a :split of the dataset, or a file, folder, address or hub set.",
        show_default="its test split, or a tenth",
    ),
]
DatasetsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="DATASET...", help="As for mint sft: no_robots, a file, a folder, ...; several make a mixture."
    ),
]
TrainOnOption = Annotated[
    Literal["all_assistant", "last_assistant", "all"] | None,
    typer.Option(help="What is trained: every answer, the last one, or every token.", show_default="the dataset's own"),
]
OVERLONG_HELP = "What is done with an answer that is too long with its prompt."
ThinkingOption = Annotated[
    bool, typer.Option("--thinking", help="Thoughts in answers are trained (Qwen3, GLM-4.5, DeepSeek-R1 ...).")
]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="What columns mean, e.g. prompt=question,completion=answer; with SET: before it, for one of several.",
        show_default="found out",
    ),
]


def make_console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, emoji=False)  # ":train:" in the id of a run is no picture


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def command(console: Console, *, verbose: bool = True) -> Iterator[None]:
    """Log MinT's lines to `console`; errors of MinT's own and of files become one message on stderr and exit code 1."""
    handler = RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("mint").setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    except (MintError, OSError) as error:  # of the system's: a folder that cannot be written, say
        Console(stderr=True, emoji=False).print(
            f"[red]error:[/red] {_escaped(str(error))}", soft_wrap=True, highlight=False
        )
        raise typer.Exit(EXIT_FAILED) from None
    except KeyboardInterrupt:
        Console(stderr=True, emoji=False).print("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def is_checkpoint(name: str) -> bool:
    return name.startswith(("tinker://", "mint://"))


def checkpoint_named(name: str) -> str:
    """`name`, or where it is the folder of a recipe's run, the path of that run's last checkpoint."""
    from mint.recipes.run_folder import SUMMARY, RunFolder

    if is_checkpoint(name) or not (Path(name) / SUMMARY).is_file():
        return name
    return str(RunFolder(Path(name)).read_summary()["checkpoint"])


def run_named(name: str) -> str:
    """The id of a run, given itself, one of its checkpoints or the folder of a recipe's run."""
    from mint.types import ParsedCheckpointTinkerPath

    path = checkpoint_named(name)
    return ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id if is_checkpoint(path) else path
