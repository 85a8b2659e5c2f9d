"""Causal attention within every sequence of a packed row, forward and backward.

Explicit products beat the fused CPU kernel's backward, and blocks of query rows skip most of what the causal mask hides and
keep memory linear in the length. The row's heads are gathered into scratch where every sequence has a multiple of STEP
positions, block after block: the products then take contiguous operands of few different shapes, for which the processor's
kernels are fast and need not be made anew for every length. What fills a sequence up repeats its last token, which is its
own and comes after everything that is read. Where sequences begin alike, one has the rows of that beginning and the
others gather their keys and values from there; their own queries begin at the multiple of STEP before the first own row.
Blocks end at the same places whatever is shared, and shapes depend on a sequence's length and on what it shares alone.
Shape letters: T tokens of the row, P positions of the filled-up sequences together, N heads (H of q, then K each of k and
v), G query heads per key/value head, E head_dim, b rows of a block, n keys it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mint.engine.models.attention import QUERY_BLOCK, causal_mask, probabilities, reserve
from mint.engine.workspace import Workspace

STEP = 32
SHARED_AT_ONCE = 2**13  # head rows whose gradients are added in float32 at once


@dataclass(frozen=True, slots=True, repr=False)
class PackedSequence:
    """Where each of a sequence's tokens lies in the packed row. The first `num_shared` are an earlier sequence's."""

    rows_N: np.ndarray
    num_shared: int = 0


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows [start, end) of a filled-up sequence of `length` positions. Where its queries begin among all gathered head
    rows, and its sequence's keys and values among those of keys and values."""

    start: int
    end: int
    length: int
    query_at: int
    keys_at: int


class PackedAttention:
    """Of one packed row. `heads`: of queries and of keys; the sequences' own rows follow one another."""

    def __init__(
        self, ws: Workspace, sequences: Sequence[PackedSequence], heads: tuple[int, int], head_dim: int
    ) -> None:
        self._ws, self._heads, self._head_dim = ws, heads, head_dim
        num_q, num_kv = heads
        num_tokens = int(sequences[-1].rows_N[-1]) + 1
        blocks, queries, keys_values, filled, shared = [], [], [], [], []
        query_at, keys_at = 0, 0
        for sequence in sequences:
            size, first = len(sequence.rows_N), sequence.num_shared
            length = -(-size // STEP) * STEP
            token_n = sequence.rows_N[np.minimum(np.arange(length), size - 1)]
            keys_values.append((num_q + np.arange(2 * num_kv)[:, None]) * num_tokens + token_n)
            shared.append(keys_at + np.arange(2 * num_kv)[:, None] * length + np.arange(first))
            borders = range(first - first % QUERY_BLOCK + QUERY_BLOCK, length, QUERY_BLOCK)
            for start, end in pairwise([first - first % STEP, *borders, length]):
                blocks.append(_Block(start, end, length, query_at, keys_at))
                queries.append(np.arange(num_q)[:, None] * num_tokens + token_n[start:end])
                position = np.arange(start, end)
                filled.append(np.broadcast_to((position < first) | (position >= size), (num_q, end - start)))
                query_at += num_q * (end - start)
            keys_at += 2 * num_kv * length
        self._blocks = blocks
        self._longest = max(block.length for block in blocks)
        source_q, source_kv, shared_kv, filled_q = (
            np.concatenate([part.ravel() for part in parts]) for parts in (queries, keys_values, shared, filled)
        )
        source = np.concatenate([source_q, source_kv])
        # of several places with one source the first counts: later ones are fillings, or keys and values that are shared
        place = np.empty((num_q + 2 * num_kv) * num_tokens, np.int64)
        place[source[::-1]] = np.arange(len(source))[::-1]
        place_TH = place[: num_q * num_tokens].reshape(num_q, num_tokens).T.ravel()
        head, token = np.divmod(source_q, num_tokens)
        self._num_queries = len(source_q)
        self._source, self._place, self._place_TH, self._source_TH, self._filled = (
            self._index(index) for index in (source, place, place_TH, token * num_q + head, np.flatnonzero(filled_q))
        )
        self._shared = self._shared_gradients(source_kv[shared_kv], shared_kv + len(source_q))

    def _index(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(index)).to(self._ws.device)

    def _shared_gradients(self, source: np.ndarray, place: np.ndarray) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Places of gradients that belong to another sequence's keys and values: those head rows, which of them each
        place is for, and the places; not too many at once."""
        order = np.argsort(source, kind="stable")
        parts = []
        for first in range(0, len(order), SHARED_AT_ONCE):
            chosen = order[first : first + SHARED_AT_ONCE]
            rows, targets = np.unique(source[chosen], return_inverse=True)
            parts.append((self._index(rows), self._index(targets), self._index(place[chosen])))
        return parts

    def __call__(self, layer: int, qkv_NTE: Tensor, out_TH: Tensor) -> None:
        """Writes the attention of every token."""
        queries, keys_values = self._gather(qkv_NTE)
        out = self._scratch("attn.out", self._num_queries, qkv_NTE.dtype)
        for block in self._blocks:
            k, v = self._keys_values(keys_values, block)
            probs = probabilities(self._ws, self._rows(queries, block), k, self._mask(block, k))
            torch.bmm(probs, v, out=self._rows(out, block))
        torch.index_select(out, 0, self._place_TH, out=out_TH.view(-1, self._head_dim))

    def backward(self, grad_TH: Tensor, qkv_NTE: Tensor, grad_NTE: Tensor) -> None:
        """From the gradient by the output that by the heads, probabilities computed once more."""
        scale, dtype = self._head_dim**-0.5, qkv_NTE.dtype
        queries, keys_values = self._gather(qkv_NTE)
        grad_out = self._scratch("attn.out", self._num_queries, dtype)
        torch.index_select(grad_TH.view(-1, self._head_dim), 0, self._source_TH, out=grad_out)
        grad_out.index_fill_(0, self._filled, 0)  # nobody reads what was computed there
        grads = self._scratch("attn.grads", len(self._source), dtype)
        grad_queries, grad_keys_values = grads[: self._num_queries], grads[self._num_queries :]
        for block in reversed(
            self._blocks
        ):  # the last block of a sequence sees all its keys: it writes, the others add
            more = 0 if block.end == block.length else 1
            q, grad = self._rows(queries, block), self._rows(grad_out, block)
            k, v = self._keys_values(keys_values, block)
            grad_k, grad_v = self._keys_values(grad_keys_values, block)
            probs = probabilities(self._ws, q, k, self._mask(block, k))
            grad_v.baddbmm_(probs.transpose(1, 2), grad, beta=more)
            grad_probs = self._ws.get("attn.scores", tuple(probs.shape), dtype)
            torch.bmm(grad, v.transpose(1, 2), out=grad_probs)
            grad_scores = self._ws.get("attn.grad_scores", tuple(probs.shape), dtype)
            torch.ops.aten._softmax_backward_data.out(grad_probs, probs, -1, dtype, grad_input=grad_scores)
            grad_q = self._rows(grad_queries, block)
            torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
            grad_k.baddbmm_(grad_scores.transpose(1, 2), q, beta=more, alpha=scale)
        heads = grad_NTE.view(-1, self._head_dim)
        torch.index_select(grads, 0, self._place, out=heads)
        for rows, targets, places in self._shared:  # summed in float32: there may be many
            heads[rows] = heads[rows].float().index_add_(0, targets, grads[places].float()).to(dtype)

    def _scratch(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        return self._ws.get(name, (rows, self._head_dim), dtype)

    def _gather(self, qkv_NTE: Tensor) -> tuple[Tensor, Tensor]:
        """Head rows of all blocks' queries, and of all sequences' keys and values."""
        names = ("attn.scores", "attn.probs", "attn.grad_scores")
        reserve(self._ws, names, self._heads[0], self._longest, qkv_NTE.dtype)
        heads = self._scratch("attn.heads", len(self._source), qkv_NTE.dtype)
        torch.index_select(qkv_NTE.view(-1, self._head_dim), 0, self._source, out=heads)
        return heads[: self._num_queries], heads[self._num_queries :]

    def _mask(self, block: _Block, like: Tensor) -> Tensor:
        rows = block.end - block.start
        return causal_mask(rows, rows, like.dtype, like.device)

    def _rows(self, flat: Tensor, block: _Block) -> Tensor:
        """[K, G b, E] of the block."""
        num_q, num_kv = self._heads
        rows = num_q * (block.end - block.start)
        return flat[block.query_at : block.query_at + rows].view(num_kv, rows // num_kv, self._head_dim)

    def _keys_values(self, flat: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
        """[K, n, E] each, those that the block sees."""
        num_kv = self._heads[1]
        both = flat[block.keys_at : block.keys_at + 2 * num_kv * block.length]
        k, v = both.view(2, num_kv, block.length, self._head_dim)[:, :, : block.end]
        return k, v
