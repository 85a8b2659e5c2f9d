"""`mint data show`: rows of a data set as the model is trained on them, token by token."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from mint.cli.common import (
    OVERLONG_HELP,
    ColumnsOption,
    DatasetsArgument,
    TestOption,
    ThinkingOption,
    TrainOnOption,
    checkpoint_named,
    command,
    is_checkpoint,
    make_console,
)
from mint.errors import InputError

if TYPE_CHECKING:
    from mint.chat import OnOverlong, ShownRow

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"
TERMINAL_ROWS, PAGE_ROWS = 3, 100  # shown where none are named
MAX_ROWS = 5000  # at once, in memory and in a browser; of some hundred tokens each that is a page of 10 MB

Model = Annotated[
    str | None,
    typer.Option(
        help="Hub id, folder or packaged model: whose tokenizer and template.",
        show_default=f"{DEFAULT_MODEL}, or the checkpoint's",
    ),
]
Rows = Annotated[
    str | None,
    typer.Option(
        help="Numbers from 0, such as 0,3,10-12 or 500-, or all.",
        show_default=f"first {TERMINAL_ROWS}; with --html first {PAGE_ROWS}",
    ),
]


def show(
    dataset: DatasetsArgument,
    model: Model = None,
    rows: Rows = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="The rows trained on, or those held out.")] = "train",
    test: TestOption = None,
    columns: ColumnsOption = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a conversation.")] = 2048,
    train_on: TrainOnOption = None,
    thinking: ThinkingOption = False,
    on_overlong: Annotated[
        Literal["drop", "truncate_right", "truncate_left_turns"],
        typer.Option(help=OVERLONG_HELP),
    ] = "drop",
    seed: Annotated[int, typer.Option(help="Chooses the test rows of a file, as in mint sft.")] = 0,
    checkpoint: Annotated[
        str | None, typer.Option(help="tinker:// path or a run's folder: how it changed the NLL of every token.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page for the browser, with search and filters, to this file.")
    ] = None,
) -> None:
    """Rows as they are trained: every token, and whether the model has to learn to write it.

    On a terminal, or with --html as one page that needs no other file and no network. With --checkpoint the colours show
    each token's NLL before and after training.
    """
    console = make_console()
    with command(make_console(stderr=True), verbose=False):
        first = TERMINAL_ROWS if html is None else PAGE_ROWS
        data = (tuple(dataset), test, columns, seed)
        view = View(*data, split, rows, first, max_length, train_on, on_overlong, thinking)
        if checkpoint is None:
            from mint.hub import load_tokenizer

            model = model or DEFAULT_MODEL
            shown, facts = view.render(load_tokenizer(model))
            facts = {"model": model, **facts}
        else:
            shown, facts = _scored(view, model, checkpoint)
        if html is None:
            _print(shown, facts, console)
        else:
            _write(shown, facts, view, html, console)


@dataclass(frozen=True, slots=True)
class View:
    """Which rows are looked at, and by which rules they are rendered. rows, first: see `row_numbers`."""

    dataset: tuple[str, ...]
    test: str | None
    columns: list[str] | None
    seed: int
    split: Literal["train", "test"]
    rows: str | None
    first: int
    max_length: int
    train_on: str | None
    on_overlong: OnOverlong
    thinking: bool

    def render(self, tokenizer: Any) -> tuple[list[ShownRow], dict[str, str]]:
        """The rows, and what was rendered how. Raises as `load_chat_set` and `Converter`."""
        from mint.chat import Converter, get_renderer, show_row
        from mint.data import load_chat_set

        chats = load_chat_set(self.dataset, test=self.test, columns=self.columns, seed=self.seed)
        source = chats.train if self.split == "train" else chats.test
        numbers = row_numbers(self.rows, len(source), first=self.first)
        renderer = get_renderer(tokenizer, thinking=self.thinking)
        train_on: Any = self.train_on or chats.train_on
        converter = Converter(renderer, self.max_length, train_on, on_overlong=self.on_overlong)
        facts = {
            "data set": f"{chats.name}, {self.split} ({len(source):,} rows)",
            **_template_facts(renderer.settings),
            "trained on": train_on,
            "max length": f"{self.max_length:,} tokens",
            "too long": self.on_overlong,
        }
        return [show_row(number, source[number], converter) for number in numbers], facts


def row_numbers(chosen: str | None, count: int, *, first: int) -> list[int]:
    """The rows that `chosen` names of `count`, in its order, each once; None is the `first` so many.

    chosen: "all", or numbers from 0 and ranges with both ends, "10-12", or "500-" to the end, with commas between.
    Raises InputError, also for more than MAX_ROWS.
    """
    if chosen is None:
        return list(range(min(first, count)))
    parts = ["0-"] if chosen.strip() == "all" else [part.strip() for part in chosen.split(",")]
    ranges = [_row_range(part, count) for part in parts]
    total = sum(map(len, ranges))
    if total > MAX_ROWS:
        raise InputError(f"--rows {chosen}: {total:,} rows; at most {MAX_ROWS:,} are shown at once")
    return list(dict.fromkeys(itertools.chain.from_iterable(ranges)))


def _row_range(part: str, count: int) -> range:
    found = re.fullmatch(r"(\d+)(-(\d*))?", part)
    if found is None:
        raise InputError(f"--rows: {part!r} is no number and no range; give e.g. 0,3,10-12, 500- or all")
    start = int(found[1])
    end = start if found[2] is None else int(found[3] or count - 1)
    if max(start, end) >= count:
        raise InputError(f"--rows: {part!r} is beyond the {count:,} rows there are, numbered from 0")
    if end < start:
        raise InputError(f"--rows: {part!r} is not a range: its end is before its start")
    return range(start, end + 1)


def _template_facts(settings: Mapping[str, Any]) -> dict[str, str]:
    """family (hash of the template), and the date and the thinking switch where they are used."""
    facts = {"chat template": f"{settings['family']} ({settings['template']})"}
    if settings["date"] is not None:
        facts["date"] = str(settings["date"])
    if settings["thinking"]:
        facts["thinking"] = "on"
    return facts


def _scored(view: View, model: str | None, checkpoint: str) -> tuple[list[ShownRow], dict[str, str]]:
    """As `View.render` with the base model's tokenizer, and the NLLs that it and the checkpoint give."""
    from rich.progress import track

    import mint
    from mint.data.scored import scored_rows

    path = checkpoint_named(checkpoint)
    if not is_checkpoint(path):
        raise InputError(f"--checkpoint {checkpoint}: give a tinker:// path or the folder of a run with a checkpoint")
    with mint.ServiceClient() as service:
        tuned = service.create_sampling_client(path)
        base_model = tuned.get_base_model()
        if model not in (None, base_model):
            raise InputError(f"--model {model}: the checkpoint was trained on {base_model}; leave --model out")
        shown, facts = view.render(tuned.get_tokenizer())
        base = service.create_sampling_client(None, base_model)
        scored = scored_rows(shown, tuned, base)
        console = make_console(stderr=True)
        quiet = not console.is_terminal
        shown = list(track(scored, "scoring", total=len(shown), console=console, transient=True, disable=quiet))
    return shown, {"model": base_model, "checkpoint": path, **facts}


def _print(rows: Sequence[ShownRow], facts: dict[str, str], console: Console) -> None:
    from mint.cli.shown_text import print_rows

    console.print(
        "; ".join(f"{name}: {value}" for name, value in facts.items()),
        style="dim",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    print_rows(rows, console)


def _write(rows: Sequence[ShownRow], facts: dict[str, str], view: View, file: Path, console: Console) -> None:
    from mint.cli.shown_text import summary
    from mint.data.figures import figures
    from mint.data.page import page

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page(rows, f"{', '.join(view.dataset)}: rows as they are trained", facts), encoding="utf-8")
    console.print(f"{summary(figures(rows))}\npage: {file}", highlight=False, markup=False, soft_wrap=True)
