"""The HTML page of shown rows in a real browser, from disk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mint.chat import ShownRow
from mint.data.page import page
from tests.support import browser as browsers
from tests.support.browser import Browser
from tests.support.shown import plain_row, token

pytestmark = pytest.mark.skipif(browsers.missing() is not None, reason=f"no browser: {browsers.missing()}")

HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">&amp;"
ESCAPE, RIGHT, END = "\ue00c", "\ue014", "\ue010"  # keys in the WebDriver protocol
VISIBLE_ROWS = "[...document.querySelectorAll('.row')].filter(r => r.checkVisibility()).map(r => +r.dataset.row)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser.start(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def rows() -> list[ShownRow]:
    scored = (
        token("<user>", "scaffold", nll=None, nll_before=None),
        token("Hi", message=0, nll=1.0, nll_before=1.0),
        token(" worse", "trained", message=1, nll=5.0, nll_before=0.05),
        token(" better", "trained", message=1, nll=0.05, nll_before=5.0),
        token(" gone", "truncated", message=1),
    )
    hostile = (token(HOSTILE, "trained", message=1), token("a\nb\u202e", message=1))
    return [
        plain_row(0, "One", " fish"),
        replace(plain_row(1, HOSTILE), examples=(hostile, hostile), roles=(HOSTILE, "x"), notes=(HOSTILE,)),
        ShownRow(2, ("user",), (), "no_assistant", "[no_assistant] nothing to train on"),
        ShownRow(5, ("user", "assistant"), (), "overlong", "[overlong] too long"),
        ShownRow(6, ("user", "assistant"), ((token("lost", "truncated"),),), "overlong", "[overlong] too long, too"),
        ShownRow(9, ("user", "assistant"), (scored,)),
    ]


@pytest.fixture
def opened(browser: Browser, rows: list[ShownRow], tmp_path: Path) -> Any:
    """Opens the page of `rows` at a fragment."""
    file = tmp_path / "page.html"
    file.write_text(page(rows, "the title", {"data set": "three"}), encoding="utf-8")

    def open_at(fragment: str = "") -> Browser:
        browser.open(f"{file.as_uri()}#{fragment}")
        browser.until("document.documentElement.dataset.ready === 'true'")
        return browser

    return open_at


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.run(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
    )
    return found


def classes(browser: Browser, row: int) -> list[str]:
    selector = f"[data-row='{row}'] .t"
    found: list[str] = browser.run(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.className)", selector
    )
    return found


def test_rows_are_drawn_with_their_tokens_and_nothing_in_them_runs(opened: Any) -> None:
    browser = opened()
    browser.until("document.querySelectorAll('.t').length === 4 + 4 + 1 + 5 + 4")  # of the rows, and of the legend
    assert texts(browser, "[data-row='0'] .t") == ["<user>", "Hi", "One", " fish"]
    assert classes(browser, 0) == ["t scaffold", "t context", "t trained", "t trained"]
    assert texts(browser, "[data-row='1'] .t") == [HOSTILE, "a↵\nb⟨U+202E⟩"] * 2
    assert texts(browser, "[data-row='1'] .roles") == [f"{HOSTILE} · x"]
    assert texts(browser, "[data-row='1'] h3") == ["example 1 of 2, 2 tokens", "example 2 of 2, 2 tokens"]
    assert texts(browser, "[data-row='2'] .error") == ["[no_assistant] nothing to train on"]
    assert browser.run("return document.title") == "the title"
    assert browser.run("return document.images.length + document.scripts.length") == 2  # its data and its program
    assert browser.run("return performance.getEntriesByType('resource').length") == 0


def test_totals_stand_on_top(opened: Any) -> None:
    browser = opened()
    tiles = dict(zip(texts(browser, "#totals span"), texts(browser, "#totals b"), strict=True))
    assert tiles == {
        "rows": "6", "kept": "3", "dropped": "3", "examples": "4", "tokens": "12", "trained (50.0 %)": "6",
        "tokens cut off": "2", "mean NLL before → after": "2.525 → 2.525",
    }  # fmt: skip
    assert texts(browser, "#facts dt, #facts dd") == ["data set", "three"]


def test_what_the_policy_forbids_does_not_run(opened: Any) -> None:
    browser = opened()
    browser.run(
        "document.addEventListener('securitypolicyviolation', event => { window.refused = event.effectiveDirective });"
        "const s = document.createElement('script'); s.textContent = 'document.title = \"run\"'; document.body.append(s);"
    )
    assert browser.until("window.refused") == "script-src-elem"
    assert browser.run("return document.title") == "the title"


def test_filters_count_and_choose_by_reason(opened: Any) -> None:
    browser = opened()
    assert texts(browser, "#chips button") == ["all6", "kept3", "cut1", "dropped: no_assistant1", "dropped: overlong2"]
    browser.click("#chips [value='dropped.overlong']")
    assert browser.run(f"return {VISIBLE_ROWS}") == [5, 6]
    assert texts(browser, "#count") == ["2 of 6 rows"]
    assert browser.run("return location.hash") == "#filter=dropped.overlong"
    assert opened("filter=kept").run(f"return {VISIBLE_ROWS}") == [0, 1, 9]
    assert opened("filter=constructor&color=nonsense").run(f"return {VISIBLE_ROWS}") == [0, 1, 2, 5, 6, 9]


def test_search_finds_rows_and_marks_the_tokens_that_hold_a_piece_of_it(opened: Any) -> None:
    browser = opened()
    browser.type("#search", "NE FI")
    browser.until("document.querySelectorAll('.found').length === 2")
    assert texts(browser, ".found") == ["One", " fish"]
    assert browser.run(f"return {VISIBLE_ROWS}") == [0]
    assert opened("q=too+long").run(f"return {VISIBLE_ROWS}") == [5, 6]
    browser = opened("q=nowhere")
    assert browser.run(f"return {VISIBLE_ROWS}") == []
    assert browser.run("return document.getElementById('empty').checkVisibility()")


def test_a_row_is_gone_to_by_its_number_through_filters(opened: Any) -> None:
    browser = opened("filter=dropped.overlong")
    browser.type("#jump", "9\n")
    browser.until("document.querySelector('.goal')?.dataset.row === '9'")
    assert browser.run("return location.hash") == "#row=9"
    assert 9 in browser.run(f"return {VISIBLE_ROWS}")
    browser.run("document.getElementById('jump').value = ''")
    browser.type("#jump", "7\n")
    assert browser.until("document.getElementById('jump').validationMessage") == "row 7 is not on this page"


def test_a_token_tells_about_itself_under_the_mouse(opened: Any) -> None:
    browser = opened()
    browser.until("document.querySelector(\"[data-row='9'] .t\")")
    browser.hover("[data-row='9'] .t:nth-child(4)")
    browser.until("document.getElementById('tip').checkVisibility()")
    assert texts(browser, "#tip .text") == ["·better"]
    facts = dict(zip(texts(browser, "#tip dt"), texts(browser, "#tip dd"), strict=True))
    assert facts == {
        "id": str(sum(map(ord, " better"))), "kind": "trained", "weight": "1", "message": "1 (assistant)",
        "place": "token 3 of row 9", "NLL before": "5.000 nats (p = 0.0067)", "NLL after": "0.050 nats (p = 0.95)",
        "change": "−4.95 nats",  # noqa: RUF001
    }  # fmt: skip


def test_a_click_pins_a_token_and_its_address_leads_back_to_it(opened: Any) -> None:
    browser = opened()
    browser.until("document.querySelector(\"[data-row='1'] .t\")")
    browser.click("[data-row='1'] .flow:last-child .t:nth-child(2)")
    assert texts(browser, "#tip .text") == ["a↵b⟨U+202E⟩"]
    browser.hover("[data-row='0'] .t")
    assert texts(browser, "#tip .text") == ["a↵b⟨U+202E⟩"]
    fragment = browser.run("return location.hash")
    assert fragment == "#row=1&token=3"
    browser = opened(fragment[1:])
    browser.until("document.querySelector('.current')")
    assert texts(browser, "#tip .text") == ["a↵b⟨U+202E⟩"]
    browser.type("body", ESCAPE)
    assert not browser.run("return document.getElementById('tip').checkVisibility()")
    assert browser.run("return location.hash") == "#row=1"


def test_keys_go_from_token_to_token(opened: Any) -> None:
    browser = opened()
    browser.until("document.querySelector(\"[data-row='0'] .flow\")")
    said = []
    for key in (RIGHT, RIGHT, END, RIGHT):
        browser.type("[data-row='0'] .flow", key)
        said += texts(browser, "#tip .text")
    assert said == ["<user>", "Hi", "·fish", "·fish"]


def test_colours_show_nll_before_after_and_its_change(opened: Any) -> None:
    plain = ["t scaffold", "t context"]
    scales = {"after": ["n6", "n0"], "before": ["n0", "n6"], "change": ["d8", "d0"]}
    for color, scale in scales.items():
        browser = opened(f"color={color}")
        browser.until("document.querySelector(\"[data-row='9'] .t\")")
        assert classes(browser, 9) == [*plain, *(f"t trained {name}" for name in scale), "t truncated"]
    browser.run("const c = document.getElementById('color'); c.value = 'kind'; c.dispatchEvent(new Event('change'))")
    assert classes(browser, 9) == [*plain, "t trained", "t trained", "t truncated"]
    assert texts(browser, "[data-row='9'] .numbers") == ["4 tokens, 2 trained, 1 cut · NLL 2.52 → 2.52 (+0.00)"]


def test_rows_are_ordered(browser: Browser, tmp_path: Path) -> None:
    def scored(number: int, length: int, nll: float, before: float) -> ShownRow:
        return ShownRow(number, (), ((token("x", "trained", nll=nll, nll_before=before),) * length,))

    gone = ShownRow(3, (), (), "overlong", "[overlong] too long")
    rows = [scored(0, 2, 1.0, 0.5), scored(1, 3, 3.0, 3.0), scored(2, 1, 2.0, 1.0), gone]
    file = tmp_path / "page.html"
    file.write_text(page(rows, "t", {}), encoding="utf-8")
    for order, numbers in {
        "number": [0, 1, 2, 3],
        "long": [1, 0, 2, 3],
        "high": [1, 2, 0, 3],
        "worse": [2, 0, 1, 3],
    }.items():
        browser.open(f"{file.as_uri()}#order={order}")
        browser.until("document.documentElement.dataset.ready === 'true'")
        assert browser.run(f"return {VISIBLE_ROWS}") == numbers


def test_a_page_without_scores_offers_none(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page([plain_row(0, "x")], "t", {}), encoding="utf-8")
    browser.open(f"{file.as_uri()}#color=after")
    browser.until("document.documentElement.dataset.ready === 'true'")
    assert not browser.run("return document.getElementById('color').checkVisibility()")
    assert texts(browser, "#legend .t") == ["trained", "context", "chat template", "cut off"]


def test_of_a_long_page_only_what_is_near_the_window_is_drawn(browser: Browser, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [plain_row(number, *draw.choices([" some", " word", "\n", " 漢字"], k=998)) for number in range(500)]
    file = tmp_path / "page.html"
    file.write_text(page(rows, "t", {}), encoding="utf-8")
    assert file.stat().st_size < 3_000_000
    browser.open(file.as_uri())
    browser.until("document.querySelectorAll('.body .t').length > 0")
    assert browser.run("return document.querySelectorAll('.row').length") == 500
    assert browser.run("return document.querySelectorAll('.body .t').length") <= 10 * 1000
    browser.run("location.hash = '#row=400&token=900'")
    browser.until("document.querySelector('[data-row=\"400\"] .t.current')")
    browser.until(
        "(b => b.top > 0 && b.bottom < innerHeight)(document.querySelector('.current').getBoundingClientRect())"
    )
    browser.run("location.hash = '#row=200'")
    browser.until("Math.abs(document.querySelector('[data-row=\"200\"]').getBoundingClientRect().top - 104) < 2")
    browser.until("document.querySelector(\"[data-row='0'] .t\") === null")
    assert browser.run("return document.querySelectorAll('.body .t').length") <= 10 * 1000


def test_light_and_dark_follow_the_button(opened: Any) -> None:
    browser = opened()
    said, grounds = [], []
    for _ in range(3):
        browser.click("#theme")
        said.append(browser.run("return document.documentElement.dataset.theme"))
        grounds.append(browser.run("return getComputedStyle(document.body).backgroundColor"))
    assert said == ["light", "dark", ""]
    assert grounds[:2] == ["rgb(244, 246, 248)", "rgb(14, 18, 23)"]
    assert opened("theme=dark").run("return getComputedStyle(document.body).backgroundColor") == grounds[1]


def test_a_slash_leads_to_the_search(opened: Any) -> None:
    browser = opened()
    browser.type("body", "/")
    assert browser.run("return document.activeElement.id") == "search"
    assert browser.run("return document.getElementById('search').value") == ""


def test_a_narrow_window_is_not_scrolled_sideways(opened: Any, browser: Browser) -> None:
    browser.resize(420, 900)
    try:
        opened()
        browser.until("document.querySelector('[data-row=\"1\"] .t')")
        assert browser.run("return innerWidth") < 600
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.resize(1280, 1000)
