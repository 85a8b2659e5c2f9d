"""Continuous batching: requests join and leave a running batch; each step prefills one chunk or decodes one token each.

What a sequence's numbers depend on is fixed: a prompt is prefilled alone, in chunks with borders counted from its start;
a decode step runs at most MAX_ROWS sequences through the linears at a time, whose kernels give a row the same bits for
any number of rows up to that (checked when the sampler is made; where they do not, rows are padded to a fixed number).
Shape letters: B sequences of a decode step, T rows, D hidden, V vocabulary, K, G, E as in models/attention.py.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mint.engine.backend import GenerateRequest, Generation, StopCheck
from mint.engine.lora import UNEMBED_SITE, AdapterWeights, Segment
from mint.engine.models.attention import attend
from mint.engine.models.decoder import Attention, Decoder, PackedRow
from mint.engine.models.head import Head
from mint.engine.sampling.cache import PrefixCache, SequenceCache
from mint.engine.sampling.choose import Choice, choose, log_normaliser
from mint.types.results import SampledSequence, StopReason

MAX_ROWS = 32
MAX_SEQUENCES = 64  # growing at once; further requests wait, so that caches stay bounded
PREFILL_CHUNK = 256


@dataclass(slots=True, repr=False)
class _Sequence:
    """One sequence of a request; its last token is not in the cache yet."""

    index: int
    cache: SequenceCache
    random: np.random.Generator
    stop_check: StopCheck | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]] | None] = field(default_factory=list)
    stop_reason: StopReason | None = None


@dataclass(slots=True, repr=False)
class _Request:
    number: int
    given: GenerateRequest
    weights: AdapterWeights | None  # held here, so that a snapshot may be dropped while it is in use
    prompt_cache: SequenceCache
    sequences: list[_Sequence] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def prefilled(self) -> bool:
        return bool(self.sequences)  # they start when the prompt's last chunk is done

    def growing(self) -> list[_Sequence]:
        return [s for s in self.sequences if s.stop_reason is None]


class Sampler:
    """Generates on a decoder. `adapters` is shared with the backend, which adds and drops snapshots."""

    def __init__(self, decoder: Decoder, head: Head, adapters: dict[int, AdapterWeights], prefix_bytes: int) -> None:
        self._decoder, self._head, self._adapters = decoder, head, adapters
        self._requests: OrderedDict[int, _Request] = OrderedDict()
        self._prefixes = PrefixCache(prefix_bytes)
        self._next = 0
        decoder.weights.pack()
        self._row_block = 1 if decoder.dtype == torch.float32 or _rows_are_independent(decoder) else MAX_ROWS

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def add(self, given: GenerateRequest) -> int:
        decoder = self._decoder
        cache = SequenceCache(decoder.config, len(given.prompt), decoder.dtype, decoder.device)
        self._next += 1
        weights = self._adapters[given.adapter] if given.adapter is not None else None
        self._requests[self._next] = _Request(self._next, given, weights, cache)
        return self._next

    def cancel(self, number: int) -> None:
        self._requests.pop(number, None)

    def forget_adapter(self, handle: int) -> None:
        self._prefixes.forget_adapter(handle)

    def step(self) -> list[Generation]:
        """Prefill first: a waiting prompt joins the batch before the others go on, where there is room."""
        growing = [(r, s) for r in self._requests.values() for s in r.growing()]
        waiting = next((r for r in self._requests.values() if not r.prefilled), None)
        if waiting is not None and (not growing or len(growing) + waiting.given.num_samples <= MAX_SEQUENCES):
            self._prefill_chunk(waiting)
        else:
            # rows of one adapter lie together, so that each adapter is one segment
            growing.sort(key=lambda pair: -1 if pair[0].given.adapter is None else pair[0].given.adapter)
            for first in range(0, len(growing), MAX_ROWS):
                self._decode(growing[first : first + MAX_ROWS])
        return self._collect()

    def _collect(self) -> list[Generation]:
        done = [r for r in self._requests.values() if r.prefilled and not r.growing()]
        for request in done:
            del self._requests[request.number]
        return [Generation(r.number, [_sampled(s) for s in r.sequences], r.cached_tokens) for r in done]

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

    def _prefill_chunk(self, request: _Request) -> None:
        given, cache = request.given, request.prompt_cache
        start, prompt = cache.length, request.given.prompt
        end = min(start + PREFILL_CHUNK, len(prompt))
        whole = end - start == PREFILL_CHUNK
        known = self._prefixes.get(given.adapter, prompt[:end]) if whole and end < len(prompt) else None
        if known is not None:
            cache.extend(known)
            request.cached_tokens += PREFILL_CHUNK
            return

        def attention(index: int, qkv_NTE: Tensor, out_TH: Tensor) -> None:
            q, _, _ = self._decoder.split_heads(qkv_NTE)
            filled = cache.kv[index, :, :, :end]
            filled[:, :, start:] = self._decoder.keys_values(qkv_NTE)
            attend(self._decoder.ws, q, filled[0], filled[1], self._decoder.grouped(out_TH))

        segments = [Segment(0, end - start, request.weights)]
        final_TD = self._forward(list(prompt[start:end]), list(range(start, end)), segments, attention)
        cache.length = end
        if whole:
            self._prefixes.put(given.adapter, prompt[:end], cache.kv[:, :, :, start:end])
        if end == len(prompt):
            self._start_sequences(request, final_TD[-1:])

    def _start_sequences(self, request: _Request, final_1D: Tensor) -> None:
        given = request.given
        for i in range(given.num_samples):
            last = i == given.num_samples - 1
            cache = request.prompt_cache if last else request.prompt_cache.fork()
            key = np.array([given.seed % 2**64, i], np.uint64)
            random = np.random.Generator(np.random.Philox(key=key))
            check = given.new_stop_check() if given.new_stop_check is not None else None
            request.sequences.append(_Sequence(i, cache, random, check))
        pairs = [(request, sequence) for sequence in request.sequences]
        for first in range(0, len(pairs), MAX_ROWS):
            group = pairs[first : first + MAX_ROWS]
            self._choose(final_1D.expand(len(group), -1).contiguous(), group)

    def _decode(self, pairs: list[tuple[_Request, _Sequence]]) -> None:
        """One token for each: the last token's keys and values enter the cache, the next token is chosen."""
        num_pad = -len(pairs) % self._row_block
        for _, sequence in pairs:
            sequence.cache.reserve(sequence.cache.length + 1)
        decoder, caches = self._decoder, [sequence.cache for _, sequence in pairs]
        # views of every layer at once, so that a layer's attention costs few small operations
        places = [cache.at(cache.length) for cache in caches]
        seen = [cache.until(cache.length + 1) for cache in caches]

        def attention(index: int, qkv_NTE: Tensor, out_TH: Tensor) -> None:
            q = decoder.split_heads(qkv_NTE)[0].transpose(0, 2)
            new = decoder.keys_values(qkv_NTE)
            out = decoder.grouped(out_TH)
            out[len(pairs) :].zero_()
            for i, (place, (keys, values)) in enumerate(zip(places, seen, strict=True)):
                place[index].copy_(new[:, :, i])
                # the group's query heads stand where a kernel expects query positions: no key is repeated per head
                attended = scaled_dot_product_attention(q[i, None].transpose(1, 2), keys[index], values[index])
                out[i].copy_(attended[0])

        tokens = [s.tokens[-1] for _, s in pairs] + [0] * num_pad
        positions = [s.cache.length for _, s in pairs] + [0] * num_pad
        final_BD = self._forward(tokens, positions, self._segments(pairs), attention)
        for _, sequence in pairs:
            sequence.cache.length += 1
        self._choose(final_BD, pairs)

    def _segments(self, pairs: list[tuple[_Request, _Sequence]]) -> list[Segment]:
        """Runs of equal adapters."""
        adapters = [request.given.adapter for request, _ in pairs]
        borders = [0, *(i for i in range(1, len(adapters)) if adapters[i] != adapters[i - 1]), len(adapters)]
        return [Segment(a, b, pairs[a][0].weights) for a, b in pairwise(borders)]

    def _choose(self, final_BD: Tensor, pairs: list[tuple[_Request, _Sequence]]) -> None:
        """The next token of every row, its logprob at temperature 1, and whether the sequence ends with it."""
        normed_BD, _ = self._head.normalise(final_BD)
        segments = self._segments(pairs)
        logits_BV = self._head.logits(normed_BD, None)[: len(pairs)]
        for segment in segments:
            if (lora := segment.at(UNEMBED_SITE)) is not None:
                rows = slice(segment.start, segment.end)
                logits_BV[rows].addmm_(normed_BD[rows] @ lora.a_RI.t(), lora.b_OR.t())
        choices = [Choice(r.given.temperature, r.given.top_k, r.given.top_p, s.random.random()) for r, s in pairs]
        tokens = choose(logits_BV, choices)
        logprobs = self._logprobs(normed_BD, logits_BV, tokens, segments)
        for i, (request, sequence) in enumerate(pairs):
            sequence.tokens.append(tokens[i])
            sequence.logprobs.append(logprobs[i])
            if request.given.num_topk:
                sequence.topk.append(top_logprobs(logits_BV[i : i + 1], request.given.num_topk)[0])
            sequence.stop_reason = _stop_reason(request.given, sequence)

    def _logprobs(
        self, normed_BD: Tensor, logits_BV: Tensor, tokens: list[int], segments: list[Segment]
    ) -> list[float]:
        """As the head scores targets: in bf16 the token's logit is exact and takes the rounded one's place."""
        token_B = torch.tensor(tokens, device=logits_BV.device)
        normaliser_B = log_normaliser(logits_BV)
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


def top_logprobs(logits_BV: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k likeliest tokens of each row with their logprobs, likeliest first."""
    values, tokens = logits_BV.float().topk(min(k, logits_BV.shape[1]), dim=-1)
    logprobs = (values.double() - log_normaliser(logits_BV)[:, None]).tolist()
    return [list(zip(ids, row, strict=True)) for ids, row in zip(tokens.tolist(), logprobs, strict=True)]


def _stop_reason(given: GenerateRequest, sequence: _Sequence) -> StopReason | None:
    token = sequence.tokens[-1]
    complete = sequence.stop_check is not None and sequence.stop_check(token)
    if token in given.stop_tokens or complete:
        return "stop"
    return "length" if len(sequence.tokens) >= given.max_new else None


def _sampled(sequence: _Sequence) -> SampledSequence:
    assert sequence.stop_reason is not None
    return SampledSequence(
        stop_reason=sequence.stop_reason,
        tokens=sequence.tokens,
        logprobs=sequence.logprobs,
        topk_logprobs=sequence.topk or None,
    )


def _rows_are_independent(decoder: Decoder) -> bool:
    """Whether the kernels give a row the same bits for every number of rows a decode step may have."""
    layer = decoder.weights.layers[0]
    generator = torch.Generator().manual_seed(0)
    for weight in (linear.weight_OI for linear in layer.linears()):
        x = torch.randn(MAX_ROWS, weight.shape[1], generator=generator).to(decoder.device, decoder.dtype)
        whole = x @ weight.t()
        if not all(torch.equal(x[:n] @ weight.t(), whole[:n]) for n in (1, 2, 3, 5, 8, 13, 16, 17, 24, 31)):
            return False
    return True
