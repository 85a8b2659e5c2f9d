"""The packed layout of a projection: the bits of the plain product, used only where that holds, and never needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mint.engine.models.linear import PACKED_ROWS, Linear
from tests.support.engine import generate, open_backend, random_prompt, request

OUTPUTS, INPUTS = 96, 64


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def _packable(linear: Linear) -> Linear:
    if not linear.pack({}):
        pytest.skip("this processor or torch has no packed bf16 products with the bits of the plain ones")
    return linear


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_packed_and_plain_products_have_the_same_bits(with_bias: bool, with_residual: bool) -> None:
    torch.manual_seed(0)
    weight, bias = _random(OUTPUTS, INPUTS), _random(OUTPUTS) if with_bias else None
    packed, plain = _packable(Linear(weight, bias)), Linear(weight, bias)
    for rows in (1, 2, 4, 6, 8, 33, PACKED_ROWS, PACKED_ROWS + 1):
        x, residual = _random(rows, INPUTS), _random(rows, OUTPUTS) if with_residual else None
        outs = [linear.forward(x, x.new_empty(rows, OUTPUTS), residual) for linear in (packed, plain)]
        assert torch.equal(*outs)
        exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        exact += 0 if residual is None else residual.double()
        torch.testing.assert_close(outs[0].double(), exact, rtol=2**-7, atol=2**-7)


def test_kernels_with_other_bits_are_not_used_and_tried_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    _packable(Linear(_random(OUTPUTS, INPUTS)))
    tried = []

    def other_bits(self: Linear, x_TI: Tensor, residual_TO: Tensor | None) -> Tensor:
        tried.append(self)
        return torch.full((len(x_TI), OUTPUTS), 7.0, dtype=torch.bfloat16)

    monkeypatch.setattr(Linear, "_packed_forward", other_bits)
    known: dict[tuple[int, int, bool], bool] = {}
    linears = [Linear(_random(OUTPUTS, INPUTS)) for _ in range(3)]
    assert [linear.pack(known) for linear in linears] == [False] * 3
    assert known == {(OUTPUTS, INPUTS, False): False}
    assert {id(linear) for linear in tried} == {id(linears[0])}
    x = _random(4, INPUTS)
    assert torch.equal(linears[2].forward(x, x.new_empty(4, OUTPUTS)), x @ linears[2].weight_OI.t())


def test_sampling_without_the_packed_layout_gives_the_same_bits(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [request(random_prompt(10 + i), seed=i, max_new=20) for i in range(3)]
    packed = generate(open_backend(tiny("llama"), "bfloat16"), *given)
    monkeypatch.setattr(Linear, "pack", lambda self, known: False)
    plain = generate(open_backend(tiny("llama"), "bfloat16"), *given)
    assert [g.sequences for g in packed] == [g.sequences for g in plain]
