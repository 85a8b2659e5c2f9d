"""Choosing tokens by the kernel: the tokens of `choose` wherever rounding of the cumulative distribution leaves no doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.unit.engine.kernels.calling import threads, up
from torch import Tensor

from mint.engine.kernels.choice import choose_compiled
from mint.engine.sampling.choose import Choice, choose

SIZES = [1, 16, 50, 64, 65, 384, 1000]
DOUBT = 1e-6  # shares of the distribution within which rounding decides
NEAR_ONE = math.nextafter(1.0, 0.0)


def padded(logits_BV: Tensor) -> Tensor:
    """The same in rows that are filled up in memory with what would win if it were seen."""
    rows, size = logits_BV.shape
    memory = torch.full((rows, up(size)), 1e9)
    memory[:, :size] = logits_BV
    return memory[:, :size]


def random_logits(rows: int, size: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))


def plain(uniforms: Sequence[float], temperature: float = 1.0) -> list[Choice]:
    return [Choice(temperature, -1, 1.0, float(uniform)) for uniform in uniforms]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_at_the_uniform_number(size: int, temperature: float) -> None:
    """Of the cumulative distribution in float64; nearly always that is what torch's path takes as well."""
    rows = 300
    logits_BV = random_logits(rows, size)
    choices = plain(np.random.default_rng(size).random(rows), temperature)
    found, normaliser_B = choose_compiled(padded(logits_BV), choices)
    expected, expected_B = choose(logits_BV, choices)
    cumulative_BV = (logits_BV.double() / temperature).softmax(-1).cumsum(-1)
    doubtful = 0
    for token, other, choice, cumulative_V in zip(found, expected, choices, cumulative_BV, strict=True):
        before = cumulative_V[token - 1].item() if token else 0.0
        assert before - DOUBT <= choice.uniform <= cumulative_V[token].item() + DOUBT
        if token != other:
            doubtful += 1
            assert (cumulative_V - choice.uniform).abs().min() <= DOUBT
    assert doubtful <= 1
    torch.testing.assert_close(normaliser_B, logits_BV.double().logsumexp(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(normaliser_B, expected_B, rtol=0, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 1e-9, NEAR_ONE])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_token_of_weight_0_is_never_chosen(uniform: float, temperature: float) -> None:
    """Neither at the ends of the distribution nor in whole blocks of such."""
    generator = np.random.default_rng(0)
    for size in (17, 64, 130, 300):
        logits_BV = random_logits(40, size)
        for row in range(40):
            logits_BV[row, torch.from_numpy(generator.permutation(size)[: int(generator.integers(size))])] = -math.inf
            if row % 2:
                logits_BV[row, : size // 2] = logits_BV[row, -3:] = -math.inf
                logits_BV[row, size // 2] = 0.0
        found, _ = choose_compiled(padded(logits_BV), plain([uniform] * 40, temperature))
        finite = logits_BV.isfinite()
        for row, token in enumerate(found):
            assert 0 <= token < size and finite[row, token]


def test_the_first_and_the_last_token_with_a_weight() -> None:
    logits_BV = torch.full((2, 200), -math.inf)
    logits_BV[:, 70], logits_BV[:, 135] = 0.0, 1.0
    assert choose_compiled(padded(logits_BV), plain([0.0, NEAR_ONE]))[0] == [70, 135]


@pytest.mark.parametrize("size", SIZES)
def test_at_temperature_0_the_first_largest_is_chosen(size: int) -> None:
    logits_BV = random_logits(20, size).round()  # many are alike
    logits_BV[0] = -7.0
    found, normaliser_B = choose_compiled(padded(logits_BV), plain([0.9] * 20, 0.0))
    assert found == [row.index(max(row)) for row in logits_BV.tolist()]
    torch.testing.assert_close(normaliser_B, logits_BV.double().logsumexp(-1), rtol=0, atol=1e-6)


def test_top_k_and_top_p_beside_rows_without() -> None:
    """The same tokens as torch's path takes, whose filter it is; rows without a filter keep theirs."""
    logits_BV = random_logits(60, 200)
    uniforms = np.random.default_rng(3).random(60)
    kinds = [(1.0, 5, 1.0), (0.7, -1, 0.5), (1.0, -1, 1.0), (0.0, 3, 0.5), (1.3, 40, 0.9), (1.0, 1, 1.0)]
    choices = [Choice(*kinds[i % len(kinds)], float(u)) for i, u in enumerate(uniforms)]
    found, _ = choose_compiled(padded(logits_BV), choices)
    assert found == choose(logits_BV, choices)[0]
    order_BV = logits_BV.argsort(-1, descending=True)
    for row, (token, choice) in enumerate(zip(found, choices, strict=True)):
        if choice.top_k > 0:
            assert token in order_BV[row, : choice.top_k]
    assert found[5] == order_BV[5, 0]


@pytest.mark.parametrize("count", [2, 3])
def test_a_rows_token_depends_on_the_row_alone(count: int) -> None:
    logits_BV = random_logits(33, 384)
    choices = plain(np.random.default_rng(1).random(33), 0.8)
    found, normaliser_B = choose_compiled(padded(logits_BV), choices)
    with threads(count):
        again, again_B = choose_compiled(padded(logits_BV), choices)
    assert again == found and torch.equal(again_B, normaliser_B)
    for row in (0, 7, 32):
        one, one_B = choose_compiled(padded(logits_BV[row : row + 1]), choices[row : row + 1])
        assert one == found[row : row + 1] and torch.equal(one_B, normaliser_B[row : row + 1])


def test_counts_follow_the_distribution() -> None:
    """Evenly spaced uniform numbers: every token as often as its probability says, but for one at either end."""
    logits_V, rows = random_logits(1, 100)[0], 5000
    uniforms = (np.arange(rows) + 0.5) / rows
    found, _ = choose_compiled(padded(logits_V.expand(rows, 100)), plain(uniforms))
    counts = torch.bincount(torch.tensor(found), minlength=100).double()
    assert (counts - rows * logits_V.double().softmax(0)).abs().max() <= 1 + rows * DOUBT
