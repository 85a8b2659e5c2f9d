"""What operations answer: the protocol's fields and defaults, and reprs that print no payload."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel

from mint import types

NOW = datetime.now(UTC)

# Protocol, sections 4.6, 4.8, 4.9; ... stands for "required".
FIELDS: dict[type[BaseModel], dict[str, Any]] = {
    types.ForwardBackwardOutput: {"loss_fn_output_type": ..., "loss_fn_outputs": ..., "metrics": ...},
    types.OptimStepResponse: {"metrics": None},
    types.SaveWeightsResponse: {"path": ...},
    types.SaveWeightsForSamplerResponse: {"path": None, "sampling_session_id": None},
    types.LoadWeightsResponse: {"path": ...},
    types.UnloadModelResponse: {"model_id": ...},
    types.SampledSequence: {"stop_reason": ..., "tokens": ..., "logprobs": None, "topk_logprobs": None},
    types.SampleResponse: {
        "sequences": ...,
        "prompt_logprobs": None,
        "topk_prompt_logprobs": None,
        "prompt_cache_hit_tokens": 0,
    },
    types.Cursor: {"offset": ..., "limit": ..., "total_count": ...},
    types.Checkpoint: {
        "checkpoint_id": ...,
        "checkpoint_type": ...,
        "time": ...,
        "tinker_path": ...,
        "size_bytes": None,
        "public": False,
        "user_metadata": None,
        "expires_at": None,
    },
    types.TrainingRun: {
        "training_run_id": ...,
        "base_model": ...,
        "model_owner": ...,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": None,
        "last_request_time": ...,
        "last_checkpoint": None,
        "last_sampler_checkpoint": None,
        "user_metadata": None,
    },
}


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_and_defaults_are_the_protocols(kind: type[BaseModel]) -> None:
    found = {name: ... if field.is_required() else field.default for name, field in kind.model_fields.items()}
    assert found == FIELDS[kind]
    assert kind.model_config["frozen"]


def test_reprs_count_and_print_no_tokens() -> None:
    sequence = types.SampledSequence(stop_reason="stop", tokens=[123456, 7], logprobs=[-0.625, -1.0])
    assert repr(sequence) == "SampledSequence(2 tokens, stop_reason='stop')"
    response = types.SampleResponse(sequences=[sequence], prompt_logprobs=[None, -0.625])
    assert repr(response) == "SampleResponse([SampledSequence(2 tokens, stop_reason='stop')])"
    output = types.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[{"logprobs": types.TensorData([-0.625])}],
        metrics={"loss:sum": 1.5},
    )
    assert repr(output) == "ForwardBackwardOutput(1 datums, metrics={'loss:sum': 1.5})"


def test_values_outside_the_protocols_words_are_refused() -> None:
    with pytest.raises(ValueError, match="'stop' or 'length'"):
        types.SampledSequence(stop_reason="eos", tokens=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'training' or 'sampler'"):
        types.Checkpoint(checkpoint_id="x", checkpoint_type="external", time=NOW, tinker_path="y")  # type: ignore[arg-type]


def test_a_listing_survives_json() -> None:
    saved = types.Checkpoint(
        checkpoint_id="weights/a",
        checkpoint_type="training",
        time=NOW,
        tinker_path="tinker://r/weights/a",
        expires_at=NOW,
    )
    listing = types.CheckpointsListResponse(checkpoints=[saved], cursor=types.Cursor(offset=0, limit=1, total_count=1))
    assert types.CheckpointsListResponse.model_validate_json(listing.model_dump_json()) == listing
