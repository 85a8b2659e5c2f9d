"""Characters put into a template's input, to see in its output what came from a message.

They are Unicode noncharacters, which no text may contain; templates carry them through like letters.
"""

from __future__ import annotations

import re
from typing import Final

OPEN, SEP, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"  # OPEN number SEP text CLOSE: text of message `number`
BREAK: Final = "\ufdd3"  # no token reaches across it: it stands inside the text of a control token
TAGGED, UNTAGGED = "\ufdd4", "\ufdd5"  # around what a template encloses in {% generation %}

NONCHARACTER: Final = re.compile("[\ufdd0-\ufdef]")
NONCHARACTER_LEAD: Final = b"\xef\xb7"  # the first two of their three bytes in UTF-8
_OPENING: Final = re.compile(f"{OPEN}(\\d+){SEP}")
_MARK: Final = re.compile(f"{OPEN}\\d+{SEP}|{CLOSE}")


def content_number(message: int) -> int:
    return 2 * message


def reasoning_number(message: int) -> int:
    return 2 * message + 1


def mark(number: int, text: str) -> str:
    """`text` marked as message `number`'s; whitespace around it stays outside, so that templates trim as they would."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    return f"{text[:start]}{OPEN}{number}{SEP}{core}{CLOSE}{text[start + len(core) :]}"


def unmarked(text: str) -> str:
    return _MARK.sub("", text)


def marked_parts(text: str) -> list[tuple[str, int | None]]:
    """`text` in parts: what stands in a mark with its message number, what does not with None."""
    parts: list[tuple[str, int | None]] = []
    pieces = _OPENING.split(text)
    if pieces[0]:
        parts.append((pieces[0], None))
    for number, rest in zip(pieces[1::2], pieces[2::2], strict=True):
        inside, _, after = rest.partition(CLOSE)
        parts.append((inside, int(number)))
        if after:
            parts.append((after, None))
    return parts


def numbers_in(text: str) -> list[int]:
    """The numbers of all marks, in order."""
    return [int(number) for number in _OPENING.findall(text)]
