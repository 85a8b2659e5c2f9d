"""What goes into a model: `ModelInput` and `Datum`. Source: Tinker protocol, ModelInput and Datum. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from mint.errors import InputError, UnsupportedError
from mint.types.refusal import refuses_with_input_error
from mint.types.tensor import TensorData, TensorDtype, as_numpy

MAX_TOKEN_ID = 2**31 - 1

# loss inputs whose dtype the protocol fixes; a list given under another name keeps the type of its values
LOSS_INPUT_DTYPES: dict[str, TensorDtype] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
}


def token_list(tokens: object, name: str = "tokens") -> list[int]:
    """Token ids as a list of ints, from a list, numpy array or torch tensor. Raises InputError, naming `name`."""
    array = as_numpy(tokens, name)
    if array.ndim != 1:
        raise InputError(f"{name}: expected one flat list of token ids, got shape {list(array.shape)}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name}: token ids are whole numbers, got {array.dtype}")
    if array.size and (array.min() < 0 or array.max() > MAX_TOKEN_ID):
        raise InputError(f"{name}: token ids lie in 0..{MAX_TOKEN_ID}, got {array.min()}..{array.max()}")
    ids: list[int] = array.astype(np.int64).tolist()
    return ids


@refuses_with_input_error
class EncodedTextChunk(BaseModel):
    """A run of token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: list[int]
    type: Literal["encoded_text"] = "encoded_text"

    @field_validator("tokens", mode="before")
    @classmethod
    def _check_tokens(cls, value: object) -> list[int]:
        return token_list(value)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"EncodedTextChunk({self.length} tokens)"

    __str__ = __repr__


@refuses_with_input_error
class ModelInput(BaseModel):
    """A sequence of chunks; MinT runs text, so every chunk is an EncodedTextChunk (others raise UnsupportedError)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chunks: list[EncodedTextChunk] = Field(default_factory=list)

    @field_validator("chunks", mode="before")
    @classmethod
    def _only_text(cls, value: object) -> object:
        for chunk in value if isinstance(value, Sequence) else []:
            kind = chunk.get("type", "encoded_text") if isinstance(chunk, dict) else getattr(chunk, "type", None)
            if kind != "encoded_text":
                raise UnsupportedError(f"ModelInput chunk of type {kind!r}: only 'encoded_text' is supported")
        return value

    @classmethod
    def from_ints(cls, tokens: Any) -> ModelInput:
        """One chunk of the given token ids (list, numpy or torch)."""
        return cls(chunks=[EncodedTextChunk(tokens=tokens)])

    @classmethod
    def empty(cls) -> ModelInput:
        return cls()

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """A new input with `chunk` at the end."""
        return ModelInput(chunks=[*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        return self.append(EncodedTextChunk(tokens=[token]))

    @property
    def length(self) -> int:
        """Number of tokens."""
        return sum(chunk.length for chunk in self.chunks)

    def __repr__(self) -> str:
        return f"ModelInput({self.length} tokens)"

    __str__ = __repr__


@refuses_with_input_error
class Datum(BaseModel):
    """One training example: N input tokens and, per loss input, N values (or N x K for cross_entropy).

    Position i of `model_input` predicts `target_tokens[i]`. Values may be lists, numpy arrays, torch tensors or
    TensorData; they are copied. What a loss requires is checked when the datum is used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = Field(default_factory=dict)

    @field_validator("loss_fn_inputs", mode="before")
    @classmethod
    def _to_tensor_data(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise InputError(f"loss_fn_inputs: expected a dict of tensors, got {type(value).__name__}")
        return {name: _loss_input(name, item) for name, item in value.items()}

    def __repr__(self) -> str:
        return f"Datum({self.model_input.length} tokens, inputs: {', '.join(self.loss_fn_inputs) or 'none'})"

    __str__ = __repr__


def _loss_input(name: str, value: object) -> TensorData:
    try:
        if isinstance(value, dict):  # the protocol's JSON form
            value = TensorData(**value)
        return TensorData(value, LOSS_INPUT_DTYPES.get(name))
    except InputError as error:
        raise InputError(f"loss_fn_inputs[{name!r}]: {error}") from None
