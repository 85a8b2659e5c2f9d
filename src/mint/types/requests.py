"""Validated forms of what an operation is given; every `Service` takes these. No torch.

They can be built only through `prepare_*`, which copies and checks, so that whoever holds one may rely on it.
Numbers that only the backend knows (vocabulary, context length) are checked there.
Index letters: N input tokens, K targets per position (1 except for N x K cross_entropy).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mint.errors import InputError, UnsupportedError
from mint.losses import LOSSES
from mint.types.inputs import Datum, ModelInput
from mint.types.params import SamplingParams
from mint.types.refusal import whole_number

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

MAX_SAMPLES = 1024
MAX_TOPK = 100


@dataclass(frozen=True, slots=True, repr=False)
class PreparedDatum:
    """tokens_N, targets_NK, inputs by name (each N x K float32); `flat`: the caller gave N targets, not N x K."""

    tokens_N: IntArray
    targets_NK: IntArray
    inputs: dict[str, FloatArray]
    flat: bool

    @property
    def length(self) -> int:
        return len(self.tokens_N)


@dataclass(frozen=True, slots=True, repr=False)
class TrainingInput:
    """Datums with the loss that is to be taken over them; `loss_fn_config` holds every key, defaults filled in."""

    data: tuple[PreparedDatum, ...]
    loss_fn: str
    loss_fn_config: dict[str, float]


@dataclass(frozen=True, slots=True, repr=False)
class SampleInput:
    """A prompt and what to do with it. `num_prompt_topk`: top-k logprobs per prompt position, 0 = none."""

    prompt: tuple[int, ...]
    num_samples: int
    params: SamplingParams
    prompt_logprobs: bool = False
    num_prompt_topk: int = 0
    num_sample_topk: int = 0


def prepare_training_input(
    data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None
) -> TrainingInput:
    """Check and copy. Raises InputError naming the datum and the field; nothing is dropped or padded."""
    if loss_fn not in LOSSES:
        raise InputError(f"unknown loss_fn {loss_fn!r}; supported: {', '.join(LOSSES)}")
    loss = LOSSES[loss_fn]
    config = dict(loss.config)
    for key, value in (loss_fn_config or {}).items():
        if key not in config:
            allowed = ", ".join(loss.config) or "none"
            raise InputError(f"loss_fn_config: {loss_fn} knows no key {key!r}; allowed: {allowed}")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
            raise InputError(f"loss_fn_config[{key!r}]={value!r}: expected a finite number")
        config[key] = float(value)
    if config.keys() >= {"clip_low_threshold", "clip_high_threshold"}:
        low, high = config["clip_low_threshold"], config["clip_high_threshold"]
        if not 0 <= low <= high:
            raise InputError(
                f"clip_low_threshold={low}, clip_high_threshold={high}: ratio bounds need 0 <= low <= high"
            )
    rows = _datum_list(data)
    return TrainingInput(
        tuple(_prepare(i, datum, loss_fn, loss.inputs) for i, datum in enumerate(rows)), loss_fn, config
    )


def prepare_custom_input(data: Sequence[Datum]) -> TrainingInput:
    """Datums for a loss of the caller's own: `target_tokens` is required, whatever else they hold is the caller's."""
    rows = _datum_list(data)
    prepared = tuple(_prepare(i, datum, "cross_entropy", (), what="a custom loss") for i, datum in enumerate(rows))
    return TrainingInput(prepared, "custom", {})


def _datum_list(data: object) -> list[Datum]:
    if isinstance(data, Datum) or not isinstance(data, Sequence):
        raise InputError(f"data: expected a list of types.Datum, got {type(data).__name__}")
    if not data:
        raise InputError("data: the list of datums is empty; give at least one")
    for i, datum in enumerate(data):
        if not isinstance(datum, Datum):
            raise InputError(f"data[{i}]: expected types.Datum, got {type(datum).__name__}")
    return list(data)


def _prepare(
    index: int, datum: Datum, loss_fn: str, required: tuple[str, ...], what: str | None = None
) -> PreparedDatum:
    where = f"data[{index}]"
    tokens_N = np.asarray(datum.model_input.to_ints(), np.int64)
    num_tokens = len(tokens_N)
    if not num_tokens:
        raise InputError(f"{where}: model_input is empty; a datum needs at least one token")
    given = datum.loss_fn_inputs
    missing = [name for name in ("target_tokens", *required) if name not in given]
    if missing:
        raise InputError(
            f"{where}: {what or loss_fn} needs loss_fn_inputs {', '.join(repr(m) for m in missing)}; "
            f"given: {', '.join(given) or 'none'}"
        )
    if required and (unknown := [name for name in given if name not in ("target_tokens", *required)]):
        raise InputError(
            f"{where}: {loss_fn} takes no loss_fn_inputs {', '.join(repr(u) for u in unknown)}; "
            f"it takes target_tokens, {', '.join(required)}"
        )
    targets = given["target_tokens"].to_numpy()
    if given["target_tokens"].dtype != "int64":
        raise InputError(f"{where}: target_tokens are token ids (int64), got float32")
    if (
        targets.ndim not in (1, 2)
        or len(targets) != num_tokens
        or (targets.ndim == 2 and not LOSSES[loss_fn].multi_target)
    ):
        shapes = f"[{num_tokens}]" + (f" or [{num_tokens}, K]" if LOSSES[loss_fn].multi_target else "")
        raise InputError(
            f"{where}: target_tokens has shape {list(targets.shape)}, but model_input has {num_tokens} tokens: expected {shapes}"
        )
    if targets.size and targets.min() < 0:
        raise InputError(
            f"{where}: target_tokens holds {targets.min()}; token ids are not negative (mask with weight 0, not with -100)"
        )
    inputs = {}
    for name in required:
        values = given[name].to_numpy()
        if values.shape != targets.shape:
            raise InputError(
                f"{where}: {name} has shape {list(values.shape)}, target_tokens {list(targets.shape)}: they must agree"
            )
        if not np.isfinite(values).all():
            raise InputError(
                f"{where}: {name} holds NaN or infinity at position {int(np.argmax(~np.isfinite(values).ravel()))}"
            )
        inputs[name] = np.array(values, np.float32).reshape(num_tokens, -1)
    return PreparedDatum(tokens_N, np.array(targets, np.int64).reshape(num_tokens, -1), inputs, flat=targets.ndim == 1)


def prepare_sample_input(
    prompt: ModelInput,
    num_samples: int,
    params: SamplingParams,
    *,
    prompt_logprobs: bool = False,
    num_prompt_topk: int = 0,
    num_sample_topk: int = 0,
) -> SampleInput:
    """Check and copy. Raises InputError naming the argument."""
    if not isinstance(prompt, ModelInput):
        raise InputError(
            f"prompt: expected types.ModelInput (e.g. ModelInput.from_ints(tokens)), got {type(prompt).__name__}"
        )
    if not isinstance(params, SamplingParams):
        raise InputError(f"sampling_params: expected types.SamplingParams, got {type(params).__name__}")
    if prompt.length == 0:
        raise InputError("prompt: it is empty; sampling needs at least one token")
    return SampleInput(
        tuple(prompt.to_ints()),
        _whole_within("num_samples", num_samples, 1, MAX_SAMPLES),
        params,
        bool(prompt_logprobs),
        _whole_within("topk_prompt_logprobs", num_prompt_topk, 0, MAX_TOPK),
        _whole_within("topk_sample_logprobs", num_sample_topk, 0, MAX_TOPK),
    )


def _whole_within(name: str, value: object, low: int, high: int) -> int:
    number = whole_number(value, name)
    if not low <= number <= high:
        raise InputError(f"{name}={value!r}: must be a whole number in {low}..{high}")
    return number


def refuse(option: str, value: object) -> None:
    """Raise UnsupportedError unless `value` is the option's "not asked for" (None, 0 or False)."""
    if value:
        raise UnsupportedError(f"{option}={value!r} is not supported; leave it out")


def server_only(call: str, instead: str) -> UnsupportedError:
    """For calls of the SDK's surface that make no sense inside one process."""
    return UnsupportedError(f"{call} needs a server, and MinT runs inside this process; {instead}")


def check_ttl(ttl_seconds: int | None) -> int | None:
    """One hour to ten years, or None for good."""
    if ttl_seconds is None:
        return None
    seconds = whole_number(ttl_seconds, "ttl_seconds")
    if not 3600 <= seconds <= 10 * 365 * 86_400:
        raise InputError(
            f"ttl_seconds={ttl_seconds!r}: must be None (keep) or a whole number from 3600 (an hour) to ten years"
        )
    return seconds


def check_user_metadata(metadata: Any) -> dict[str, str]:
    """A copy of `metadata`; keys and values are strings, 64 KiB in all."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()
    ):
        raise InputError("user_metadata: expected a dict of strings to strings")
    if sum(len(k) + len(v) for k, v in metadata.items()) > 65_536:
        raise InputError("user_metadata: more than 64 KiB; store large things elsewhere and put a reference here")
    return dict(metadata)
