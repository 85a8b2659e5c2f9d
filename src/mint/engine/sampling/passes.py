"""`Passes`: how the sampler's prompts and steps are computed; torch_passes.py and compiled_passes.py implement it.

Shape letters: C chunks of a prefill pass, B rows of a decode step, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mint.engine.models.config import DecoderConfig
from mint.engine.sampling.choose import Choice
from mint.engine.sampling.chunks import Chunk
from mint.engine.sampling.grouping import Grouping
from mint.engine.sampling.request import Row

ExactLogits = Callable[[Tensor], Tensor]  # of one token for each row, [B] -> [B] float32


class Passes(Protocol):
    """dtype, device: of keys and values."""

    config: DecoderConfig
    dtype: torch.dtype
    device: torch.device

    @property
    def grouping(self) -> Grouping:
        """What may be computed at once. The first call may prepare weights: whoever only trains needs nothing of it."""
        ...

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute these prompt positions, whose keys and values enter the prompts' caches. The residual stream after the last
        layer at every chunk's last position, [C, D]."""
        ...

    def decode(self, rows: Sequence[Row]) -> Tensor:
        """Compute the last token of every sequence at its place's next position, for which there is room. [B, D]."""
        ...

    def logits(self, final_BD: Tensor, rows: Sequence[Row], real: Sequence[int]) -> tuple[Tensor, ExactLogits | None]:
        """Logits [len(real), V] of the rows with these numbers, those with a sequence, in memory that the next call reuses;
        and, where they are rounded, exact ones."""
        ...

    def choose(self, logits_BV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], Tensor]:
        """See sampling/choose.py."""
        ...
