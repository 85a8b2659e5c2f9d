"""`Service` in this process, bound to one tenant: every operation, handed to where it is done."""

from __future__ import annotations

from concurrent.futures import Future

from mint.hub import PACKAGED_MODELS
from mint.local.core import Core, Session
from mint.local.futures import done, errors_in_future
from mint.local.runs import RunStore
from mint.local.sampling import SamplingOps
from mint.local.saving import SavingOps
from mint.local.training import TrainingOps
from mint.service import LossFromLogprobs, OnToken, RunSpec, SamplingSession, SaveSpec
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
    OptimStepResponse,
    SampleResponse,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    SupportedModel,
    TrainingRun,
    TrainingRunsResponse,
    UnloadModelResponse,
    WeightsInfoResponse,
)
from mint.types.requests import SampleInput, TrainingInput


class LocalService:
    def __init__(self, core: Core, tenant: str) -> None:
        self._core, self._tenant = core, tenant
        store = RunStore(core.settings.runs_dir, tenant)
        self._training = TrainingOps(core, store, tenant)
        self._saving = SavingOps(core, store, self._training)
        self._sampling = SamplingOps(core, store, tenant)

    def capabilities(self) -> Future[GetServerCapabilitiesResponse]:
        self._core.check_process()
        loaded = [backend.limits for backend in list(self._core.backends.values())]
        models = {name: SupportedModel(model_name=name) for name in PACKAGED_MODELS}
        for limits in loaded:
            models[limits.base_model] = SupportedModel(
                model_name=limits.base_model, max_context_length=limits.max_context, backend=limits.backend
            )
        return done(GetServerCapabilitiesResponse(supported_models=list(models.values())))

    def create_session(self, user_metadata: dict[str, str], display_name: str | None = None) -> Future[str]:
        self._core.check_process()
        return done(self._core.new_session(Session(self._tenant, user_metadata, display_name)))

    @errors_in_future
    def get_session(self, session_id: str) -> Future[GetSessionResponse]:
        session = self._core.session(session_id, self._tenant)
        return done(
            GetSessionResponse(
                training_run_ids=sorted(session.runs),
                sampler_ids=sorted(session.samplers),
                user_metadata=session.user_metadata,
                display_name=session.display_name,
            )
        )

    def list_sessions(self, limit: int, offset: int) -> Future[ListSessionsResponse]:
        own = [key for key, session in reversed(list(self._core.sessions.items())) if session.tenant == self._tenant]
        return done(ListSessionsResponse(sessions=own[offset : offset + limit]))

    def heartbeat(self, session_id: str) -> Future[None]:
        self._core.session(session_id, self._tenant)
        return done(None)

    def close_session(self, session_id: str) -> Future[None]:
        session = self._core.sessions.get(session_id)
        if session is None or session.tenant != self._tenant:
            return done(None)
        return self._core.release(lambda: self._core.drop_session(session_id))

    @errors_in_future
    def create_run(self, spec: RunSpec) -> Future[GetInfoResponse]:
        return self._training.create_run(spec)

    @errors_in_future
    def get_info(self, run_id: str) -> Future[GetInfoResponse]:
        return self._training.get_info(run_id)

    @errors_in_future
    def unload(self, run_id: str) -> Future[UnloadModelResponse]:
        return self._training.unload(run_id)

    @errors_in_future
    def forward(self, run_id: str, seq_id: int | None, training_input: TrainingInput) -> Future[ForwardBackwardOutput]:
        return self._training.run_pass(run_id, seq_id, training_input, "forward")

    @errors_in_future
    def forward_backward(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput
    ) -> Future[ForwardBackwardOutput]:
        return self._training.run_pass(run_id, seq_id, training_input, "forward_backward")

    @errors_in_future
    def forward_backward_custom(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput, loss: LossFromLogprobs
    ) -> Future[ForwardBackwardOutput]:
        return self._training.run_custom(run_id, seq_id, training_input, loss)

    @errors_in_future
    def optim_step(self, run_id: str, seq_id: int | None, params: AdamParams) -> Future[OptimStepResponse]:
        return self._training.optim_step(run_id, seq_id, params)

    @errors_in_future
    def save_weights(self, run_id: str, seq_id: int | None, spec: SaveSpec) -> Future[SaveWeightsResponse]:
        return self._saving.save_weights(run_id, seq_id, spec)

    @errors_in_future
    def load_weights(
        self, run_id: str, seq_id: int | None, path: str, *, optimizer: bool
    ) -> Future[LoadWeightsResponse]:
        return self._saving.load_weights(run_id, seq_id, path, optimizer=optimizer)

    @errors_in_future
    def save_weights_for_sampler(
        self, run_id: str, seq_id: int | None, spec: SaveSpec
    ) -> Future[SaveWeightsForSamplerResponse]:
        return self._saving.save_weights_for_sampler(run_id, seq_id, spec)

    @errors_in_future
    def create_sampling_session(
        self, session_id: str, base_model: str | None, model_path: str | None
    ) -> Future[SamplingSession]:
        return self._sampling.create_session(session_id, base_model, model_path)

    @errors_in_future
    def get_sampler(self, sampling_session_id: str) -> Future[GetSamplerResponse]:
        return self._sampling.get_sampler(sampling_session_id)

    def close_sampling_session(self, sampling_session_id: str) -> Future[None]:
        return self._sampling.close_session(sampling_session_id)

    @errors_in_future
    def sample(
        self, sampling_session_id: str, sample_input: SampleInput, on_token: OnToken | None = None
    ) -> Future[SampleResponse]:
        return self._sampling.sample(sampling_session_id, sample_input, on_token)

    @errors_in_future
    def weights_info(self, path: str, *, optimizer: bool = False) -> Future[WeightsInfoResponse]:
        return self._saving.weights_info(path, optimizer=optimizer)

    @errors_in_future
    def get_run(self, run_id: str) -> Future[TrainingRun]:
        return self._saving.get_run(run_id)

    @errors_in_future
    def list_runs(self, limit: int, offset: int) -> Future[TrainingRunsResponse]:
        return self._saving.list_runs(limit, offset)

    @errors_in_future
    def list_checkpoints(self, run_id: str) -> Future[CheckpointsListResponse]:
        return self._saving.list_checkpoints(run_id)

    @errors_in_future
    def list_all_checkpoints(self, limit: int, offset: int) -> Future[CheckpointsListResponse]:
        return self._saving.list_all_checkpoints(limit, offset)

    @errors_in_future
    def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> Future[None]:
        return self._saving.set_checkpoint_ttl(path, ttl_seconds)

    @errors_in_future
    def delete_checkpoint(self, path: str) -> Future[None]:
        return self._saving.delete_checkpoint(path)
