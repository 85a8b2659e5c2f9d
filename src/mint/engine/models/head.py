"""Final norm, unembedding and the log-probability of targets, in chunks of rows: whole logits never exist.

Logits of the base dtype are rounded, so in bf16 the target's own logit is computed again in float32 and takes the
rounded one's place in the softmax sum: more exact, and never above 0. Shape letters: T rows of the packed row, C rows of
a chunk, D hidden, V vocabulary, P (row, target) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.engine.lora import UNEMBED_SITE, Segment, SiteWeights
from mint.engine.models.decoder import Decoder
from mint.engine.models.ops import rms_norm, rms_norm_backward

SOFTMAX_ROWS = 32  # rows whose float32 softmax is held at once; stays in the processor's cache
CHUNK_VALUES = 2**24  # logits of one chunk

# (logprobs of some pairs, their positions among all pairs) -> derivative of the loss by those logprobs
Derivative = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True, repr=False)
class Targets:
    """Pair p scores token_P[p] at packed row rows_R[row_P[p]]; row_P never decreases."""

    rows_R: Tensor
    row_P: Tensor
    token_P: Tensor


def rows_per_chunk(vocab_size: int) -> int:
    return max(SOFTMAX_ROWS, min(1024, CHUNK_VALUES // vocab_size // SOFTMAX_ROWS * SOFTMAX_ROWS))


class Head:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._eps = decoder.config.rms_norm_eps
        self._norm_D = decoder.weights.final_norm_D
        self._unembed = decoder.weights.unembed
        self._unembed_VD = self._unembed.weight_OI
        self.rows_per_chunk = rows_per_chunk(len(self._unembed_VD))

    def normalise(self, final_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed rows in the base dtype and 1 / rms, for the backward."""
        normed_TD = self._decoder.ws.get("head.normed", tuple(final_TD.shape), final_TD.dtype)
        return normed_TD, rms_norm(self._decoder.ws, final_TD, self._norm_D, self._eps, normed_TD)

    def backward_norm(self, grad_TD: Tensor, final_TD: Tensor, rstd: Tensor) -> Tensor:
        """Float32 gradient by the last layer's output."""
        return rms_norm_backward(self._decoder.ws, grad_TD, final_TD, self._norm_D, rstd).clone()

    def logits(self, normed_CD: Tensor, lora: SiteWeights | None, u_CR: Tensor | None = None) -> Tensor:
        """[C, V] in the base dtype, in a buffer that the next call reuses."""
        out = self._decoder.ws.get("head.logits", (len(normed_CD), len(self._unembed_VD)), normed_CD.dtype)
        out = self._unembed.forward(normed_CD, out)
        if lora is not None:
            out.addmm_(normed_CD @ lora.a_RI.t() if u_CR is None else u_CR, lora.b_OR.t())
        return out

    def logits_for(self, normed_CD: Tensor, segment: Segment) -> Tensor:
        """[C, V] of rows of this segment, in a buffer that the next call reuses."""
        return self.logits(normed_CD, segment.at(UNEMBED_SITE))

    def exact_logits(self, normed_PD: Tensor, token_P: Tensor, lora: SiteWeights | None) -> Tensor:
        """The logit of one token per row, in float32."""
        logit_P = (normed_PD.float() * self._unembed_VD[token_P].float()).sum(-1)
        if lora is not None:
            logit_P += ((normed_PD @ lora.a_RI.t()).float() * lora.b_OR[token_P].float()).sum(-1)
        return logit_P

    def score(
        self,
        normed_TD: Tensor,
        targets: Targets,
        segment: Segment,
        derivative: Derivative | None = None,
        grad_normed_TD: Tensor | None = None,
    ) -> Generator[None, None, Tensor]:
        """Logprobs [P] of `targets`; with `derivative`, also the gradient by the rows into `grad_normed_TD`.

        Yields between chunks. The unembedding adapter's gradient goes to the segment's.
        """
        logprob_P = torch.empty(len(targets.token_P), dtype=torch.float32, device=normed_TD.device)
        step = self.rows_per_chunk
        borders = torch.arange(0, len(targets.rows_R) + step, step, device=normed_TD.device)
        pair_borders = torch.searchsorted(targets.row_P, borders).tolist()
        for i, first in enumerate(range(0, len(targets.rows_R), step)):
            rows_C = targets.rows_R[first : first + step]
            pairs = slice(pair_borders[i], pair_borders[i + 1])
            chunk = _Chunk(normed_TD[rows_C], targets.row_P[pairs] - first, targets.token_P[pairs], pairs)
            grad_CD = self._score_chunk(chunk, segment, logprob_P, derivative)
            if grad_CD is not None and grad_normed_TD is not None:
                grad_normed_TD[rows_C] = grad_CD
            yield
        return logprob_P

    def _score_chunk(
        self, chunk: _Chunk, segment: Segment, logprob_P: Tensor, derivative: Derivative | None
    ) -> Tensor | None:
        lora = segment.at(UNEMBED_SITE)
        u_CR = chunk.normed_CD @ lora.a_RI.t() if lora is not None else None
        logits_CV = self.logits(chunk.normed_CD, lora, u_CR)
        exact_P = None
        if logits_CV.dtype != torch.float32:
            step = rows_per_chunk(logits_CV.shape[1])  # there may be many pairs for a row
            blocks = [slice(first, first + step) for first in range(0, len(chunk.row_P), step)]
            exact_P = torch.cat(
                [self.exact_logits(chunk.normed_CD[chunk.row_P[b]], chunk.token_P[b], lora) for b in blocks]
            )
        borders = torch.arange(0, len(logits_CV) + SOFTMAX_ROWS, SOFTMAX_ROWS, device=logits_CV.device)
        pair_borders = torch.searchsorted(chunk.row_P, borders).tolist()
        for i, first in enumerate(range(0, len(logits_CV), SOFTMAX_ROWS)):
            pairs = slice(pair_borders[i], pair_borders[i + 1])
            block = logits_CV[first : first + SOFTMAX_ROWS]
            where = slice(chunk.pairs.start + pairs.start, chunk.pairs.start + pairs.stop)
            exact = exact_P[pairs] if exact_P is not None else None
            logprob_P[where] = self._softmax_block(
                block, (chunk.row_P[pairs] - first, chunk.token_P[pairs]), exact, where, derivative
            )
        if derivative is None:
            return None
        grad_CD = logits_CV @ self._unembed_VD
        if lora is not None and u_CR is not None:
            grad_u_CR = logits_CV @ lora.b_OR
            if segment.gradient is not None:
                segment.gradient.add(UNEMBED_SITE, grad_u_CR.t() @ chunk.normed_CD, u_CR.t() @ logits_CV)
            grad_CD.addmm_(grad_u_CR, lora.a_RI)
        return grad_CD

    def _softmax_block(
        self,
        logits_BV: Tensor,
        pairs: tuple[Tensor, Tensor],
        exact_P: Tensor | None,
        where: slice,
        derivative: Derivative | None,
    ) -> Tensor:
        """Logprobs of the block's pairs; with `derivative`, logits_BV is overwritten by the loss gradient."""
        row_P, token_P = pairs
        max_B = logits_BV.amax(-1, keepdim=True).float()
        exp_BV = self._decoder.ws.get("head.softmax", tuple(logits_BV.shape), torch.float32)
        exp_BV.copy_(logits_BV).sub_(max_B)  # subtracting across types would make a tensor of its own
        rounded_P = exp_BV[row_P, token_P]
        exp_BV.exp_()
        sum_B = exp_BV.sum(-1)
        if exact_P is None:
            logprob_P = rounded_P - sum_B[row_P].log()
        else:
            exact_P = exact_P - max_B[row_P, 0]
            logprob_P = exact_P - (sum_B[row_P] - rounded_P.exp() + exact_P.exp()).log()
        if derivative is not None:
            grad_P = derivative(logprob_P, where)
            weight_B = torch.zeros_like(sum_B).index_add_(0, row_P, grad_P)
            exp_BV.mul_((-weight_B / sum_B)[:, None])
            exp_BV.index_put_((row_P, token_P), grad_P, accumulate=True)
            logits_BV.copy_(exp_BV)
        return logprob_P


@dataclass(frozen=True, slots=True, repr=False)
class _Chunk:
    """Rows of one unembedding product; `pairs` is their place among all pairs, row_P counts within the chunk."""

    normed_CD: Tensor
    row_P: Tensor
    token_P: Tensor
    pairs: slice
