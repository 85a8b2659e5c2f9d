"""What an operation answers. Source: Tinker protocol, result types. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from mint.types.tensor import TensorData

StopReason = Literal["stop", "length"]
TopkLogprobs = list[list[tuple[int, float]] | None]


class ForwardBackwardOutput(BaseModel):
    """Per datum (request order) `{"logprobs": TensorData}` of the target's shape; metrics hold `loss:sum` and more."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float]

    def __repr__(self) -> str:
        return f"ForwardBackwardOutput({len(self.loss_fn_outputs)} datums, metrics={self.metrics})"

    __str__ = __repr__


class OptimStepResponse(BaseModel):
    """metrics: step, learning_rate, grad_norm (before clipping), update_norm; `no_gradient` = 1 where nothing was done."""

    model_config = ConfigDict(frozen=True)

    metrics: dict[str, float] | None = None


class SaveWeightsResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str


class SaveWeightsForSamplerResponse(BaseModel):
    """A named save answers with its path, an ephemeral one with its sampling session."""

    model_config = ConfigDict(frozen=True)

    path: str | None = None
    sampling_session_id: str | None = None


class LoadWeightsResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str


class UnloadModelResponse(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_id: str


class SampledSequence(BaseModel):
    """Generated tokens, the one that ended the sequence included once; logprobs are the model's at temperature 1."""

    model_config = ConfigDict(frozen=True)

    stop_reason: StopReason
    tokens: list[int]
    logprobs: list[float] | None = None
    topk_logprobs: TopkLogprobs | None = None

    def __repr__(self) -> str:
        return f"SampledSequence({len(self.tokens)} tokens, stop_reason={self.stop_reason!r})"

    __str__ = __repr__


class SampleResponse(BaseModel):
    """prompt_logprobs[i] = log p(prompt[i] | prompt[:i]); entry 0 is None. The same holds for topk_prompt_logprobs."""

    model_config = ConfigDict(frozen=True)

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: TopkLogprobs | None = None
    prompt_cache_hit_tokens: int = 0

    def __repr__(self) -> str:
        return f"SampleResponse({self.sequences})"

    __str__ = __repr__


class ModelData(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())

    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(BaseModel):
    """What a run is. lora_modules and everything below it are MinT's own fields.

    backend: "decoder" (MinT's own) or "transformers".
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_id: str
    model_data: ModelData
    is_lora: bool = True
    lora_rank: int | None = None
    model_name: str | None = None
    seed: int | None = None
    lora_modules: list[str] = Field(default_factory=list)
    num_parameters: int | None = None
    backend: str | None = None
    device: str | None = None
    dtype: str | None = None
    num_threads: int | None = None
    max_tokens_per_pass: int | None = None
    recomputed_layers: int | None = None


class SupportedModel(BaseModel):
    """backend, of a loaded model and MinT's own field: "decoder" or "transformers"."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True
    backend: str | None = None


class GetServerCapabilitiesResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    supported_models: list[SupportedModel]
