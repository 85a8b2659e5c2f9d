"""Text made safe to look at."""

import sys
import unicodedata

import pytest

from mint.data.visible import visible, visible_token


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ~ text", "plain ~ text"),
        ("Ümläut, 日本語, עברית, 👩‍👧, نمی‌خواهم", "Ümläut, 日本語, עברית, 👩‍👧, نمی‌خواهم"),
        ("a\nb\tc", "a↵\nb⇥\tc"),
        ("\x00\x1b[31m\r\x7f", "␀␛[31m␍␡"),
        ("\x85\u2028\u2029", "⟨U+0085⟩⟨U+2028⟩⟨U+2029⟩"),
        ("\u202eabc\u202c\u2066", "⟨U+202E⟩abc⟨U+202C⟩⟨U+2066⟩"),
        ("\u200b\ufeff\xad", "⟨U+200B⟩⟨U+FEFF⟩⟨U+00AD⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("1\xa0000\u2009m\u3000", "1⍽000⍽m\u3000"),
        ("\ud800", "⟨U+D800⟩"),
        ("", ""),
    ],
)
def test_what_a_reader_would_not_see_gets_a_sign(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_no_character_of_unicode_stays_a_control_or_changes_direction() -> None:
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    left = {character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Cn")}
    assert left == {"\n", "\t", "\u200c", "\u200d"}


def test_a_part_of_a_character_has_a_sign() -> None:
    assert (visible_token(""), visible_token("\n")) == ("◌", "↵\n")
