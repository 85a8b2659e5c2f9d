"""Who runs next: pure functions of what waits and what was done before. No threads, no clock."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "sample"]


@dataclass(frozen=True, slots=True)
class Head:
    """The first waiting operation of a run. `joins`: heads of equal value may share one pass; None runs alone.

    num_tokens: of its next micro-batch, which takes part in a pass of at most max_tokens. begun: a part of it is done.
    """

    run_id: str
    tenant: str
    arrived: float
    joins: Hashable | None = None
    num_tokens: int = 0
    max_tokens: int = 0
    begun: bool = False


def next_kind(*, train: bool, sample: bool, spent: Mapping[Kind, float]) -> Kind | None:
    """Waiting training and waiting sampling get equal time; a kind that waits alone gets all of it."""
    if train and sample:
        return "train" if spent["train"] <= spent["sample"] else "sample"
    return "train" if train else "sample" if sample else None


def charge(spent: Mapping[Kind, float], kind: Kind, seconds: float, *, contended: bool) -> dict[Kind, float]:
    """Time is counted only while both kinds wait, so that nobody saves up a claim while the other is away."""
    if not contended:
        return {"train": 0.0, "sample": 0.0}
    return {**spent, kind: spent[kind] + seconds}


def next_heads(heads: Sequence[Head], last_turn: Mapping[str, int]) -> list[str]:
    """Runs whose heads go now: first of the tenant whose last turn is the longest ago, then the oldest; then those that
    may join its pass, in the same order, as far as it has room.

    So whoever waits is served after at most one pass for every other tenant that waits, however much these have queued.
    """
    if not heads:
        return []
    first, *others = sorted(heads, key=lambda head: (last_turn.get(head.tenant, 0), head.arrived))
    chosen, num_tokens, most = [first.run_id], first.num_tokens, first.max_tokens
    for head in others if first.joins is not None else ():
        if head.joins == first.joins and num_tokens + head.num_tokens <= min(most, head.max_tokens):
            chosen.append(head.run_id)
            num_tokens, most = num_tokens + head.num_tokens, min(most, head.max_tokens)
    return chosen


def whose_turn(heads: Sequence[Head], runs: Collection[str]) -> set[str]:
    """Tenants for whom it counts as a turn that these runs go: those whose oldest head goes. Whoever has merely something
    smaller taken along keeps his place."""
    oldest: dict[str, str] = {}
    for head in sorted(heads, key=lambda head: head.arrived):
        oldest.setdefault(head.tenant, head.run_id)
    return {tenant for tenant, run_id in oldest.items() if run_id in runs}
