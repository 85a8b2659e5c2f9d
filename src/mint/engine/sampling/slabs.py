"""Keys and values of growing sequences, side by side: a decode step attends over many of them at once.

A slab holds the sequences that need the same room, in steps of STEP positions. So the shapes of a sequence's attention
depend on its own length alone, and what is masked is written nowhere but beyond its end. Shape letters: L layers, S slots,
B sequences of a decode step, b those of them in one slab, K key/value heads, G query heads per key/value head, n positions
(a slab's capacity), E head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mint.engine.models.attention import STEP
from mint.engine.models.config import DecoderConfig
from mint.engine.sampling.cache import SequenceCache, position_bytes


def slab_capacity(length: int) -> int:
    """Positions in the slab of a sequence that holds `length` and gets at least one more."""
    return (length // STEP + 1) * STEP


@dataclass(slots=True, repr=False, eq=False)
class Place:
    """Where a growing sequence's keys and values are; `length` positions are filled."""

    slab: Slab
    slot: int
    length: int


@dataclass(slots=True, repr=False, eq=False)
class Slab:
    """kv: [L, 2, S, K, n, E]; a slot that is taken is 0 beyond its sequence's end: what is masked must still be a number.

    places: of the first slots, in order.
    """

    kv: Tensor
    places: list[Place] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    def resize(self, slots: int) -> None:
        layers, two, _, *rest = self.kv.shape
        fresh = self.kv.new_empty(layers, two, slots, *rest)
        fresh[:, :, : len(self.places)] = self.kv[:, :, : len(self.places)]
        self.kv = fresh


class GrowingCaches:
    """The slabs of a sampler. Memory follows the sequences that are growing: at most four times what they use."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = (config.num_layers, 2, 0, config.num_kv_heads)
        self._head_dim = config.head_dim
        self._options: dict[str, torch.dtype | torch.device] = {"dtype": dtype, "device": device}
        self._position_bytes = position_bytes(config, dtype)
        self._slabs: dict[int, Slab] = {}

    def num_bytes(self) -> int:
        """All that is held, free slots included."""
        return sum(slab.kv.nbytes for slab in self._slabs.values())

    def used_bytes(self) -> int:
        """Of the slots that are taken."""
        return self._position_bytes * sum(slab.capacity * len(slab.places) for slab in self._slabs.values())

    def missing_bytes(self, place: Place) -> int:
        """How much more the sequence uses when it gets room for its next position; mostly 0."""
        return 0 if place.length < place.slab.capacity else self._position_bytes * STEP

    def start(self, prompt: SequenceCache) -> Place:
        """A sequence that goes on after `prompt`, of which it gets a copy."""
        return self._enter(prompt.kv[:, :, :, : prompt.length])

    def make_room(self, place: Place) -> None:
        """For one more position; the sequence moves to the next slab where its own is full."""
        if place.length < place.slab.capacity:
            return
        fresh = self._enter(place.slab.kv[:, :, place.slot])
        self.remove(place)
        place.slab, place.slot = fresh.slab, fresh.slot
        place.slab.places[place.slot] = place

    def remove(self, place: Place) -> None:
        """The last sequence of the slab takes over the slot."""
        slab, last = place.slab, place.slab.places.pop()
        if last is not place:
            slab.kv[:, :, place.slot] = slab.kv[:, :, last.slot]
            slab.places[place.slot] = last
            last.slot = place.slot
        if not slab.places:
            del self._slabs[slab.capacity]
            slab.resize(0)  # places that are done still point to it
        elif 4 * len(slab.places) <= slab.kv.shape[2]:
            slab.resize(2 * len(slab.places))

    def _enter(self, kv_L2KnE: Tensor) -> Place:
        """A place with a copy of these keys and values and room for more."""
        length = kv_L2KnE.shape[3]
        capacity = slab_capacity(length)
        slab = self._slabs.get(capacity)
        if slab is None:
            slab = Slab(torch.empty(*self._shape, capacity, self._head_dim, **self._options))  # type: ignore[call-overload]
            self._slabs[capacity] = slab
        if len(slab.places) == slab.kv.shape[2]:
            slab.resize(max(1, 2 * len(slab.places)))
        place = Place(slab, len(slab.places), length)
        slab.kv[:, :, place.slot, :, :length] = kv_L2KnE
        slab.kv[:, :, place.slot, :, length:] = 0.0
        slab.places.append(place)
        return place


class SlabAttention:
    """One decode step's attention over the sequences of one slab: b rows of the step, their slots, the next position."""

    def __init__(
        self, members: Sequence[tuple[int, Place]], q_BKGE: Tensor, new_2KBE: Tensor, out_BKGE: Tensor
    ) -> None:
        """The tensors hold another layer's rows at every call: queries, keys and values, and where the result goes."""
        ordered = sorted(members, key=lambda member: member[1].slot)
        places = [place for _, place in ordered]
        kv, device, count = places[0].slab.kv, places[0].slab.kv.device, len(places)
        num_kv, group, head_dim = q_BKGE.shape[1:]
        rows, slots, positions = (
            torch.tensor(numbers, device=device)
            for numbers in ([row for row, _ in ordered], [p.slot for p in places], [p.length for p in places])
        )
        self._q, self._new, self._out = q_BKGE, new_2KBE, out_BKGE
        self._rows: Tensor | None = rows
        if [row for row, _ in ordered] == list(range(count)):  # nothing has to be gathered
            self._q, self._new, self._out, self._rows = q_BKGE[:count], new_2KBE[:, :, :count], out_BKGE[:count], None
        layers, two, all_slots, _, capacity, _ = kv.shape
        # where a layer's new keys and values go, among all its head rows
        kinds_2K1 = torch.arange(two, device=device)[:, None, None] * all_slots * num_kv
        heads_K1 = torch.arange(num_kv, device=device)[:, None]
        self._head_rows = (((kinds_2K1 + slots * num_kv + heads_K1) * capacity) + positions).flatten()
        self._flat = kv.view(layers, -1, head_dim)
        first = places[0].slot
        lie_together = places[-1].slot - first + 1 == count
        self._slots = None if lie_together else slots
        self._kv = kv[:, :, first : first + count].flatten(2, 3) if lie_together else kv
        beyond_bn = torch.arange(capacity, device=device) > positions[:, None]
        mask_bn = torch.zeros(beyond_bn.shape, dtype=kv.dtype, device=device).masked_fill_(beyond_bn, -math.inf)
        shape = (count, num_kv, group, capacity)
        self._mask = mask_bn[:, None, None].expand(shape).reshape(-1, group, capacity)

    def __call__(self, layer: int) -> None:
        """Writes the new keys and values, then the attention of these rows over all there are."""
        q, new, rows = self._q, self._new, self._rows
        if rows is not None:
            q, new = q.index_select(0, rows), new.index_select(2, rows)
        self._flat[layer].index_copy_(0, self._head_rows, new.reshape(-1, new.shape[-1]))
        kv = self._kv[layer]
        keys, values = kv if self._slots is None else kv.index_select(1, self._slots).flatten(1, 2)
        if rows is None:
            attend_masked(q.flatten(0, 1), keys, values, self._mask, self._out.flatten(0, 1))
        else:
            self._out[rows] = attend_masked(q.flatten(0, 1), keys, values, self._mask).view(q.shape)


def attend_masked(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(E) + mask) v for each of b K heads, into `out` where there is one.

    q: [b K, G, E], keys and values: [b K, n, E], mask: [b K, G, n].
    """
    scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(torch.softmax(scores, -1), values, out=out)


def sequences_are_independent(
    config: DecoderConfig, counts: Sequence[int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether `attend_masked` gives a sequence the same bits beside any of these numbers of others."""
    generator = torch.Generator().manual_seed(0)
    num_kv, group, head_dim = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    most = max(counts)
    for capacity in (STEP, 4 * STEP):
        shapes = ((group, head_dim), (capacity, head_dim), (capacity, head_dim))
        parts = [torch.randn(most * num_kv, *shape, generator=generator).to(device, dtype) for shape in shapes]
        mask = torch.zeros(most * num_kv, group, capacity, dtype=dtype, device=device)
        mask[..., capacity - STEP // 2 :] = -math.inf
        results = [attend_masked(*(t[: n * num_kv] for t in (*parts, mask))) for n in counts]
        if not all(torch.equal(result, results[-1][: len(result)]) for result in results):
            return False
    return True
