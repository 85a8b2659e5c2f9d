"""Rows as they are trained, on a terminal: colours where it has them, brackets where not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mint.chat import ShownRow, ShownToken
    from mint.data.figures import Figures

STYLES = {"trained": "bold green", "context": "", "scaffold": "dim cyan", "truncated": "red strike"}
NAMES = {"trained": "trained", "context": "context", "scaffold": "chat template", "truncated": "cut off"}
BRACKETS = {"trained": ("⟦", "⟧"), "truncated": ("⟪", "⟫")}

# Of trained tokens, by how a checkpoint changed their NLL in nats; see `_change_name`.
CHANGES = {
    "better by 1 or more": "bold bright_cyan",
    "better": "cyan",
    "about the same": "",
    "worse": "yellow",
    "worse by 1 or more": "bold bright_red",
}
UNTRAINED = "dim"


def has_colour(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def print_rows(rows: Sequence[ShownRow], console: Console) -> None:
    """Every row with a line about it, the legend, and where tokens have NLLs a table of their means."""
    from mint.data.figures import figures

    total = figures(rows)
    by_change = total.change is not None
    for row in rows:
        _print_row(row, console, by_change=by_change)
    console.rule(style="dim")
    console.print(legend(by_change=by_change, coloured=has_colour(console)), soft_wrap=True)
    if by_change:
        console.print(nll_table(rows))
    console.print(summary(total), highlight=False, soft_wrap=True)


def legend(*, by_change: bool, coloured: bool) -> Text:
    marks = {} if coloured else BRACKETS
    kinds = [Text(_bracketed(name, marks.get(kind)), STYLES[kind]) for kind, name in NAMES.items()]
    signs = Text("↵ line feed, ◌ part of a character", "dim")
    if not by_change or not coloured:
        return Text("  ").join([*kinds, signs])
    changes = [Text(name, style) for name, style in CHANGES.items()]
    return Text("  ").join([Text("trained, NLL in nats:"), *changes, Text("not trained", UNTRAINED), kinds[-1], signs])


def example_text(example: Iterable[ShownToken], *, by_change: bool, coloured: bool) -> Text:
    """The tokens of an example, one style a kind, or for trained ones a style by how their NLL changed.

    coloured: else trained and truncated stretches stand in BRACKETS.
    """
    from mint.data.visible import visible_token

    text = Text()
    for kind, of_kind in groupby(example, lambda token: token.kind):
        opening, closing = ("", "") if coloured else BRACKETS.get(kind, ("", ""))
        text.append(opening)
        for token in of_kind:
            text.append(visible_token(token.text), _change_style(token) if by_change else STYLES[kind])
        text.append(closing)
    return text


def summary(total: Figures) -> str:
    share = f" ({total.trained / total.tokens:.1%})" if total.tokens else ""
    cut = f", {total.cut:,} cut off" if total.cut else ""
    return (
        f"{total.rows:,} rows: {total.rows - total.dropped:,} kept, {total.dropped:,} dropped; "
        f"{total.tokens:,} tokens, {total.trained:,} trained{share}{cut}"
    )


def nll_table(rows: Sequence[ShownRow]) -> Table:
    """Mean NLL of the trained tokens, before and after, of every row that has any and of all."""
    from mint.data.figures import figures

    table = Table("row", title="mean NLL of trained tokens, nats")
    for name in ("trained", "before", "after", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        _add_means(table, str(row.number), figures([row]))
    table.add_section()
    _add_means(table, "all", figures(rows))
    return table


def _add_means(table: Table, name: str, found: Figures) -> None:
    if found.nll is not None and found.nll_before is not None and found.change is not None:
        means = f"{found.nll_before:.4f}", f"{found.nll:.4f}", f"{found.change:+.4f}"
        table.add_row(name, f"{found.trained:,}", *means)


def _print_row(row: ShownRow, console: Console, *, by_change: bool) -> None:
    from mint.data.figures import figures
    from mint.data.visible import visible

    found = figures([row])
    facts = [f"row {row.number}"]
    if row.dropped is not None:
        facts.append(f"dropped: {row.dropped}")
    if found.tokens:
        facts.append(f"{found.tokens:,} tokens, {found.trained:,} trained")
    if found.cut:
        facts.append(f"{found.cut:,} tokens cut off")
    if row.roles:
        facts.append(", ".join(map(visible, row.roles)))  # last: what has no room is left out
    console.rule(Text(" · ".join(facts), "bold"), align="left", style="dim")
    if row.error is not None:
        console.print(Text(visible(row.error), "red"), soft_wrap=True)
    for note in row.notes:
        console.print(Text(f"note: {visible(note)}", "yellow"), soft_wrap=True)
    for number, example in enumerate(row.examples, 1):
        if len(row.examples) > 1:
            console.print(Text(f"example {number} of {len(row.examples)}, {len(example):,} tokens", "dim"))
        console.print(example_text(example, by_change=by_change, coloured=has_colour(console)), soft_wrap=True)


def _change_style(token: ShownToken) -> str:
    if token.kind == "truncated":
        return STYLES["truncated"]
    if not token.weight or token.nll is None or token.nll_before is None:
        return UNTRAINED
    return CHANGES[_change_name(token.nll - token.nll_before)]


def _change_name(change: float) -> str:
    if abs(change) < 0.1:
        return "about the same"
    return ("better" if change < 0 else "worse") + (" by 1 or more" if abs(change) >= 1 else "")


def _bracketed(text: str, brackets: tuple[str, str] | None) -> str:
    return text if brackets is None else text.join(brackets)
