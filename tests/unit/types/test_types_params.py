"""LoraConfig, AdamParams, SamplingParams: every field and default of the protocol, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from mint.types import AdamParams, LoraConfig, SamplingParams

# Protocol, sections 4.4 and 4.5; `stop_token_ids` is MinT's own. ... stands for "required".
FIELDS: dict[type[BaseModel], dict[str, Any]] = {
    LoraConfig: {"rank": ..., "seed": None, "train_unembed": True, "train_mlp": True, "train_attn": True},
    AdamParams: {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    },
    SamplingParams: {
        "max_tokens": None,
        "seed": None,
        "stop": None,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "stop_token_ids": None,
    },
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_and_defaults_are_the_protocols(kind: type[BaseModel]) -> None:
    found = {name: ... if field.is_required() else field.default for name, field in kind.model_fields.items()}
    assert found == FIELDS[kind]


@pytest.mark.parametrize("kind", FIELDS)
def test_an_unknown_keyword_raises(kind: type[BaseModel]) -> None:
    with pytest.raises(ValueError, match=r"learning_rat: Extra inputs are not permitted"):
        kind(**({"rank": 1} if kind is LoraConfig else {}), learning_rat=1.0)


@pytest.mark.parametrize("kind", FIELDS)
def test_they_are_frozen_and_compare_by_value(kind: type[BaseModel]) -> None:
    required = {"rank": 1} if kind is LoraConfig else {}
    made = kind(**required)
    assert made == kind(**required)
    with pytest.raises(ValueError, match="frozen"):
        made.seed = 1  # type: ignore[attr-defined]
    assert kind.model_validate_json(made.model_dump_json()) == made


NEGATIVE = "must not be negative"
FINITE = "Input should be a finite number"
BIT64 = "a seed is a 64-bit whole number"


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        (LoraConfig, {}, "rank: Field required"),
        (LoraConfig, {"rank": 0}, "rank=0: a LoRA rank lies in 1..1024; 8 to 64 are usual"),
        (LoraConfig, {"rank": 1025}, "rank=1025: a LoRA rank lies in 1..1024"),
        (LoraConfig, {"rank": 2.5}, "rank=2.5: expected a whole number"),
        (LoraConfig, {"rank": "8"}, "rank='8': expected a whole number"),
        (LoraConfig, {"rank": True}, "rank=True: expected a whole number"),
        (LoraConfig, {"rank": 1, "seed": 1.0}, "seed=1.0: expected a whole number"),
        (SamplingParams, {"max_tokens": "9"}, "max_tokens='9': expected a whole number"),
        (SamplingParams, {"top_k": 1.5}, "top_k=1.5: expected a whole number"),
        (LoraConfig, {"rank": 1, "seed": 2**64}, f"seed={2**64}: {BIT64}"),
        (LoraConfig, {"rank": 1, "seed": -(2**63) - 1}, BIT64),
        (
            LoraConfig,
            {"rank": 1, "train_mlp": False, "train_attn": False, "train_unembed": False},
            "nothing to train: set at least one of train_mlp, train_attn, train_unembed to True",
        ),
        (AdamParams, {"learning_rate": -1.0}, f"learning_rate=-1.0: {NEGATIVE}"),
        (AdamParams, {"eps": -1e-9}, f"eps=-1e-09: {NEGATIVE}"),
        (AdamParams, {"weight_decay": -0.1}, f"weight_decay=-0.1: {NEGATIVE}"),
        (AdamParams, {"grad_clip_norm": -1.0}, f"grad_clip_norm=-1.0: {NEGATIVE}"),
        (AdamParams, {"beta1": 1.0}, r"beta1=1.0: must lie in \[0, 1\)"),
        (AdamParams, {"beta2": -0.5}, r"beta2=-0.5: must lie in \[0, 1\)"),
        (AdamParams, {"learning_rate": float("nan")}, FINITE),
        (AdamParams, {"eps": float("inf")}, FINITE),
        (AdamParams, {"eps": 0.0}, "eps=0.0: must be at least 1e-30; where a gradient is 0, AdamW divides 0 by it"),
        (AdamParams, {"learning_rate": "fast"}, "Input should be a valid number"),
        (SamplingParams, {"max_tokens": 0}, "max_tokens=0: must be at least 1"),
        (SamplingParams, {"temperature": -0.1}, r"temperature=-0.1: must be 0 \(greedy\) or positive"),
        (SamplingParams, {"temperature": float("nan")}, FINITE),
        (SamplingParams, {"top_k": 0}, r"top_k=0: must be -1 \(off\) or at least 1"),
        (SamplingParams, {"top_k": -2}, r"top_k=-2: must be -1 \(off\) or at least 1"),
        (SamplingParams, {"top_p": 0.0}, r"top_p=0.0: must lie in \(0, 1\]"),
        (SamplingParams, {"top_p": 1.5}, r"top_p=1.5: must lie in \(0, 1\]"),
        (SamplingParams, {"seed": 2**64}, BIT64),
        (SamplingParams, {"stop": 5}, "stop: expected a string, a list of strings or a list of token ids, got int"),
        (SamplingParams, {"stop": {"a"}}, "got set"),
        (SamplingParams, {"stop": ["a", 1]}, "stop: give strings or token ids, not both in one list"),
        (SamplingParams, {"stop": [True]}, "stop: give strings or token ids"),
        (SamplingParams, {"stop": ""}, "stop: an empty string would stop at once; leave it out"),
        (SamplingParams, {"stop": ["a", ""]}, "stop: an empty string would stop at once"),
        (SamplingParams, {"stop": [3, -1]}, "stop token id -1: token ids are not negative"),
        (SamplingParams, {"stop_token_ids": [-7]}, "stop token id -7: token ids are not negative"),
        (SamplingParams, {"stop_token_ids": ["a"]}, "Input should be a valid integer"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(kind: type[BaseModel], given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**given)


def test_whole_numbers_of_numpy_and_torch_are_taken() -> None:
    made = LoraConfig(rank=np.int64(8), seed=torch.tensor(3))  # type: ignore[arg-type]
    assert (made.rank, made.seed) == (8, 3) and type(made.rank) is type(made.seed) is int
    assert SamplingParams(max_tokens=np.int32(5), top_k=np.int64(2), seed=None).max_tokens == 5


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (LoraConfig, {"rank": 1024, "seed": 2**64 - 1}),
        (LoraConfig, {"rank": 1, "seed": -(2**63), "train_attn": False, "train_mlp": False}),
        (AdamParams, dict.fromkeys(FIELDS[AdamParams], 0.0) | {"eps": 1e-30}),
        (SamplingParams, {"max_tokens": 1, "temperature": 0.0, "top_k": 1, "top_p": 1e-6, "seed": 0}),
    ],
)
def test_the_borders_are_allowed(kind: type[BaseModel], given: dict[str, Any]) -> None:
    assert kind(**given).model_dump(include=set(given)) == given


@pytest.mark.parametrize(
    ("given", "strings", "ids", "at_end_of_text"),
    [
        ({}, (), set(), True),
        ({"stop": "\n\n"}, ("\n\n",), set(), True),
        ({"stop": ["a", "b"]}, ("a", "b"), set(), True),
        ({"stop": ("a", "b")}, ("a", "b"), set(), True),
        ({"stop": [5, 6]}, (), {5, 6}, True),
        ({"stop": []}, (), set(), False),
        ({"stop": [], "stop_token_ids": [9]}, (), {9}, False),
        ({"stop_token_ids": [9, 9]}, (), {9}, True),
        ({"stop": [5], "stop_token_ids": [9]}, (), {5, 9}, True),
        ({"stop": "a", "stop_token_ids": [9]}, ("a",), {9}, True),
        ({"stop_token_ids": []}, (), set(), True),
    ],
)
def test_what_stops_a_sequence(
    given: dict[str, Any], strings: tuple[str, ...], ids: set[int], at_end_of_text: bool
) -> None:
    params = SamplingParams(**given)
    assert params.stop_strings == strings
    assert params.extra_stop_tokens == ids
    assert params.stops_at_end_of_text is at_end_of_text


def test_the_stop_list_is_copied() -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("b")
    assert params.stop_strings == ("a",)
