"""What a request is on its way: it waits, its prompt is prefilled (see chunks.py), its sequences grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from mint.engine.backend import GenerateRequest, Generation
from mint.engine.lora import AnyAdapter, Segment
from mint.engine.sampling.sequence import GrowingSequence
from mint.engine.sampling.slabs import Place

SlabSequence = GrowingSequence[Place]


@dataclass(frozen=True, slots=True, repr=False)
class Request:
    """While it waits, this is all there is of it."""

    number: int
    given: GenerateRequest
    weights: AnyAdapter | None  # held here, so that a snapshot may be dropped while it is in use

    @property
    def adapter_order(self) -> int:
        return -1 if self.given.adapter is None else self.given.adapter


@dataclass(frozen=True, slots=True, repr=False)
class Growing:
    """A request whose sequences have started."""

    request: Request
    cached_tokens: int
    sequences: list[SlabSequence] = field(default_factory=list)

    def unfinished(self) -> list[SlabSequence]:
        return [s for s in self.sequences if s.stop_reason is None]

    def generation(self) -> Generation:
        return Generation(self.request.number, [s.finished() for s in self.sequences], self.cached_tokens)


@dataclass(frozen=True, slots=True, repr=False)
class Row:
    """A row of a decode step; without a sequence it is padding of its request's adapter."""

    request: Request
    sequence: SlabSequence | None


def row_segments(rows: Sequence[Row]) -> list[Segment]:
    """One segment per run of equal adapters."""
    segments, start = [], 0
    for _, group in groupby(rows, key=lambda row: row.request.adapter_order):
        members = list(group)
        segments.append(Segment(start, start + len(members), members[0].request.weights))
        start += len(members)
    return segments
