"""What holds for every example: commands that can be given, and a row in the table."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.examples.load import EXAMPLES, example

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_the_scripts_are_found() -> None:
    assert {"chat_sft", "grpo", "custom_loss", "sweep"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_docstring_and_readme_show_commands_that_can_be_given(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so that help does not break the line
    script = example(name)
    with pytest.raises(SystemExit, match=r"^0$"):
        script.main(["--help"])
    for text in (capsys.readouterr().out, script.__doc__, README):
        commands = re.findall(rf"python examples/{name}\.py (--[^`\n]+)", text)
        assert commands, text
        for options in commands:
            script.parse_args(shlex.split(options))  # exits where an option does not exist


def test_the_table_lists_every_example() -> None:
    rows = re.findall(r"^\| \[`([^`]+)`\]\(([^)]+)\) ", README, re.MULTILINE)
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
    assert sorted(shown for shown, _ in rows) == sorted(target for _, target in rows) == files
