"""The sampler's passes through the torch decoder, whose `attention` they pass in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from mint.engine.lora import UNEMBED_SITE, Segment
from mint.engine.models.attention import attend
from mint.engine.models.decoder import Attention, Decoder, PackedRow
from mint.engine.models.head import Head
from mint.engine.sampling.choose import Choice, choose
from mint.engine.sampling.chunks import Chunk
from mint.engine.sampling.grouping import Grouping, find_grouping
from mint.engine.sampling.passes import ExactLogits
from mint.engine.sampling.request import Row, row_segments
from mint.engine.sampling.slabs import Place, SlabAttention


class TorchPasses:
    """See `Passes`."""

    def __init__(self, decoder: Decoder, *, batch_invariant: bool) -> None:
        self._decoder, self._head = decoder, Head(decoder)
        self._batch_invariant = batch_invariant
        self.config, self.dtype, self.device = decoder.config, decoder.dtype, decoder.device

    @cached_property
    def grouping(self) -> Grouping:
        self._decoder.weights.pack()
        return find_grouping(self._decoder, batch_invariant=self._batch_invariant)

    def _forward(
        self, tokens: list[int], positions: list[int], segments: list[Segment], attention: Attention
    ) -> Tensor:
        device = self._decoder.device
        row = PackedRow(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), segments)
        work = self._decoder.forward(row, attention, keep=False)
        while True:
            try:
                next(work)
            except StopIteration as end:
                final_TD: Tensor = end.value[0]
                return final_TD

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        decoder, step = self._decoder, self.grouping.prefill_row_step
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        starts: list[int] = []
        for _, group in groupby(chunks, key=lambda chunk: chunk.request.adapter_order):
            first, members = len(tokens), list(group)
            for chunk in members:
                starts.append(len(tokens))
                tokens += chunk.request.given.prompt[chunk.start : chunk.end]
                positions += range(chunk.start, chunk.end)
            num_pad = (first - len(tokens)) % step
            tokens += [0] * num_pad
            positions += [0] * num_pad
            segments.append(Segment(first, len(tokens), members[0].request.weights))

        def attention(index: int, qkv_NTE: Tensor, out_TH: Tensor) -> None:
            q, _, _ = decoder.split_heads(qkv_NTE)
            new, out = decoder.keys_values(qkv_NTE), decoder.grouped(out_TH.zero_())
            for chunk, a in zip(chunks, starts, strict=True):
                b, kv = a + chunk.length, chunk.prefill.cache.kv[index]
                if chunk.source is not None:
                    shared = slice(chunk.prefill.cache.length, chunk.start)
                    kv[:, :, shared] = chunk.source.kv[index, :, :, shared]
                kv[:, :, chunk.start : chunk.end] = new[:, :, a:b]
                attend(decoder.ws, q[:, :, a:b], kv[0], kv[1], chunk.start, out[a:b])

        final_TD = self._forward(tokens, positions, segments, attention)
        return final_TD[[start + chunk.length - 1 for chunk, start in zip(chunks, starts, strict=True)]]

    def decode(self, rows: Sequence[Row]) -> Tensor:
        decoder = self._decoder
        by_slab: dict[int, list[tuple[int, Place]]] = {}
        for i, row in enumerate(rows):
            if row.sequence is not None:
                place = row.sequence.cache
                key = place.slab.capacity if self.grouping.attends_together else i
                by_slab.setdefault(key, []).append((i, place))
        parts: list[SlabAttention] = []

        def attention(index: int, qkv_NTE: Tensor, out_TH: Tensor) -> None:
            if index == 0:  # the tensors are the same in every layer
                q_BKGE = decoder.split_heads(qkv_NTE)[0].permute(2, 0, 1, 3)
                new, out = decoder.keys_values(qkv_NTE), decoder.grouped(out_TH.zero_())  # rows of padding stay 0
                parts.extend(SlabAttention(members, q_BKGE, new, out) for members in by_slab.values())
            for part in parts:
                part(index)

        tokens = [row.sequence.tokens[-1] if row.sequence is not None else 0 for row in rows]
        positions = [row.sequence.cache.length if row.sequence is not None else 0 for row in rows]
        return self._forward(tokens, positions, row_segments(rows), attention)

    def logits(self, final_BD: Tensor, rows: Sequence[Row], real: Sequence[int]) -> tuple[Tensor, ExactLogits | None]:
        normed_BD, _ = self._head.normalise(final_BD)
        logits_BV = self._head.logits(normed_BD, None)
        for segment in row_segments(rows):
            if (lora := segment.at(UNEMBED_SITE)) is not None:
                part = slice(segment.start, segment.end)
                logits_BV[part].addmm_(normed_BD[part] @ lora.a_RI.t(), lora.b_OR.t())
        if len(real) < len(rows):
            chosen = slice(len(real)) if real[-1] == len(real) - 1 else list(real)
            normed_BD, logits_BV, rows = normed_BD[chosen], logits_BV[chosen], [rows[i] for i in real]
        if logits_BV.dtype == torch.float32:
            return logits_BV, None
        segments = row_segments(rows)

        def exact(token_B: Tensor) -> Tensor:
            parts = (
                self._head.exact_logits(normed_BD[s.start : s.end], token_B[s.start : s.end], s.at(UNEMBED_SITE))
                for s in segments
            )
            return torch.cat(list(parts))

        return logits_BV, exact

    def choose(self, logits_BV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], Tensor]:
        return choose(logits_BV, choices)
