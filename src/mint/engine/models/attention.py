"""Causal attention of some positions of one sequence, in blocks of query rows against the keys that they may see.

What a position's attention depends on is fixed: it reads as many keys as there are up to the next multiple of STEP, those
after its own masked. Rows of a block are filled up to a multiple of FILL, so that few shapes occur. Shape letters: K
key/value heads, G query heads per key/value head, E head_dim, b query rows of a block, n keys that it reads, m keys that
some of its rows may not see.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from mint.engine.workspace import Workspace

QUERY_BLOCK = 256  # of a training pass
STEP = 128
FILL = 32


@cache
def causal_mask(rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, keys], -inf where a key comes after the row; both count from the same position."""
    return torch.full((rows, keys), -math.inf, dtype=dtype, device=device).triu_(1)


def probabilities(ws: Workspace, q_KGE: Tensor, k_KnE: Tensor, mask_bm: Tensor) -> Tensor:
    """softmax(q k / sqrt(E) + mask) of one block, [K, G b, n]; the mask is for the last m keys."""
    num_kv, grouped, head_dim = q_KGE.shape
    num_keys, (rows, num_masked) = k_KnE.shape[1], mask_bm.shape
    scores = ws.get("attn.scores", (num_kv, grouped, num_keys), q_KGE.dtype)
    torch.baddbmm(scores, q_KGE, k_KnE.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=scores)
    scores.view(num_kv, grouped // rows, rows, num_keys)[..., num_keys - num_masked :].add_(mask_bm)
    probs = ws.get("attn.probs", (num_kv, grouped, num_keys), q_KGE.dtype)
    return torch.softmax(scores, -1, out=probs)


def reserve(ws: Workspace, names: tuple[str, ...], heads: int, num_keys: int, dtype: torch.dtype) -> None:
    """Scratch for the block that sees most."""
    for name in names:
        ws.reserve(name, heads * min(QUERY_BLOCK, num_keys) * num_keys, dtype)


def attend(ws: Workspace, q: Tensor, k: Tensor, v: Tensor, past: int, out: Tensor) -> None:
    """Attention of the t positions from `past` on.

    q: [K, G, t, E]; k, v: [K, n, E], finite, with n a multiple of STEP and no less than past + t; out: [t, K, G, E], written.
    """
    num_kv, group, num_new, head_dim = q.shape
    end = past + num_new
    reserve(ws, ("attn.scores", "attn.probs"), num_kv * group, -(-end // STEP) * STEP, q.dtype)
    mask = causal_mask(STEP + FILL, STEP, q.dtype, q.device)
    for first in range(past - past % STEP, end, STEP):
        start, stop = max(first, past), min(first + STEP, end)
        rows = stop - start
        filled = -(-rows // FILL) * FILL
        q_block = ws.get("attn.q", (num_kv, group, filled, head_dim), q.dtype)
        q_block[:, :, :rows] = q[:, :, start - past : stop - past]
        keys, values = k[:, : first + STEP], v[:, : first + STEP]
        probs = probabilities(ws, q_block.flatten(1, 2), keys, mask[start - first :][:filled])
        block = ws.get("attn.out", (num_kv, group * filled, head_dim), q.dtype)
        torch.bmm(probs, values, out=block)
        out[start - past : stop - past] = block.view(num_kv, group, filled, head_dim)[:, :, :rows].permute(2, 0, 1, 3)
