"""The sampler's passes through compiled kernels: a row's bits depend on its own sequence alone, so everything is computed at
once, and a prompt may be cut anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from torch import Tensor

from mint.engine.kernels.choice import choose_compiled
from mint.engine.kernels.rows import CacheRow, RowsModel
from mint.engine.lora import AnyAdapter
from mint.engine.sampling.choose import Choice
from mint.engine.sampling.chunks import Chunk
from mint.engine.sampling.grouping import Grouping
from mint.engine.sampling.passes import ExactLogits
from mint.engine.sampling.request import Request, Row

# rows of a decode step: as many as there are sequences at most
COMPILED = Grouping(
    row_multiple=1,
    min_rows=1,
    max_rows=64,
    prefill_row_step=1,
    packs_prompts=True,
    cuts_prompts=True,
    attends_together=True,
)


class CompiledPasses:
    """See `Passes`."""

    grouping = COMPILED

    def __init__(self, model: RowsModel) -> None:
        self._model = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        tokens: list[int] = []
        rows: list[CacheRow] = []
        copies: list[tuple[int, int, int, int]] = []
        first_row: dict[int, int] = {}  # of each cache in the pass
        for chunk in chunks:
            cache = chunk.prefill.cache
            if chunk.source is not None:
                copies.append((first_row[id(chunk.source)], len(rows), cache.length, chunk.start))
            first_row[id(cache)] = len(rows)
            tokens += chunk.request.given.prompt[chunk.start : chunk.end]
            rows += cache_rows(cache.kv, range(chunk.start, chunk.end))
        lengths = [(chunk.request, chunk.length) for chunk in chunks]
        final_TD = self._model.forward(tokens, rows, adapted(lengths), copies)
        ends = [start + length - 1 for start, length in zip(starts_of(lengths), (n for _, n in lengths), strict=True)]
        return final_TD[ends]

    def decode(self, rows: Sequence[Row]) -> Tensor:
        sequences = [row.sequence for row in rows if row.sequence is not None]
        places = [next(iter(cache_rows(s.cache.slab.kv[:, :, s.cache.slot], [s.cache.length]))) for s in sequences]
        return self._model.forward([s.tokens[-1] for s in sequences], places, adapted((r.request, 1) for r in rows))

    def logits(self, final_BD: Tensor, rows: Sequence[Row], real: Sequence[int]) -> tuple[Tensor, ExactLogits | None]:
        assert len(real) == len(rows)
        return self._model.logits(final_BD, adapted((row.request, 1) for row in rows)), None

    def choose(self, logits_BV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], Tensor]:
        return choose_compiled(logits_BV, choices)


def cache_rows(kv_L2KnE: Tensor, positions: Iterable[int]) -> list[CacheRow]:
    """Rows at these positions of one sequence's cache."""
    layer, kind, head, _, _ = (step * kv_L2KnE.element_size() for step in kv_L2KnE.stride())
    return [CacheRow(position, kv_L2KnE.data_ptr(), layer, kind, head) for position in positions]


def starts_of(lengths: Sequence[tuple[Request, int]]) -> list[int]:
    starts = [0]
    for _, length in lengths[:-1]:
        starts.append(starts[-1] + length)
    return starts


def adapted(lengths: Iterable[tuple[Request, int]]) -> list[tuple[int, int, AnyAdapter | None]]:
    """One entry for each run of rows with the same adapter; so many rows belong to each request."""
    parts, start = [], 0
    for _, group in groupby(lengths, key=lambda pair: pair[0].adapter_order):
        members = list(group)
        end = start + sum(length for _, length in members)
        parts.append((start, end, members[0][0].weights))
        start = end
    return parts
