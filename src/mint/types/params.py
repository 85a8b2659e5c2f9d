"""What a caller asks for: `LoraConfig`, `AdamParams`, `SamplingParams`. Source: Tinker protocol. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mint.errors import InputError
from mint.types.refusal import WholeNumber, refuses_with_input_error

LORA_ALPHA = 32  # fixed by the protocol's service; scale = alpha / rank
MAX_RANK = 1024

Finite = Annotated[float, Field(allow_inf_nan=False)]


@refuses_with_input_error
class LoraConfig(BaseModel):
    """The shape of an adapter. `seed=None` draws one; the drawn seed is recorded with the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: WholeNumber
    seed: WholeNumber | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if not 1 <= self.rank <= MAX_RANK:
            raise InputError(f"rank={self.rank}: a LoRA rank lies in 1..{MAX_RANK}; 8 to 64 are usual")
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise InputError("nothing to train: set at least one of train_mlp, train_attn, train_unembed to True")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed={self.seed}: a seed is a 64-bit whole number")
        return self


MIN_EPS = 1e-30  # far above what is 0 in float32


@refuses_with_input_error
class AdamParams(BaseModel):
    """AdamW with decoupled weight decay; `grad_clip_norm` is a global norm, 0 switches clipping off."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: Finite = 1e-4
    beta1: Finite = 0.9
    beta2: Finite = 0.95
    eps: Finite = 1e-12
    weight_decay: Finite = 0.0
    grad_clip_norm: Finite = 0.0

    @model_validator(mode="after")
    def _check(self) -> AdamParams:
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must not be negative")
        if self.eps < MIN_EPS:
            raise InputError(
                f"eps={self.eps}: must be at least {MIN_EPS}; where a gradient is 0, AdamW divides 0 by it"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        return self


@refuses_with_input_error
class SamplingParams(BaseModel):
    """How to sample. temperature 0 is greedy; top_k -1 is off; max_tokens None fills the context.

    stop: None = the model's end-of-text tokens; a string, a list of strings or a list of token ids stop as well as
    end-of-text; [] = nothing stops before max_tokens. stop_token_ids: more token ids that stop.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: WholeNumber | None = None
    seed: WholeNumber | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: Finite = 1.0
    top_k: WholeNumber = -1
    top_p: Finite = 1.0
    stop_token_ids: list[int] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, value: Any) -> Any:
        if value is None or isinstance(value, str):
            items: Sequence[Any] = [value] if value is not None else []
        elif isinstance(value, Sequence):
            value = items = list(value)
        else:
            raise InputError(
                f"stop: expected a string, a list of strings or a list of token ids, got {type(value).__name__}"
            )
        if not (all(isinstance(s, str) for s in items) or all(type(s) is int for s in items)):
            raise InputError("stop: give strings or token ids, not both in one list; stop_token_ids takes further ids")
        if any(s == "" for s in items):
            raise InputError("stop: an empty string would stop at once; leave it out")
        return value

    @model_validator(mode="after")
    def _check(self) -> SamplingParams:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens={self.max_tokens}: must be at least 1")
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 1 and self.top_k != -1:
            raise InputError(f"top_k={self.top_k}: must be -1 (off) or at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must lie in (0, 1]")
        for token in [*(self.stop_token_ids or []), *(s for s in self.stop or [] if isinstance(s, int))]:
            if token < 0:
                raise InputError(f"stop token id {token}: token ids are not negative")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed={self.seed}: a seed is a 64-bit whole number")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(s for s in self.stop or [] if isinstance(s, str))

    @property
    def extra_stop_tokens(self) -> frozenset[int]:
        """Token ids that stop besides the model's own end-of-text."""
        listed = [s for s in self.stop or [] if isinstance(s, int)] if isinstance(self.stop, list) else []
        return frozenset([*listed, *(self.stop_token_ids or [])])

    @property
    def stops_at_end_of_text(self) -> bool:
        return self.stop != []
