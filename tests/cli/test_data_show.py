"""`mint data show` on a tiny model."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

import mint
from mint.chat import ShownRow
from mint.cli import data_show
from mint.cli.data_show import row_numbers, show
from mint.cli.shown_text import example_text, legend, print_rows
from mint.errors import InputError
from mint.recipes.config import ChatSftConfig
from tests.support.clients import train
from tests.support.shown import plain_row, token

pytestmark = pytest.mark.usefixtures("logging_as_before")

app = typer.Typer()
app.command()(show)
runner = CliRunner()


def invoke(*arguments: str) -> Result:
    return runner.invoke(app, list(arguments), env={"COLUMNS": "160"})


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """20 rows of which some are held out, and those that end in 3 have no answer."""

    def row(number: int) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"What is {number}?"}
        return [question] if number % 10 == 3 else [question, {"role": "assistant", "content": f"It is {number}."}]

    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": row(number)}) + "\n" for number in range(20)))
    return str(file)


@pytest.fixture
def checkpoint(tiny_model: str) -> str:
    with mint.ServiceClient() as service:
        run = service.create_lora_training_client(tiny_model, rank=4, seed=0)
        train(run, 2)
        return run.save_state("two").result().path


def numbers_shown(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"^row (\d+) ·", text, re.MULTILINE)]


def embedded(file: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        (None, [0, 1, 2]),
        ("all", list(range(12))),
        ("0,3,10-11", [0, 3, 10, 11]),
        (" 7 , 2-3,3 ", [7, 2, 3]),
        ("9-", [9, 10, 11]),
    ],
)
def test_rows_are_named_by_numbers_and_ranges(chosen: str | None, numbers: list[int]) -> None:
    assert row_numbers(chosen, 12, first=3) == numbers


def test_of_a_short_set_the_first_rows_are_all() -> None:
    assert row_numbers(None, 2, first=3) == [0, 1]


@pytest.mark.parametrize(
    ("chosen", "error"),
    [
        ("1,x", "--rows: 'x' is no number and no range; give e.g. 0,3,10-12, 500- or all"),
        ("-3", "--rows: '-3' is no number and no range; give e.g. 0,3,10-12, 500- or all"),
        ("", "--rows: '' is no number and no range; give e.g. 0,3,10-12, 500- or all"),
        ("12", "--rows: '12' is beyond the 12 rows there are, numbered from 0"),
        ("3-12", "--rows: '3-12' is beyond the 12 rows there are, numbered from 0"),
        ("5-4", "--rows: '5-4' is not a range: its end is before its start"),
    ],
)
def test_other_names_of_rows_are_refused(chosen: str, error: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(error)}$"):
        row_numbers(chosen, 12, first=3)


def test_rows_are_printed_with_what_is_trained_in_brackets(chats: str, tiny_model: str) -> None:
    done = invoke(chats, "--model", tiny_model, "--rows", "all")
    assert done.exit_code == 0, done.output
    assert numbers_shown(done.stdout) == list(range(18))
    trained = re.findall(r"⟦(.*?)⟧", done.stdout)
    answers = re.findall(r"It is \d+\.", Path(chats).read_text())
    assert len(trained) > 15 and {text.removesuffix("<|im_end|>") for text in trained[:-1]} < set(answers)
    assert trained[-1] == "trained"  # the legend's
    assert "What is 0?" in done.stdout or "What is 1?" in done.stdout
    assert re.search(r"^row \d+ · dropped: no_assistant · user ─", done.stdout, re.MULTILINE)
    assert "[no_assistant] the conversation has no assistant message" in done.stdout
    assert f"model: {tiny_model}; data set: {chats}, train (18 rows); chat template: chatml (" in done.stdout


def test_the_first_three_are_shown_of_the_split_that_is_asked_for(chats: str, tiny_model: str) -> None:
    assert numbers_shown(invoke(chats, "--model", tiny_model).stdout) == [0, 1, 2]
    held_out = invoke(chats, "--model", tiny_model, "--split", "test")
    assert numbers_shown(held_out.stdout) == [0, 1] and ", test (2 rows)" in held_out.stdout
    given = invoke(chats, "--model", tiny_model, "--test-file", chats, "--rows", "all")
    assert numbers_shown(given.stdout) == list(range(20))
    other = invoke(chats, "--model", tiny_model, "--split", "test", "--seed", "1")
    assert numbers_shown(other.stdout) == [0, 1] and other.stdout != held_out.stdout


def test_rules_decide_what_is_kept(chats: str, tiny_model: str) -> None:
    dropped = invoke(chats, "--model", tiny_model, "--rows", "0", "--max-length", "20")
    assert "dropped: overlong" in dropped.stdout and "1 rows: 0 kept, 1 dropped" in dropped.stdout
    unknown = invoke(chats, "--model", tiny_model, "--train-on", "nothing")
    assert (
        unknown.exit_code == 2 and "'nothing' is not one of 'all_assistant', 'last_assistant', 'all'" in unknown.stderr
    )


def test_the_page_is_written_with_the_same_rows(chats: str, tiny_model: str, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "rows.html"
    done = invoke(chats, "--model", tiny_model, "--html", str(file))
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"\npage: {file}\n") and "18 rows: " in done.stdout
    data = embedded(file)
    assert [row["number"] for row in data["rows"]] == list(range(18))
    assert {row["dropped"] for row in data["rows"]} == {None, "no_assistant"}
    assert dict(data["facts"])["model"] == tiny_model
    assert data["totals"]["nll"] is None


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_show, "MAX_ROWS", 17)
    assert row_numbers("0-16", 10**9, first=3) == list(range(17))
    with pytest.raises(InputError, match=r"^--rows all: 1,000,000,000 rows; at most 17 are shown at once$"):
        row_numbers("all", 10**9, first=3)


def test_a_checkpoint_colours_by_what_it_changed(chats: str, checkpoint: str, tiny_model: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.html"
    done = invoke(chats, "--checkpoint", checkpoint, "--model", tiny_model, "--rows", "0-2", "--html", str(file))
    assert done.exit_code == 0, done.output
    data = embedded(file)
    totals, facts = data["totals"], dict(data["facts"])
    assert (facts["model"], facts["checkpoint"]) == (tiny_model, checkpoint)
    assert totals["nll"] != totals["nll_before"]
    shown = invoke(chats, "--checkpoint", checkpoint, "--rows", "0-2").stdout
    (line,) = re.findall(r"^│ all .*$", shown, re.MULTILINE)
    change = totals["nll"] - totals["nll_before"]
    expected = [f"{totals['trained']}", f"{totals['nll_before']:.4f}", f"{totals['nll']:.4f}", f"{change:+.4f}"]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["all", *expected]


def test_a_checkpoint_is_named_by_its_path_or_its_run(chats: str) -> None:
    done = invoke(chats, "--checkpoint", "nowhere")
    assert done.exit_code == 1
    assert "error: --checkpoint nowhere: give a tinker:// path or the folder of a run" in done.stderr


def test_without_a_model_it_is_that_of_the_recipe(chats: str) -> None:
    assert ChatSftConfig().base_model == data_show.DEFAULT_MODEL
    assert data_show.DEFAULT_MODEL in invoke(chats).stderr  # there is no hub here


def test_another_model_than_the_checkpoint_s_is_refused(chats: str, checkpoint: str, tiny_model: str) -> None:
    done = invoke(chats, "--checkpoint", checkpoint, "--model", "other")
    assert done.exit_code == 1
    assert f"error: --model other: the checkpoint was trained on {tiny_model}; leave --model out" in done.stderr


def styles(row: ShownRow, *, by_change: bool) -> list[tuple[str, str]]:
    text = example_text(row.examples[0], by_change=by_change, coloured=True)
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


SCORED = ShownRow(
    4,
    ("user", "assistant"),
    (
        (
            token("<user>", "scaffold"),
            token("Hi\n", message=0, nll=1.0, nll_before=3.0),
            token("a", "trained", nll=1.0, nll_before=2.0),
            token("b", "trained", nll=0.5, nll_before=1.0),
            token("c", "trained", nll=0.5, nll_before=0.5),
            token("d", "trained", nll=0.5, nll_before=0.3),
            token("e", "trained", nll=2.0, nll_before=1.0),
            token("f", "truncated"),
        ),
    ),
    notes=("one \x1b[31mnote",),
)


def test_a_colour_stands_for_a_kind_or_for_a_change() -> None:
    assert styles(SCORED, by_change=False) == [
        ("<user>", "dim cyan"), *((letter, "bold green") for letter in "abcde"), ("f", "red strike"),
    ]  # fmt: skip
    assert styles(SCORED, by_change=True) == [
        ("<user>", "dim"), ("Hi↵\n", "dim"), ("a", "bold bright_cyan"), ("b", "cyan"), ("d", "yellow"),
        ("e", "bold bright_red"), ("f", "red strike"),
    ]  # fmt: skip


def test_without_colour_brackets_stand_around_what_is_trained_and_what_is_cut() -> None:
    text = example_text(SCORED.examples[0], by_change=False, coloured=False)
    assert text.plain == "<user>Hi↵\n⟦abcde⟧⟪f⟫"
    assert legend(by_change=False, coloured=False).plain.startswith("⟦trained⟧  context  chat template  ⟪cut off⟫")
    assert example_text(SCORED.examples[0], by_change=False, coloured=True).plain == "<user>Hi↵\nabcdef"


@pytest.mark.parametrize("coloured", [True, False])
def test_nothing_in_a_row_reaches_the_terminal_as_a_command(coloured: bool) -> None:
    hostile = replace(plain_row(0, "[red]x[/red]\x1b[2J\r"), error="\x1b[2J", notes=("\x9b2J",), roles=("\x07",))
    file = io.StringIO()
    print_rows([hostile], Console(file=file, force_terminal=coloured, color_system="standard" if coloured else None))
    printed = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert not [c for c in printed if c != "\n" and unicodedata.category(c) == "Cc"]
    assert (
        "[red]x[/red]␛[2J␍" in printed
        and "note: ⟨U+009B⟩2J" in printed
        and "row 0 · 3 tokens, 1 trained · ␇ ─" in printed
    )
