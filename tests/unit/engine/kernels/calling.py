"""Calling compiled kernels from tests. Importing this skips the test module that does where they cannot be used, so it comes
before whatever needs numba.

    out_TO = torch.empty(rows, 16)
    native(multiply)(x_TI.data_ptr(), ...)  # what is `exported`; what is a `device` function is called as it is
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from tests.support.engine import MISSING
from torch import Tensor
from torch.nn.functional import pad

WIDTH = 16
UNIT = 2.0**-8  # rounding to bf16 changes a number by so much of it at most

if MISSING is not None:
    pytest.skip(f"compiled kernels: {MISSING}", allow_module_level=True)


@cache
def native(function: Any) -> Callable[..., None]:
    """An exported function, called with addresses and numbers."""
    import llvmlite.binding as llvm
    from numba import types

    kinds = {types.int64: ctypes.c_int64, types.float32: ctypes.c_float}
    address = llvm.address_of_symbol(function.symbol)
    assert address
    return ctypes.CFUNCTYPE(None, *(kinds[kind] for kind in function.sig.args))(address)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def up(count: int, unit: int = WIDTH) -> int:
    return -(-count // unit) * unit


def whole(generator: torch.Generator, *shape: int, most: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Whole numbers in [-most, most]: sums of their products are exact in float32, so that results are compared bit by
    bit."""
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


def half(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in bf16."""
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def layout_of(weight_OI: Tensor, pairs: int | None = None) -> Tensor:
    """[O / 16, pairs, 16, 2] bf16: where products look for W's values, zeros elsewhere."""
    num_out, num_in = weight_OI.shape
    pairs = pairs if pairs is not None else -(-num_in // 2)
    filled = pad(weight_OI, (0, 2 * pairs - num_in, 0, up(num_out) - num_out))
    return filled.view(-1, WIDTH, pairs, 2).transpose(1, 2).contiguous().bfloat16()


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float) -> None:
    """Element by element; what is no number is never within."""
    assert found.shape == exact.shape and not exact.requires_grad
    error = (found.double() - exact).abs()
    allowed = torch.as_tensor(bound, dtype=torch.float64).expand_as(error)
    assert (error <= allowed).all(), f"off by {(error - allowed).max():g} more than allowed"


def assert_rounded(found: Tensor, exact: Tensor, slack: float = 1e-6) -> None:
    """bf16 of numbers that were computed in float32: an error of one rounding."""
    assert found.dtype == torch.bfloat16
    assert_within(found, exact, exact.abs() * UNIT * (1 + 1e-3) + slack)


class _RoundedBothWays(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().double()


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().double()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded(x: Tensor, *, back: bool = False) -> Tensor:
    """Float64 with the value that bf16 holds; the gradient passes as it is, or rounded too."""
    value: Tensor = (_RoundedBothWays if back else _Rounded).apply(x)
    return value
