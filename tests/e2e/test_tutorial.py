"""The tutorial's ten steps, by a user's own program, with the hub's names for model and data sets."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mint.local.checkpoints import read_checkpoint
from tests.support.clients import checkpoint_folder, embedded
from tests.support.fakehub import FakeHub
from tests.support.tiny_models import NO_ROBOTS, TULU3, write_tiny_dataset, write_tiny_model

PROGRAM = Path(__file__).with_name("tutorial.py")
ROWS = {"no_robots": (64, 16), "tulu3": (76, 1024)}  # train and test
STEPS = {"no_robots": (0, 10, 11), "tulu3": (0, 10, 13)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    write_tiny_model(root / "models" / "Qwen" / "Qwen3-0.6B", "qwen3")
    write_tiny_dataset(root / "datasets" / NO_ROBOTS, NO_ROBOTS, rows=64)
    write_tiny_dataset(root / "datasets" / TULU3, TULU3, rows=1100)
    with FakeHub(root) as served:
        yield served


@pytest.fixture(scope="module")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


def number(name: str, output: str) -> float:
    found = re.search(rf"^{name}: (-?[\d.]+|nan|inf)$", output, re.MULTILINE)
    assert found, f"no line {name!r} in:\n{output}"
    return float(found[1])


@pytest.mark.parametrize("dataset", ["no_robots", "tulu3"])
def test_all_ten_steps_run(hub: FakeHub, hf_home: Path, mint_home: Path, tmp_path: Path, dataset: str) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    env = hub.env(hf_home, MPLBACKEND="Agg", MINT_DTYPE="float32", MPLCONFIGDIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), dataset], env=env, cwd=folder, text=True, capture_output=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    output = done.stdout
    assert "WARNING: MINT_API_KEY not found!\nConnected to MinT\n" in output
    trained, targets = number("Trainable tokens", output), number("Trainable targets", output)
    assert 0 < trained <= number("Tokens", output) and targets == trained
    assert number("Input length", output) == number("Target length", output) == number("Tokens", output) - 1
    train, test = ROWS[dataset]
    assert f"Train: {train} conversations\nTest: {test} conversations\n" in output
    losses = {
        int(step): float(loss) for step, loss in re.findall(r"^Step +(\d+): loss=([\d.]+)$", output, re.MULTILINE)
    }
    assert tuple(losses) == STEPS[dataset]
    assert all(math.isfinite(loss) and loss > 0 for loss in losses.values())
    assert number("Initial loss", output) == losses[0] and number("Final loss", output) == losses[STEPS[dataset][-1]]
    assert math.isfinite(number("Test NLL", output))
    assert (folder / f"{dataset}_training.png").read_bytes().startswith(b"\x89PNG")
    length, reason = re.search(r"^Generated: (\d+) tokens, (\w+)$", output, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert 1 <= int(length) <= 128 and (reason == "stop" or int(length) == 128)
    assert re.search(r"^Assistant: (['\"]).+\1$", output, re.MULTILINE)
    here, resumed = re.findall(r"^Continued: (.+)$", output, re.MULTILINE)
    assert here == resumed  # bit for bit, before and after one more step
    path = re.search(r"^Checkpoint saved: (\S+)$", output, re.MULTILINE)[1]  # type: ignore[index]
    assert re.fullmatch(rf"tinker://[0-9a-f]+:train:0/weights/{dataset}-sft-final", path)
    assert "Traceback" not in done.stderr
    assert whole(path, mint_home)
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD", "POST"}


def whole(path: str, mint_home: Path) -> bool:
    """Whether the checkpoint is listed and every file of it agrees with its hash."""
    with embedded(mint_home) as world:
        listed = world.rest().list_user_checkpoints().result().checkpoints
        info = world.rest().get_weights_info_by_tinker_path(path).result()
    manifest, state = read_checkpoint(checkpoint_folder(mint_home, path), path, optimizer=True)
    assert manifest.step == state.step == STEPS[manifest.path.rpartition("/")[2].removesuffix("-sft-final")][-1] + 1
    return [c.tinker_path for c in listed] == [path] and (info.base_model, info.lora_rank) == ("Qwen/Qwen3-0.6B", 16)
