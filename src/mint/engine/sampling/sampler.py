"""Continuous batching: requests join and leave a running batch; each step prefills one chunk or decodes one token each.

What a sequence's numbers depend on is fixed: prompts are prefilled in chunks with borders counted from their start, and a
decode step runs at most MAX_ROWS sequences through the linears at a time. Rows of several sequences share a product only
where its kernel gives a row the same bits for every number of rows that occurs, which is checked when the sampler is made;
elsewhere prompts are prefilled alone and each adapter's rows of a decode step are padded to a fixed number.
Shape letters: B sequences of a decode step, T rows, D hidden, V vocabulary, K, G, E as in models/attention.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from mint.engine.backend import GenerateRequest, Generation
from mint.engine.lora import UNEMBED_SITE, AdapterWeights, Segment
from mint.engine.models.attention import attend
from mint.engine.models.decoder import Attention, Decoder, PackedRow
from mint.engine.models.head import Head
from mint.engine.models.linear import Linear
from mint.engine.sampling.cache import PrefixCache, SequenceCache
from mint.engine.sampling.choose import PADDING, choose, top_logprobs
from mint.engine.sampling.sequence import GrowingSequence, new_sequence
from mint.engine.sampling.slabs import GrowingCaches, Place, SlabAttention, sequences_are_independent
from mint.errors import ClosedError

MAX_ROWS = 32
MAX_SEQUENCES = 64  # growing at once; further requests wait, so that caches stay bounded
PREFILL_CHUNK = 256  # of one prompt
PREFILL_ROWS = 256  # of one pass; rounded up to a multiple of ROW_STEP, so that few shapes occur
ROW_STEP = 32

_Sequence = GrowingSequence[Place]


@dataclass(slots=True, repr=False)
class _Request:
    number: int
    given: GenerateRequest
    weights: AdapterWeights | None  # held here, so that a snapshot may be dropped while it is in use
    prompt_cache: SequenceCache  # of no use any more once the sequences have started
    sequences: list[_Sequence] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def prefilled(self) -> bool:
        return bool(self.sequences)  # they start when the prompt's last chunk is done

    @property
    def adapter_order(self) -> int:
        return -1 if self.given.adapter is None else self.given.adapter

    def growing(self) -> list[_Sequence]:
        return [s for s in self.sequences if s.stop_reason is None]

    def start_sequences(self, caches: GrowingCaches) -> None:
        """Sequences that share the prefill: each has a copy of its cache and a random stream of its own."""
        self.sequences = [
            new_sequence(self.given, i, caches.start(self.prompt_cache)) for i in range(self.given.num_samples)
        ]


@dataclass(frozen=True, slots=True, repr=False)
class _Row:
    """A row of a decode step; without a sequence it is padding of its request's adapter."""

    request: _Request
    sequence: _Sequence | None


@dataclass(frozen=True, slots=True, repr=False)
class _Chunk:
    """Prompt positions [start, end) of a request."""

    request: _Request
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def _segments(rows: list[_Row]) -> list[Segment]:
    """One segment per run of equal adapters."""
    segments, start = [], 0
    for _, group in groupby(rows, key=lambda row: row.request.adapter_order):
        members = list(group)
        segments.append(Segment(start, start + len(members), members[0].request.weights))
        start += len(members)
    return segments


@dataclass(frozen=True, slots=True)
class _Kernels:
    """What may be done at once without changing a sequence's bits; float32 promises a tolerance, not bits.

    row_multiple: each adapter's rows of a decode step are filled up to a multiple of it. packs_prompts: prompts share a
    pass. attends_together: sequences share the products of attention.
    """

    row_multiple: int
    packs_prompts: bool
    attends_together: bool


def _examine_kernels(decoder: Decoder) -> _Kernels:
    if decoder.dtype == torch.float32:
        return _Kernels(1, packs_prompts=True, attends_together=True)
    # a single row takes kernels of its own, so the rows of every adapter come in pairs
    pairs_agree = rows_are_independent(decoder, range(2, MAX_ROWS + 1, 2))
    return _Kernels(
        2 if pairs_agree else MAX_ROWS,
        rows_are_independent(decoder, range(ROW_STEP, PREFILL_ROWS + 1, ROW_STEP)),
        sequences_are_independent(decoder.config, range(1, MAX_ROWS + 1), decoder.dtype, decoder.device),
    )


class Sampler:
    """Generates on a decoder. `adapters` is shared with the backend, which adds and drops snapshots."""

    def __init__(self, decoder: Decoder, head: Head, adapters: dict[int, AdapterWeights], prefix_bytes: int) -> None:
        self._decoder, self._head, self._adapters = decoder, head, adapters
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._prefixes = PrefixCache(prefix_bytes)
        self._caches = GrowingCaches(decoder.config, decoder.dtype, decoder.device)
        self._next = 0

    @cached_property
    def _kernels(self) -> _Kernels:
        """Prepared with the first request: whoever only trains needs no second copy of the weights."""
        self._decoder.weights.pack()
        return _examine_kernels(self._decoder)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def add(self, given: GenerateRequest) -> int:
        decoder = self._decoder
        cache = SequenceCache(decoder.config, len(given.prompt), decoder.dtype, decoder.device)
        self._next += 1
        if given.adapter is not None and given.adapter not in self._adapters:
            raise ClosedError("the sampling session was closed before this sample began; make a new sampling client")
        weights = self._adapters[given.adapter] if given.adapter is not None else None
        self._requests[self._next] = _Request(self._next, given, weights, cache)
        return self._next

    def cancel(self, number: int) -> None:
        request = self._requests.pop(number, None)
        for sequence in request.growing() if request is not None else ():
            self._caches.remove(sequence.cache)

    def forget_adapter(self, handle: int) -> None:
        self._prefixes.forget_adapter(handle)

    def step(self) -> list[Generation]:
        """Prefill first: waiting prompts join the batch before the others go on, where there is room."""
        growing = [(r, s) for r in self._requests.values() for s in r.growing()]
        chunks = self._next_chunks(len(growing))
        if chunks:
            self._prefill(chunks)
        else:
            for rows in self._rows(growing):
                self._decode(rows)
        return self._collect()

    def _rows(self, pairs: list[tuple[_Request, _Sequence]]) -> list[list[_Row]]:
        """Steps of at most MAX_ROWS rows. Rows of one adapter lie together and are padded by themselves."""
        steps: list[list[_Row]] = [[]]
        # of one adapter in the order of their slots: a step that cannot take all then takes neighbours
        ordered = sorted(pairs, key=lambda p: (p[0].adapter_order, p[1].cache.slab.capacity, p[1].cache.slot))
        for _, group in groupby(ordered, key=lambda pair: pair[0].adapter_order):
            members = [_Row(*pair) for pair in group]
            for first in range(0, len(members), MAX_ROWS):
                rows = members[first : first + MAX_ROWS]
                rows += [_Row(rows[0].request, None)] * (-len(rows) % self._kernels.row_multiple)
                if len(steps[-1]) + len(rows) > MAX_ROWS:
                    steps.append([])
                steps[-1] += rows
        return steps

    def _next_chunks(self, num_growing: int) -> list[_Chunk]:
        """Prompt chunks of one pass: the oldest request's, and others that fit beside it."""
        chunks: list[_Chunk] = []
        room = PREFILL_ROWS
        for request in self._requests.values():
            if request.prefilled:
                continue
            num_growing += request.given.num_samples
            self._skip_known_prefix(request)
            start = request.prompt_cache.length
            end = min(start + PREFILL_CHUNK, len(request.given.prompt))
            if chunks and (end - start > room or num_growing > MAX_SEQUENCES or not self._kernels.packs_prompts):
                break
            if not chunks and num_growing > max(MAX_SEQUENCES, request.given.num_samples):
                break
            chunks.append(_Chunk(request, start, end))
            room -= end - start
        return sorted(chunks, key=lambda chunk: chunk.request.adapter_order)

    def _skip_known_prefix(self, request: _Request) -> None:
        """Take over whole chunks that the prefix cache has; the last token is always computed, for its logits."""
        given, cache = request.given, request.prompt_cache
        while (end := cache.length + PREFILL_CHUNK) < len(given.prompt):
            known = self._prefixes.get(given.adapter, given.prompt[:end])
            if known is None:
                return
            cache.extend(known)
            request.cached_tokens += PREFILL_CHUNK

    def _collect(self) -> list[Generation]:
        done = [r for r in self._requests.values() if r.prefilled and not r.growing()]
        for request in done:
            del self._requests[request.number]
        return [Generation(r.number, [s.finished() for s in r.sequences], r.cached_tokens) for r in done]

    def _forward(
        self, tokens: list[int], positions: list[int], segments: list[Segment], attention: Attention
    ) -> Tensor:
        device = self._decoder.device
        row = PackedRow(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), [], segments)
        work = self._decoder.forward(row, attention, keep=False)
        while True:
            try:
                next(work)
            except StopIteration as end:
                final_TD: Tensor = end.value[0]
                return final_TD

    def _prefill(self, chunks: list[_Chunk]) -> None:
        decoder, step = self._decoder, ROW_STEP if self._kernels.packs_prompts else 1
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
                b = a + chunk.length
                filled = chunk.request.prompt_cache.kv[index, :, :, : chunk.end]
                filled[:, :, chunk.start :] = new[:, :, a:b]
                attend(decoder.ws, q[:, :, a:b], filled[0], filled[1], out[a:b])

        final_TD = self._forward(tokens, positions, segments, attention)
        last_row: dict[int, int] = {}
        for chunk, start in zip(chunks, starts, strict=True):
            request, cache = chunk.request, chunk.request.prompt_cache
            cache.length = chunk.end
            if chunk.length == PREFILL_CHUNK:
                kv_L2KnE = cache.kv[:, :, :, chunk.start : chunk.end]
                self._prefixes.put(request.given.adapter, request.given.prompt[: chunk.end], kv_L2KnE)
            if chunk.end == len(request.given.prompt):
                request.start_sequences(self._caches)
                last_row[request.number] = start + chunk.length - 1
        started = [(c.request, s) for c in chunks if c.request.number in last_row for s in c.request.sequences]
        for rows in self._rows(started) if started else ():
            self._choose(final_TD[[last_row[row.request.number] for row in rows]], rows)

    def _decode(self, rows: list[_Row]) -> None:
        """One token for each: the last token's keys and values enter the cache, the next token is chosen."""
        decoder = self._decoder
        growing = [(i, row.sequence.cache) for i, row in enumerate(rows) if row.sequence is not None]
        for _, place in growing:
            self._caches.make_room(place)
        by_slab: dict[int, list[tuple[int, Place]]] = {}
        for i, place in growing:
            by_slab.setdefault(place.slab.capacity if self._kernels.attends_together else i, []).append((i, place))
        config = decoder.config
        heads = config.num_kv_heads, config.num_heads // config.num_kv_heads
        parts = [SlabAttention(members, *heads) for members in by_slab.values()]

        def attention(index: int, qkv_NTE: Tensor, out_TH: Tensor) -> None:
            q_BKGE = decoder.split_heads(qkv_NTE)[0].permute(2, 0, 1, 3)
            new, out = decoder.keys_values(qkv_NTE), decoder.grouped(out_TH.zero_())
            for part in parts:
                part(index, q_BKGE, new, out)

        tokens = [row.sequence.tokens[-1] if row.sequence is not None else 0 for row in rows]
        positions = [row.sequence.cache.length if row.sequence is not None else 0 for row in rows]
        final_BD = self._forward(tokens, positions, _segments(rows), attention)
        for _, place in growing:
            place.length += 1
        self._choose(final_BD, rows)

    def _choose(self, final_BD: Tensor, rows: list[_Row]) -> None:
        """The next token of every row, its logprob at temperature 1, and whether the sequence ends with it."""
        normed_BD, _ = self._head.normalise(final_BD)
        segments = _segments(rows)
        logits_BV = self._head.logits(normed_BD, None)
        for segment in segments:
            if (lora := segment.at(UNEMBED_SITE)) is not None:
                part = slice(segment.start, segment.end)
                logits_BV[part].addmm_(normed_BD[part] @ lora.a_RI.t(), lora.b_OR.t())
        choices = [row.sequence.choice() if row.sequence is not None else PADDING for row in rows]
        tokens, normaliser_B = choose(logits_BV, choices)
        logprobs = self._logprobs(normed_BD, logits_BV, (tokens, normaliser_B), segments)
        for i, row in enumerate(rows):
            if row.sequence is not None:
                num_topk = row.request.given.num_topk
                topk = top_logprobs(logits_BV[i : i + 1], num_topk)[0] if num_topk else None
                row.sequence.extend(tokens[i], logprobs[i], topk)
                if row.sequence.stop_reason is not None:
                    self._caches.remove(row.sequence.cache)

    def _logprobs(
        self, normed_BD: Tensor, logits_BV: Tensor, chosen: tuple[list[int], Tensor], segments: list[Segment]
    ) -> list[float]:
        """As the head scores targets: in bf16 the token's logit is exact and takes the rounded one's place."""
        tokens, normaliser_B = chosen
        token_B = torch.tensor(tokens, device=logits_BV.device)
        rounded_B = logits_BV.gather(1, token_B[:, None])[:, 0].double()
        if logits_BV.dtype == torch.float32:
            result: list[float] = (rounded_B - normaliser_B).tolist()
            return result
        exact_B = torch.cat(
            [
                self._head.exact_logits(normed_BD[s.start : s.end], token_B[s.start : s.end], s.at(UNEMBED_SITE))
                for s in segments
            ]
        ).double()
        corrected_B = 1 - (rounded_B - normaliser_B).exp() + (exact_B - normaliser_B).exp()
        result = (exact_B - normaliser_B - corrected_B.log()).tolist()
        return result


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
