"""The notebook: a valid file without results, whose cells run from the first to the last."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from tests.examples.load import EXAMPLES
from tests.support.clients import Embedded

NOTEBOOK = EXAMPLES / "chat_sft.ipynb"


def notebook() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return read


def code_cells() -> list[tuple[str, str]]:
    """Id and source of every code cell."""
    return [(cell["id"], "".join(cell["source"])) for cell in notebook()["cells"] if cell["cell_type"] == "code"]


def test_it_is_notebook_format_4_without_results() -> None:
    read = notebook()
    assert (read["nbformat"], read["nbformat_minor"]) == (4, 5)
    assert read["metadata"].keys() == {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in read["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in read["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        is_code = cell["cell_type"] == "code"
        assert cell.keys() == (common | {"execution_count", "outputs"} if is_code else common)
        assert cell["metadata"] == {} and (not is_code or (cell["outputs"], cell["execution_count"]) == ([], None))
        assert cell["source"] and all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")


def test_the_steps_are_numbered_from_one_to_ten() -> None:
    texts = ["".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == "markdown"]
    headings = re.findall(r"^## (\d+)\. ", "\n".join(texts), re.MULTILINE)
    assert [int(number) for number in headings] == list(range(1, 11))


def test_its_cells_run_in_order(
    world: Embedded, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {
        "MODEL": tiny_model,
        "NUM_STEPS": 2,
        "BATCH_SIZE": 3,
        "MAX_LENGTH": 400,
        "MAX_TOKENS": 8,
        "OUT": str(tmp_path / "out"),
    }
    (first, parameters), *cells = code_cells()
    assert first == "parameters"
    namespace: dict[str, Any] = {}
    exec(parameters, namespace)
    assigned = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(parameters).body}  # type: ignore
    assert chosen.keys() <= assigned.keys()
    namespace.update(chosen)
    for name, source in cells:
        exec(compile(source, f"cell {name}", "exec"), namespace)
    plt.close(namespace["figure"])

    text = capsys.readouterr().out
    assert [int(step) for step in re.findall(r"^step +(\d+)  loss \d", text, re.MULTILINE)] == [0, 1]
    before, after = re.search(r"^held-out NLL: (\S+) -> (\S+)$", text, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert float(after) < float(before)
    assert text.count("[before]") == text.count("[after]") == 2
    next_step, resumed = re.findall(r"^ *(?:this run|resumed): loss (.+)$", text, re.MULTILINE)
    assert next_step == resumed and len(set(next_step.split(", then "))) == 2
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    trained = [token for token, weight in zip(namespace["targets"], namespace["weights"], strict=True) if weight]
    assert namespace["tokenizer"].decode(trained) == namespace["answer"]["content"] + "<|im_end|>"
    assert len(re.findall(r" -> .* weight [01]$", text, re.MULTILINE)) == 14
