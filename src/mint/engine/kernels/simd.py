"""Vectors for compiled kernels: 16 float32 or 32 bfloat16 values in one processor register, and what is done with them.

numba compiles the kernels; these are its missing words. Nothing here depends on what the compiler would vectorise by
itself, and no operation may be reassociated but the sum over one register: so a row's bits do not depend on its
neighbours. Addresses are int64, in bytes.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

WIDTH = 16


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_F32, _F64, _I16, _I32, _I64 = ir.FloatType(), ir.DoubleType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32S, I16S, I32S = (ir.VectorType(kind, WIDTH) for kind in (_F32, _I16, _I32))
PAIRS = ir.VectorType(_BFloat(), 2 * WIDTH)
HALVES = ir.VectorType(_BFloat(), WIDTH)


class Floats(types.Type):  # type: ignore[misc]
    """16 float32."""

    def __init__(self) -> None:
        super().__init__("Floats")


class Pairs(types.Type):  # type: ignore[misc]
    """32 bfloat16: the two of every lane are multiplied and added at once."""

    def __init__(self) -> None:
        super().__init__("Pairs")


floats, pairs = Floats(), Pairs()


@register_model(Floats)
class _FloatsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, F32S)


@register_model(Pairs)
class _PairsModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, PAIRS)


Build = Callable[..., Any]


def word(result: Any, arguments: Sequence[Any], build: Build) -> Any:
    """A function for kernels whose body is what `build(builder, *values)` writes. Arguments must have these types; whole
    numbers may be of any width."""
    signature = result(*arguments)

    def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
        built = build(builder, *values)
        return context.get_dummy_value() if result is types.void else built

    def function(typing: Any, *values: Any) -> Any:
        return signature, codegen

    names = ["typing", *(f"value{i}" for i in range(len(arguments)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(function)


def call(builder: Any, name: str, kind: Any, *values: Any) -> Any:
    """LLVM's intrinsic of this name."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(kind, [value.type for value in values]), name
    )
    return builder.call(function, values)


def splat_of(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def load_from(builder: Any, address: Any, kind: Any, align: int = 2) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store_to(builder: Any, address: Any, value: Any, align: int = 2) -> None:
    stored = builder.store(value, builder.inttoptr(address, value.type.as_pointer()))
    stored.align = align


def prefetch(builder: Any, address: Any) -> None:
    """The 64 bytes there will be read, but not at once: into the second level of the cache."""
    bytes_at = builder.inttoptr(address, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [bytes_at.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [bytes_at, _I32(0), _I32(2), _I32(1)])


def broadcast(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, count), [0] * count)
    )


def dot_pairs(builder: Any, total: Any, a: Any, b: Any) -> Any:
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", F32S, total, a, b)


def _load_bf16(builder: Any, address: Any) -> Any:
    bits = builder.zext(load_from(builder, address, I16S), I32S)
    return builder.bitcast(builder.shl(bits, splat_of(I32S, 16)), F32S)


def _exp(builder: Any, x: Any) -> Any:
    """e^x within 2 units in the last place; 0 below -87, as for e^88 above 88, and what is no number stays none."""

    def multiply_add(a: Any, b: Any, c: Any) -> Any:
        return call(builder, "llvm.fma.v16f32", F32S, a, b, c)

    def number(value: float) -> Any:
        return splat_of(F32S, value)

    tiny, huge, unknown = (
        builder.fcmp_ordered("<", x, number(-87.0)),
        builder.fcmp_ordered(">", x, number(88.0)),
        builder.fcmp_unordered("uno", x, x),
    )
    given, x = x, builder.select(huge, number(88.0), x)
    turns = call(builder, "llvm.rint.v16f32", F32S, builder.fmul(x, number(1.4426950408889634)))
    rest = multiply_add(turns, number(-0.693359375), x)  # ln 2 in two parts
    rest = multiply_add(turns, number(2.12194440e-4), rest)
    y = number(1 / 5040)
    for denominator in (720, 120, 24, 6, 2, 1, 1):
        y = multiply_add(y, rest, number(1 / denominator))
    exponent = builder.shl(builder.fptosi(turns, I32S), splat_of(I32S, 23))
    y = builder.bitcast(builder.add(builder.bitcast(y, I32S), exponent), F32S)
    return builder.select(unknown, given, builder.select(tiny, number(0.0), y))


def _total(builder: Any, x: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_F32, [_F32, F32S]), "llvm.vector.reduce.fadd.v16f32"
    )
    return builder.call(function, (ir.Constant(_F32, 0.0), x), fastmath=("reassoc",))


def _squares(builder: Any, x: Any) -> Any:
    """The sum of the squares, in float64 throughout."""
    f64s, half = ir.VectorType(_F64, WIDTH // 2), WIDTH // 2
    lanes = [ir.Constant(ir.VectorType(_I32, half), list(range(start, start + half))) for start in (0, half)]
    low, high = (builder.fpext(builder.shuffle_vector(x, x, order), f64s) for order in lanes)
    both = builder.fadd(builder.fmul(low, low), builder.fmul(high, high))
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_F64, [_F64, f64s]), "llvm.vector.reduce.fadd.v8f64"
    )
    return builder.call(function, (ir.Constant(_F64, 0.0), both), fastmath=("reassoc",))


_f32, _i64 = types.float32, types.int64
zeros = word(floats, (), lambda b: splat_of(F32S, 0.0))
splat = word(floats, (_f32,), lambda b, value: broadcast(b, value, WIDTH))
load = word(floats, (_i64,), lambda b, address: load_from(b, address, F32S))
store = word(types.void, (_i64, floats), store_to)
load_bf16 = word(floats, (_i64,), _load_bf16)
store_bf16 = word(types.void, (_i64, floats), lambda b, address, x: store_to(b, address, b.fptrunc(x, HALVES)))
store_pairs = word(types.void, (_i64, pairs), store_to)
load_pairs = word(pairs, (_i64,), lambda b, address: load_from(b, address, PAIRS))
dot = word(floats, (floats, pairs, pairs), dot_pairs)
fma = word(floats, (floats, floats, floats), lambda b, *x: call(b, "llvm.fma.v16f32", F32S, *x))
root = word(floats, (floats,), lambda b, x: call(b, "llvm.sqrt.v16f32", F32S, x))
maximum = word(floats, (floats, floats), lambda b, *x: call(b, "llvm.maxnum.v16f32", F32S, *x))
exp = word(floats, (floats,), _exp)
total = word(_f32, (floats,), _total)
squares = word(types.float64, (floats,), _squares)
largest = word(_f32, (floats,), lambda b, x: call(b, "llvm.vector.reduce.fmax.v16f32", _F32, x))
store_int = word(types.void, (_i64, _i64), store_to)
load_double = word(types.float64, (_i64,), lambda b, address: load_from(b, address, _F64))
store_double = word(types.void, (_i64, types.float64), store_to)
load_int = word(_i64, (_i64,), lambda b, address: load_from(b, address, _I64))
load_scalar = word(_f32, (_i64,), lambda b, address: load_from(b, address, _F32))
store_half = word(types.void, (_i64, _f32), lambda b, address, x: store_to(b, address, b.fptrunc(x, _BFloat())))
store_scalar = word(types.void, (_i64, _f32), store_to)


def _operator(symbol: Any, name: str) -> None:
    function = word(floats, (floats, floats), lambda b, x, y: getattr(b, name)(x, y))

    @overload(symbol, strict=False)  # type: ignore[untyped-decorator]
    def _(x: Any, y: Any) -> Any:
        if isinstance(x, Floats) and isinstance(y, Floats):
            return lambda x, y: function(x, y)
        return None


for _symbol, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _name)
