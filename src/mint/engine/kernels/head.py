"""`CompiledHead`: final norm, unembedding and the log-probability of targets through compiled kernels. See models/head.py,
which computes the same with torch. Logits are float32 here, so nothing is to be made exact."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint.engine.kernels import softmax as k
from mint.engine.kernels.adapter import adapted_table
from mint.engine.kernels.low_rank import GAP
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS
from mint.engine.kernels.simd import WIDTH
from mint.engine.kernels.weights import PackedWeights
from mint.engine.lora import UNEMBED_SITE, AdapterGradient, Segment, Site
from mint.engine.models.config import DecoderConfig
from mint.engine.models.head import Derivative, Targets
from mint.engine.models.ops import rms_norm, rms_norm_backward
from mint.engine.plan import compiled_rows_per_chunk
from mint.engine.workspace import Workspace


class CompiledHead:
    def __init__(self, config: DecoderConfig, packed: PackedWeights, workspace: Workspace) -> None:
        self._config, self._packed, self._ws = config, packed, workspace
        self.rows_per_chunk = compiled_rows_per_chunk(config.vocab_size)

    def normalise(self, final_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Normed rows in bf16 and 1 / rms, for the backward."""
        normed_TD = self._ws.get("head.normed", tuple(final_TD.shape), final_TD.dtype)
        return normed_TD, rms_norm(self._ws, final_TD, self._packed.final_norm_D, self._config.rms_norm_eps, normed_TD)

    def backward_norm(self, grad_TD: Tensor, final_TD: Tensor, rstd: Tensor) -> Tensor:
        """Float32 gradient by the last layer's output."""
        return rms_norm_backward(self._ws, grad_TD, final_TD, self._packed.final_norm_D, rstd).clone()

    def _scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._ws.get(f"head.{name}", shape, dtype)

    def _adapted(
        self, rows: int, weights: Mapping[Site, Any] | None, gradient: AdapterGradient | None
    ) -> tuple[np.ndarray, list[int], int]:
        """The table of a chunk with one adapter at most, addresses of scratch for its low ranks, and their number."""
        weights = weights if weights is not None and UNEMBED_SITE in weights else None
        table, count, ranks = adapted_table([(0, rows, weights, gradient.flat_P if gradient is not None else None)])
        wide = self._scratch("wide", rows + WIDTH, ranks)
        narrow = self._scratch("narrow", rows, ranks, dtype=torch.bfloat16)
        return table, [count, wide.data_ptr(), narrow.data_ptr()], ranks

    def _padded_logits(self, normed_CD: Tensor, weights: Mapping[Site, Any] | None) -> Tensor:
        """[C, V filled up], in a buffer that the next call reuses."""
        rows, blocks = len(normed_CD), self._packed.vocab_blocks
        table, (count, wide, narrow), ranks = self._adapted(rows, weights, None)
        logits = self._scratch("logits", rows, blocks * WIDTH)
        k.logits_kernel(
            table.ctypes.data, count, self._packed.unembed_site, normed_CD.data_ptr(), rows, self._config.hidden_size // 2,
            self._packed.unembed, blocks, wide, narrow, ranks, logits.data_ptr(),
        )  # fmt: skip
        return logits

    def logits_for(self, normed_CD: Tensor, segment: Segment) -> Tensor:
        """[C, V] float32 of rows of this segment, in a buffer that the next call reuses."""
        return self._padded_logits(normed_CD, segment.weights)[:, : self._config.vocab_size]

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
        logprob_P = torch.empty(len(targets.token_P))
        step, row_P = self.rows_per_chunk, targets.row_P.numpy()
        for first in range(0, len(targets.rows_R), step):
            rows_C = targets.rows_R[first : first + step]
            borders = np.searchsorted(row_P, np.arange(first, first + len(rows_C) + 1)).astype(np.int64)
            pairs = slice(int(borders[0]), int(borders[-1]))
            normed_CD = normed_TD.index_select(0, rows_C)
            logits_CV = self._padded_logits(normed_CD, segment.weights)
            most_C, sum_C = self._statistics(logits_CV)
            row_p, token_p = targets.row_P[pairs] - first, targets.token_P[pairs]
            logprob_P[pairs] = logits_CV[row_p, token_p] - most_C[row_p] - sum_C.log()[row_p]
            if derivative is not None:
                grad_p = derivative(logprob_P[pairs], pairs).float().contiguous()
                grad_CV = self._gradient(logits_CV, (most_C, sum_C), (row_p, token_p, grad_p), borders - borders[0])
                grad_CD = self._back(normed_CD, grad_CV, segment)
                if grad_normed_TD is not None:
                    grad_normed_TD[rows_C] = grad_CD.to(grad_normed_TD.dtype)
            yield
        return logprob_P

    def _statistics(self, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit of every row and the sum of the others' exponentials below it, [C]."""
        rows, step = logits_CV.shape
        most_C, sum_C = torch.empty(rows), torch.empty(rows)
        k.statistics_kernel(
            logits_CV.data_ptr(), rows, self._config.vocab_size, step, most_C.data_ptr(), sum_C.data_ptr()
        )
        return most_C, sum_C

    def _gradient(
        self,
        logits_CV: Tensor,
        statistics: tuple[Tensor, Tensor],
        pairs: tuple[Tensor, Tensor, Tensor],
        borders: np.ndarray,
    ) -> Tensor:
        """Of the loss by the logits, bf16 [C, V filled up], from that by the pairs' logprobs."""
        (most_C, sum_C), (row_p, token_p, grad_p) = statistics, pairs
        rows, step = logits_CV.shape
        factor_C = torch.zeros(rows).index_add_(0, row_p, grad_p).div_(sum_C).neg_()
        grad_CV = self._scratch("grad_logits", rows, step, dtype=torch.bfloat16)
        k.gradient_kernel(
            logits_CV.data_ptr(), rows, step, most_C.data_ptr(), factor_C.data_ptr(), borders.ctypes.data,
            token_p.data_ptr(), grad_p.data_ptr(), grad_CV.data_ptr(),
        )  # fmt: skip
        return grad_CV

    def _back(self, normed_CD: Tensor, grad_CV: Tensor, segment: Segment) -> Tensor:
        """The gradient by normed rows, float32 [C, D]; adds the unembedding adapter's."""
        threads, (rows, size) = torch.get_num_threads(), normed_CD.shape
        table, (count, wide, narrow), ranks = self._adapted(rows, segment.weights, segment.gradient)
        columns = -(-rows // WIDTH) * WIDTH + 2 * (GAP + WIDTH)
        panel = TILE_BLOCKS * BLOCK_BYTES * (rows + WIDTH) + 4 * TILE_BLOCKS * WIDTH * ranks
        half = {"dtype": torch.bfloat16}
        out = self._scratch("grad", rows, size)
        k.back_kernel(
            table.ctypes.data, count, self._packed.unembed_site, normed_CD.data_ptr(), rows, grad_CV.data_ptr(),
            self._packed.vocab_blocks, self._packed.unembed_back, size, out.data_ptr(), wide, narrow,
            self._scratch("wide_back", rows + WIDTH, ranks).data_ptr(),
            self._scratch("narrow_back", rows, ranks, **half).data_ptr(), ranks,
            self._scratch("turned", ranks, columns, **half).data_ptr(),
            self._scratch("turned_back", ranks, columns, **half).data_ptr(), 2 * columns,
            self._scratch("panel", threads, panel, dtype=torch.uint8).data_ptr(), panel, threads=threads,
        )  # fmt: skip
        return out
