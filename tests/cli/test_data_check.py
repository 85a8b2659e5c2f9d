"""`mint data check`: the table, the JSON, the exit codes, stopping."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import mint
from mint.cli.main import app
from mint.data.checking import DataCheck

pytestmark = pytest.mark.usefixtures("logging_as_before")


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["data", "check", *arguments], env={"COLUMNS": "160"})


def cells(result: Result, name: str) -> list[str]:
    """The two cells of the table's line `name`."""
    (line,) = [line for line in result.output.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two files: 40 rows with one that repeats another, and 4 with one of the first."""
    rows = [
        [{"role": "user", "content": f"Name {i}?"}, {"role": "assistant", "content": f"It is {i * i}, of course."}]
        for i in range(40)
    ]
    rows[7] = rows[3]
    return write(tmp_path / "train.jsonl", rows), write(tmp_path / "test.jsonl", [rows[5], *rows[:1] * 2])


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def test_a_good_set_is_ok(files: tuple[str, str], tiny_model: str, tmp_path: Path) -> None:
    done = check(files[0], "--test-file", files[1], "--model", tiny_model, "--json", str(tmp_path / "new" / "all.json"))
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "ok: 0.00% lost, allowed are 1.00%"
    assert cells(done, "rows") == ["40", "3"]
    assert cells(done, "exact duplicates") == ["1 (rows 7=3)", ""]
    assert cells(done, "equal to a training row") == ["", "3 (rows 0=5, 1=0, 2=0)"]
    assert "note: 3 test rows stand among the training rows too" in done.stdout
    written = json.loads((tmp_path / "new" / "all.json").read_text())
    assert (written["verdict"], written["mint_version"]) == ("ok", mint.__version__)
    assert written["model"]["context"] == 512 and written["model"]["name"] == tiny_model
    assert cells(done, "rendered tokens sha256") == [
        written[part]["rendered_sha256"][:16] for part in ("train", "test")
    ]
    share = written["train"]["trained_tokens"] / written["train"]["tokens"]
    assert cells(done, "trained tokens")[0] == f"{written['train']['trained_tokens']:,} ({share:.1%})"


def test_json_on_stdout_stands_alone(files: tuple[str, str], tiny_model: str) -> None:
    done = check(files[0], "--model", tiny_model, "--json", "-")
    found = json.loads(done.stdout)
    assert (found["train"]["rows"], found["test"]["rows"]) == (36, 4) and "ok: 0.00% lost" in done.stderr


def test_too_great_a_loss_is_exit_code_1_and_says_what_to_do(tiny_model: str, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(20)]
    rows[4:6] = [[{"role": "user", "content": "no answer"}]] * 2
    data, test = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:1])
    options = (data, "--test-file", test, "--model", tiny_model)
    done = check(*options)
    assert done.exit_code == 1
    assert cells(done, "dropped: no_assistant") == ["2 (rows 4, 5)", ""]
    place = f"row 4 ({data}, row 4 (line 5))"
    assert f"train, no_assistant: {place}: [no_assistant] the conversation has no assistant message" in done.stdout
    assert "look at them: mint data show ... --rows 4,5\n" in done.stdout
    assert done.stdout.splitlines()[-2:] == [
        "not ok: 10.00% of the rows would be lost, allowed are 1.00%",
        "what to do: mend or remove the rows dropped as no_assistant; or allow it with --max-loss 0.1",
    ]
    allowed = check(*options, "--max-loss", "0.1")
    assert allowed.exit_code == 0 and allowed.stdout.splitlines()[-1] == "ok: 10.00% lost, allowed are 10.00%"


def test_where_nothing_would_be_trained_no_loss_is_allowed(tiny_model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [[{"role": "user", "content": f"no answer {i}"}] for i in range(3)])
    done = check(data, "--model", tiny_model, "--max-loss", "1")
    assert done.exit_code == 1 and "not ok: nothing would be trained: no training row gives a token" in done.stdout
    assert "allow it" not in done.stdout


def test_a_length_is_proposed_and_used(tiny_model: str, tmp_path: Path) -> None:
    def rows(answer: str) -> str:
        answered = {"role": "assistant", "content": answer}
        return write(tmp_path / "a.jsonl", [[{"role": "user", "content": f"Q{i}"}, answered] for i in range(20)])

    done = check(rows("x1 " * 130), "--model", tiny_model, "--max-length", "auto", "--json", str(tmp_path / "c.json"))
    found = json.loads((tmp_path / "c.json").read_text())
    longest = found["train"]["lengths"]["max"]
    assert 256 < longest <= 512 and found["rules"]["max_length"] == (384 if longest <= 384 else 512)
    assert done.exit_code == 0 and ": 0.00% of the rows are longer" in done.stdout.splitlines()[1]
    done = check(rows("x1 " * 400), "--model", tiny_model, "--max-length", "auto")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1] == "--max-length 512, the model's context: 100.00% of the rows are longer"
    refused = check(rows("a"), "--model", tiny_model, "--max-length", "long")
    assert refused.exit_code == 1
    assert "error: --max-length long: expected a whole number of tokens, or auto" in refused.stderr


def test_a_part_of_the_rows_is_a_sample(files: tuple[str, str], tiny_model: str) -> None:
    done = check(files[0], "--model", tiny_model, "--limit", "3")
    assert done.exit_code == 0 and cells(done, "rows") == ["3 of 36", "3 of 4"]
    assert "a sample of 6 evenly spaced rows; leave --limit out to look at all" in done.stdout


def test_ctrl_c_shows_what_was_seen(
    files: tuple[str, str], tiny_model: str, monkeypatch: pytest.MonkeyPatch, ctrl_c_interrupts: None
) -> None:
    plain = DataCheck.steps

    def steps(self: DataCheck) -> Any:
        for number, step in enumerate(plain(self), 1):
            if number == 4:
                signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(DataCheck, "steps", steps)
    done = check(files[0], "--model", tiny_model)
    assert done.exit_code == 130 and cells(done, "rows") == ["4 of 36", "0 of 4"]
    assert "finishing this row, then showing what was seen" in done.stdout
    assert done.stdout.splitlines()[-1] == "interrupted: the numbers are of the first 4 rows"


def test_a_file_that_cannot_be_written_is_one_message(files: tuple[str, str], tiny_model: str) -> None:
    done = check(files[0], "--model", tiny_model, "--json", f"{files[0]}/x.json")
    assert done.exit_code == 1 and "cannot be written: " in done.stderr and "give another file" in done.stderr


def test_a_checkpoint_shows_what_it_was_trained_on(files: tuple[str, str], tiny_model: str, tmp_path: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "out")
    options = ["--model", tiny_model, "--dataset", files[0], "--steps", "1", "--batch-size", "2", "--prompt", "hi"]
    trained = runner.invoke(app, ["sft", *options, "--max-length", "64", "--out", out])
    assert trained.exit_code == 0, trained.output
    shown = runner.invoke(app, ["checkpoints", "show", out], env={"COLUMNS": "400"}).stdout
    (line,) = [line for line in shown.splitlines() if line.strip().startswith("data ")]
    assert line.split("data", 1)[1].strip().startswith(f"ok: {files[0]}, 36 of 36 training rows, ")
    assert "schema_version" not in shown and "'step': '1'" in shown
    as_json = json.loads(runner.invoke(app, ["checkpoints", "show", out, "--json"]).stdout)
    assert json.loads(as_json["user_metadata"]["data_certificate"])["verdict"] == "ok"


def test_data_changed_belongs_to_resume() -> None:
    done = CliRunner().invoke(app, ["sft", "--offline", "--data-changed"])
    assert done.exit_code == 1 and "error: --data-changed belongs to --resume" in done.stderr
