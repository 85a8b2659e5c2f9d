"""The low-rank part of a site, forward and backward, for several adapters of a pass, against float64 autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from tests.unit.engine.kernels.calling import assert_within, half, native, rounded, up, whole
from torch import Tensor

from mint.engine.kernels import low_rank as k
from mint.engine.kernels.adapter import PackedAdapter, adapted_table, pack_adapter, site_numbers
from mint.engine.kernels.packing import BLOCK_BYTES
from mint.engine.kernels.products import TILE_BLOCKS
from mint.engine.lora import QKV, UNEMBED_SITE, AdapterLayout, Site, lay_out, module_views
from mint.types.params import LoraConfig

INPUTS = 64
ATTENTION = ((0, QKV), {"q": 64, "k": 32, "v": 32})  # outputs of every module
VOCABULARY = (UNEMBED_SITE, {"lm_head": 55})  # not whole blocks, and an odd number
Planned = tuple[Site, Mapping[str, int]]


@dataclass(frozen=True)
class Part:
    """Rows of one adapter: how many, its rank, the site that it adapts (None: it has none), whether it has a gradient."""

    rows: int
    rank: int = 1
    planned: Planned | None = ATTENTION
    trained: bool = True


SEVERAL = [Part(7, 5), Part(1, 16), Part(70, 33), Part(3, 4, planned=None), Part(16, 16), Part(9, 1), Part(2, 40)]
UNTRAINED = [Part(5, 5), Part(13, 16, trained=False), Part(1, 33), Part(64, 33, trained=False)]
CASES = {
    "one row": [Part(1, 1)],
    "several": SEVERAL,
    "some are not trained": UNTRAINED,
    "another site": [Part(11, 5), Part(6, 20, VOCABULARY), Part(8, 16)],
    "longer than a chunk": [Part(131, 5), Part(129, 32)],
}


class Pass:
    """One site over rows with these parts; scratch holds no number until something is written."""

    def __init__(
        self, parts: Sequence[Part], generator: torch.Generator, planned: Planned = ATTENTION, exact: bool = False
    ) -> None:
        self.site, outputs = planned
        self.parts, self.number = parts, site_numbers(1)[self.site]
        self.outputs = sum(outputs.values())
        self.rows, width = sum(part.rows for part in parts), up(self.outputs)
        make = whole if exact else half
        self.x_TI, self.grad_TO = make(generator, self.rows, INPUTS), make(generator, self.rows, width)
        self.grad_TO[:, self.outputs :] = 0
        self.layouts = [self._layout(part) for part in parts]
        self.flats, self.gradients, table_rows, start = [], [], [], 0
        for part, layout in zip(parts, self.layouts, strict=True):
            flat_P = make(generator, layout.size).float() if layout is not None else torch.empty(0)
            gradient_P = torch.full_like(flat_P, 0.5) if part.trained else None
            adapter = pack_adapter(layout, flat_P, 1, back=True) if layout is not None else None
            table_rows.append((start, start + part.rows, adapter, gradient_P))
            self.flats.append(flat_P)
            self.gradients.append(gradient_P)
            start += part.rows
        self._held = table_rows
        self.table, self.count, self.ranks = adapted_table(table_rows)
        self.given_TO = torch.randn(self.rows, width, generator=generator)
        self.given_TI = torch.randn(self.rows, INPUTS, generator=generator)

    @staticmethod
    def _layout(part: Part) -> AdapterLayout | None:
        if part.planned is None:
            return None
        return lay_out(LoraConfig(rank=part.rank), [(part.planned[0], INPUTS, part.planned[1])])

    def _adapted(self, part: int, threads: int) -> list[int]:
        return [part, threads, self.table.ctypes.data, self.count, self.number]

    def _scratch(self) -> tuple[Tensor, Tensor]:
        wide = torch.full((self.rows + 16, self.ranks), math.nan)
        return wide, torch.full((self.rows, self.ranks), math.nan, dtype=torch.bfloat16)

    def inputs(self, threads: int) -> tuple[Tensor, Tensor]:
        wide, narrow = self._scratch()
        for part in range(threads):
            native(k.low_rank_inputs)(
                *self._adapted(part, threads), self.x_TI.data_ptr(), wide.data_ptr(), narrow.data_ptr(), self.ranks
            )
        return wide, narrow

    def forward(self, threads: int = 1) -> Tensor:
        """What is there plus the low-rank part, blocks of outputs one after the other."""
        _, narrow = self.inputs(threads)
        out_TO = self.given_TO.clone()
        blocks = out_TO.shape[1] // 16
        for first in range(0, blocks, TILE_BLOCKS):
            native(k.add_low_rank)(
                *self._adapted(0, 1)[2:], narrow.data_ptr(), self.ranks, first, min(blocks, first + TILE_BLOCKS),
                out_TO.data_ptr(), 4 * out_TO.shape[1],
            )  # fmt: skip
        return out_TO

    def backward(self, threads: int = 1) -> Tensor:
        """Adds to the gradients; what is there plus the gradient by the input."""
        wide, _ = self.inputs(threads)
        wide_back, narrow_back = self._scratch()
        grad, step = self.grad_TO.data_ptr(), 2 * self.grad_TO.shape[1]
        columns = self.rows + (len(self.parts) + 2) * (k.GAP + 16)
        turned, turned_back = (torch.full((self.ranks, columns), math.nan).bfloat16() for _ in range(2))
        panel = TILE_BLOCKS * BLOCK_BYTES * (self.rows + 16) + 4 * TILE_BLOCKS * 16 * self.ranks
        scratch = torch.full((threads, panel // 4), math.nan)
        for part in range(threads):
            native(k.low_rank_back)(
                *self._adapted(part, threads), grad, step, wide_back.data_ptr(), narrow_back.data_ptr(), self.ranks
            )
        for part in range(threads):
            for source, target in ((wide, turned), (wide_back, turned_back)):
                native(k.transpose_ranks)(
                    *self._adapted(part, threads), source.data_ptr(), self.ranks, target.data_ptr(), 2 * columns
                )
        for part in range(threads):
            native(k.add_gradients)(
                *self._adapted(part, threads), self.x_TI.data_ptr(), turned_back.data_ptr(), grad, step,
                turned.data_ptr(), 2 * columns, scratch.data_ptr(), panel,
            )  # fmt: skip
        out_TI = self.given_TI.clone()
        for first, end in ((0, 3), (3, 4)):
            native(k.add_low_rank_back)(
                *self._adapted(0, 1)[2:], narrow_back.data_ptr(), self.ranks, first, end, out_TI.data_ptr(), 4 * INPUTS
            )
        return out_TI


@dataclass(frozen=True)
class Exact:
    """Of one part in float64: its rows' outputs, the gradient by its parameters and by its rows."""

    out_TO: Tensor
    grad_P: Tensor
    grad_TI: Tensor


def expected(given: Pass) -> list[Exact]:
    """What is multiplied is rounded as the kernels round it: A, B times its scale, u, and the gradient by u."""
    found, start = [], 0
    for part, layout, flat_P in zip(given.parts, given.layouts, given.flats, strict=True):
        rows = slice(start, start + part.rows)
        start += part.rows
        x_TI = given.x_TI[rows].double().requires_grad_()
        leaf_P, outs = flat_P.double().requires_grad_(), []
        if layout is not None and layout.sites[0].site == given.site:
            scale = float(torch.tensor(layout.scale, dtype=torch.float32))
            for module in layout.modules:
                a, b = module_views(layout, leaf_P, module)
                u = rounded(x_TI @ rounded(a).t(), back=True)
                scaled = (b.detach().float() * scale).double() + (b - b.detach()) * scale  # as float32 multiplies them
                outs.append(u @ rounded(scaled).t())
        out_TO = torch.cat(outs, -1) if outs else (0 * x_TI.sum() + 0 * leaf_P.sum()).expand(part.rows, given.outputs)
        grad = given.grad_TO[rows, : given.outputs].double()
        grad_TI, grad_P = torch.autograd.grad(out_TO, (x_TI, leaf_P), grad)
        found.append(Exact(out_TO.detach(), grad_P, grad_TI))
    return found


def _split(given: Pass, whole_T: Tensor) -> list[Tensor]:
    return list(whole_T.split([part.rows for part in given.parts]))


def _assert_close(found: Tensor, exact: Tensor) -> None:
    """Float32 sums whose operands are rounded alike; here and there a value lies so near a tie that it is rounded the other
    way."""
    assert_within(found, exact, 2e-3 * exact.abs().max() + 1e-6)
    assert float((found.double() - exact).norm()) <= 2e-4 * float(exact.norm()) + 1e-6


@pytest.mark.parametrize("planned", [ATTENTION, VOCABULARY], ids=["three modules", "ragged outputs"])
@pytest.mark.parametrize("name", CASES)
def test_forward_adds_every_adapters_part_to_its_rows(name: str, planned: Planned, generator: torch.Generator) -> None:
    given = Pass(_of(CASES[name], planned), generator, planned)
    out_TO = given.forward()
    added = (out_TO.double() - given.given_TO.double())[:, : given.outputs]
    for part, found, exact in zip(given.parts, _split(given, added), expected(given), strict=True):
        assert_within(found, exact.out_TO, 2e-3 * exact.out_TO.abs().max() + 1e-5)
        assert part.planned == planned or not exact.out_TO.any()
    assert torch.equal(out_TO[:, given.outputs :], given.given_TO[:, given.outputs :])


def _of(parts: Sequence[Part], planned: Planned) -> list[Part]:
    """The same with this site in the place of the attention's."""
    return [Part(p.rows, p.rank, planned if p.planned == ATTENTION else p.planned, p.trained) for p in parts]


@pytest.mark.parametrize("planned", [ATTENTION, VOCABULARY], ids=["three modules", "ragged outputs"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_adapter(name: str, planned: Planned, generator: torch.Generator) -> None:
    """Added to what is there; those without a gradient still give theirs by the input."""
    given = Pass(_of(CASES[name], planned), generator, planned)
    out_TI = given.backward()
    for part, gradient_P, exact in zip(given.parts, given.gradients, expected(given), strict=True):
        if gradient_P is not None and part.planned is not None:
            _assert_close(gradient_P - 0.5, exact.grad_P)
            assert part.planned == planned or (gradient_P == 0.5).all()
    added = out_TI.double() - given.given_TI.double()
    for found, exact in zip(_split(given, added), expected(given), strict=True):
        _assert_close(found, exact.grad_TI)


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("rank", [1, 2, 16, 32])
def test_whole_numbers_come_out_exactly(rows: int, rank: int, generator: torch.Generator) -> None:
    """The scale is a power of two, so nothing is rounded but u and the gradient by it."""
    given = Pass([Part(3, 8), Part(rows, rank)], generator, exact=True)
    given.given_TO.round_()
    given.given_TI.round_()
    out_TO, out_TI = given.forward(), given.backward()
    for found_TO, found_TI, gradient_P, there_TO, there_TI, exact in zip(
        _split(given, out_TO), _split(given, out_TI), given.gradients, _split(given, given.given_TO),
        _split(given, given.given_TI), expected(given), strict=True,
    ):  # fmt: skip
        assert torch.equal(found_TO.double(), there_TO.double() + exact.out_TO)
        assert torch.equal(found_TI.double(), there_TI.double() + exact.grad_TI)
        assert gradient_P is not None and torch.equal(gradient_P.double(), exact.grad_P + 0.5)


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_bits_do_not_depend_on_how_many_share_the_work(threads: int, generator: torch.Generator) -> None:
    given, again = (Pass(SEVERAL, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(given.forward(threads), again.forward())
    assert torch.equal(given.backward(threads), again.backward())
    for found, one in zip(given.gradients, again.gradients, strict=True):
        assert found is not None and one is not None and torch.equal(found, one)


def test_an_adapters_bits_do_not_depend_on_the_others(generator: torch.Generator) -> None:
    """Neither its rows' results nor its gradient: whichever ranks and rows are beside it."""
    part = Part(37, 5)
    among, alone = Pass([Part(5, 33), part, Part(8, 16)], generator), Pass([part], generator)
    among.flats[1].copy_(alone.flats[0])
    rows = slice(5, 42)
    for name in ("x_TI", "grad_TO", "given_TO", "given_TI"):
        getattr(among, name)[rows] = getattr(alone, name)
    adapter = _repacked(among, 1)
    among.table[1, k.TABLE], among.table[1, k.SCALE] = adapter.table.ctypes.data, adapter.scale.data_ptr()
    assert torch.equal(among.forward()[rows], alone.forward())
    assert torch.equal(among.backward()[rows], alone.backward())
    assert torch.equal(among.gradients[1], alone.gradients[0])


def _repacked(given: Pass, index: int) -> PackedAdapter:
    layout = given.layouts[index]
    assert layout is not None
    return pack_adapter(layout, given.flats[index], 1, back=True)
