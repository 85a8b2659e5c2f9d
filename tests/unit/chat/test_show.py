"""`show_row`: every token with what it is and whose, also where the tokenizer writes texts in its own way."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from tests.unit.chat.conversations import TWO_TURNS, chat
from tests.unit.chat.test_families import renderer_of
from tests.unit.chat.tiny_tokenizers import make_tokenizer, tokenizer_of

from mint.chat import Converter, ShownRow, UnusableRow, get_renderer, show_row


def shown(row: Any, name: str = "smollm2", max_length: int = 2048, **options: Any) -> ShownRow:
    return show_row(7, row, Converter(renderer_of(name, False), max_length, **options))


def pieces(example: Any) -> list[tuple[str, int | None, str]]:
    """What stands together: kind, message, text."""
    return [
        (*group, "".join(token.text for token in tokens))
        for group, tokens in groupby(example, lambda token: (token.kind, token.message))
    ]


@pytest.mark.parametrize("name", ["smollm2", "phi3_pieces", "gemma3_pieces"])
def test_each_token_has_its_kind_and_its_message(name: str) -> None:
    row = shown(chat("Hello there", "How can I help"), name)
    assert (row.number, row.roles, row.dropped, row.error) == (7, ("user", "assistant"), None, None)
    (example,) = row.examples
    found = [(kind, message, text.strip()) for kind, message, text in pieces(example) if kind != "scaffold"]
    end = {"smollm2": "<|im_end|>", "phi3_pieces": "<|end|>", "gemma3_pieces": "<end_of_turn>"}[name]
    assert found == [("context", 0, "Hello there"), ("trained", 1, f"How can I help{end}")]
    assert [token.weight for token in example] == [float(token.kind == "trained") for token in example]
    tokenizer = tokenizer_of(name)
    assert "".join(token.text for token in example) == tokenizer.decode([token.id for token in example])


def test_messages_are_found_though_the_tokenizer_normalises_their_text() -> None:
    from tokenizers import normalizers

    tokenizer = make_tokenizer("qwen3")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = show_row(0, chat("Hello e\u0301", "Yes e\u0301"), Converter(get_renderer(tokenizer), 2048))
    assert [piece for piece in pieces(row.examples[0]) if piece[0] != "scaffold"] == [
        ("context", 0, "Hello \u00e9"),
        ("trained", 1, "Yes \u00e9<|im_end|>"),
    ]


def test_bytes_of_a_character_are_shown_by_the_token_that_completes_it() -> None:
    (example,) = shown(chat("世", "界")).examples
    asked = [token.text for token in example if token.message == 0]
    assert asked[-1] == "世" and set(asked[:-1]) <= {""}


def test_what_is_cut_off_is_truncated_and_an_end_without_its_answer_is_not_trained() -> None:
    whole = shown(TWO_TURNS).examples[0]
    cut = shown(TWO_TURNS, max_length=len(whole) - 2, on_overlong="truncate_right")
    assert [token.id for token in cut.examples[0]] == [token.id for token in whole]
    assert [token.kind for token in cut.examples[0]] == [token.kind for token in whole[:-2]] + ["truncated"] * 2
    assert [token.weight for token in cut.examples[0][-3:]] == [1.0, 0.0, 0.0]
    assert cut.notes[-1] == "too long: 1 answer shortened, 0 answers left out, 2 tokens in all"


def test_messages_are_found_behind_a_history_that_was_left_out() -> None:
    row = shown(TWO_TURNS, max_length=len(shown(TWO_TURNS).examples[0]) - 1, on_overlong="truncate_left_turns")
    *_, last = row.examples
    assert [piece for piece in pieces(last) if piece[0] != "scaffold"] == [
        ("context", 2, "Name a color."),
        ("trained", 3, "Blue is a color.<|im_end|>"),
    ]


def test_dropped_rows_say_why_and_show_what_they_would_have_been() -> None:
    row = shown(TWO_TURNS, max_length=10)
    assert row.dropped == "overlong" and "raise max_length" in str(row.error)
    assert {token.kind for token in row.examples[0]} == {"truncated"}
    unread = shown(UnusableRow("a.jsonl, row 3: no 'messages'"))
    assert (unread.dropped, unread.roles, unread.examples) == ("unreadable", (), ())
    unanswered = shown(chat("Hello?"))
    assert (unanswered.dropped, unanswered.roles, unanswered.examples) == ("no_assistant", ("user",), ())


def test_plain_text_is_one_message() -> None:
    (example,) = shown({"text": "Hello there"}).examples
    assert pieces(example) == [("context", 0, "Hello"), ("trained", 0, " there<|im_end|>")]


def test_notes_tell_what_is_remarkable() -> None:
    messages = [*chat("What is <|im_end|>?", "A token."), {"role": "user", "content": "Thanks"}]
    assert shown(messages).notes == (
        "the template adds: 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'",
        "a message contains the text of a control token; it is encoded as ordinary text",
        "left out after the last answer: 1 message",
    )
    assert shown(TWO_TURNS, "qwen3").notes == (
        "the template rewrites earlier turns, so every answer is an example of its own",
    )
