"""What may be computed at once without changing a sequence's bits, found out by trying the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.engine.models.attention import FILL, STEP, attend
from mint.engine.models.config import DecoderConfig
from mint.engine.models.decoder import Decoder
from mint.engine.models.linear import Linear
from mint.engine.sampling.slabs import sequences_are_independent
from mint.engine.workspace import Workspace

MAX_ROWS = 32  # of a decode step
BF16_MIN_ROWS = 4  # of a decode step; fewer take longer: 2 rows 1.2 times as long with AVX-512
PREFILL_CHUNK = 256  # positions of one prompt, and rows of one pass
ROW_STEP = 32  # a pass has a multiple of it in rows, so that few shapes occur
PREFIX_BLOCK = 16  # positions; prompts share whole blocks of known beginnings


@dataclass(frozen=True, slots=True)
class Grouping:
    """What may be done at once without changing a sequence's bits.

    row_multiple: each adapter's rows of a decode step are filled up to a multiple of it; min_rows: and the step's to so
    many; max_rows: of a step. prefill_row_step: each adapter's rows of a pass over prompts are filled up to a multiple of it.
    packs_prompts: prompts share a pass. cuts_prompts: they may also be cut anywhere, so what two have in common is computed
    once; otherwise they are cut at multiples of PREFILL_CHUNK. attends_together: sequences share the products of attention.
    """

    row_multiple: int
    min_rows: int
    max_rows: int
    prefill_row_step: int
    packs_prompts: bool
    cuts_prompts: bool
    attends_together: bool

    @property
    def prefix_block(self) -> int:
        return PREFIX_BLOCK if self.cuts_prompts else PREFILL_CHUNK


def find_grouping(decoder: Decoder, *, batch_invariant: bool) -> Grouping:
    """float32 promises a tolerance, not bits, and its kernels differ with the number of rows: so everything at once, or
    with `batch_invariant` nothing. Its prompts are not cut anywhere: a request that is repeated alone repeats its bits."""
    if decoder.dtype == torch.float32:
        together = not batch_invariant
        return Grouping(
            1 if together else MAX_ROWS, 1, MAX_ROWS, ROW_STEP if together else 1, together, cuts_prompts=False,
            attends_together=together,
        )  # fmt: skip
    # a single row takes kernels of its own, so the rows of every adapter come in pairs
    pairs_agree = rows_are_independent(decoder, range(2, MAX_ROWS + 1, 2))
    packs_prompts = rows_are_independent(decoder, range(ROW_STEP, PREFILL_CHUNK + 1, ROW_STEP))
    kind = decoder.dtype, decoder.device
    return Grouping(
        2 if pairs_agree else MAX_ROWS,
        BF16_MIN_ROWS,
        MAX_ROWS,
        ROW_STEP if packs_prompts else 1,
        packs_prompts,
        packs_prompts and positions_are_independent(decoder.config, *kind),
        sequences_are_independent(decoder.config, range(1, MAX_ROWS + 1), *kind),
    )


def rows_are_independent(decoder: Decoder, counts: Sequence[int]) -> bool:
    """Whether the kernels give a row the same bits for each of these numbers of rows, base and low-rank products."""
    layers, width = decoder.weights.layers, decoder.config.intermediate_size
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(decoder.device, decoder.dtype)

    sizes = (decoder.config.hidden_size, width)
    low_rank = [random(*shape) for rank in (5, 16, 48) for size in sizes for shape in ((rank, size), (size, rank))]
    chosen = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    linears = [linear for layer in chosen for linear in layer.linears()]
    for linear in (*linears, *(Linear(weight) for weight in low_rank)):
        x = random(max(counts), linear.weight_OI.shape[1])
        results = [linear.forward(x[:n], x.new_empty(n, len(linear.weight_OI))) for n in counts]
        if not all(torch.equal(result, results[-1][: len(result)]) for result in results):
            return False
    return True


def positions_are_independent(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend` gives a position the same bits wherever its prompt is cut: tried for every number of rows, each at
    several places, with few keys and with many."""
    generator, ws = torch.Generator().manual_seed(0), Workspace(device)
    num_kv, group, head_dim = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    for past in (0, 3 * STEP):
        shapes = (num_kv, group, STEP, head_dim), *((num_kv, past + STEP, head_dim),) * 2
        q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        whole = q.new_empty(STEP, num_kv, group, head_dim)
        attend(ws, q, k, v, past, whole)
        for count in range(1, STEP):
            for first in {0, 1, (STEP - count) // 2, STEP - count} if count % FILL < 2 else {STEP - count}:
                part = torch.empty_like(whole[:count])
                attend(ws, q[:, :, first : first + count], k, v, past + first, part)
                if not torch.equal(part, whole[first : first + count]):
                    return False
    return True
