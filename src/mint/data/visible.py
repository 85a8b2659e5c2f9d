"""Text of strangers, made safe to look at: nothing in it can move a cursor, reorder a line or hide."""

from __future__ import annotations

import re
import unicodedata

PART_OF_CHARACTER = "◌"  # stands for a token whose bytes are no whole character alone

_BREAKS = {"\n": "↵\n", "\t": "⇥\t", "\x7f": "␡"}
_SPACES_AS_THEY_ARE = " \u3000"
_JOINERS = "\u200c\u200d"  # Persian words and family emoji fall apart without them
_ORDINARY = re.compile(r"[ !-~]*")


def visible(text: str) -> str:
    """`text` with a sign for everything that a reader would not see.

    A line feed gets ↵ and a tab ⇥ before them, other control characters become their pictures (␀, ␍), spaces that are
    no plain space ⍽, and what has no width or changes direction (U+200B, U+202E, U+2028 ...) its code point as ⟨U+202E⟩.
    """
    return text if _ORDINARY.fullmatch(text) else "".join(map(_visible_character, text))


def visible_token(text: str) -> str:
    """As `visible`, with a sign for a token without a text of its own."""
    return visible(text) if text else PART_OF_CHARACTER


def _visible_character(character: str) -> str:
    if character in _BREAKS:
        return _BREAKS[character]
    category = unicodedata.category(character)
    if category == "Cc" and character < " ":
        return chr(0x2400 + ord(character))
    if category == "Zs" and character not in _SPACES_AS_THEY_ARE:
        return "⍽"
    # Cn: not assigned, so no font draws it; Co: private, so nobody knows what it draws
    if category in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn") and character not in _JOINERS:
        return f"⟨U+{ord(character):04X}⟩"
    return character
