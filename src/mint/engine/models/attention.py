"""Causal attention of the last positions of one sequence, in blocks of query rows against all keys before their end.

Borders are counted from the start of the sequence, so shapes, and with them the bits, depend on the sequence alone. Shape
letters: K key/value heads, G query heads per key/value head, E head_dim, b query rows of a block, n keys that it sees.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from mint.engine.workspace import Workspace

QUERY_BLOCK = 256


@cache
def _causal_mask(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((rows, rows), -math.inf, dtype=dtype, device=device).triu_(1)


def probabilities(ws: Workspace, q_KGE: Tensor, k_KnE: Tensor, rows: int) -> Tensor:
    """softmax(q k / sqrt(E)) of one block, [K, G b, n]; the last `rows` keys are masked causally."""
    num_kv, grouped, head_dim = q_KGE.shape
    num_keys = k_KnE.shape[1]
    scores = ws.get("attn.scores", (num_kv, grouped, num_keys), q_KGE.dtype)
    torch.baddbmm(scores, q_KGE, k_KnE.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=scores)
    if rows > 1:
        diagonal = scores.view(num_kv, grouped // rows, rows, num_keys)[..., num_keys - rows :]
        diagonal.add_(_causal_mask(rows, scores.dtype, scores.device))
    probs = ws.get("attn.probs", (num_kv, grouped, num_keys), q_KGE.dtype)
    return torch.softmax(scores, -1, out=probs)


def reserve(ws: Workspace, names: tuple[str, ...], heads: int, num_keys: int, dtype: torch.dtype) -> None:
    """Scratch for the block that sees most."""
    for name in names:
        ws.reserve(name, heads * min(QUERY_BLOCK, num_keys) * num_keys, dtype)


def _blocks(first: int, end: int) -> list[tuple[int, int]]:
    """Query rows [first, end) cut at multiples of QUERY_BLOCK counted from row 0."""
    borders = [first, *range((first // QUERY_BLOCK + 1) * QUERY_BLOCK, end, QUERY_BLOCK), end]
    return list(pairwise(borders))


def attend(ws: Workspace, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Attention of the last t positions of a sequence over all n of it.

    q: [K, G, t, E]; k, v: [K, n, E] with n >= t; out: [t, K, G, E], written.
    """
    num_kv, group, num_new, head_dim = q.shape
    past = k.shape[1] - num_new
    reserve(ws, ("attn.scores", "attn.probs"), num_kv * group, k.shape[1], q.dtype)
    for start, end in _blocks(past, past + num_new):
        rows = end - start
        q_block = q[:, :, start - past : end - past].reshape(num_kv, group * rows, head_dim)
        probs = probabilities(ws, q_block, k[:, :end], rows)
        block = ws.get("attn.out", (num_kv, group * rows, head_dim), q.dtype)
        torch.bmm(probs, v[:, :end], out=block)
        out[start - past : end - past].copy_(block.view(num_kv, group, rows, head_dim).permute(2, 0, 1, 3))
