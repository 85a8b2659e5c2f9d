"""Drawn tokens follow the distribution that temperature, top-k and top-p define, computed here independently.

Seeds are fixed, so a test gives one answer for ever. "False alarm" is the probability, over the choice of seeds, that a
correct sampler would fail; it is at most 1e-6 a test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mint.engine.sampling.choose import Choice, choose
from tests.support.engine import VOCAB, generate, open_backend, random_prompt, request, transformers_model

DRAWS = 2000
FALSE_ALARM = 1e-6
MIN_EXPECTED = 5.0  # chi-square's rule of thumb; rarer tokens are pooled
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 12},
    {"top_p": 0.5},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8},
]
# what each is told apart from, so that the tests can fail
WRONG: list[dict[str, Any]] = [
    {"temperature": 1.5},
    {"temperature": 1.0},
    {"temperature": 0.75, "top_k": 12},
    {"top_p": 0.4},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.7},
]
PROMPT = random_prompt(17)


def distribution(logits: np.ndarray, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> np.ndarray:
    """Temperature, then top-k, then top-p of what is left: the shortest prefix, likeliest first, that reaches top_p."""
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-p, kind="stable")
    if top_k > 0:
        p[order[top_k:]] = 0
    p /= p.sum()
    reached = np.cumsum(p[order])
    p[order[int(np.argmax(reached >= min(top_p, reached[-1]))) + 1 :]] = 0
    return p / p.sum()


def chi_square_p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Probability of a deviation at least this large from `p`, cells below MIN_EXPECTED pooled."""
    expected = p * counts.sum()
    common = expected >= MIN_EXPECTED
    seen, wanted = counts[common], expected[common]
    if (rest := expected[~common].sum()) > 0:
        seen, wanted = np.append(seen, counts[~common].sum()), np.append(wanted, rest)
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    half = torch.tensor([(len(seen) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.fixture(scope="module")
def logits(tiny: Callable[..., Path]) -> np.ndarray:
    with torch.no_grad():
        return transformers_model(tiny("llama"))(torch.tensor([PROMPT])).logits[0, -1].numpy()


@pytest.mark.parametrize(("options", "wrong"), list(zip(OPTIONS, WRONG, strict=True)), ids=str)
def test_draws_follow_the_distribution(
    tiny: Callable[..., Path], logits: np.ndarray, options: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """2,000 first tokens of as many random streams, chi-square against the whole distribution; false alarm 1e-6.

    No token outside the allowed set is ever drawn, and every one inside that is expected 30 times is (a miss has
    probability e^-30 each).
    """
    backend = open_backend(tiny("llama"))
    requests = [request(PROMPT, max_new=1, num_samples=DRAWS // 8, seed=seed, **options) for seed in range(8)]
    drawn = [s.tokens[0] for generation in generate(backend, *requests) for s in generation.sequences]
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts.sum() == DRAWS
    p = distribution(logits, **options)
    assert not counts[p == 0].any()
    assert counts[p * DRAWS >= 30].all()
    assert chi_square_p_value(counts, p) >= FALSE_ALARM
    other = distribution(logits, **wrong)
    assert counts[other == 0].any() or chi_square_p_value(counts, other) < FALSE_ALARM


def test_neighbouring_streams_are_independent(tiny: Callable[..., Path], logits: np.ndarray) -> None:
    """Streams i and i + 1 of a seed, and stream i of seeds s and s + 1: which quarter of the distribution each of a pair
    fell into, chi-square on the 4 x 4 table of disjoint pairs; false alarm 1e-6 each."""
    backend = open_backend(tiny("llama"))
    generations = generate(backend, *(request(PROMPT, max_new=1, num_samples=250, seed=seed) for seed in range(8)))
    p = distribution(logits)
    quarter = np.minimum((4 * (np.cumsum(p) - p / 2)).astype(int), 3)
    share = np.bincount(quarter, weights=p, minlength=4)
    streams = np.array([[quarter[s.tokens[0]] for s in generation.sequences] for generation in generations])
    for left, right in ((streams[:, ::2], streams[:, 1::2]), (streams[::2], streams[1::2])):
        table = np.bincount((4 * left + right).ravel(), minlength=16)
        assert chi_square_p_value(table, np.outer(share, share).ravel()) >= FALSE_ALARM


def _random_logits(rows: int, vocab: int = 50) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocab", [50, 64, 333, 3000])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_grid_of_uniforms_gives_exact_frequencies(options: dict[str, Any], vocab: int) -> None:
    """No chance involved: of n evenly spaced uniforms, a token takes n p of them, give or take one. Vocabularies of less
    than one block of the cumulative sum, one, and several; of 3,000, top-p keeps more than are tried first."""
    n = 4000
    (logits,) = _random_logits(1, vocab)
    if vocab == 3000:
        logits = logits / 10
    given = {"temperature": 1.0, "top_k": -1, "top_p": 1.0, **options}
    tokens, _ = choose(logits.expand(n, -1), [Choice(uniform=(i + 0.5) / n, **given) for i in range(n)])
    p = distribution(logits.numpy(), **options)
    counts = np.bincount(tokens, minlength=len(p))
    # weights are float32: n times their rounding is far below 1
    assert np.abs(counts - n * p).max() <= 1.0 + 1e-2
    assert not counts[p == 0].any()


def test_rows_of_one_step_keep_their_own_options() -> None:
    logits = _random_logits(5)
    choices = [
        Choice(0.0, -1, 1.0, 0.99),
        Choice(1.0, 1, 1.0, 0.5),
        Choice(1.0, -1, 1e-9, 0.5),
        Choice(1e-4, -1, 1.0, 0.5),
        Choice(1.0, -1, 1.0, 0.5),
    ]
    tokens, _ = choose(logits, choices)
    assert tokens[:4] == logits[:4].argmax(-1).tolist()  # greedy, in four ways
    p = distribution(logits[4].numpy())
    assert tokens[4] == int(np.searchsorted(np.cumsum(p), 0.5, side="right"))
    for i, choice in enumerate(choices):
        assert choose(logits[i : i + 1], [choice])[0] == [tokens[i]]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_allowed_tokens(uniform: float) -> None:
    """Excluded tokens stand first and last in the vocabulary; neither end of the interval may reach them."""
    logits = torch.full((1, 50), -1.0)
    logits[0, 10:20] = 3.0
    (token,), _ = choose(logits, [Choice(1.0, 10, 1.0, uniform)])
    assert token == (10 if uniform == 0 else 19)


def test_equal_logits_at_the_border_keep_the_smaller_tokens() -> None:
    n = 1000
    logits = torch.zeros(50)
    tokens, _ = choose(logits.expand(n, -1), [Choice(1.0, 3, 1.0, (i + 0.5) / n) for i in range(n)])
    assert set(tokens) == {0, 1, 2}
    tokens, _ = choose(logits.expand(n, -1), [Choice(1.0, -1, 0.1, (i + 0.5) / n) for i in range(n)])
    assert set(tokens) == {0, 1, 2, 3, 4}  # 5 of 50 equal shares reach 0.1
