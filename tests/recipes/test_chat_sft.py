"""The main job on the real packaged model, as `make sft` runs it, shortened."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 4
MINT = [sys.executable, "-m", "mint.cli.main"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, packaged_home):
    out = tmp_path_factory.mktemp("sft") / "out"
    options = ["--offline", "--steps", str(STEPS), "--batch-size", "4", "--eval-size", "16", "--out", str(out)]
    done = subprocess.run([*MINT, "sft", *options], capture_output=True, text=True, env=packaged_home, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_it_lowers_held_out_nll(run):
    out, _ = run
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_nll_after"] < summary["test_nll_before"] - 0.1
    assert summary["test_rows"] == 16 and summary["rows_skipped"] == {}


def test_one_step_from_the_checkpoint_has_the_bits_of_one_step_without(run):
    out, text = run
    assert json.loads((out / "summary.json").read_text())["resumed_exactly"] is True
    assert "bit-equal" in text and "not bit-equal" not in text


def test_it_prints_and_writes_what_it_did(run):
    out, text = run
    for pattern in (
        r"test NLL: +\d\.\d{4} -> \d\.\d{4}",
        r"train loss: \d\.\d{4} -> \d\.\d{4}",
        r"step +4/4  loss \d\.\d{4}  \d+ tokens/s  waited for data 0.\d%  left 0:00:00",
        r"checkpoint: tinker://\w+:train:0/weights/step-000004",
        rf"go on:      mint sft --resume {out} --steps 8",
        rf"talk to it: mint chat {out}\n",
    ):
        assert re.search(pattern, text), text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG") and (out / "loss.png").stat().st_size > 10_000
    samples = (out / "samples.md").read_text()
    assert samples.count("### Before") == samples.count("### After") == 3


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
