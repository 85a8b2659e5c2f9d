"""What the trap tests read out of datums, and reference computations that know nothing of MinT."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from mint import types
from tests.unit.chat.conversations import all_tokens, all_weights


class Answer(NamedTuple):
    """A run of trained tokens and everything before it."""

    prompt: list[int]
    tokens: list[int]


def answers(datums: Sequence[types.Datum]) -> list[Answer]:
    """Every unbroken run of tokens with a weight, in order, before the shift."""
    found = []
    for datum in datums:
        tokens, trained = all_tokens(datum), [weight != 0 for weight in all_weights(datum)]
        starts = [i for i, now in enumerate(trained) if now and (i == 0 or not trained[i - 1])]
        ends = [i + 1 for i, now in enumerate(trained) if now and (i + 1 == len(trained) or not trained[i + 1])]
        found += [Answer(tokens[:start], tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
    return found


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def control_ids(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.added_tokens_decoder]


@cache
def _reference(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()


def reference_logprobs(model: str, tokens: Sequence[int]) -> np.ndarray:
    """float64 [position, vocabulary]: of the token after each position, by transformers, the sequence alone."""
    with torch.no_grad():
        logits = _reference(model)(torch.tensor([list(tokens)])).logits[0]
    return np.asarray(logits.log_softmax(-1))


def answer_nll(model: str, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """-log p(answer | prompt), token by token as a sampler would meet them."""
    logprobs = reference_logprobs(model, [*prompt, *answer])
    return -sum(float(logprobs[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
