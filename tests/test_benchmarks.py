"""The results that stand in the repository are whole, and the chart is drawn from them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def ratios(value: Any) -> list[list[float]]:
    """Every [median, smallest, largest] in a result."""
    if isinstance(value, dict):
        own = [[value["ratio"], *value["ratio_min_max"]]] if "ratio_min_max" in value else []
        return own + [found for part in value.values() for found in ratios(part)]
    if isinstance(value, list):
        if len(value) == 3 and all(isinstance(number, int | float) for number in value):
            return [value]
        return [found for part in value for found in ratios(part)]
    return []


def test_there_are_results() -> None:
    assert RESULTS


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_name_machine_command_and_spread(file: Path) -> None:
    for results in json.loads(file.read_text()).values():
        assert results
        for one in results:
            assert one["cores"] and one["torch"] and one["command"] and one["measured"]
            found = ratios(one)
            assert found
            for middle, smallest, largest in found:
                assert 0 < smallest <= middle <= largest


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_chart_is_drawn_from_them(file: Path, tmp_path: Path) -> None:
    image = tmp_path / "speed.png"
    code = "import json, run, sys; run.draw(json.load(open(sys.argv[1])), run.Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", code, str(file), str(image)], check=True, cwd=ROOT / "benchmarks")
    assert image.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_benchmark_is_refused_by_name() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "sftt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark sftt; there are sft, sft-trl, sampling" in done.stderr
