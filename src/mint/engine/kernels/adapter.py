"""`PackedAdapter`: an adapter as compiled kernels multiply with it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mint.engine.kernels.low_rank import (
    ADAPTED_WIDTH,
    SITE_WIDTH,
    pack_sites,
)
from mint.engine.kernels.simd import WIDTH, load_scalar
from mint.engine.kernels.tables import NUM_SITES
from mint.engine.kernels.threads import Kernel, thread_count, thread_number
from mint.engine.lora import DOWN, GATE_UP, QKV, UNEMBED_SITE, AdapterLayout, AnyAdapter, LoraSite, O, Site

SITES = (QKV, O, GATE_UP, DOWN)  # of a layer, in the order of the tables
assert len(SITES) == NUM_SITES


def _pack(a: Any) -> None:
    pack_sites(thread_number(), thread_count(), a[0], a[1], a[2], load_scalar(a[3]), a[4] != 0)


_pack_kernel = Kernel(_pack)


def site_numbers(num_layers: int) -> dict[Site, int]:
    """Where each site's entry is in an adapter's table."""
    numbers: dict[Site, int] = {(i, name): NUM_SITES * i + k for i in range(num_layers) for k, name in enumerate(SITES)}
    numbers[UNEMBED_SITE] = NUM_SITES * num_layers
    return numbers


MOST_SPARE_BYTES = 160_000_000  # of eight adapters of rank 16 of a model of 135M


class SpareStorage:
    """Storage of packed adapters that are gone, for the next of the same size: what the system has taken back has to be
    faulted in again, which takes as long as packing."""

    def __init__(self) -> None:
        self._spares: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self._lock = threading.RLock()  # an adapter may go while another is made, on the same thread, too

    def take(self, size: int) -> Tensor:
        """[size] bf16, whatever is in it."""
        with self._lock:
            try:
                storage = self._spares[size].pop()
            except (KeyError, IndexError):
                return torch.empty(size, dtype=torch.bfloat16)
            self._bytes -= storage.nbytes
            return storage

    def keep(self, storage: Tensor) -> None:
        """As many of one size as there is room for; where other sizes have taken it, they go."""
        with self._lock:
            if self._bytes + storage.nbytes > MOST_SPARE_BYTES and not self._spares.get(len(storage)):
                self._spares, self._bytes = {}, 0
            if self._bytes + storage.nbytes <= MOST_SPARE_BYTES:
                self._spares.setdefault(len(storage), []).append(storage)
                self._bytes += storage.nbytes


@dataclass(frozen=True, slots=True, weakref_slot=True, repr=False, eq=False)
class PackedAdapter(Mapping[Site, int]):
    """The number of every adapted site. ranks: the most of a site, filled up. table: see low_rank.py; storage: what it points
    to."""

    numbers: Mapping[Site, int]
    ranks: int
    table: np.ndarray
    storage: Tensor
    scale: Tensor

    def __getitem__(self, site: Site) -> int:
        return self.numbers[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


def pack_adapter(
    layout: AdapterLayout, flat_P: Tensor, num_layers: int, *, back: bool, spares: SpareStorage | None = None
) -> PackedAdapter:
    """A copy of the parameters; for backward too where `back`. Its storage comes from `spares` and goes there."""
    padded = -(-layout.rank // WIDTH) * WIDTH
    numbers = site_numbers(num_layers)
    table = np.zeros((len(numbers), SITE_WIDTH), np.int64)
    sizes = [_site_values(site, layout.rank, padded, back=back) for site in layout.sites]
    filled = padded == layout.rank and not any(module.num_out % WIDTH for module in layout.modules)
    spares = spares or SpareStorage()
    storage = spares.take(sum(sum(size) for size in sizes))
    if not filled:
        storage.zero_()
    at = storage.data_ptr()
    for site, parts in zip(layout.sites, sizes, strict=True):
        addresses = at + 2 * np.cumsum([0, *parts])
        table[numbers[site.site]] = _site_row(site, layout.rank, padded, addresses.tolist())
        at = int(addresses[-1])
    scale = torch.tensor(layout.scale, dtype=torch.float32)
    _pack_kernel(table.ctypes.data, len(table), flat_P.data_ptr(), scale.data_ptr(), int(back))
    ranks = padded * max(len(site.modules) for site in layout.sites)
    packed = PackedAdapter({site.site: numbers[site.site] for site in layout.sites}, ranks, table, storage, scale)
    weakref.finalize(packed, spares.keep, storage).atexit = False
    return packed


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _site_values(site: LoraSite, rank: int, padded: int, *, back: bool) -> list[int]:
    """How many bf16 A takes, A for backward, and B and B for backward of every module."""
    a = padded * len(site.modules) * site.num_in
    sizes = [a, a if back else 0]
    for module in site.modules:
        sizes += [_up(module.num_out, WIDTH) * _up(rank, 2), padded * _up(module.num_out, 2) if back else 0]
    return sizes


def _site_row(site: LoraSite, rank: int, padded: int, addresses: list[int]) -> list[int]:
    row = [addresses[0], addresses[1], padded * len(site.modules), rank, padded, site.num_in, len(site.modules)]
    for i, module in enumerate(site.modules):
        first, end = module.row // WIDTH, -(-(module.row + module.num_out) // WIDTH)
        row += [first, end, *addresses[2 + 2 * i : 4 + 2 * i], module.a_offset, module.b_offset, module.num_out]
    return row + [0] * (SITE_WIDTH - len(row))


def adapted_table(parts: Sequence[tuple[int, int, AnyAdapter | None, Tensor | None]]) -> tuple[np.ndarray, int, int]:
    """The table of a pass (first row, end, adapter, flat gradient), how many have an adapter, and the most ranks of a site."""
    rows, ranks = [], WIDTH
    for start, end, adapter, gradient in parts:
        if adapter is not None:
            assert isinstance(adapter, PackedAdapter)
            address = gradient.data_ptr() if gradient is not None else 0
            rows.append((start, end, adapter.table.ctypes.data, address, adapter.scale.data_ptr()))
            ranks = max(ranks, adapter.ranks)
    return np.array(rows, np.int64).reshape(-1, ADAPTED_WIDTH), len(rows), ranks
