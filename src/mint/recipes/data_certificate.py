"""The certificate of the data a run trains on: made before the first step, kept in its folder and beside its checkpoints."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mint
from mint.chat import Converter
from mint.data.certificate import (
    METADATA_KEY,
    Certificate,
    compact_line,
    model_facts,
    notes,
    problems,
    require_acceptable,
    require_same_data,
)
from mint.data.chat_sets import ChatSet
from mint.data.checking import DataCheck
from mint.recipes.interrupt import StopOnCtrlC
from mint.recipes.run_folder import CERTIFICATE, RunFolder

_ROWS_AN_UPDATE = 20  # of the bar
FULLY_CHECKED_ROWS = 20_000  # of larger sets so many evenly spaced rows are looked at


def run_check(check: DataCheck, console: Console, stop: StopOnCtrlC | None = None) -> Certificate:
    """Looks at the rows under a progress bar, until the end or until a stop is requested."""
    bar = Progress(
        TextColumn("data check, row"), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[speed]}"),
        TextColumn("left"), TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("check", total=check.total_rows, speed="")
        started = time.perf_counter()
        for rows, _ in enumerate(check.steps(), 1):
            if rows % _ROWS_AN_UPDATE == 0:
                speed = rows / (time.perf_counter() - started)
                bar.update(task, completed=rows, speed=f"{speed:,.0f} rows/s")
            if stop is not None and stop.requested:
                break
    return check.certificate()


def certify(
    chats: ChatSet, converter: Converter, model: str, tokenizer: Any, max_loss: float, console: Console
) -> Certificate:
    """The certificate of a set that is to be trained on; says what is to be said about it. Counts nothing in `converter`."""
    facts = model_facts(model, tokenizer)
    check = DataCheck(
        chats, converter, facts, mint_version=mint.__version__, limit=FULLY_CHECKED_ROWS, max_loss=max_loss
    )
    certificate = run_check(check, console)
    console.print(f"data check: {compact_line(certificate.compact())}", highlight=False, markup=False, soft_wrap=True)
    for line in (*problems(certificate), *notes(certificate)):
        console.print(f"  {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    return certificate


def accept(certificate: Certificate, folder: RunFolder, *, resume: bool, data_changed: bool) -> None:
    """Write the certificate to the folder and go on only with data that can be trained on.

    Raises DataError where too much would be lost, and for a resumed run where the data renders to other tokens than
    before and `data_changed` does not declare it.
    """
    before = folder.read_certificate() if resume else None
    if before is not None and not data_changed:
        require_same_data(before, certificate)
    folder.write_certificate(certificate.to_json())
    require_acceptable(certificate, where=str(folder.path / CERTIFICATE))


def checkpoint_metadata(certificate: Certificate) -> dict[str, str]:
    """What is saved with every checkpoint."""
    return {METADATA_KEY: json.dumps(certificate.compact())}
