"""From logits to tokens, purely: no model, no tokenizer. Shape letters: B rows, V vocabulary.

A row's token depends on its logits, its options and one uniform number alone: reductions that a kernel might split by
the number of rows are sequential float64 sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """Options of one row. temperature 0: the largest logit. uniform: in [0, 1), from the sequence's own stream."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float


GREEDY = Choice(temperature=0.0, top_k=-1, top_p=1.0, uniform=0.0)


def choose(logits_BV: Tensor, choices: list[Choice]) -> list[int]:
    """One token per row by inverting the cumulative distribution after temperature, top-k, then top-p."""
    device = logits_BV.device
    temperature_B = torch.tensor([c.temperature or 1.0 for c in choices], device=device)
    scaled_BV = logits_BV.float() / temperature_B[:, None]
    weight_BV = (scaled_BV - scaled_BV.amax(-1, keepdim=True)).exp_()
    for row, c in enumerate(choices):
        if c.temperature > 0 and (c.top_k > 0 or c.top_p < 1):
            _filter(weight_BV[row], c.top_k, c.top_p)
    cdf_BV = weight_BV.cumsum(-1, dtype=torch.float64)
    uniform_B = torch.tensor([c.uniform for c in choices], dtype=torch.float64, device=device)
    # the first entry above u x total: an entry of weight 0 can never be the first
    drawn_B = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1])[:, None], right=True)[:, 0]
    tokens: list[int] = drawn_B.clamp_(max=logits_BV.shape[1] - 1).tolist()
    for row, c in enumerate(choices):
        if c.temperature == 0:
            tokens[row] = int(logits_BV[row].argmax())
    return tokens


def _filter(weight_V: Tensor, top_k: int, top_p: float) -> None:
    """Zero what top-k and top-p exclude, in place. Ties keep the smaller token id; one token always stays."""
    ordered_V, token_V = weight_V.sort(descending=True, stable=True)
    if 0 < top_k < len(ordered_V):
        ordered_V, token_V = ordered_V[:top_k], token_V[:top_k]
    if top_p < 1:
        cumulative = ordered_V.cumsum(0, dtype=torch.float64)
        # keep the shortest prefix that reaches top_p: entries whose predecessors do not reach it yet
        kept = int((cumulative - ordered_V < top_p * cumulative[-1]).sum())
        ordered_V, token_V = ordered_V[: max(kept, 1)], token_V[: max(kept, 1)]
    weight_V.zero_()
    weight_V[token_V] = ordered_V


def log_normaliser(logits_BV: Tensor) -> Tensor:
    """log sum exp of each row at temperature 1, float64 [B]."""
    max_B = logits_BV.amax(-1, keepdim=True).float()
    return (logits_BV - max_B).exp_().sum(-1, dtype=torch.float64).log_() + max_B[:, 0].double()


def top_logprobs(logits_BV: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k likeliest tokens of each row with their logprobs, likeliest first."""
    values, tokens = logits_BV.float().topk(min(k, logits_BV.shape[1]), dim=-1)
    logprobs = (values.double() - log_normaliser(logits_BV)[:, None]).tolist()
    return [list(zip(ids, row, strict=True)) for ids, row in zip(tokens.tolist(), logprobs, strict=True)]
