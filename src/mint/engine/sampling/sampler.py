"""Continuous batching: requests join and leave a running batch; each step is a prefill pass or a token for each sequence.

A request waits (its tokens are all it holds), its prompt is prefilled, its sequences grow; the next that waits (tenants
take turns) joins where there is room, in sequences and in bytes. A sequence that needs more keys and values than there is
room for pauses, but for those of the oldest request, which always go on: so everything ends, and of what is held at most
the oldest request's part goes beyond the bound.

What a sequence's numbers depend on is fixed: rows share a product, and prompts are cut and share what they have in common,
only where the kernels give a row the same bits for every number of rows that occurs, which is examined with the first
request; elsewhere prompts are prefilled alone, or cut at borders counted from their start, and each adapter's rows of a
decode step, at most MAX_ROWS, are padded to a fixed number.
Shape letters: B sequences of a decode step, T rows, D hidden, V vocabulary, K, G, E as in models/attention.py.
"""

from __future__ import annotations

from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from mint.engine.backend import GenerateRequest, Generation
from mint.engine.lora import UNEMBED_SITE, AdapterWeights, Segment
from mint.engine.models.attention import attend
from mint.engine.models.decoder import Attention, Decoder, PackedRow
from mint.engine.models.head import Head
from mint.engine.sampling.cache import PrefixCache, SequenceCache, position_bytes, prompt_capacity
from mint.engine.sampling.choose import choose, top_logprobs
from mint.engine.sampling.chunks import Chunk, Prefill, chunk_end, shared_beginning
from mint.engine.sampling.kernels import MAX_ROWS, ROW_STEP, Kernels, examine_kernels
from mint.engine.sampling.request import Growing, Request, Row, SlabSequence, row_segments
from mint.engine.sampling.sequence import new_sequence
from mint.engine.sampling.slabs import GrowingCaches, Place, SlabAttention, slab_capacity
from mint.engine.sampling.waiting import WaitingRequests
from mint.errors import ClosedError

MAX_SEQUENCES = 64  # growing at once
PREFILLS_PER_STEP = 4  # prefill passes between two decode steps while sequences grow


class Sampler:
    """Generates on a decoder. `adapters` is shared with the backend, which adds and drops snapshots.

    prefix_bytes, sequence_bytes: what the keys and values of known prefixes and of sequences in flight may take. Free
    slots of slabs come on top of the latter (see GrowingCaches), and one request alone may take more.
    """

    def __init__(
        self,
        decoder: Decoder,
        head: Head,
        adapters: dict[int, AdapterWeights],
        *,
        prefix_bytes: int,
        sequence_bytes: int,
        batch_invariant: bool,
    ) -> None:
        self._decoder, self._head, self._adapters = decoder, head, adapters
        self._waiting: WaitingRequests[Request] = WaitingRequests()
        self._prefilling: Prefill | None = None
        self._growing: dict[int, Growing] = {}  # oldest first
        self._prefixes = PrefixCache(prefix_bytes)
        self._caches = GrowingCaches(decoder.config, decoder.dtype, decoder.device)
        self._max_bytes, self._position_bytes = sequence_bytes, position_bytes(decoder.config, decoder.dtype)
        self._batch_invariant = batch_invariant
        self._prefills = 0  # since the last decode step
        self._next = 0

    @cached_property
    def _kernels(self) -> Kernels:
        """Prepared with the first request: whoever only trains needs no second copy of the weights."""
        self._decoder.weights.pack()
        return examine_kernels(self._decoder, batch_invariant=self._batch_invariant)

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._growing) + (self._prefilling is not None)

    def num_bytes(self) -> int:
        """Of all keys and values held: prompts, growing sequences and their free slots, known prefixes."""
        prompt = self._prefilling.cache.num_bytes() if self._prefilling is not None else 0
        return prompt + self._caches.num_bytes() + self._prefixes.num_bytes()

    def add(self, given: GenerateRequest) -> int:
        if given.adapter is not None and given.adapter not in self._adapters:
            raise ClosedError("the sampling session was closed before this sample began; make a new sampling client")
        weights = self._adapters[given.adapter] if given.adapter is not None else None
        self._next += 1
        self._waiting.add(given.tenant, self._next, Request(self._next, given, weights))
        return self._next

    def cancel(self, number: int) -> None:
        self._waiting.remove(number)
        if self._prefilling is not None and self._prefilling.request.number == number:
            self._prefilling = None
        if (growing := self._growing.pop(number, None)) is not None:
            for sequence in growing.unfinished():
                self._caches.remove(sequence.cache)

    def forget_adapter(self, handle: int) -> None:
        self._prefixes.forget_adapter(handle)

    def step(self) -> list[Generation]:
        """Prompts join before the sequences go on, PREFILLS_PER_STEP passes at most."""
        growing = [(g.request, s) for g in self._growing.values() for s in g.unfinished()]
        going_on, room = self._with_room(growing)
        chunks: list[Chunk] = []
        if not growing or self._prefills < PREFILLS_PER_STEP:
            chunks = self._next_chunks(len(growing), room)
        if chunks:
            self._prefill(chunks)
            self._prefills += bool(growing)
        else:
            for rows in self._rows(going_on):
                self._decode(rows)
            self._prefills = 0
        return self._collect()

    def _collect(self) -> list[Generation]:
        done = [growing for growing in self._growing.values() if not growing.unfinished()]
        for growing in done:
            del self._growing[growing.request.number]
        return [growing.generation() for growing in done]

    # who may take how much

    def _cost(self, given: GenerateRequest) -> int:
        """Bytes of keys and values when the sequences start: the prompt's and a copy for each."""
        length = len(given.prompt)
        return self._position_bytes * (prompt_capacity(length) + given.num_samples * slab_capacity(length))

    def _room(self) -> int:
        """Bytes that are not taken, by sequences or by the prompt that has begun; negative where more than all is."""
        begun = self._cost(self._prefilling.request.given) if self._prefilling is not None else 0
        return self._max_bytes - begun - self._caches.used_bytes()

    def _with_room(self, growing: list[tuple[Request, SlabSequence]]) -> tuple[list[tuple[Request, SlabSequence]], int]:
        """Those that can take one more token, and the bytes that are left: of the oldest request all, of others as many as
        there is room for."""
        found, room = [], self._room()
        for request, sequence in growing:
            needed = self._caches.missing_bytes(sequence.cache)
            if needed <= max(room, 0) or request is growing[0][0]:
                room -= needed
                found.append((request, sequence))
        return found, room

    def _next_chunks(self, num_growing: int, room: int) -> list[Chunk]:
        """Prompt chunks of one pass: of the prompt that has begun, and of the next that wait and fit beside. What a
        prompt has in common with a known one or with another of the pass is not computed again."""
        chunks: list[Chunk] = []
        if (begun := self._prefilling) is not None:
            num_growing += begun.request.given.num_samples
            start = begun.cache.length
            chunks.append(Chunk(begun, start, chunk_end((), begun.request, start, self._kernels)))
        while self._waiting and (not chunks or chunks[-1].is_last):  # one prompt at most stays begun
            request = self._waiting.first()
            given, cost = request.given, self._cost(request.given)
            if num_growing and (num_growing + given.num_samples > MAX_SEQUENCES or cost > room):
                break  # but one alone always may
            known = self._prefixes.find(given.adapter, given.prompt, self._kernels.prefix_block)
            start, source = len(known) * self._kernels.prefix_block, None
            if self._kernels.cuts_prompts:
                shared, cache = shared_beginning(chunks, request)
                if shared > start:
                    start, source = shared, cache
            end = chunk_end(chunks, request, start, self._kernels)
            if end == start:
                break
            self._waiting.take_first()
            decoder = self._decoder
            cache = SequenceCache(decoder.config, len(given.prompt), decoder.dtype, decoder.device)
            for kv_L2KnE in known:
                cache.extend(kv_L2KnE)
            chunks.append(Chunk(Prefill(request, cache, start), start, end, source))
            num_growing += given.num_samples
            room -= cost
        return sorted(chunks, key=lambda chunk: chunk.request.adapter_order)

    def _rows(self, pairs: list[tuple[Request, SlabSequence]]) -> list[list[Row]]:
        """Steps of at most MAX_ROWS rows. Rows of one adapter lie together and are padded by themselves."""
        steps: list[list[Row]] = []
        # of one adapter in the order of their slots: a step that cannot take all then takes neighbours
        ordered = sorted(pairs, key=lambda p: (p[0].adapter_order, p[1].cache.slab.capacity, p[1].cache.slot))
        for _, group in groupby(ordered, key=lambda pair: pair[0].adapter_order):
            members = [Row(*pair) for pair in group]
            for first in range(0, len(members), MAX_ROWS):
                rows = members[first : first + MAX_ROWS]
                rows += [Row(rows[0].request, None)] * (-len(rows) % self._kernels.row_multiple)
                if not steps or len(steps[-1]) + len(rows) > MAX_ROWS:
                    steps.append([])
                steps[-1] += rows
        for step in steps:
            step += [Row(step[-1].request, None)] * (self._kernels.min_rows - len(step))
        return steps

    # passes

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

    def _prefill(self, chunks: list[Chunk]) -> None:
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
                b, kv = a + chunk.length, chunk.prefill.cache.kv[index]
                if chunk.source is not None:
                    shared = slice(chunk.prefill.cache.length, chunk.start)
                    kv[:, :, shared] = chunk.source.kv[index, :, :, shared]
                kv[:, :, chunk.start : chunk.end] = new[:, :, a:b]
                attend(decoder.ws, q[:, :, a:b], kv[0], kv[1], chunk.start, out[a:b])

        final_TD = self._forward(tokens, positions, segments, attention)
        self._prefilling = None
        last_row: dict[int, int] = {}
        for chunk, start in zip(chunks, starts, strict=True):
            self._keep(chunk)
            if chunk.is_last:
                last_row[chunk.request.number] = start + chunk.length - 1
        started = [(self._growing[number].request, s) for number in last_row for s in self._growing[number].sequences]
        for rows in self._rows(started):
            self._choose(final_TD[[last_row[row.request.number] for row in rows]], rows)

    def _keep(self, chunk: Chunk) -> None:
        """What a pass has computed of a prompt: for others with the same prefix, and for its sequences or next chunk."""
        prefill, given = chunk.prefill, chunk.request.given
        prefill.cache.length = chunk.end
        self._prefixes.put(given.adapter, given.prompt[: chunk.end], self._kernels.prefix_block, prefill.cache.kv)
        if not chunk.is_last:
            self._prefilling = prefill
            return
        # sequences share the prefill: each has a copy of its cache and a random stream of its own
        growing = self._growing[chunk.request.number] = Growing(chunk.request, prefill.cached_tokens)
        for i in range(given.num_samples):
            growing.sequences.append(new_sequence(given, i, self._caches.start(prefill.cache)))

    def _decode(self, rows: list[Row]) -> None:
        """One token for each: the last token's keys and values enter the cache, the next token is chosen."""
        decoder = self._decoder
        growing = [(i, row.sequence.cache) for i, row in enumerate(rows) if row.sequence is not None]
        for _, place in growing:
            self._caches.make_room(place)
        by_slab: dict[int, list[tuple[int, Place]]] = {}
        for i, place in growing:
            by_slab.setdefault(place.slab.capacity if self._kernels.attends_together else i, []).append((i, place))
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
        final_BD = self._forward(tokens, positions, row_segments(rows), attention)
        for _, place in growing:
            place.length += 1
        self._choose(final_BD, rows)

    def _choose(self, final_BD: Tensor, rows: list[Row]) -> None:
        """The next token of every row, its logprob at temperature 1, and whether the sequence ends with it."""
        normed_BD, _ = self._head.normalise(final_BD)
        segments = row_segments(rows)
        logits_BV = self._head.logits(normed_BD, None)
        for segment in segments:
            if (lora := segment.at(UNEMBED_SITE)) is not None:
                part = slice(segment.start, segment.end)
                logits_BV[part].addmm_(normed_BD[part] @ lora.a_RI.t(), lora.b_OR.t())
        real = [i for i, row in enumerate(rows) if row.sequence is not None]
        if len(real) < len(rows):
            chosen = slice(len(real)) if real[-1] == len(real) - 1 else real
            normed_BD, logits_BV, rows = normed_BD[chosen], logits_BV[chosen], [rows[i] for i in real]
            segments = row_segments(rows)
        sequences = [row.sequence for row in rows if row.sequence is not None]
        tokens, normaliser_B = choose(logits_BV, [sequence.choice() for sequence in sequences])
        logprobs = self._logprobs(normed_BD, logits_BV, (tokens, normaliser_B), segments)
        for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            num_topk = row.request.given.num_topk
            topk = top_logprobs(logits_BV[i : i + 1], num_topk)[0] if num_topk else None
            sequence.extend(tokens[i], logprobs[i], topk)
            if sequence.stop_reason is not None:
                self._caches.remove(sequence.cache)

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
