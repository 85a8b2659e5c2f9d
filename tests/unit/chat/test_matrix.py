"""The table of model families in docs/chat-data.md says what rendering does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.support.chat_cases import CASES, Case
from tests.support.real_tokenizers import SOURCES
from tests.unit.chat.test_families import expected_calls
from tests.unit.chat.tiny_tokenizers import TEMPLATES, tokenizer_of

from mint.chat import Converter, get_renderer
from mint.chat.examples import Conversion
from mint.errors import UnsupportedError

PAGE = Path(__file__).parents[3] / "docs" / "chat-data.md"
HEADER = (
    "| model | template | checked with | answers in an example | thoughts | tool calls | the template adds | remarks |"
)


def table() -> dict[str, list[str]]:
    """The cells of each row after its template."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(f"{HEADER}\n")
    rows = {}
    for line in rest.partition("\n\n")[0].splitlines()[1:]:
        _, template, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        rows[template.strip("`")] = cells
    return rows


@cache
def conversion(template: str, title: str, *, thinking: bool = False, tools: bool = True) -> Conversion | None:
    """What becomes of a case; None where it is refused."""
    case = CASES[title]
    row = {"messages": case.messages, "tools": case.tools if tools else None}
    try:
        renderer = get_renderer(tokenizer_of(template), thinking=thinking)
    except UnsupportedError:
        return None
    return Converter(renderer, 8192).outcome(0, row).conversion


def count(template: str, title: str, *, thinking: bool = False) -> int:
    found = conversion(template, title, thinking=thinking)
    assert found is not None
    return len(found.examples)


def checked_with(template: str) -> str:
    source: str = SOURCES.get(template, "")
    return "text" if not source else "real ids\\*" if source.startswith("llama") else "real ids"


def answers(template: str) -> str:
    if count(template, "two turns") == 2:
        return {5: "one", 2: "those to one question"}[count(template, "two rounds of calls")]
    if conversion(template, "reasoning", thinking=True) is None:
        return "all"
    assert count(template, "reasoning in two turns", thinking=True) == 2
    return "all; one with thoughts"


def thoughts(template: str) -> str:
    if conversion(template, "reasoning"):
        return "yes"
    if conversion(template, "reasoning", thinking=True) is None:
        return "no"
    every = conversion(template, "reasoning in one of two turns", thinking=True) is None
    return "`--thinking`, in every answer" if every else "`--thinking`"


def reads_back(template: str, case: Case) -> bool:
    renderer = get_renderer(tokenizer_of(template))
    made = conversion(template, "call without a list of tools")
    assert made is not None
    example = made.examples[0]
    message, end = example.answers[0]
    answer: Any = renderer.parse(example.tokens[len(renderer.prompt(case.messages[:message])) : end])
    return list(answer.tool_calls) == expected_calls(case.messages[message])


def calls(template: str) -> str:
    if conversion(template, "call without a list of tools") is None:
        return "no"
    said = ["yes" if conversion(template, "two calls at once", tools=False) else "one a turn"]
    said += [] if conversion(template, "unused tools") else ["no list of tools"]
    said += [] if reads_back(template, CASES["call without a list of tools"]) else ["not read back"]
    return ", ".join(said)


def adds(template: str) -> str:
    made = conversion(template, "one turn")
    assert made is not None
    said = ["system text"] if made.injected_system else []
    return ", ".join(said + (["date"] if get_renderer(tokenizer_of(template)).settings["date"] else [])) or "nothing"


def test_the_table_has_a_row_for_every_template_that_is_tested() -> None:
    assert sorted(table()) == sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_a_row_of_the_table_says_what_rendering_does(template: str) -> None:
    found = [checked_with(template), answers(template), thoughts(template), calls(template), adds(template)]
    assert table()[template][: len(found)] == found
