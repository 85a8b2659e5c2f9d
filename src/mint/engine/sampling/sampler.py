"""Continuous batching: requests join and leave a running batch; each step is a prefill pass or a token for each sequence.

A request waits (its tokens are all it holds), its prompt is prefilled, its sequences grow; the next that waits (tenants
take turns) joins where there is room, in sequences and in bytes. A sequence that needs more keys and values than there is
room for pauses, but for those of the oldest request, which always go on: so everything ends, and of what is held at most
the oldest request's part goes beyond the bound.

What a sequence's numbers depend on is fixed: rows share a product, and prompts are cut and share what they have in common,
only where the kernels give a row the same bits for every number of rows that occurs, which is examined with the first
request; elsewhere prompts are prefilled alone, or cut at borders counted from their start, and each adapter's rows of a
decode step, at most so many, are padded to a fixed number.
Shape letters: B sequences of a decode step, T rows, D hidden, V vocabulary, K, G, E as in models/attention.py.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor

from mint.engine.backend import GenerateRequest, Generation
from mint.engine.lora import AnyAdapter
from mint.engine.sampling.cache import PrefixCache, SequenceCache, position_bytes, prompt_capacity
from mint.engine.sampling.choose import top_logprobs
from mint.engine.sampling.chunks import Chunk, Prefill, chunk_end, shared_beginning
from mint.engine.sampling.grouping import Grouping
from mint.engine.sampling.passes import ExactLogits, Passes
from mint.engine.sampling.request import Growing, Request, Row, SlabSequence
from mint.engine.sampling.sequence import new_sequence, not_finite
from mint.engine.sampling.slabs import GrowingCaches, slab_capacity
from mint.engine.sampling.waiting import WaitingRequests
from mint.errors import ClosedError, NumericsError

MAX_SEQUENCES = 64  # growing at once
PREFILLS_PER_STEP = 4  # prefill passes between two decode steps while sequences grow


class Sampler:
    """Generates by `passes`. `adapters` is shared with the backend, which adds and drops snapshots.

    prefix_bytes, sequence_bytes: what the keys and values of known prefixes and of sequences in flight may take. Free
    slots of slabs come on top of the latter (see GrowingCaches), and one request alone may take more.
    """

    def __init__(
        self,
        passes: Passes,
        adapters: dict[int, AnyAdapter],
        *,
        prefix_bytes: int,
        sequence_bytes: int,
    ) -> None:
        self._passes, self._adapters = passes, adapters
        config, dtype, device = passes.config, passes.dtype, passes.device
        self._waiting: WaitingRequests[Request] = WaitingRequests()
        self._prefilling: Prefill | None = None
        self._growing: dict[int, Growing] = {}  # oldest first
        self._failed: dict[int, NumericsError] = {}  # in the step that is going on
        self._prefixes = PrefixCache(prefix_bytes)
        self._caches = GrowingCaches(config, dtype, device)
        self._max_bytes, self._position_bytes = sequence_bytes, position_bytes(config, dtype)
        self._prefills = 0  # since the last decode step
        self._next = 0

    @property
    def _grouping(self) -> Grouping:
        return self._passes.grouping

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
        failed = [Generation(number, [], 0, error) for number, error in self._failed.items()]
        self._failed.clear()
        for generation in failed:
            self.cancel(generation.request)
        done = [growing for growing in self._growing.values() if not growing.unfinished()]
        for growing in done:
            del self._growing[growing.request.number]
        return [*failed, *(growing.generation() for growing in done)]

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
            chunks.append(Chunk(begun, start, chunk_end((), begun.request, start, self._grouping)))
        while self._waiting and (not chunks or chunks[-1].is_last):  # one prompt at most stays begun
            request = self._waiting.first()
            given, cost = request.given, self._cost(request.given)
            if num_growing and (num_growing + given.num_samples > MAX_SEQUENCES or cost > room):
                break  # but one alone always may
            known = self._prefixes.find(given.adapter, given.prompt, self._grouping.prefix_block)
            start, source = len(known) * self._grouping.prefix_block, None
            if self._grouping.cuts_prompts:
                shared, cache = shared_beginning(chunks, request)
                if shared > start:
                    start, source = shared, cache
            end = chunk_end(chunks, request, start, self._grouping)
            if end == start:
                break
            self._waiting.take_first()
            cache = SequenceCache(self._passes.config, len(given.prompt), self._passes.dtype, self._passes.device)
            for kv_L2KnE in known:
                cache.extend(kv_L2KnE)
            chunks.append(Chunk(Prefill(request, cache, start), start, end, source))
            num_growing += given.num_samples
            room -= cost
        return sorted(chunks, key=lambda chunk: chunk.request.adapter_order)

    def _rows(self, pairs: list[tuple[Request, SlabSequence]]) -> list[list[Row]]:
        """Steps of at most self._grouping.max_rows rows. Rows of one adapter lie together and are padded by themselves."""
        steps: list[list[Row]] = []
        # of one adapter in the order of their slots: a step that cannot take all then takes neighbours
        ordered = sorted(pairs, key=lambda p: (p[0].adapter_order, p[1].cache.slab.capacity, p[1].cache.slot))
        for _, group in groupby(ordered, key=lambda pair: pair[0].adapter_order):
            members = [Row(*pair) for pair in group]
            for first in range(0, len(members), self._grouping.max_rows):
                rows = members[first : first + self._grouping.max_rows]
                rows += [Row(rows[0].request, None)] * (-len(rows) % self._grouping.row_multiple)
                if not steps or len(steps[-1]) + len(rows) > self._grouping.max_rows:
                    steps.append([])
                steps[-1] += rows
        for step in steps:
            step += [Row(step[-1].request, None)] * (self._grouping.min_rows - len(step))
        return steps

    # passes

    def _prefill(self, chunks: list[Chunk]) -> None:
        final_CD = self._passes.prefill(chunks)
        self._prefilling = None
        for chunk in chunks:
            self._keep(chunk)
        ended = {chunk.request.number: i for i, chunk in enumerate(chunks) if chunk.is_last}
        started = [(self._growing[number].request, s) for number in ended for s in self._growing[number].sequences]
        for rows in self._rows(started):
            self._choose(final_CD[[ended[row.request.number] for row in rows]], rows)

    def _keep(self, chunk: Chunk) -> None:
        """What a pass has computed of a prompt: for others with the same prefix, and for its sequences or next chunk."""
        prefill, given = chunk.prefill, chunk.request.given
        prefill.cache.length = chunk.end
        self._prefixes.put(given.adapter, given.prompt[: chunk.end], self._grouping.prefix_block, prefill.cache.kv)
        if not chunk.is_last:
            self._prefilling = prefill
            return
        # sequences share the prefill: each has a copy of its cache and a random stream of its own
        growing = self._growing[chunk.request.number] = Growing(chunk.request, prefill.cached_tokens)
        for i in range(given.num_samples):
            growing.sequences.append(new_sequence(given, i, self._caches.start(prefill.cache)))

    def _decode(self, rows: list[Row]) -> None:
        """One token for each: the last token's keys and values enter the cache, the next token is chosen."""
        places = [row.sequence.cache for row in rows if row.sequence is not None]
        for place in places:
            self._caches.make_room(place)
        final_BD = self._passes.decode(rows)
        for place in places:
            place.length += 1
        self._choose(final_BD, rows)

    def _choose(self, final_BD: Tensor, rows: list[Row]) -> None:
        """The next token of every row, its logprob at temperature 1, and whether the sequence ends with it."""
        real = [i for i, row in enumerate(rows) if row.sequence is not None]
        logits_BV, exact = self._passes.logits(final_BD, rows, real)
        rows = [rows[i] for i in real]
        sequences = [row.sequence for row in rows if row.sequence is not None]
        tokens, normaliser_B = self._passes.choose(logits_BV, [sequence.choice() for sequence in sequences])
        logprobs = chosen_logprobs(logits_BV, tokens, normaliser_B, exact)
        for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            if not math.isfinite(logprobs[i]):
                self._failed[row.request.number] = not_finite(row.request.given)
                continue
            num_topk = row.request.given.num_topk
            topk = top_logprobs(logits_BV[i : i + 1], num_topk)[0] if num_topk else None
            sequence.extend(tokens[i], logprobs[i], topk)
            if sequence.stop_reason is not None:
                self._caches.remove(sequence.cache)


def chosen_logprobs(
    logits_BV: Tensor, tokens: list[int], normaliser_B: Tensor, exact: ExactLogits | None
) -> list[float]:
    """As the head scores targets: where logits are rounded, the token's exact one takes the rounded one's place."""
    token_B = torch.tensor(tokens, device=logits_BV.device)
    rounded_B = logits_BV.gather(1, token_B[:, None])[:, 0].double()
    if exact is None:
        result: list[float] = (rounded_B - normaliser_B).tolist()
        return result
    exact_B = exact(token_B).double()
    corrected_B = 1 - (rounded_B - normaliser_B).exp() + (exact_B - normaliser_B).exp()
    result = (exact_B - normaliser_B - corrected_B.log()).tolist()
    return result
