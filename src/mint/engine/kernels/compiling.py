"""Compiling the kernels' functions with numba, once for a processor: what was compiled is found again at the next start.

numba looks for changes in the function's own file only, and a kernel is made of functions of several files. So here what was
compiled holds for all sources of this package as they are, or not at all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
from numba import njit, types
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    InTreeCacheLocator,
    UserProvidedCacheLocator,
    UserWideCacheLocator,
)
from numba.core.ccallback import CFunc

logger = logging.getLogger("mint")

# kinds of what compiled functions take and return
NOTHING, INT64, FLOAT32 = types.void, types.int64, types.float32
NUMBERS = types.CPointer(types.int64)

F = TypeVar("F", bound=Callable[..., Any])

_sources = sorted(Path(__file__).parent.glob("*.py"))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in _sources)).hexdigest()


def _stamped(locator: Any) -> Any:
    """A place for what was compiled, where that holds for these sources only."""
    return type(f"Stamped{locator.__name__}", (locator,), {"get_source_stamp": lambda _: SOURCES})


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    # NUMBA_CACHE_DIR; beside the sources, where Python keeps its own; where those may not be written
    _locator_classes = tuple(map(_stamped, (UserProvidedCacheLocator, InTreeCacheLocator, UserWideCacheLocator)))


class _Cache(FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl


_compiled: list[Any] = []  # kept: their code lives as long as they do
_told = False


def compile_function(function: Callable[..., Any], result: Any, arguments: tuple[Any, ...]) -> int:
    """The address of the function's code."""
    global _told
    compiled: Any = CFunc(function, (arguments, result), locals={}, options={"error_model": "numpy"})
    compiled._cache = _Cache(function)
    compiled.compile()
    _compiled.append(compiled)
    if not compiled.cache_hits and not _told:
        logger.info("compiling kernels for this processor: some 20 seconds, this once")
        _told = True
    address: int = compiled.address
    return address


def device(function: F) -> F:
    """A function that becomes part of what calls it."""
    inlined: F = njit(error_model="numpy")(function)
    return inlined


def exported(result: Any, arguments: tuple[Any, ...]) -> Callable[[F], F]:
    """A function that is compiled by itself, and called: what is large would otherwise be compiled again with each caller."""

    def export(function: F) -> F:
        name = f"{function.__module__}.{function.__name__}"
        llvm.add_symbol(name, compile_function(function, result, arguments))
        external: F = types.ExternalFunction(name, result(*arguments))
        return external

    return export
