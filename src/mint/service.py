"""`Service`: every operation of the system, typed. The seam between the SDK and whatever does the work.

Contract, kept by every implementation:
- A method returns a `concurrent.futures.Future` at once; an accepted operation is running from then on, and no waiter
  can cancel it. Operations of a run execute in the order of their seq_id, which start at 1 without gaps; None is the
  next one, for callers that keep no count of their own.
- Arguments arrive checked and copied (`types.requests`). What only the backend knows (vocabulary, context, missing
  checkpoint) arrives as an exception of the future, of the same class through every door.
- If a forward_backward of a run failed since its last optim_step, the next optim_step fails naming it, changes nothing
  and clears the mark. An optim_step without a gradient succeeds and says so in its metrics.
- A Service object belongs to one tenant and answers for that tenant's objects alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from mint.types import (
    AdamParams,
    CheckpointsListResponse,
    ForwardBackwardOutput,
    GetInfoResponse,
    GetSamplerResponse,
    GetServerCapabilitiesResponse,
    GetSessionResponse,
    ListSessionsResponse,
    LoadWeightsResponse,
    LoraConfig,
    OptimStepResponse,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TrainingRun,
    TrainingRunsResponse,
    UnloadModelResponse,
    WeightsInfoResponse,
)
from mint.types.requests import SampleInput, TrainingInput

# logprobs of every datum as torch tensors with gradient -> (scalar loss, metrics)
LossFromLogprobs = Callable[[Sequence[Any]], tuple[Any, dict[str, float]]]

# told a token; True ends the sequence there
OnToken = Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A run to create. `seed` is drawn by the service where the config has none."""

    session_id: str
    base_model: str
    lora: LoraConfig
    user_metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class SaveSpec:
    """How to save. `name` None: an unlisted sampler snapshot. ttl_seconds: 3600 to ten years, None = for good."""

    name: str | None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SamplingSession:
    """A place to sample from: a base model or a snapshot of an adapter."""

    sampling_session_id: str
    base_model: str
    model_path: str | None


class Service(Protocol):
    def capabilities(self) -> Future[GetServerCapabilitiesResponse]: ...

    def create_session(self, user_metadata: dict[str, str], display_name: str | None = None) -> Future[str]:
        """A session groups what one client makes; closing it frees all of that."""

    def get_session(self, session_id: str) -> Future[GetSessionResponse]: ...

    def list_sessions(self, limit: int, offset: int) -> Future[ListSessionsResponse]:
        """Open sessions, the newest first."""

    def heartbeat(self, session_id: str) -> Future[None]: ...

    def close_session(self, session_id: str) -> Future[None]:
        """May be called from a finaliser, on any thread."""

    def create_run(self, spec: RunSpec) -> Future[GetInfoResponse]: ...

    def get_info(self, run_id: str) -> Future[GetInfoResponse]: ...

    def unload(self, run_id: str) -> Future[UnloadModelResponse]:
        """May be called from a finaliser, on any thread."""

    def forward(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput
    ) -> Future[ForwardBackwardOutput]: ...

    def forward_backward(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput
    ) -> Future[ForwardBackwardOutput]: ...

    def forward_backward_custom(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput, loss: LossFromLogprobs
    ) -> Future[ForwardBackwardOutput]: ...

    def optim_step(self, run_id: str, seq_id: int | None, params: AdamParams) -> Future[OptimStepResponse]: ...

    def save_weights(self, run_id: str, seq_id: int | None, spec: SaveSpec) -> Future[SaveWeightsResponse]: ...

    def load_weights(
        self, run_id: str, seq_id: int | None, path: str, *, optimizer: bool
    ) -> Future[LoadWeightsResponse]: ...

    def save_weights_for_sampler(
        self, run_id: str, seq_id: int | None, spec: SaveSpec
    ) -> Future[SaveWeightsForSamplerResponse]: ...

    def create_sampling_session(
        self, session_id: str, base_model: str | None, model_path: str | None
    ) -> Future[SamplingSession]:
        """`model_path` wins where both are given."""

    def get_sampler(self, sampling_session_id: str) -> Future[GetSamplerResponse]: ...

    def close_sampling_session(self, sampling_session_id: str) -> Future[None]:
        """May be called from a finaliser, on any thread."""

    def sample(
        self, sampling_session_id: str, sample_input: SampleInput, on_token: OnToken | None = None
    ) -> Future[SampleResponse]:
        """`on_token`: for a single sequence, told every token as it is generated, on whatever thread that happens."""

    def weights_info(self, path: str, *, optimizer: bool = False) -> Future[WeightsInfoResponse]:
        """After the checkpoint's files, with `optimizer` those of a training checkpoint, were found whole."""

    def get_run(self, run_id: str) -> Future[TrainingRun]: ...

    def list_runs(self, limit: int, offset: int) -> Future[TrainingRunsResponse]: ...

    def list_checkpoints(self, run_id: str) -> Future[CheckpointsListResponse]: ...

    def list_all_checkpoints(self, limit: int, offset: int) -> Future[CheckpointsListResponse]: ...

    def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> Future[None]:
        """From now on; None keeps the checkpoint for good."""

    def delete_checkpoint(self, path: str) -> Future[None]: ...
