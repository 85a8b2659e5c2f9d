"""Packed operands: every value where products look for it, zeros beside, nothing written elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.unit.engine.kernels.calling import WIDTH, half, layout_of, native, up
from torch import Tensor

from mint.engine.kernels import packing
from mint.engine.kernels.products import pack

# outputs x inputs: ranks on either side, one block and several, odd numbers
SHAPES = [(1, 1), (1, 64), (5, 33), (16, 32), (16, 34), (33, 5), (33, 64), (48, 31), (50, 16)]
SPARE = 40  # values behind the result that nobody may touch
UNTOUCHED = 77.0


def _among_nans(values: Tensor) -> tuple[Tensor, int]:
    """The same rows inside a larger matrix that is no number elsewhere, and the bytes from row to row."""
    rows, columns = values.shape
    larger = torch.full((rows + 3, columns + 5), math.nan, dtype=values.dtype)
    larger[:rows, :columns] = values
    return larger, larger.stride(0) * larger.element_size()


def _room(*shape: int) -> tuple[Tensor, Tensor]:
    """A buffer with room for this and what must stay as it is behind it."""
    size = int(np.prod(shape))
    buffer = torch.full((size + SPARE,), UNTOUCHED, dtype=torch.bfloat16)
    return buffer[:size].view(shape), buffer[size:]


def test_a_packed_weight_holds_pairs_of_inputs_of_16_outputs(generator: torch.Generator) -> None:
    """The layout itself, value by value; the other tests compare with `layout_of`."""
    weight_OI = half(generator, 21, 7)
    expected = torch.zeros(2, 4, WIDTH, 2, dtype=torch.bfloat16)
    for output in range(21):
        for i in range(7):
            expected[output // WIDTH, i // 2, output % WIDTH, i % 2] = weight_OI[output, i]
    assert torch.equal(layout_of(weight_OI), expected)
    assert torch.equal(pack(weight_OI), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_a_weight_copies_it(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Rounded where it is float32; given transposed, too; later changes do not reach it."""
    for num_out, num_in in SHAPES:
        weight_OI = torch.randn(num_out, num_in, generator=generator).to(dtype)
        expected = layout_of(weight_OI)
        packed = pack(weight_OI)
        weight_OI.zero_()
        assert packed.is_contiguous() and torch.equal(packed, expected)
        assert torch.equal(pack(weight_OI.t()), layout_of(weight_OI.t()))


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 6.4])
def test_float_rows_of_outputs(outputs: int, inputs: int, scale: float, generator: torch.Generator) -> None:
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    source, step = _among_nans(weight_OI)
    out, spare = _room(up(outputs) // WIDTH, up(inputs, 2) // 2, WIDTH, 2)
    native(packing.pack_output_rows)(source.data_ptr(), step, outputs, inputs, scale, out.data_ptr())
    assert torch.equal(out, layout_of(weight_OI * scale))
    assert (spare == UNTOUCHED).all()


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 6.4])
def test_float_rows_of_inputs(outputs: int, inputs: int, scale: float, generator: torch.Generator) -> None:
    """A block has room for more pairs than there are, which stay as they were."""
    weight_IO = torch.randn(inputs, outputs, generator=generator)
    source, step = _among_nans(weight_IO)
    there = up(inputs, 2) // 2
    out, spare = _room(up(outputs) // WIDTH, there + 3, WIDTH, 2)
    native(packing.pack_input_rows)(source.data_ptr(), step, inputs, outputs, scale, there + 3, out.data_ptr())
    assert torch.equal(out[:, :there], layout_of(weight_IO.t() * scale))
    assert (out[:, there:] == UNTOUCHED).all() and (spare == UNTOUCHED).all()


@pytest.mark.parametrize("outputs", [1, 5, 16, 33])
@pytest.mark.parametrize("inputs", [32, 96])
def test_bf16_rows_of_outputs(outputs: int, inputs: int, generator: torch.Generator) -> None:
    weight_OI = half(generator, outputs, inputs)
    source, step = _among_nans(weight_OI)
    out, spare = _room(up(outputs) // WIDTH, inputs // 2, WIDTH, 2)
    native(packing.pack_bf16_output_rows)(source.data_ptr(), step, outputs, inputs, out.data_ptr())
    assert torch.equal(out, layout_of(weight_OI))
    assert (spare == UNTOUCHED).all()


@pytest.mark.parametrize("inputs", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("outputs", [16, 48])
def test_bf16_rows_of_inputs(outputs: int, inputs: int, generator: torch.Generator) -> None:
    """An odd last row gets a partner of zeros, whatever follows it."""
    weight_IO = half(generator, inputs, outputs)
    source, step = _among_nans(weight_IO)
    there = up(inputs, 2) // 2
    out, spare = _room(outputs // WIDTH, there + 2, WIDTH, 2)
    native(packing.pack_bf16_input_rows)(source.data_ptr(), step, inputs, outputs, there + 2, out.data_ptr())
    assert torch.equal(out[:, :there], layout_of(weight_IO.t()))
    assert (spare == UNTOUCHED).all()


def test_a_block_is_transposed_and_rounded(generator: torch.Generator) -> None:
    block = torch.randn(WIDTH, WIDTH, generator=generator)
    source, step = _among_nans(block)
    out = torch.full((WIDTH, WIDTH + 4), UNTOUCHED, dtype=torch.bfloat16)
    native(packing.transpose_to_bf16)(source.data_ptr(), step, out.data_ptr(), 2 * (WIDTH + 4))
    assert torch.equal(out[:, :WIDTH], block.t().bfloat16())
    assert (out[:, WIDTH:] == UNTOUCHED).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 48), (8, 17), (16, 16), (17, 33), (32, 48)])
def test_a_scaled_transpose_is_added(rows: int, columns: int, generator: torch.Generator) -> None:
    values, there = (torch.randn(*shape, generator=generator) for shape in ((rows, columns), (columns, rows)))
    source = torch.full((up(rows), up(columns)), math.nan)
    source[:rows, :columns] = values
    out = torch.cat([there.flatten(), torch.full((SPARE,), UNTOUCHED)])
    step = source.stride(0) * source.element_size()
    native(packing.add_transposed)(source.data_ptr(), step, rows, columns, 0.7, out.data_ptr())
    assert torch.equal(out[: rows * columns].view(columns, rows), there + values.t() * torch.tensor(0.7))
    assert (out[rows * columns :] == UNTOUCHED).all()
