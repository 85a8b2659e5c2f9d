"""`mint sft` without options is the tutorial's job: its model and data set by their names on the hub, its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakehub import FakeHub
from tests.support.tiny_models import NO_ROBOTS, TULU3, write_tiny_dataset, write_tiny_model

MINT = [sys.executable, "-m", "mint.cli.main"]
MODEL = "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    write_tiny_model(root / "models" / "Qwen" / "Qwen3-0.6B", "qwen3", context=2048)
    write_tiny_dataset(root / "datasets" / NO_ROBOTS, NO_ROBOTS, rows=60)
    write_tiny_dataset(root / "datasets" / TULU3, TULU3, rows=1100)
    with FakeHub(root) as served:
        yield served


@pytest.fixture(scope="module")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


def sft(hub: FakeHub, hf_home: Path, place: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = hub.env(hf_home, MINT_DTYPE="float32")
    return subprocess.run([*MINT, "sft", *options], env=env, cwd=place, capture_output=True, text=True, timeout=240)


def test_without_options_it_is_the_tutorial(hub: FakeHub, hf_home: Path, tmp_path: Path) -> None:
    done = sft(hub, hf_home, tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    summary, out = json.loads(done.stdout), tmp_path / "out" / "sft"
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    wanted = {
        "base_model": MODEL, "dataset": "no_robots", "num_steps": 50, "batch_size": 4, "learning_rate": 1e-4,
        "rank": 16, "max_length": 2048, "schedule": "constant", "train_on": None,
    }  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert (summary["status"], summary["step"], summary["test_rows"]) == ("finished", 50, 15)
    assert summary["test_nll_after"] < summary["test_nll_before"]
    assert "trained on all_assistant" in done.stderr


def test_tulu3_takes_a_hundred_steps_and_trains_the_last_answer(hub: FakeHub, hf_home: Path, tmp_path: Path) -> None:
    done = sft(hub, hf_home, tmp_path, "--dataset", "tulu3", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 100 and "trained on last_assistant" in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_hub_it_names_offline(tmp_path: Path) -> None:
    with FakeHub(tmp_path / "nothing") as gone:
        pass  # its port is closed from here on
    done = sft(gone, tmp_path / "hf", tmp_path)
    assert done.returncode == 1 and "`mint sft --offline` runs without any hub" in done.stderr
