"""What was compiled holds for the sources as they are: any change of any of them compiles anew."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.unit.engine.kernels.calling import native

from mint.engine.kernels import compiling

COMPILING_TEXT = "compiling kernels for this processor: some 20 seconds, this once"
KERNEL = """
def add(a: int, b: int) -> int:
    return a + b
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder of sources with `compiling` among them."""
    shutil.copy(str(compiling.__file__), tmp_path / "compiling.py")
    (tmp_path / "one.py").write_text(KERNEL)
    (tmp_path / "other.py").write_text("NUMBER = 1\n")
    return tmp_path


def load(path: Path) -> ModuleType:
    """As a process that starts now."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stamp_of(package: Path) -> str:
    return str(load(package / "compiling.py").SOURCES)


def compiled_in(package: Path) -> Any:
    """`add`, compiled or found."""
    module = load(package / "compiling.py")
    assert module.compile_function(load(package / "one.py").add, module.INT64, (module.INT64, module.INT64)) > 0
    return module._compiled[-1]


def test_the_stamp_is_of_all_sources_contents(package: Path) -> None:
    first = stamp_of(package)
    assert len(first) == 64 and stamp_of(package) == first
    (package / "notes.txt").write_text("no source")
    (package / "other.py").touch()
    assert stamp_of(package) == first
    (package / "other.py").write_text("NUMBER = 2\n")
    assert stamp_of(package) != first
    (package / "other.py").write_text("NUMBER = 1\n")
    assert stamp_of(package) == first
    (package / "third.py").write_text("NUMBER = 3\n")
    assert stamp_of(package) != first


def test_the_stamp_is_of_the_kernels_themselves() -> None:
    folder = Path(str(compiling.__file__)).parent
    assert {path.name for path in compiling._sources} == {path.name for path in folder.glob("*.py")} >= {"simd.py"}


def test_what_was_compiled_is_found_until_a_source_changes(
    package: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changed file is not the function's own."""
    from numba import config

    monkeypatch.setattr(config, "CACHE_DIR", "")
    with caplog.at_level(logging.INFO, logger="mint"):
        assert compiled_in(package).cache_hits == 0
    assert [record.getMessage() for record in caplog.records] == [COMPILING_TEXT]
    caplog.clear()
    assert compiled_in(package).cache_hits == 1
    assert list((package / "__pycache__").glob("one.add*.nbi"))
    (package / "other.py").write_text("NUMBER = 2\n")
    assert compiled_in(package).cache_hits == 0
    assert compiled_in(package).cache_hits == 1


def test_compiling_is_told_once(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    (package / "two.py").write_text(KERNEL.replace("a + b", "a - b"))
    module = load(package / "compiling.py")
    with caplog.at_level(logging.INFO, logger="mint"):
        for name in ("one", "two"):
            module.compile_function(load(package / f"{name}.py").add, module.INT64, (module.INT64, module.INT64))
    assert [record.getMessage() for record in caplog.records] == [COMPILING_TEXT]


def test_division_by_zero_is_numpys(package: Path) -> None:
    """No exception, which nobody would see: kernels return nothing."""
    import ctypes

    (package / "one.py").write_text("def add(a: float, b: float) -> float:\n    return a / b\n")
    module = load(package / "compiling.py")
    kinds = (module.FLOAT32, (module.FLOAT32, module.FLOAT32))
    address = module.compile_function(load(package / "one.py").add, *kinds)
    divide = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_float, ctypes.c_float)(address)
    assert divide(1.0, 0.0) == float("inf") and divide(3.0, 2.0) == 1.5


def test_exported_functions_have_their_modules_name() -> None:
    """By which other compiled functions find them."""
    from mint.engine.kernels.products import multiply

    assert multiply.symbol == "mint.engine.kernels.products.multiply"
    assert native(multiply) is native(multiply)
