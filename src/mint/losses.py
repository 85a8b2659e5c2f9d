"""The losses: one pure function each, with its inputs and config keys beside it. Knows neither torch nor the engine.

Every loss is a sum over target positions without normalisation, and every position's term depends on that position's
logprob alone, so a loss answers per position with its value and its derivative. The functions are written against the
operations that numpy and torch share (`xp`), so that the engine and a float64 check run the same lines.

p: logprob of the target under the trained model; q: logprob under the policy that sampled it; A: advantage; w: weight.
Source: Tinker protocol, loss semantics; PPO: Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Array = Any  # numpy array or torch tensor, all of one shape
Terms = tuple[Array, Array]  # (loss, d loss / d p), elementwise


def cross_entropy(xp: Any, p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> Terms:
    """-w p. Weights may have any sign and size."""
    w = inputs["weights"]
    return xp.where(w != 0, -w * p, xp.zeros_like(w)), -w


def importance_sampling(xp: Any, p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> Terms:
    """-exp(p - q) A."""
    active, a = inputs["advantages"] != 0, inputs["advantages"]
    surrogate = xp.exp(xp.where(active, p - inputs["logprobs"], xp.zeros_like(p))) * a
    return -surrogate, -surrogate


def ppo(xp: Any, p: Array, inputs: Mapping[str, Array], config: Mapping[str, float]) -> Terms:
    """-min(r A, clip(r, low, high) A) with r = exp(p - q); the thresholds are absolute ratio bounds."""
    active, a = inputs["advantages"] != 0, inputs["advantages"]
    ratio = xp.exp(xp.where(active, p - inputs["logprobs"], xp.zeros_like(p)))
    free = ratio * a
    clipped = xp.clip(ratio, config["clip_low_threshold"], config["clip_high_threshold"]) * a
    return -xp.minimum(free, clipped), xp.where(free <= clipped, -free, xp.zeros_like(free))


@dataclass(frozen=True, slots=True)
class Loss:
    """inputs: required beside target_tokens, of the same shape. weight_input: where it is 0, the position has no term.
    config: allowed keys with their defaults. multi_target: N x K targets are allowed."""

    terms: Callable[[Any, Array, Mapping[str, Array], Mapping[str, float]], Terms]
    inputs: tuple[str, ...]
    weight_input: str
    config: Mapping[str, float]
    multi_target: bool = False


_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy, ("weights",), "weights", {}, multi_target=True),
    "importance_sampling": Loss(importance_sampling, ("logprobs", "advantages"), "advantages", {}),
    "ppo": Loss(ppo, ("logprobs", "advantages"), "advantages", _CLIP),
}
