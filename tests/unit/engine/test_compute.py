"""What computes a model: compiled kernels where they can, torch elsewhere or when asked to."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.engine import open_backend
from tests.support.tiny_models import write_tiny_model

from mint import types
from mint.engine import compute
from mint.engine.compute import make_compute, why_not_compiled, why_not_here
from mint.engine.device import Device
from mint.engine.kernels.available import missing
from mint.engine.models.config import DecoderConfig
from mint.engine.models.weights import load_weights, read_config
from mint.errors import InputError
from mint.settings import Settings, load

CPU = torch.device("cpu")
DEVICE = Device(CPU, torch.bfloat16, 1, 2**34)
FLAGS = {"avx512f", "avx512_bf16"}


def model(folder: Path, **sizes: int) -> Path:
    return write_tiny_model(folder, "llama", tokenizer=False, **{"head_dim": 32, **sizes})


@pytest.fixture
def capable(tmp_path: Path) -> Path:
    """A model that compiled kernels can compute here."""
    folder = model(tmp_path / "model")
    if (reason := why_not_compiled(read_config(folder), DEVICE, Settings(folder))) is not None:
        pytest.skip(reason)
    return folder


@pytest.mark.parametrize(
    ("device", "dtype", "flags", "reason"),
    [
        (CPU, torch.float32, FLAGS, "they compute in bfloat16 on a processor, this is float32 on cpu"),
        (torch.device("cuda"), torch.bfloat16, FLAGS, "this is bfloat16 on cuda"),
        (CPU, torch.bfloat16, {"avx512f", "bf16"}, "the processor does not report avx512_bf16"),
    ],
)
def test_what_is_missing_is_named(device: torch.device, dtype: torch.dtype, flags: set[str], reason: str) -> None:
    assert reason in str(missing(device, dtype, flags))


def test_sizes_that_do_not_fit_are_named(capable: Path, tmp_path: Path) -> None:
    config: DecoderConfig = read_config(model(tmp_path / "narrow", head_dim=16, intermediate=80))
    reason = why_not_compiled(config, DEVICE, Settings(capable))
    assert reason == "they compute in steps of 32, the model has intermediate_size 80, head_dim 16"


def test_with_amx_torch_computes_unless_asked_otherwise(capable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "processor_flags", lambda: frozenset(FLAGS | {"amx_bf16"}))
    assert why_not_here(DEVICE, Settings(capable)) == "torch multiplies with amx_bf16, these kernels cannot"
    assert why_not_here(DEVICE, Settings(capable, kernels="compiled")) is None
    single = replace(DEVICE, dtype=torch.float32)
    assert str(why_not_here(single, Settings(capable))).startswith("they compute in bfloat16")


def test_on_a_capable_machine_the_log_says_why_torch_computes(capable: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mint"):
        open_backend(capable, "bfloat16", kernels="torch")
    assert "compiled kernels are not used: MINT_KERNELS=torch" in caplog.text


def test_what_cannot_be_compiled_is_refused_when_asked_for(tmp_path: Path) -> None:
    folder = model(tmp_path)
    with pytest.raises(InputError, match=r"MINT_KERNELS=compiled: they compute in bfloat16 .* Unset it"):
        open_backend(folder, "float32", kernels="compiled")


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINT_KERNELS", "fast")
    with pytest.raises(InputError, match="MINT_KERNELS='fast' is not supported; allowed: compiled, torch"):
        load()


def test_kernels_are_compiled_by_default_and_torchs_when_asked_for(capable: Path) -> None:
    assert open_backend(capable, "bfloat16").limits.kernels.startswith("numba ")
    assert open_backend(capable, "bfloat16", kernels="torch").limits.kernels == "torch"
    assert open_backend(capable, "float32").limits.kernels == "torch"


def test_the_originals_of_packed_matrices_are_let_go(capable: Path, tmp_path: Path) -> None:
    config = read_config(capable)
    weights = load_weights(capable, config, torch.bfloat16, CPU)
    make_compute(config, weights, DEVICE, Settings(tmp_path))
    assert weights.layers == []


def test_a_run_of_other_kernels_goes_on_and_says_so(capable: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = open_backend(capable, "bfloat16", kernels="torch")
    plan = first.add_run("run", types.LoraConfig(rank=2), 0).plan
    assert plan.kernels == "torch"
    second = open_backend(capable, "bfloat16")
    own = second.add_run("run", types.LoraConfig(rank=2), 0).plan
    with caplog.at_level(logging.WARNING, "mint"):
        second.use_plan("run", own)
        assert not caplog.records
        second.use_plan("run", plan)
    assert f"(kernels torch -> {own.kernels}): it goes on, but not bit for bit" in caplog.text
    assert replace(plan, kernels=own.kernels) == own
