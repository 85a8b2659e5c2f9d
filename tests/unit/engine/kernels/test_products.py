"""Products with packed weights: exact where float32 is, close to float64 elsewhere, and the same bits for any rows."""

from __future__ import annotations

import math

import pytest
import torch
from tests.unit.engine.kernels.calling import WIDTH, assert_within, half, layout_of, native, whole
from torch import Tensor

from mint.engine.kernels.products import PART_PAIRS, multiply

MOST_ROWS = 33
PAIRS = [1, 7, 32, PART_PAIRS, PART_PAIRS + 1, 2 * PART_PAIRS + 52]


def product(
    x_TI: Tensor, packed: Tensor, given_TO: Tensor | None = None, *, first: int = 0, end: int | None = None
) -> Tensor:
    """Blocks [first, end) of x w, or of `given_TO` with that added; what is not written is no number, or as given."""
    blocks, pairs = packed.shape[:2]
    out_TO = torch.full((len(x_TI), WIDTH * blocks), math.nan) if given_TO is None else given_TO.clone()
    native(multiply)(
        x_TI.data_ptr(), 2 * x_TI.stride(0), len(x_TI), packed.data_ptr(), 64 * pairs, pairs, first,
        blocks if end is None else end, out_TO.data_ptr(), 4 * out_TO.stride(0), int(given_TO is not None),
    )  # fmt: skip
    return out_TO


@pytest.mark.parametrize("pairs", PAIRS)
def test_whole_numbers_are_multiplied_exactly(pairs: int, generator: torch.Generator) -> None:
    """For every number of rows, and of blocks on either side of the three that are taken at once."""
    x_TI, weight_OI = whole(generator, MOST_ROWS, 2 * pairs), whole(generator, 7 * WIDTH, 2 * pairs)
    exact_TO = (x_TI.double() @ weight_OI.double().t()).float()
    packed = layout_of(weight_OI)
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(product(x_TI[:rows], packed), exact_TO[:rows])
    for blocks in range(1, 7):
        assert torch.equal(product(x_TI, packed[:blocks]), exact_TO[:, : WIDTH * blocks])


@pytest.mark.parametrize("pairs", PAIRS)
def test_products_are_added_to_what_is_there(pairs: int, generator: torch.Generator) -> None:
    x_TI, weight_OI = whole(generator, 11, 2 * pairs), whole(generator, 5 * WIDTH, 2 * pairs)
    given_TO = whole(generator, 11, 5 * WIDTH, most=1000, dtype=torch.float32)
    exact_TO = (given_TO.double() + x_TI.double() @ weight_OI.double().t()).float()
    assert torch.equal(product(x_TI, layout_of(weight_OI), given_TO), exact_TO)


@pytest.mark.parametrize("pairs", PAIRS)
def test_sums_are_close_to_float64(pairs: int, generator: torch.Generator) -> None:
    x_TI, weight_OI = half(generator, 9, 2 * pairs), half(generator, 4 * WIDTH, 2 * pairs)
    exact_TO = x_TI.double() @ weight_OI.double().t()
    size_TO = x_TI.double().abs() @ weight_OI.double().abs().t()
    assert_within(product(x_TI, layout_of(weight_OI)), exact_TO, 2.0**-24 * (2 * pairs) ** 0.5 * size_TO + 1e-6)


@pytest.mark.parametrize("pairs", [32, PART_PAIRS + 5])
@pytest.mark.parametrize("added", [False, True], ids=["written", "added"])
def test_a_rows_bits_depend_neither_on_other_rows_nor_on_other_blocks(
    pairs: int, added: bool, generator: torch.Generator
) -> None:
    x_TI, weight_OI = half(generator, MOST_ROWS, 2 * pairs), half(generator, 7 * WIDTH, 2 * pairs)
    given_TO = torch.randn(MOST_ROWS, 7 * WIDTH, generator=generator) if added else None
    packed = layout_of(weight_OI)
    whole_TO = product(x_TI, packed, given_TO)
    for rows in (1, 2, 7, 8, 9, 16, 17, 24, 31):
        for start in (0, MOST_ROWS - rows):
            some = slice(start, start + rows)
            given = given_TO[some] if given_TO is not None else None
            assert torch.equal(product(x_TI[some], packed, given), whole_TO[some])
    for first, end in ((0, 1), (1, 3), (2, 5), (3, 7), (6, 7)):
        outputs = slice(WIDTH * first, WIDTH * end)
        assert torch.equal(product(x_TI, packed, given_TO, first=first, end=end)[:, outputs], whole_TO[:, outputs])


def test_other_blocks_are_left_alone(generator: torch.Generator) -> None:
    x_TI, weight_OI = whole(generator, 10, 32), whole(generator, 7 * WIDTH, 32)
    exact_TO = (x_TI.double() @ weight_OI.double().t()).float()
    for first, end in ((0, 0), (0, 2), (1, 5), (5, 7)):
        found = product(x_TI, layout_of(weight_OI), first=first, end=end)
        written = torch.zeros(7 * WIDTH, dtype=torch.bool)
        written[WIDTH * first : WIDTH * end] = True
        assert torch.equal(found[:, written], exact_TO[:, written]) and found[:, ~written].isnan().all()


def test_rows_may_lie_apart(generator: torch.Generator) -> None:
    """x and the result are parts of wider matrices: columns beside them are neither read nor written."""
    wide_x, weight_OI = torch.full((13, 50), math.nan, dtype=torch.bfloat16), whole(generator, 4 * WIDTH, 22)
    wide_x[:, 6:28] = whole(generator, 13, 22)
    wide_out = torch.full((13, 6 * WIDTH), math.nan)
    packed, x = layout_of(weight_OI), wide_x[:, 6:28]
    native(multiply)(
        x.data_ptr(), 2 * 50, 13, packed.data_ptr(), 64 * 11, 11, 0, 4, wide_out[:, WIDTH:].data_ptr(), 4 * 6 * WIDTH, 0
    )
    assert torch.equal(wide_out[:, WIDTH : 5 * WIDTH], (x.double() @ weight_OI.double().t()).float())
    assert wide_out[:, :WIDTH].isnan().all() and wide_out[:, 5 * WIDTH :].isnan().all()
