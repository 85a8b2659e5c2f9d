"""`mint data check`: the certificate of a chat set, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from mint.cli.common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    OVERLONG_HELP,
    ColumnsOption,
    DatasetsArgument,
    TestOption,
    ThinkingOption,
    TrainOnOption,
    command,
    make_console,
    print_json,
)
from mint.errors import InputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mint.chat import Renderer
    from mint.data.certificate import Certificate, ModelFacts, RowList, SplitCertificate
    from mint.data.checking import DataCheck
    from mint.data.duplicates import Pairs

STDOUT = Path("-")
AUTO = "auto"
_SHOWN = 5  # row numbers in a cell


def check(
    dataset: DatasetsArgument,
    model: Annotated[
        str, typer.Option(help="Hub id, folder or packaged model: whose tokenizer and template.")
    ] = "Qwen/Qwen3-0.6B",
    test: TestOption = None,
    columns: ColumnsOption = None,
    max_length: Annotated[
        str, typer.Option(metavar="N|auto", help="Tokens of a conversation; auto proposes a length and uses it.")
    ] = "2048",
    train_on: TrainOnOption = None,
    thinking: ThinkingOption = False,
    on_overlong: Annotated[
        Literal["drop", "truncate_right", "truncate_left_turns"],
        typer.Option(help=OVERLONG_HELP),
    ] = "drop",
    max_loss: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows and of answers that may be lost.")
    ] = 0.01,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", "--rows", min=1, help="Look at so many evenly spaced rows of each part.", show_default="all"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the test rows of a file, as in mint sft.")] = 0,
    cache: Annotated[bool, typer.Option("--cache", help="Keep converted rows in MINT_HOME/cache.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - is stdout.")
    ] = None,
) -> None:
    """What a model would be trained on: lengths, losses, masks, duplicates. Exit code 1 where too much would be lost.

    Every row is rendered as `mint sft` does it. Ctrl-C shows what was seen so far.
    """
    console = make_console(stderr=as_json == STDOUT)
    with command(console):
        from mint.data import load_chat_set
        from mint.recipes.data_certificate import run_check
        from mint.recipes.interrupt import StopOnCtrlC

        chats = load_chat_set(tuple(dataset), test=test, columns=columns, seed=seed)
        source = _resolve(model, thinking)
        checking = _prepare(chats, source, _length(max_length), train_on, on_overlong, limit, max_loss, cache, console)
        with StopOnCtrlC(console, "finishing this row, then showing what was seen") as stop:
            found = run_check(checking, console, stop)
        if as_json == STDOUT:
            print_json(found.to_json())
        elif as_json is not None:
            _write(as_json, found)
        print_certificate(found, console)
    if found.verdict != "ok":
        raise typer.Exit(EXIT_INTERRUPTED if found.is_interrupted else EXIT_FAILED)


def _length(text: str) -> int | None:
    """None: to be proposed."""
    if text == AUTO:
        return None
    if not text.isdecimal():
        raise InputError(f"--max-length {text}: expected a whole number of tokens, or {AUTO}")
    return int(text)


@dataclass(frozen=True, slots=True)
class _Source:
    """Whose template rows are rendered with. context: tokens that the model can read, None where its config is silent."""

    facts: ModelFacts
    renderer: Renderer
    context: int | None


def _resolve(model: str, thinking: bool) -> _Source:
    from mint.chat import get_renderer
    from mint.data.certificate import model_facts
    from mint.hub import load_tokenizer, resolve_model

    found = resolve_model(model)
    tokenizer = load_tokenizer(found)
    context = _context(found.path)
    facts = model_facts(model, tokenizer, revision=found.revision, context=context)
    return _Source(facts, get_renderer(tokenizer, thinking=thinking), context)


def _prepare(
    chats: Any, source: _Source, max_length: int | None, train_on: Any, on_overlong: Any, limit: int | None, max_loss: float,
    cache: bool, console: Console,
) -> DataCheck:  # fmt: skip
    import mint
    from mint.chat import Converter
    from mint.data import cached
    from mint.data.checking import DataCheck, propose_max_length

    renderer, context = source.renderer, source.context
    train_on = train_on or chats.train_on
    if max_length is None:
        proposed = propose_max_length(chats, renderer, train_on, max_loss=max_loss, context=context)
        max_length = proposed.max_length
        limited = ", the model's context" if max_length == context else ""
        console.print(
            f"--max-length {max_length}{limited}: {proposed.longer_share:.2%} of the rows are longer", highlight=False
        )
    converter = Converter(renderer, max_length, train_on, on_overlong=on_overlong)
    kept = cached(converter) if cache else converter
    return DataCheck(chats, kept, source.facts, mint_version=mint.__version__, limit=limit, max_loss=max_loss)


def _context(folder: Path) -> int | None:
    """What the model's config.json says; None where it does not."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    return int(found) if found is not None else None


def _write(path: Path, found: Certificate) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"--json {path} cannot be written: {error.strerror}; give another file") from error


def print_certificate(found: Certificate, console: Console) -> None:
    """A table of what there is to tell, then the notes, then one line: ok, or what to do."""
    from mint.data.certificate import notes, problems, ways_out

    rules, family = found.rules, found.renderer.get("family")
    console.print(
        f"{found.dataset} for {found.model.name} ({family}): {rules['train_on']}, at most {rules['max_length']} tokens, "
        f"overlong: {rules['on_overlong']}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("what", "train", "test")
    for name, *cells in _lines(found):
        if name in ("rows", "tokens") or any(cells):
            table.add_row(name, *cells)
    console.print(table, highlight=False)
    for split, part in (("train", found.train), ("test", found.test)):
        for reason, dropped in part.dropped.items():
            text = f"{split}, {reason}: {dropped.first_error}"
            console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
            shown = ",".join(map(str, dropped.rows.first[:_SHOWN]))
            option = "" if split == "train" else f" --split {split}"
            console.print(f"  look at them: mint data show ...{option} --rows {shown}", style="dim", highlight=False)
    for note in notes(found):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    seen = found.train.rows + found.test.rows
    if found.is_interrupted:
        console.print(f"interrupted: the numbers are of the first {seen:,} rows", style="yellow", highlight=False)
    elif found.is_sample:
        console.print(f"a sample of {seen:,} evenly spaced rows; leave --limit out to look at all", highlight=False)
    if problems(found):
        console.print(f"[red]not ok:[/red] {'; '.join(problems(found))}", highlight=False, soft_wrap=True)
        console.print(f"what to do: {'; or '.join(ways_out(found))}", highlight=False, soft_wrap=True)
    elif not found.is_interrupted:
        console.print(
            f"[green]ok:[/green] {found.lost_share:.2%} lost, allowed are {found.max_loss:.2%}", highlight=False
        )


def _lines(found: Certificate) -> list[tuple[str, str, str]]:
    """Name and the two cells; both are empty where there is nothing to tell."""
    parts, twins = (found.train, found.test), found.duplicates
    reasons = list(dict.fromkeys(reason for part in parts for reason in part.dropped))

    def line(name: str, cell: Any) -> tuple[str, str, str]:
        return name, cell(parts[0]), cell(parts[1])

    return [
        line("rows", lambda part: f"{part.rows:,}" + (f" of {part.rows_in_set:,}" if part.rows < part.rows_in_set else "")),
        *(line(f"dropped: {reason}", lambda part, reason=reason: _dropped(part, reason)) for reason in reasons),
        line("answers too long", lambda part: _count(part.dropped_turns)),
        line("answers", lambda part: _count(part.turns)),
        line("examples", lambda part: _count(part.examples) if part.examples != part.used_rows else ""),
        line("tokens", lambda part: f"{part.tokens:,}"),
        line("trained tokens", lambda part: f"{part.trained_tokens:,} ({part.trained_share:.1%})" if part.tokens else ""),
        line("length 50/90/95/99 %", _lengths),
        line("longest row", lambda part: f"{part.lengths.max:,}" if part.lengths else ""),
        line("truncated rows", lambda part: _listed(part.truncated)),
        line("tokens cut or left out", lambda part: _count(part.cut_tokens)),
        line("one example per answer", lambda part: _listed(part.split)),
        line("trailing messages", lambda part: _count(part.trailing_messages)),
        line("control token text", lambda part: _listed(part.control_text)),
        line("system text added", _system_texts),
        ("exact duplicates", _paired(twins.train_exact), _paired(twins.test_exact)),
        ("near duplicates", _paired(twins.train_near), _paired(twins.test_near)),
        ("equal to a training row", "", _paired(twins.overlap_exact)),
        ("near a training row", "", _paired(twins.overlap_near)),
        line("rendered tokens sha256", lambda part: part.rendered_sha256[:16]),
    ]  # fmt: skip


def _count(count: int) -> str:
    return f"{count:,}" if count else ""


def _shown(rows: Sequence[Any], count: int) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (", ..." if count > _SHOWN else "")


def _listed(found: RowList) -> str:
    return f"{found.count:,} (rows {_shown(found.first, found.count)})" if found.count else ""


def _paired(found: Pairs) -> str:
    rows = [f"{pair.row}={pair.of}" if pair.similarity == 1 else f"{pair.row}~{pair.of}" for pair in found.first]
    return f"{found.count:,} (rows {_shown(rows, found.count)})" if found.count else ""


def _dropped(part: SplitCertificate, reason: str) -> str:
    return _listed(part.dropped[reason].rows) if reason in part.dropped else ""


def _lengths(part: SplitCertificate) -> str:
    found = part.lengths
    return f"{found.p50:,} / {found.p90:,} / {found.p95:,} / {found.p99:,}" if found else ""


def _system_texts(part: SplitCertificate) -> str:
    rows = sum(part.injected_system.values()) + part.further_injected_system
    texts = [f"{text[:24]!r}" + ("..." if len(text) > 24 else "") for text in part.injected_system]
    return f"{rows:,} x {texts[0]}" + (f" and {len(texts) - 1} more" if len(texts) > 1 else "") if rows else ""
