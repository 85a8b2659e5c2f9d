"""The HTML page of shown rows, without a browser: what it holds, and that nothing in it can run or call out."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.support.shown import plain_row, token

from mint.chat import ShownRow
from mint.data.page import page, page_data, script_json
from mint.data.visible import visible

FACTS = {"data set": "packaged", "model": "tiny"}
HOSTILE = (
    "<script>alert(1)</script></SCRIPT ><!-- <img src=x onerror=alert(2)> & \" ' {{data}} \u2028\u2029\u202eמה\ud800"
)


class Structure(HTMLParser):
    """Elements with their attributes, and the text inside each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in self.texts:
            self.texts[self._open][-1] += data


def hostile_row() -> ShownRow:
    tokens = (token(HOSTILE, message=0), token("</script>", "trained", message=1))
    return ShownRow(0, (HOSTILE,), (tokens,), HOSTILE, HOSTILE, (HOSTILE,))


def embedded(text: str) -> Any:
    data, _ = Structure(text).texts["script"]
    return json.loads(data)


def tokens_of(data: Any, example: Any) -> list[tuple[Any, ...]]:
    """Read back as the page's script does."""
    pieces = [data["pieces"][number] for number in example["tokens"]]
    spans = [span[1:] for span in example["spans"] for _ in range(span[0])]
    return [(id, text, data["kinds"][kind], m, w) for (id, text, *_), (kind, m, w) in zip(pieces, spans, strict=True)]


def test_every_token_can_be_read_back() -> None:
    row = replace(plain_row(4, " one", "\n", " one"), notes=("a note",))
    odd = (token("x", message=0), token("x", "trained", weight=0.25, id=7, message=0), token("cut", "truncated"))
    row = replace(row, examples=(*row.examples, odd))
    data = embedded(page([row], "title", FACTS))
    shown = data["rows"][0]
    assert [tokens_of(data, example) for example in shown["examples"]] == [
        [(t.id, t.text, t.kind, t.message, t.weight) for t in example] for example in row.examples
    ]
    assert (shown["number"], shown["roles"], shown["notes"]) == (4, ["user", "assistant"], ["a note"])
    assert (shown["dropped"], shown["error"]) == (None, None)
    assert len(data["pieces"]) == len({(t.id, t.text) for example in row.examples for t in example})
    assert data["facts"] == [["data set", "packaged"], ["model", "tiny"]]
    assert data["totals"]["tokens"] == shown["figures"]["tokens"] == 7


def test_visible_text_stands_beside_the_text_only_where_it_differs() -> None:
    row = ShownRow(0, (), ((token("a"), token("\n"), token("", id=9)),))
    assert page_data([row], "", {})["pieces"] == [[97, "a"], [10, "\n", "↵\n"], [9, "", "◌"]]


def test_nlls_are_one_a_token_and_only_there_where_known() -> None:
    scored = (token("a"), token("b", "trained", nll=0.12345, nll_before=2.0), token("c", "truncated"))
    plain, with_nll = page_data([plain_row(0, "x"), ShownRow(1, (), (scored,))], "", {})["rows"]
    assert plain["examples"][0].keys() == {"tokens", "spans"}
    assert with_nll["examples"][0]["nll"] == [None, 0.123, None]
    assert with_nll["examples"][0]["before"] == [None, 2.0, None]


def test_hostile_content_stays_text() -> None:
    text = page([hostile_row()], HOSTILE, {HOSTILE: HOSTILE})
    harmless = Structure(page([plain_row(0, "x")], "t", {}))
    structure = Structure(text)
    assert [tag for tag, _ in structure.elements] == [tag for tag, _ in harmless.elements]
    assert structure.texts["style"] == harmless.texts["style"]
    assert structure.texts["script"][1] == harmless.texts["script"][1]
    assert structure.texts["title"] == [visible(HOSTILE)]
    data = embedded(text)
    assert [t[1] for t in tokens_of(data, data["rows"][0]["examples"][0])] == [HOSTILE, "</script>"]
    shown = data["rows"][0]
    assert {data["title"], *data["facts"][0], *shown["roles"], shown["error"], *shown["notes"]} == {visible(HOSTILE)}
    assert text.encode().decode() == text


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "]]>", "&lt;", "\u2028\u2029", "\ud800", 'a"b\\'])
def test_json_holds_nothing_that_ends_a_script_and_reads_back(text: str) -> None:
    written = script_json({text: [text, 1.5, None]})
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", written)
    assert json.loads(written) == {text: [text, 1.5, None]}


def test_the_page_needs_no_other_file() -> None:
    text = page([plain_row(0, "x")], "t", FACTS)
    structure = Structure(text)
    asking = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping", "style"}
    assert [(tag, attrs) for tag, attrs in structure.elements if asking & attrs.keys() or tag in ("link", "base")] == []
    assert [name for _, attrs in structure.elements for name in attrs if name.startswith("on")] == []
    (style,), script = structure.texts["style"], structure.texts["script"][1]
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search(
        r"https?:|fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|eval\(|write\(['\"`]", script
    )


def test_the_policy_allows_the_one_script_and_the_one_style() -> None:
    structure = Structure(page([hostile_row()], "t", FACTS))

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    (policy,) = [a["content"] for _, a in structure.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; script-src {source(structure.texts['script'][1])}; "
        f"style-src {source(structure.texts['style'][0])}; base-uri 'none'; form-action 'none'"
    )


def test_the_same_rows_give_the_same_page() -> None:
    assert page([hostile_row()], "t", FACTS) == page([hostile_row()], "t", FACTS)
