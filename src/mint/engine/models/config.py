"""`DecoderConfig`: what distinguishes one dense decoder from another, read from a Hugging Face config.json. No torch.

Covered: Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3. What the decoder does not compute is named here, before any weight
is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mint.errors import InputError, UnsupportedError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """inv_freq: head_dim / 2 inverse wavelengths (radians per position); attention_factor scales cos and sin."""

    inv_freq: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rms_norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size


def decoder_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> DecoderConfig:
    """From the contents of config.json (and generation_config.json, for its end-of-text tokens).

    Raises UnsupportedError naming what the decoder does not cover, InputError naming a missing or impossible value.
    """
    refuse_quantised(raw)
    if reason := uncovered(raw):
        raise UnsupportedError(
            f"MinT's own decoder does not cover {reason}. Unset MINT_BACKEND to run it through transformers"
        )
    model_type = raw["model_type"]
    heads = _positive(raw, "num_attention_heads")
    hidden = _positive(raw, "hidden_size")
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    head_dim = int(raw.get("head_dim") or (128 if model_type == "qwen3" else hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            f"config.json: {heads} heads, {kv_heads} key/value heads, head_dim {head_dim} do not fit together"
        )
    bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        model_type=model_type,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=_max_context(raw),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2" or bias,
        o_bias=model_type in ("llama", "qwen3") and bias,
        mlp_bias=model_type == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        rope=_rope(raw, head_dim),
        eos_token_ids=eos_token_ids(raw, generation or {}),
    )


def _positive(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {key}={value!r}, expected a positive whole number")
    return value


def refuse_quantised(raw: Mapping[str, Any]) -> None:
    """Raises UnsupportedError: no Backend computes with quantised weights."""
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise UnsupportedError(f"quantised weights ({method}) are not supported; use the model's bf16 or fp32 weights")


def uncovered(raw: Mapping[str, Any]) -> str | None:
    """What of the model in this config.json the decoder does not compute, and what it does; None: it computes it."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        names = ", ".join(raw.get("architectures") or ["?"])
        return f"model type {model_type!r} ({names}); covered: {', '.join(MODEL_TYPES)}"
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f"hidden_act {activation!r}; covered: silu"
    rope, kind = _rope_parameters(raw)
    if float(rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        return "partial rotary embeddings"
    if kind not in ROPE_TYPES:
        return f"RoPE scaling {kind!r}; covered: {', '.join(ROPE_TYPES)}"
    return None


def _max_context(raw: Mapping[str, Any]) -> int:
    """Sliding-window layers equal full attention up to the window, so the window bounds the context."""
    longest = _positive(raw, "max_position_embeddings")
    window = raw.get("sliding_window")
    sliding = raw["model_type"] == "mistral" or bool(raw.get("use_sliding_window", False))
    return min(longest, int(window)) if window and sliding else longest


def eos_token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-text tokens of config.json and generation_config.json together."""
    ids: set[int] = set()
    for value in (raw.get("eos_token_id"), generation.get("eos_token_id")):
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ids))


def _rope_parameters(raw: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The parameters and the type; newer files hold everything in rope_parameters, older ones beside rope_scaling."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    return rope, str(rope.get("rope_type") or rope.get("type") or "default")


def _rope(raw: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """Inverse frequencies. Sources: RoFormer (2104.09864), YaRN (2309.00071), Llama 3.1's frequency rescaling."""
    rope, kind = _rope_parameters(raw)
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    plain = [theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    if kind == "default":
        return RopeConfig(tuple(plain), 1.0)
    original = int(rope.get("original_max_position_embeddings") or raw.get("max_position_embeddings") or 0)
    factor = float(rope.get("factor") or _positive(raw, "max_position_embeddings") / original)
    if kind == "linear":
        return RopeConfig(tuple(f / factor for f in plain), 1.0)
    if kind == "llama3":
        return RopeConfig(tuple(_llama3_frequency(f, factor, original, rope) for f in plain), 1.0)
    return _yarn(plain, theta, factor, original, rope)


def _llama3_frequency(frequency: float, factor: float, original: int, rope: Mapping[str, Any]) -> float:
    """Long waves are slowed by `factor`, short ones kept, those between blended linearly in 1/wavelength."""
    if not {"low_freq_factor", "high_freq_factor"} <= rope.keys():
        raise InputError("config.json: RoPE scaling llama3 needs low_freq_factor and high_freq_factor")
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = original * frequency / (2 * math.pi)
    if turns > high:
        return frequency
    if turns < low:
        return frequency / factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(plain: list[float], theta: float, factor: float, original: int, rope: Mapping[str, Any]) -> RopeConfig:
    """YaRN: dimensions that turn often keep their frequency, slow ones are interpolated, a ramp joins them."""
    dim = 2 * len(plain)

    def dimension_turning(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_turning(float(rope.get("beta_fast") or 32))
    high = dimension_turning(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    inv_freq = []
    for i, frequency in enumerate(plain):
        interpolated = min(max((i - low) / span, 0.0), 1.0)
        inv_freq.append(frequency / factor * interpolated + frequency * (1 - interpolated))
    return RopeConfig(tuple(inv_freq), _yarn_attention_factor(factor, rope))


def _yarn_attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(float(rope["mscale"])) / mscale(float(rope["mscale_all_dim"]))
    return mscale(1.0)
