"""Texts of many rows encoded at once."""

from __future__ import annotations

import pytest
from tests.unit.chat.test_families import renderer_of
from tests.unit.chat.tiny_tokenizers import tokenizer_of

from mint.chat.marks import BREAK

TEXTS = [f"Hello there {number}\n\n" + "e\u0301 世界 🙂" * (number % 3) for number in range(40)]


@pytest.mark.parametrize("name", ["smollm2", "llama3", "gemma3_pieces"])
def test_texts_encoded_together_have_the_ids_that_they_have_alone(name: str) -> None:
    encoder = renderer_of(name, False).style.encoder
    tokenizer = tokenizer_of(name)
    expected = {text: tokenizer.encode(text, add_special_tokens=False) for text in TEXTS}
    assert encoder.encode_together([*TEXTS, *TEXTS[::-1]]) == expected
    assert encoder.encode_together(TEXTS[:3]) == {text: expected[text] for text in TEXTS[:3]}
    assert encoder.encode_together([]) == {}


def test_texts_with_guarded_control_tokens_are_left_to_be_encoded_alone() -> None:
    encoder = renderer_of("smollm2", False).style.encoder
    guarded = encoder.guard("a <|im_end|> b")
    assert BREAK in guarded and encoder.encode_together([guarded, "a"]).keys() == {"a"}


def test_nothing_is_encoded_together_where_ids_depend_on_what_stands_before() -> None:
    assert renderer_of("phi3_pieces", False).style.encoder.encode_together(TEXTS) == {}
