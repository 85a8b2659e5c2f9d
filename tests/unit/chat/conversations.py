"""Conversations and readings of datums that several test modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mint import types

Conversation = list[dict[str, Any]]


def chat(*contents: str, system: str | None = None) -> Conversation:
    """user, assistant, user, ... with these contents, after the system message if there is one."""
    roles = ("user", "assistant")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


HELLO = chat("Hello!", "Hi there! How can I help you?")
TWO_TURNS = chat("Say hi.", "Hi there!", "Name a color.", "Blue is a color.")
THREE_TURNS = chat("one?", "1. one\n2. two", "two?", "Two.", "three?", "Three, I think.", system="Be short.")

CONVERSATIONS: dict[str, Conversation] = {
    "one turn": HELLO,
    "two turns": TWO_TURNS,
    "system and three turns": THREE_TURNS,
    "answers in a row": [*HELLO, {"role": "assistant", "content": "Well?"}],
    "questions in a row": [{"role": "user", "content": "a"}, *HELLO],
    "system in the middle": [*HELLO, {"role": "system", "content": "Now in French."}, *TWO_TURNS],
    "spaces around": chat("  padded \n", "answer with end  \n", "\n\nlines", "x\n"),
    "unicode": chat("Grüße, 世界 🙂", "naïve café — ok 👍🏽"),
    "empty question": chat("", "You said nothing."),
}


def all_tokens(datum: types.Datum) -> list[int]:
    """The tokens before the shift."""
    return [*datum.model_input.to_ints(), int(datum.loss_fn_inputs["target_tokens"].tolist()[-1])]


def all_weights(datum: types.Datum) -> list[float]:
    """The weights before the shift; the first, which the shift loses, is given as 0."""
    return [0.0, *datum.loss_fn_inputs["weights"].tolist()]


def trained_runs(tokens: Sequence[int], weights: Sequence[float]) -> list[list[int]]:
    """The unbroken runs of tokens with weight 1."""
    runs: list[list[int]] = []
    for index, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
        assert weight in (0.0, 1.0)
        if weight:
            if index == 0 or not weights[index - 1]:
                runs.append([])
            runs[-1].append(token)
    return runs


def trained_texts(tokenizer: Any, datum: types.Datum) -> list[str]:
    return [tokenizer.decode(run) for run in trained_runs(all_tokens(datum), all_weights(datum))]


def template_ids(tokenizer: Any, messages: Conversation, **options: Any) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    return [int(token) for token in ids]
