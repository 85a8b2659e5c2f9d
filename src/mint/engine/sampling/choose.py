"""From logits to tokens, purely: no model, no tokenizer. Shape letters: B rows, V vocabulary, N blocks of it, W block width.

A row's token depends on its logits, its options and one uniform number alone: every sum is over a block of fixed width
first, so that no kernel splits it by the number of rows, and over the blocks in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
TRIED_FIRST = 1024  # likeliest tokens among which top-p usually finds its end; more are sorted only where it does not


@dataclass(frozen=True, slots=True)
class Choice:
    """Options of one row. temperature 0: the largest logit. uniform: in [0, 1), from the sequence's own stream."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float


def choose(logits_BV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], Tensor]:
    """One token per row by inverting the cumulative distribution after temperature, top-k, then top-p; and each row's
    `log_normaliser`."""
    below_BV, max_B = _below_largest(logits_BV)
    exp_BV = below_BV.exp()
    log_sum_B = _log_sum(exp_BV, max_B)
    drawn = [i for i, c in enumerate(choices) if c.temperature > 0]
    tokens = [-1] * len(choices)
    if drawn:
        device, temperatures = logits_BV.device, [choices[i].temperature for i in drawn]
        tempered = temperatures != [1.0] * len(drawn)  # otherwise the weights are there
        weight_BV = below_BV if tempered else exp_BV
        if len(drawn) < len(choices):
            weight_BV = weight_BV[drawn]
        if tempered:
            weight_BV.div_(torch.tensor(temperatures, device=device)[:, None]).exp_()
        for row, i in enumerate(drawn):
            if choices[i].top_k > 0 or choices[i].top_p < 1:
                _filter(weight_BV[row], choices[i].top_k, choices[i].top_p)
        uniform_B = torch.tensor([choices[i].uniform for i in drawn], dtype=torch.float64, device=device)
        for i, token in zip(drawn, _invert(weight_BV, uniform_B).tolist(), strict=True):
            tokens[i] = token
    for i, c in enumerate(choices):
        if c.temperature == 0:
            tokens[i] = int(logits_BV[i].argmax())
    return tokens, log_sum_B


def log_normaliser(logits_BV: Tensor) -> Tensor:
    """log sum exp of each row at temperature 1, float64 [B]."""
    below_BV, max_B = _below_largest(logits_BV)
    return _log_sum(below_BV.exp_(), max_B)


def _below_largest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 logits less each row's largest, and the largest [B]."""
    max_B = logits_BV.amax(-1).float()
    return logits_BV.to(torch.float32, copy=True).sub_(max_B[:, None]), max_B


def _log_sum(exp_BV: Tensor, max_B: Tensor) -> Tensor:
    return _block_sums(exp_BV).sum(-1).log_() + max_B.double()


def _blocks(weight_BV: Tensor) -> Tensor:
    """[B, N, W], the last block filled up with zeros."""
    filled_up: Tensor = pad(weight_BV, (0, -weight_BV.shape[1] % BLOCK))
    return filled_up.view(len(weight_BV), -1, BLOCK)


def _block_sums(weight_BV: Tensor) -> Tensor:
    """Float64 [B, N] of float32 sums."""
    return _blocks(weight_BV).sum(-1).double()


def _invert(weight_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at `uniform` of each row's cumulative distribution; never one of weight 0."""
    rows = torch.arange(len(weight_BV), device=weight_BV.device)
    blocks_BNW = _blocks(weight_BV)
    cumulative_BN = blocks_BNW.sum(-1).double().cumsum(-1)
    wanted_B = uniform_B * cumulative_BN[:, -1]
    # the first block, then the first entry in it, above u x total: of weight 0 neither can be
    block_B = torch.searchsorted(cumulative_BN, wanted_B[:, None], right=True)[:, 0].clamp_(max=blocks_BNW.shape[1] - 1)
    before_B = torch.where(block_B > 0, cumulative_BN[rows, block_B - 1], 0.0)
    inside_BW = blocks_BNW[rows, block_B].double().cumsum(-1)
    # the block's sum in float32 may be above that in float64; its last entry with a weight ends it
    wanted_B = torch.minimum(wanted_B - before_B, inside_BW[:, -1].nextafter(torch.zeros_like(wanted_B)))
    place_B = torch.searchsorted(inside_BW, wanted_B[:, None], right=True)[:, 0]
    # where weights are no numbers there is no such place; the row's normaliser says so
    return (block_B * BLOCK + place_B).clamp_(max=weight_BV.shape[1] - 1)


def _filter(weight_V: Tensor, top_k: int, top_p: float) -> None:
    """Zero what top-k and top-p exclude, in place. Ties keep the smaller token id; one token always stays."""
    vocab = len(weight_V)
    num_k = top_k if 0 < top_k < vocab else vocab
    values = weight_V.topk(min(num_k, TRIED_FIRST) if num_k == vocab else num_k).values
    kept = num_k
    if top_p < 1:
        total = _block_sums(weight_V[None]).sum() if num_k == vocab else values.sum(dtype=torch.float64)
        if values.sum(dtype=torch.float64) < top_p * total:
            values = weight_V.topk(num_k).values
        # keep the shortest prefix that reaches top_p: entries whose predecessors do not reach it yet
        before = values.cumsum(0, dtype=torch.float64) - values
        kept = max(1, int((before < top_p * total).sum()))
    keep_V = weight_V > values[kept - 1]
    (ties,) = (weight_V == values[kept - 1]).nonzero(as_tuple=True)
    keep_V[ties[: kept - int(keep_V.sum())]] = True
    weight_V.masked_fill_(~keep_V, 0)


def top_logprobs(logits_BV: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k likeliest tokens of each row with their logprobs, likeliest first."""
    values, tokens = logits_BV.float().topk(min(k, logits_BV.shape[1]), dim=-1)
    logprobs = (values.double() - log_normaliser(logits_BV)[:, None]).tolist()
    return [list(zip(ids, row, strict=True)) for ids, row in zip(tokens.tolist(), logprobs, strict=True)]
