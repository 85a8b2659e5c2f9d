"""Which prompt positions a prefill pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mint.engine.sampling.cache import SequenceCache
from mint.engine.sampling.grouping import PREFILL_CHUNK, Grouping
from mint.engine.sampling.request import Request


@dataclass(slots=True, repr=False)
class Prefill:
    """A request whose prompt has begun. cached_tokens: computed for another request, before or in the same pass."""

    request: Request
    cache: SequenceCache
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Chunk:
    """The next prompt positions of a request, [start, end).

    Those before that are not in its cache are computed in the same pass, for `source`, whose chunk comes before.
    """

    prefill: Prefill
    start: int
    end: int
    source: SequenceCache | None = None

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def request(self) -> Request:
        return self.prefill.request

    @property
    def is_last(self) -> bool:
        return self.end == len(self.request.given.prompt)


def chunk_end(chunks: Sequence[Chunk], request: Request, start: int, grouping: Grouping) -> int:
    """How far beyond `start` the prompt gets in the pass of these chunks; `start` where there is no room for it."""
    length = min(len(request.given.prompt) - start, PREFILL_CHUNK)
    if chunks and not grouping.packs_prompts:
        return start
    free = _free_rows(chunks, request.adapter_order, grouping.prefill_row_step)
    if length <= free:
        return start + length
    return start + free if grouping.cuts_prompts else start


def _free_rows(chunks: Sequence[Chunk], adapter_order: int, step: int) -> int:
    """Each adapter's rows are filled up to a multiple of `step`."""
    rows = {adapter_order: 0}
    for chunk in chunks:
        order = chunk.request.adapter_order
        rows[order] = rows.get(order, 0) + chunk.length
    own = rows.pop(adapter_order)
    return PREFILL_CHUNK - own - sum(-(-count // step) * step for count in rows.values())


def shared_beginning(chunks: Sequence[Chunk], request: Request) -> tuple[int, SequenceCache | None]:
    """The longest beginning of the prompt, but for its last token, that the pass of these chunks computes or has, and
    whose cache it enters."""
    prompt, best, source = request.given.prompt, 0, None
    for chunk in chunks:
        if chunk.request.adapter_order == request.adapter_order:
            other, most = chunk.request.given.prompt, min(chunk.end, len(prompt) - 1)
            equal = next((i for i in range(most) if prompt[i] != other[i]), most)
            if equal > best:
                best, source = equal, chunk.prefill.cache
    return best, source
