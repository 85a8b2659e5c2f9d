"""`mint data show`: rows of a data set as the model is trained on them, token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from mint.cli.common import checkpoint_named, command, is_checkpoint, make_console
from mint.errors import InputError

if TYPE_CHECKING:
    from mint.chat import ShownRow

TERMINAL_ROWS, PAGE_ROWS = 3, 100
MAX_PAGE_ROWS = 5000  # of some hundred tokens each; a browser takes that in a second


def show(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="As for `mint sft --dataset`: a name, or a file with 'messages'.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or packaged model.", show_default="the checkpoint's")
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Numbers from 0, such as 0,3,10-12 or 500-, or all.", show_default="first 3; --html first 100"
        ),
    ] = None,
    split: Annotated[Literal["train", "test"], typer.Option(help="The rows trained on, or those held out.")] = "train",
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a conversation.")] = 2048,
    train_on: Annotated[
        str | None,
        typer.Option(help="What is trained, as for `mint sft --train-on`.", show_default="the dataset's own"),
    ] = None,
    on_overlong: Annotated[
        str, typer.Option(help="What is done with rows that are too long: drop, truncate_right, truncate_left_turns.")
    ] = "drop",
    checkpoint: Annotated[
        str | None,
        typer.Option(help="tinker:// path or folder of a run: colours tokens by how it changed their NLL."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page for the browser to this file, which needs no other.")
    ] = None,
) -> None:
    """Show rows as they are trained: which tokens, and which of them the model has to learn to write.

    On a terminal, or with --html as one page with search and filters. With --checkpoint the page also has every token's
    NLL before and after training.
    """
    console = make_console()
    with command(make_console(stderr=True), verbose=False):
        view = View(dataset, split, max_length, train_on, on_overlong)
        if checkpoint is None:
            if model is None:
                raise InputError("give --model, whose tokenizer and chat template write the rows, or --checkpoint")
            from mint.hub import load_tokenizer

            shown, facts = view.render(rows, load_tokenizer(model), to_page=html is not None)
            facts = {"model": model, **facts}
        else:
            shown, facts = _scored(view, rows, model, checkpoint, to_page=html is not None)
        _print(shown, facts, console) if html is None else _write(shown, facts, view, html, console)


@dataclass(frozen=True, slots=True)
class View:
    """Which rows are looked at, and by which rules they are rendered."""

    dataset: str
    split: Literal["train", "test"]
    max_length: int
    train_on: str | None
    on_overlong: str

    def render(self, chosen: str | None, tokenizer: Any, *, to_page: bool) -> tuple[list[ShownRow], dict[str, str]]:
        """The rows that `chosen` names, and what was rendered how. Raises as `load_chat_set` and `Converter`."""
        from mint.chat import Converter, get_renderer, show_row
        from mint.data import load_chat_set

        chats = load_chat_set(self.dataset)
        source = chats.train if self.split == "train" else chats.test
        numbers = row_numbers(chosen, len(source), first=PAGE_ROWS if to_page else TERMINAL_ROWS)
        if to_page and len(numbers) > MAX_PAGE_ROWS:
            raise InputError(f"--rows {chosen}: {len(numbers):,} rows; a page holds at most {MAX_PAGE_ROWS:,}")
        renderer = get_renderer(tokenizer)
        train_on: Any = self.train_on or chats.train_on
        on_overlong: Any = self.on_overlong
        converter = Converter(renderer, self.max_length, train_on, on_overlong=on_overlong)
        facts = {
            "data set": f"{chats.name}, {self.split} ({len(source):,} rows)",
            "rendered as": str(renderer.settings["family"]),
            "trained on": train_on,
            "max length": f"{self.max_length:,} tokens",
            "too long": on_overlong,
        }
        return [show_row(number, source[number], converter) for number in numbers], facts


def row_numbers(chosen: str | None, count: int, *, first: int) -> list[int]:
    """The rows that `chosen` names of `count`, in its order, each once; None is the `first` so many.

    chosen: "all", or numbers from 0 and ranges with both ends, "10-12", or "500-" to the end, with commas between.
    Raises InputError.
    """
    if chosen is None or chosen.strip() == "all":
        return list(range(count if chosen else min(first, count)))
    numbers: dict[int, None] = {}
    for part in map(str.strip, chosen.split(",")):
        found = re.fullmatch(r"(\d+)(-)?(\d+)?", part)
        if found is None or (found[3] and not found[2]):
            raise InputError(f"--rows {chosen}: {part!r} is no number and no range; give e.g. 0,3,10-12, 500- or all")
        start = int(found[1])
        end = int(found[3]) if found[3] else count - 1 if found[2] else start
        if max(start, end) >= count:
            raise InputError(f"--rows {chosen}: {part!r} is not within 0-{count - 1}, the {count:,} rows there are")
        if end < start:
            raise InputError(f"--rows {chosen}: {part!r} is not a range: its end is before its start")
        numbers |= dict.fromkeys(range(start, end + 1))
    return list(numbers)


def _scored(
    view: View, chosen: str | None, model: str | None, checkpoint: str, *, to_page: bool
) -> tuple[list[ShownRow], dict[str, str]]:
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
        shown, facts = view.render(chosen, tuned.get_tokenizer(), to_page=to_page)
        base = service.create_sampling_client(None, base_model)
        scored = scored_rows(shown, tuned, base)
        console = make_console(stderr=True)
        shown = list(track(scored, "scoring", total=len(shown), console=console, transient=True))
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
    file.write_text(page(rows, f"{view.dataset}: rows as they are trained", facts), encoding="utf-8")
    console.print(f"{summary(figures(rows))}\npage: {file}", highlight=False, markup=False, soft_wrap=True)
