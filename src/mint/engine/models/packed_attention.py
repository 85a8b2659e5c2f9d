"""Causal attention within every sequence of a packed row, forward and backward.

Explicit products beat the fused CPU kernel's backward, and blocks of query rows skip most of what the causal mask hides and
keep memory linear in the length. The row's heads are gathered into scratch where every sequence has a multiple of STEP
positions, block after block: the products then take contiguous operands of few different shapes, for which the processor's
kernels are fast and need not be made anew for every length. What fills a sequence up repeats its last token, which is its
own and comes after everything that is read. Shapes depend on a sequence's own length alone.
Shape letters: T tokens of the row, P positions of the filled-up sequences together, N heads (H of q, then K each of k and
v), G query heads per key/value head, E head_dim, b rows of a block, n keys it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mint.engine.models.attention import QUERY_BLOCK, causal_mask, probabilities, reserve
from mint.engine.workspace import Workspace

STEP = 32


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
    """Of one packed row. `heads`: of queries and of keys; sequences: [start, end) rows that follow one another."""

    def __init__(
        self, ws: Workspace, sequences: Sequence[tuple[int, int]], heads: tuple[int, int], head_dim: int
    ) -> None:
        self._ws, self._heads, self._head_dim = ws, heads, head_dim
        num_q, num_kv = heads
        num_tokens = sequences[-1][1]
        blocks, queries, keys_values, filled = [], [], [], []
        query_at, keys_at = 0, 0
        for first, last in sequences:
            length = -(-(last - first) // STEP) * STEP
            token_n = np.minimum(first + np.arange(length), last - 1)
            keys_values.append((num_q + np.arange(2 * num_kv)[:, None]) * num_tokens + token_n)
            for start in range(0, length, QUERY_BLOCK):
                end = min(start + QUERY_BLOCK, length)
                blocks.append(_Block(start, end, length, query_at, keys_at))
                queries.append(np.arange(num_q)[:, None] * num_tokens + token_n[start:end])
                filled.append(np.broadcast_to(first + np.arange(start, end) >= last, (num_q, end - start)))
                query_at += num_q * (end - start)
            keys_at += 2 * num_kv * length
        self._blocks = blocks
        self._longest = max(block.length for block in blocks)
        source_q, source_kv = (np.concatenate([part.ravel() for part in parts]) for parts in (queries, keys_values))
        filled_q = np.concatenate([part.ravel() for part in filled])
        source = np.concatenate([source_q, source_kv])
        # the later of two places with one source is a filling, but for the last token, whose first place counts
        place = np.empty((num_q + 2 * num_kv) * num_tokens, np.int64)
        place[source[::-1]] = np.arange(len(source))[::-1]
        place_TH = place[: num_q * num_tokens].reshape(num_q, num_tokens).T.ravel()
        head, token = np.divmod(source_q, num_tokens)
        self._num_queries = len(source_q)
        self._source, self._place, self._place_TH, self._source_TH, self._filled = (
            torch.from_numpy(np.ascontiguousarray(index)).to(ws.device)
            for index in (source, place, place_TH, token * num_q + head, np.flatnonzero(filled_q))
        )

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
        torch.index_select(grads, 0, self._place, out=grad_NTE.view(-1, self._head_dim))

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
