"""Who runs next: pure functions of what waits and what time was spent. No threads, no clock."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

Kind = Literal["train", "sample"]


@dataclass(frozen=True, slots=True)
class Head:
    """The first waiting operation of a run. `joins`: heads of equal value may share one pass; None runs alone."""

    run_id: str
    tenant: str
    arrived: float
    joins: Hashable | None


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


def charge_tenant(spent: Mapping[str, float], tenant: str, seconds: float, waiting: Set[str]) -> dict[str, float]:
    """The same among tenants: whoever works while nobody else waits pays nothing for it later."""
    if waiting <= {tenant}:
        return {}
    return {**spent, tenant: spent.get(tenant, 0.0) + seconds}


def next_heads(heads: Sequence[Head], spent_by_tenant: Mapping[str, float]) -> list[str]:
    """Runs whose heads go now: the tenant with the least time first, then the oldest; what can join its pass joins."""
    if not heads:
        return []
    first = min(heads, key=lambda h: (spent_by_tenant.get(h.tenant, 0.0), h.arrived))
    if first.joins is None:
        return [first.run_id]
    others = sorted((h for h in heads if h.joins == first.joins and h is not first), key=lambda h: h.arrived)
    return [first.run_id, *(h.run_id for h in others)]
