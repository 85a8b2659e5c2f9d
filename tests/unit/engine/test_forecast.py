"""Expected speed and memory of a model on a host, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.engine import write_variant
from tests.support.tiny_models import FAMILIES, Family, write_tiny_model

from mint.engine import host
from mint.engine.compute import make_compute, why_not_compiled
from mint.engine.device import Device
from mint.engine.forecast import (
    COMPILED,
    PACKING,
    PLAIN,
    HostSpeed,
    Manner,
    MemoryNeed,
    Projection,
    base_bytes,
    base_parameters,
    decode_step_seconds,
    expected_speed,
    memory_need,
    projection_parameters,
    projections,
    training_flop_per_token,
)
from mint.engine.models.config import DecoderConfig, decoder_config
from mint.engine.models.weights import load_weights, read_config
from mint.engine.plan import MIN_TOKENS_PER_PASS, compiled_pass_memory, torch_pass_memory
from mint.settings import Settings

SMOLLM2_135M = decoder_config({
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
})  # fmt: skip
QWEN3_0_6B = decoder_config({
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
})  # fmt: skip
HOST = HostSpeed(flop_per_second=400e9, bytes_per_second=28e9)


@pytest.mark.parametrize(
    # all parameters: as the models' authors publish them
    ("config", "multiplied", "published"),
    [
        # 30 (576 x 960 + 576 x 576 + 576 x 3072 + 1536 x 576) + 576 x 49152
        (SMOLLM2_135M, 134_479_872, 134_515_008),
        # 28 (1024 x 4096 + 2048 x 1024 + 1024 x 6144 + 3072 x 1024) + 1024 x 151936
        (QWEN3_0_6B, 595_984_384, 596_049_920),
    ],
)
def test_parameters_are_those_of_the_published_models(config: DecoderConfig, multiplied: int, published: int) -> None:
    assert (projection_parameters(config), base_parameters(config)) == (multiplied, published)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_base_parameters_are_those_that_are_loaded(family: Family, tied: bool, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / family, family, tied=tied, tokenizer=False)
    config = read_config(folder)
    weights = load_weights(folder, config, torch.float32, torch.device("cpu"))
    assert 4 * base_parameters(config) == weights.num_bytes()
    shapes = sorted(tuple(reversed(linear.weight_OI.shape)) for linear in weights.linears())
    assert sorted((p.num_in, p.num_out) for p in projections(config) for _ in range(p.count)) == shapes


def test_biases_count_as_parameters(tmp_path: Path) -> None:
    folder = write_variant(tmp_path / "llama", "llama", attention_bias=True, mlp_bias=True)
    config = read_config(folder)
    assert 4 * base_parameters(config) == load_weights(folder, config, torch.float32, torch.device("cpu")).num_bytes()


def test_the_heaviest_projection_comes_first() -> None:
    assert projections(SMOLLM2_135M)[:2] == [Projection(576, 3072, 30), Projection(576, 49152, 1)]
    assert projections(QWEN3_0_6B)[0] == Projection(1024, 6144, 28)


@pytest.mark.parametrize(
    ("length", "keys"),
    [(1, 1), (100, 100), (128, 128), (256, 256), (512, 384)],  # blocks of 256 queries see all keys before their end
)
def test_training_counts_four_operations_a_parameter_and_attention(length: int, keys: int) -> None:
    assert training_flop_per_token(SMOLLM2_135M, length) == 537_919_488 + 14 * 576 * 30 * keys


@pytest.mark.parametrize(
    ("config", "element_size", "flop", "training", "sampling"),
    [
        # 0.65 x 400e9 / 586,303,488; reading 268,959,744 bytes at 28 GB/s, or 2 x 134,479,872 x 32 / 400e9; times 2.8
        (SMOLLM2_135M, 2, 400e9, 443.45634185, (37.18028524, 297.44228192, 531.14693200)),
        (SMOLLM2_135M, 4, 100e9, 110.86408546, (18.59014262, 132.78673300, 132.78673300)),
        (QWEN3_0_6B, 2, 400e9, 102.18114553, (8.38948156, 67.11585249, 119.84973658)),
        (QWEN3_0_6B, 4, 100e9, 25.54528638, (4.19474078, 29.96243415, 29.96243415)),
    ],
)
@pytest.mark.parametrize(("manner", "training_times", "sampling_times"), [(PLAIN, 1, 1), (COMPILED, 92 / 65, 28 / 15)])
def test_speeds_are_those_worked_out_by_hand(
    config: DecoderConfig, element_size: int, flop: float, training: float, sampling: tuple[float, ...],
    manner: Manner, training_times: float, sampling_times: float,
) -> None:  # fmt: skip
    speed = expected_speed(config, element_size, HostSpeed(flop, 28e9), manner)
    assert speed.training == pytest.approx(training * training_times, rel=1e-8)
    assert list(speed.sampling) == [1, 8, 32]
    assert list(speed.sampling.values()) == pytest.approx([n * sampling_times for n in sampling], rel=1e-8)


def test_a_decode_step_takes_as_long_as_reading_until_the_products_take_longer() -> None:
    seconds = [decode_step_seconds(SMOLLM2_135M, 2, HOST, n, PLAIN) for n in (1, 14, 15, 30)]
    assert seconds[0] == seconds[1] < seconds[2]
    assert seconds[3] == pytest.approx(2 * seconds[2])


# memory


def need(limit: int, asked: int | None = None, *, manner: Manner = PACKING) -> MemoryNeed:
    return memory_need(SMOLLM2_135M, 2, limit, asked=asked, manner=manner, rank=16, threads=2)


def test_memory_is_base_adapter_copy_and_a_pass() -> None:
    memory = need(16 * 2**30, 1024)
    assert memory.base_bytes == 2 * 134_515_008
    assert memory.decoding_bytes == 2 * 134_479_872
    # A and B of seven projections a layer, and of the unembedding: rank (in + out), 16 bytes each
    layer = (576 + 576) + 2 * (576 + 192) + (576 + 576) + 3 * (576 + 1536)
    assert memory.adapter_bytes == 16 * 16 * (30 * layer + 576 + 49152) == 90_882_048
    assert memory.pass_tokens == 1024
    assert memory.pass_bytes == torch_pass_memory(SMOLLM2_135M, 2).of_pass(1024, recomputed=0)
    assert memory.total_bytes == memory.base_bytes + memory.decoding_bytes + memory.adapter_bytes + memory.pass_bytes
    assert memory.fits and memory.refusal is None
    assert need(16 * 2**30, 1024, manner=PLAIN).total_bytes == memory.total_bytes - memory.decoding_bytes


def test_compiled_kernels_hold_the_projections_twice_and_copy_nothing_to_decode() -> None:
    memory = need(16 * 2**30, 1024, manner=COMPILED)
    assert memory.base_bytes == 2 * (134_515_008 + 134_479_872 + 49152 * 576)
    assert memory.decoding_bytes == 0
    assert memory.pass_bytes == compiled_pass_memory(SMOLLM2_135M, 2).of_pass(1024, recomputed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_base_bytes_of_compiled_kernels_are_those_in_memory(tied: bool, tmp_path: Path) -> None:
    """But for norms, which are float32 in memory and counted as bf16."""
    folder = write_tiny_model(tmp_path, "llama", tied=tied, tokenizer=False, head_dim=32)
    config = read_config(folder)
    device = Device(torch.device("cpu"), torch.bfloat16, 1, 2**34)
    if (reason := why_not_compiled(config, device, Settings(tmp_path))) is not None:
        pytest.skip(reason)
    weights = load_weights(folder, config, torch.bfloat16, torch.device("cpu"))
    norms = 2 * (2 * config.num_layers + 1) * config.hidden_size
    assert make_compute(config, weights, device, Settings(tmp_path)).base_bytes == pytest.approx(
        base_bytes(config, 2, COMPILED) + norms, abs=4
    )


def test_a_run_fits_up_to_the_last_byte() -> None:
    tokens = 2048
    total = need(64 * 2**30, tokens).total_bytes
    assert (need(total, tokens).pass_tokens, need(total, tokens).fits) == (tokens, True)
    assert not need(total - 1, tokens).fits


def test_what_the_planner_refuses_does_not_fit() -> None:
    memory = need(2 * 134_515_008 + 2**20)
    assert not memory.fits and memory.pass_tokens == MIN_TOKENS_PER_PASS
    assert memory.refusal is not None and "beside the base model hold a training pass of 0 tokens" in memory.refusal


# the host


def test_the_hosts_speed_weighs_products_as_a_step_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two matrices of 2^20 weights, one is multiplied at half the speed and occurs three times: 4 units in 7."""
    seconds = {2**10: 1.0, 2**11: 2.0}
    monkeypatch.setattr(host, "_product_seconds", lambda weight: seconds[weight.shape[1]])
    monkeypatch.setattr(host, "READ_VALUES", 2**10)
    device = Device(torch.device("cpu"), torch.float32, 1, 2**30)
    found = host.measure_host(device, [Projection(2**11, 2**9, 3), Projection(2**10, 2**10, 1)])
    assert found.flop_per_second == pytest.approx(4 * 1024 * 2**20 * 4 / 7)
    assert found.bytes_per_second > 0


def test_a_matrix_too_large_to_try_is_cut_and_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def one_second(weight: torch.Tensor) -> float:
        shapes.append(tuple(weight.shape))
        return 1.0

    monkeypatch.setattr(host, "_product_seconds", one_second)
    monkeypatch.setattr(host, "READ_VALUES", 2**10)
    device = Device(torch.device("cpu"), torch.bfloat16, 1, 2**30)
    found = host.measure_host(device, [Projection(2**10, 2**18, 1), Projection(2**10, 2**10, 8)])
    assert set(shapes) == {(2**13, 2**10), (2**10, 2**10)}
    # 32 pieces of 2^23 weights and 8 matrices of 2^20, a second each
    assert found.flop_per_second == pytest.approx(4 * 1024 * (2**28 + 2**23) / 40)


def test_when_time_runs_out_the_rest_counts_as_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PRODUCTS_SECONDS", 0.0)
    monkeypatch.setattr(host, "READ_VALUES", 2**10)
    monkeypatch.setattr(host, "_product_seconds", lambda weight: weight.shape[1] / 1024)
    device = Device(torch.device("cpu"), torch.float32, 1, 2**30)
    found = host.measure_host(device, [Projection(1024, 1024, 4), Projection(2048, 512, 4)])
    assert found.flop_per_second == 4 * 1024 * 2**20
