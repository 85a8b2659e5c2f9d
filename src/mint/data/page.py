"""Rows as one HTML page that needs nothing else: no server, no network, no other file.

What rows contain was written by strangers. It reaches the page as JSON in a script element that is never run, and the
page's own script makes text of it, never markup. The content security policy allows that script and that style alone,
by their hashes, and no connection.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby
from typing import Any, get_args

from mint.chat import ShownRow, ShownToken, TokenKind
from mint.data.figures import figures
from mint.data.visible import visible, visible_token

_KINDS: tuple[str, ...] = get_args(TokenKind)
_NLL_DIGITS, _WEIGHT_DIGITS = 3, 6
# Characters with a meaning to an HTML or JavaScript parser, and half surrogate pairs, which UTF-8 cannot write.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")

Pieces = dict[tuple[int, str], int]


def page(rows: Sequence[ShownRow], title: str, facts: Mapping[str, str]) -> str:
    """The page's HTML. rows: in the order in which they are listed. facts: what was rendered and how, shown on top."""
    template = (files("mint.data") / "page.html").read_text(encoding="utf-8")
    policy = "; ".join((
        "default-src 'none'",
        f"script-src {_hash(template, 'script')}",
        f"style-src {_hash(template, 'style')}",
        "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip
    fields = {
        "title": html.escape(visible(title)),
        "policy": policy,
        "data": script_json(page_data(rows, title, facts)),
    }
    # in one pass: what is put in is not looked at again
    return re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], template)


def page_data(rows: Sequence[ShownRow], title: str, facts: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows, compact: 500 rows of 1,000 tokens are a few megabytes.

    pieces: [id, text, visible text where it differs], every pair of id and text once. An example has `tokens`, which
    are numbers of pieces; `spans`, [how many tokens, number in `kinds`, index of the message or null, weight]; and where
    they were scored `nll` and `before`, one number or null a token.
    """
    pieces: Pieces = {}
    shown = [_row_data(row, pieces) for row in rows]
    return {
        "title": visible(title),
        "facts": [[visible(name), visible(value)] for name, value in facts.items()],
        "totals": asdict(figures(rows)),
        "kinds": _KINDS,
        "pieces": [_piece_data(id, text) for id, text in pieces],
        "rows": shown,
    }


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element of an HTML page, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _row_data(row: ShownRow, pieces: Pieces) -> dict[str, Any]:
    return {
        "number": row.number,
        "roles": [visible(role) for role in row.roles],
        "dropped": row.dropped,
        "error": None if row.error is None else visible(row.error),
        "notes": [visible(note) for note in row.notes],
        "figures": asdict(figures([row])),
        "examples": [_example_data(example, pieces) for example in row.examples],
    }


def _piece_data(id: int, text: str) -> list[int | str]:
    shown = visible_token(text)
    return [id, text] if shown == text else [id, text, shown]


def _example_data(example: Sequence[ShownToken], pieces: Pieces) -> dict[str, Any]:
    data: dict[str, Any] = {
        "tokens": [pieces.setdefault((token.id, token.text), len(pieces)) for token in example],
        "spans": [
            [len(list(group)), _KINDS.index(kind), message, round(weight, _WEIGHT_DIGITS)]
            for (kind, message, weight), group in groupby(example, lambda t: (t.kind, t.message, t.weight))
        ],
    }
    nlls = {"nll": [token.nll for token in example], "before": [token.nll_before for token in example]}
    for name, values in nlls.items():
        if any(value is not None for value in values):
            data[name] = [None if value is None else round(value, _NLL_DIGITS) for value in values]
    return data


def _hash(template: str, element: str) -> str:
    """The policy's source expression for the one inline `element` without attributes."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", template, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
