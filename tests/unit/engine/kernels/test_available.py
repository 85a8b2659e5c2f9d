"""Whether compiled kernels can be used, decided from what is said to be there: neither numba nor the processor is needed."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Set
from typing import Any

import pytest
import torch

from mint.engine.kernels.available import OPENMP, OTHER_CODE, missing

CPU, FLAGS = torch.device("cpu"), frozenset({"avx512_bf16", "avx2"})


class Process:
    """What `ctypes.CDLL(None)` is, with these names."""

    def __init__(self, names: Set[str]) -> None:
        self._names = names

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return object()
        raise AttributeError(name)


@pytest.fixture(autouse=True)
def all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba and GNU's OpenMP, whether they are here or not."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.68.1")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Process(set(OPENMP)))


def test_nothing_is_missing_where_all_is_there() -> None:
    assert missing(CPU, torch.bfloat16, FLAGS) is None


@pytest.mark.parametrize(
    ("device", "dtype", "what"),
    [
        ("cpu", torch.float32, "float32 on cpu"),
        ("cpu", torch.float16, "float16 on cpu"),
        ("cuda", torch.bfloat16, "bfloat16 on cuda"),
        ("mps", torch.float32, "float32 on mps"),
    ],
)
def test_they_compute_in_bfloat16_on_a_processor(device: str, dtype: torch.dtype, what: str) -> None:
    """Whatever else is missing: that is said first."""
    expected = f"they compute in bfloat16 on a processor, this is {what}"
    assert missing(torch.device(device), dtype, FLAGS) == expected
    assert missing(torch.device(device), dtype, frozenset()) == expected


@pytest.mark.parametrize("flags", [set(), {"avx512f", "amx_bf16", "avx512bf16"}], ids=["none", "others"])
def test_the_processor_must_report_its_products(flags: set[str]) -> None:
    assert missing(CPU, torch.bfloat16, flags) == "the processor does not report avx512_bf16"


def test_without_numba_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    assert missing(CPU, torch.bfloat16, FLAGS) == "numba is not installed: pip install 'mint-toolkit[fast]'"


@pytest.mark.parametrize("version", ["0.61.2", "0.67.0rc1"])
def test_an_older_numba_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    expected = f"numba {version} is installed, they need 0.68: pip install 'mint-toolkit[fast]'"
    assert missing(CPU, torch.bfloat16, FLAGS) == expected


@pytest.mark.parametrize("name", OTHER_CODE)
def test_code_for_another_processor_is_not_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    expected = f"{name} is set, with which numba compiles for another processor"
    assert missing(CPU, torch.bfloat16, FLAGS) == expected


@pytest.mark.parametrize("name", OPENMP)
def test_every_call_of_gnus_openmp_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Process(set(OPENMP) - {name}))
    assert missing(CPU, torch.bfloat16, FLAGS) == "torch's OpenMP runtime is not GNU's"
