"""`PackedAdapter`: the operands of every module where its table says they are, and the tables of a pass."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from tests.unit.engine.kernels.calling import WIDTH, layout_of, threads, up
from torch import Tensor
from torch.nn.functional import pad

from mint.engine.kernels import adapter as adapter_module
from mint.engine.kernels import low_rank as k
from mint.engine.kernels.adapter import SpareStorage, adapted_table, pack_adapter, site_numbers
from mint.engine.lora import DOWN, GATE_UP, QKV, UNEMBED_SITE, AdapterLayout, O, lay_out, module_views
from mint.types.params import LoraConfig

PLANNED = [
    ((0, QKV), 64, {"q": 64, "k": 32, "v": 32}),
    ((1, DOWN), 96, {"down": 64}),
    (UNEMBED_SITE, 64, {"lm_head": 55}),
]
RANKS = [1, 5, 16, 33]


def read(address: int, *shape: int) -> Tensor:
    """bf16 at this address."""
    size = 2 * int(np.prod(shape))
    return torch.frombuffer(ctypes.string_at(address, size), dtype=torch.bfloat16).view(shape)


def parameters(rank: int, generator: torch.Generator) -> tuple[AdapterLayout, Tensor]:
    layout = lay_out(LoraConfig(rank=rank), PLANNED)
    return layout, torch.randn(layout.size, generator=generator)


def test_sites_are_numbered_layer_by_layer_and_the_unembedding_comes_last() -> None:
    assert site_numbers(2) == {
        (0, QKV): 0, (0, O): 1, (0, GATE_UP): 2, (0, DOWN): 3,
        (1, QKV): 4, (1, O): 5, (1, GATE_UP): 6, (1, DOWN): 7, UNEMBED_SITE: 8,
    }  # fmt: skip


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "both"])
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_every_operand_is_where_the_table_says(rank: int, back: bool, generator: torch.Generator) -> None:
    layout, flat_P = parameters(rank, generator)
    adapter = pack_adapter(layout, flat_P, 2, back=back)
    padded = up(rank)
    for site in layout.sites:
        row, count = adapter.table[adapter[site.site]].tolist(), len(site.modules)
        ranks = padded * count
        assert row[k.RANKS : k.MODULES + 1] == [ranks, rank, padded, site.num_in, count]
        a_views, _ = zip(*(module_views(layout, flat_P, m) for m in site.modules), strict=True)
        a_RI = torch.cat([pad(a, (0, 0, 0, padded - rank)) for a in a_views])
        assert torch.equal(read(row[k.A], ranks // WIDTH, site.num_in // 2, WIDTH, 2), layout_of(a_RI))
        if back:
            expected = layout_of(a_RI.t())
            assert torch.equal(read(row[k.A_BACK], *expected.shape), expected)
        for i, module in enumerate(site.modules):
            found = row[7 + k.MODULE_WIDTH * i : 7 + k.MODULE_WIDTH * (i + 1)]
            b_OR = module_views(layout, flat_P, module)[1] * torch.tensor(layout.scale)
            end = -(-(module.row + module.num_out) // WIDTH)
            assert found[k.FIRST : k.LAST + 1] == [module.row // WIDTH, end]
            assert found[k.A_AT :] == [module.a_offset, module.b_offset, module.num_out]
            assert torch.equal(read(found[k.B], *layout_of(b_OR).shape), layout_of(b_OR))
            if back:
                turned = layout_of(pad(b_OR.t(), (0, 0, 0, padded - rank)))
                assert torch.equal(read(found[k.B_BACK], *turned.shape), turned)


def test_sites_that_are_not_adapted_have_no_entry(generator: torch.Generator) -> None:
    layout, flat_P = parameters(5, generator)
    adapter = pack_adapter(layout, flat_P, 2, back=True)
    assert set(adapter) == {(0, QKV), (1, DOWN), UNEMBED_SITE} and len(adapter) == 3
    assert np.flatnonzero(adapter.table[:, k.A]).tolist() == [0, 7, 8]
    assert not adapter.table[[1, 2, 3, 4, 5, 6]].any()


def test_the_parameters_are_copied_by_any_number_of_threads(generator: torch.Generator) -> None:
    layout, flat_P = parameters(33, generator)
    first = pack_adapter(layout, flat_P, 2, back=True)
    with threads(2):
        second = pack_adapter(layout, flat_P, 2, back=True)
    flat_P.zero_()
    assert first.storage.any() and torch.equal(first.storage, second.storage)
    assert first.scale.item() == pytest.approx(32 / 33) and first.ranks == 3 * 48


def test_a_pass_lists_rows_with_an_adapter(generator: torch.Generator) -> None:
    few, many = (pack_adapter(*parameters(rank, generator), 2, back=False) for rank in (5, 33))
    gradient_P = torch.zeros(4)
    table, count, ranks = adapted_table([(0, 3, few, None), (3, 4, None, gradient_P), (4, 9, many, gradient_P)])
    assert (count, ranks) == (2, 144)
    assert table.tolist() == [
        [0, 3, few.table.ctypes.data, 0, few.scale.data_ptr()],
        [4, 9, many.table.ctypes.data, gradient_P.data_ptr(), many.scale.data_ptr()],
    ]


def test_without_adapters_there_is_scratch_for_one_block() -> None:
    table, count, ranks = adapted_table([(0, 3, None, None)])
    assert (table.shape, count, ranks) == ((0, k.ADAPTED_WIDTH), 0, WIDTH)


@pytest.mark.parametrize("rank", [16, 5])
def test_storage_of_one_that_is_gone_is_used_again(rank: int, generator: torch.Generator) -> None:
    """With the same content as new storage, whatever was in it; not for another size."""
    (layout, flat_P), (_, other_P), (smaller, smaller_P) = (parameters(r, generator) for r in (rank, rank, 1))
    spares, new = SpareStorage(), pack_adapter(layout, other_P, 2, back=True)
    first = pack_adapter(layout, flat_P, 2, back=True, spares=spares)
    address = first.storage.data_ptr()
    beside = pack_adapter(layout, flat_P, 2, back=True, spares=spares)
    assert beside.storage.data_ptr() != address  # it is not gone yet
    first.storage.fill_(torch.nan)
    del first
    assert pack_adapter(smaller, smaller_P, 2, back=True, spares=spares).storage.data_ptr() != address
    again = pack_adapter(layout, other_P, 2, back=True, spares=spares)
    assert again.storage.data_ptr() == address and torch.equal(again.storage, new.storage)


def test_only_so_much_storage_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one size as many as there is room for; those of sizes that are not used any more make room."""
    spares = SpareStorage()
    monkeypatch.setattr(adapter_module, "MOST_SPARE_BYTES", 3 * 200 + 50)
    old, new = ([torch.empty(size, dtype=torch.bfloat16) for _ in range(5)] for size in (100, 120))

    def taken(size: int, count: int) -> list[int]:
        return [spares.take(size).data_ptr() for _ in range(count)]

    for storage in old:
        spares.keep(storage)
    spares.keep(new[0])
    assert taken(120, 1) == [new[0].data_ptr()]
    assert not set(taken(100, 5)) & {storage.data_ptr() for storage in old}  # gone with the first of the new size
    for storage in old:
        spares.keep(storage)
    assert taken(100, 3) == [storage.data_ptr() for storage in old[2::-1]]
    spares.keep(torch.empty(1000, dtype=torch.bfloat16))  # too large at all
    for storage in new:
        spares.keep(storage)
    assert taken(120, 2) == [storage.data_ptr() for storage in new[1::-1]]
