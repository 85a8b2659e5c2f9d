"""The main job on the real packaged model, as `make sft` runs it, shortened."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory, packaged_home):
    out = tmp_path_factory.mktemp("sft") / "out"
    command = [
        sys.executable,
        "-m",
        "mint.cli.main",
        "sft",
        "--steps",
        str(STEPS),
        "--batch-size",
        "6",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=packaged_home, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_it_lowers_held_out_nll(run):
    out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_nll_after"] < summary["test_nll_before"] - 0.1


def test_one_step_from_the_checkpoint_has_the_bits_of_one_step_without(run):
    out, text = run
    assert json.loads((out / "summary.json").read_text())["resumed_exactly"] is True
    assert "bit-equal" in text and "not bit-equal" not in text


def test_it_prints_and_writes_what_it_did(run):
    out, text = run
    for pattern in (
        r"test NLL: +\d\.\d{4} -> \d\.\d{4}",
        r"train loss: \d\.\d{4} -> \d\.\d{4}",
        r"checkpoint: tinker://\w+:train:0/weights/step-000004",
    ):
        assert re.search(pattern, text), text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "loss.png").stat().st_size > 10_000
    samples = (out / "samples.md").read_text()
    assert samples.count("### Before") == samples.count("### After") == 3
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)


def test_help_shows_an_example_and_bad_input_exits_with_a_message(packaged_home, tmp_path):
    command = [sys.executable, "-m", "mint.cli.main", "sft"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, env=packaged_home, timeout=60)
    assert shown.returncode == 0 and "mint sft --steps 30" in shown.stdout
    bad = subprocess.run(
        [*command, "--train", str(tmp_path / "no.jsonl"), "--test", str(tmp_path / "no.jsonl")],
        capture_output=True, text=True, env=packaged_home, timeout=60,
    )  # fmt: skip
    assert bad.returncode == 1 and "no such file; give a JSON Lines file" in bad.stdout.replace("\n", " ")


def test_the_readme_s_twelve_lines_run(packaged_home, tmp_path):
    readme = Path(__file__).parents[2] / "README.md"
    code = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=packaged_home, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    losses = [float(line.split()[1]) for line in lines[:8]]
    assert losses[-1] < losses[0] / 2
    assert lines[-1].startswith("tinker://") and lines[-1].endswith("/weights/minty")
