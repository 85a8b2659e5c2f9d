"""The documentation: its commands run, its command reference is that of the program, its links lead somewhere.

Commands stand in ```sh blocks, which are run in the order of their file; ```sh hub (needs the hub) and ```sh setup are
not. Here the packaged model is a tiny one under its name, so that hours of training take seconds.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mint.cli.main import app
from mint.hub.gguf_convert import CONVERTER_VERSION
from mint.hub.package_files import PACKAGED_MODELS
from tests.support.tiny_models import write_tiny_model

ROOT = Path(__file__).parents[2]
DOCS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(sh|python)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = "SmolLM2-135M-Instruct"
NOT_RUN = {" hub", " setup"}


@pytest.fixture(scope="session")
def tiny_packaged_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("docs_home")
    shape = {"context": 4096, "hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 48}
    folder = write_tiny_model(home / "models" / NAME, "smollm", **shape)
    record = PACKAGED_MODELS[NAME]
    manifest = {
        "member_sha256": record.member_sha256,
        "converter_version": CONVERTER_VERSION,
        "files": {path.name: {"bytes": path.stat().st_size} for path in folder.iterdir()},
    }
    (folder / "mint_source.json").write_text(json.dumps(manifest))
    return home


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MINT_", "TINKER_"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": programs, "MINT_HOME": str(home), "MINT_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    return [(mark, text) for found, mark, text in BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("path", [p for p in DOCS if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_of_the_documentation_run(
    path: Path, tiny_packaged_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mint` in this process, which has loaded its libraries; everything else in a shell."""
    monkeypatch.setenv("MINT_HOME", str(tiny_packaged_home))
    monkeypatch.chdir(tmp_path)
    for mark, text in blocks(path, "sh"):
        assert mark in {"", *NOT_RUN}, f"{path.name}: unknown mark {mark!r}"
        for line in text.splitlines() if mark not in NOT_RUN else ():
            program, *arguments = shlex.split(line, comments=True)
            if program == "mint":
                result = CliRunner().invoke(app, arguments, input="Hello\n")
                assert result.exit_code == 0, f"{path.name}: {line}\n{result.output}"
            else:
                subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, timeout=60)


def test_the_program_of_the_concepts_runs(tiny_packaged_home: Path, tmp_path: Path) -> None:
    ((_, code),) = blocks(ROOT / "docs" / "concepts.md", "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment(tiny_packaged_home),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss, norm = map(float, done.stdout.splitlines()[0].split())
    assert loss > 0 and norm > 0


def test_the_command_reference_is_that_of_the_program(tmp_path: Path) -> None:
    made = tmp_path / "cli.md"
    subprocess.run(
        [sys.executable, "-m", "typer", "mint.cli.main", "utils", "docs", "--name", "mint", "--output", str(made)],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert made.read_text() == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []
