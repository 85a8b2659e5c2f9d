"""Saving, loading and managing checkpoints in this process."""

from __future__ import annotations

from concurrent.futures import Future
from datetime import UTC, datetime, timedelta

from mint.engine.backend import AdapterState
from mint.errors import CheckpointError
from mint.local.checkpoints import Manifest, delete_checkpoint, read_checkpoint, write_checkpoint, write_expiry
from mint.local.core import Core, LoadedRun, SamplerRecord, Session
from mint.local.futures import done
from mint.local.jobs import CallJob
from mint.local.runs import RunStore
from mint.local.training import TrainingOps
from mint.service import SaveSpec
from mint.types import (
    CheckpointsListResponse,
    Cursor,
    LoadWeightsResponse,
    LoraConfig,
    ParsedCheckpointTinkerPath,
    SaveWeightsForSamplerResponse,
    SaveWeightsResponse,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from mint.types.checkpoints import CheckpointType


class SavingOps:
    def __init__(self, core: Core, store: RunStore, training: TrainingOps) -> None:
        self._core, self._store, self._training = core, store, training

    def save_weights(self, run_id: str, seq_id: int | None, spec: SaveSpec) -> Future[SaveWeightsResponse]:
        run = self._training.loaded(run_id)
        job = CallJob(lambda: SaveWeightsResponse(path=self._write(run, spec, "training")), Future())
        return self._core.scheduler.submit(run_id, seq_id, job)

    def save_weights_for_sampler(
        self, run_id: str, seq_id: int | None, spec: SaveSpec
    ) -> Future[SaveWeightsForSamplerResponse]:
        run = self._training.loaded(run_id)

        def save() -> SaveWeightsForSamplerResponse:
            if spec.name is not None:
                return SaveWeightsForSamplerResponse(path=self._write(run, spec, "sampler"))
            session_id = run_id.partition(":")[0]
            session = self._core.sessions[session_id]
            record = SamplerRecord(
                run.record.tenant,
                run.record.base_model,
                run.source,
                run.backend,
                run.backend.snapshot(run_id),
                model_path=None,
            )
            return SaveWeightsForSamplerResponse(
                sampling_session_id=add_sampler(self._core, session_id, session, record)
            )

        return self._core.scheduler.submit(run_id, seq_id, CallJob(save, Future()))

    def _write(self, run: LoadedRun, spec: SaveSpec, kind: CheckpointType) -> str:
        assert spec.name is not None
        record, now = run.record, datetime.now(UTC)
        parsed = ParsedCheckpointTinkerPath(record.run_id, kind, spec.name)
        state = run.backend.export_state(record.run_id)
        manifest = Manifest(
            path=parsed.tinker_path,
            checkpoint_type=kind,
            time=now,
            base_model=record.base_model,
            lora=record.lora,
            seed=record.seed,
            modules=list(run.report.modules),
            plan=run.report.plan,
            step=state.step,
            user_metadata=spec.user_metadata or {},
            expires_at=_expiry(now, spec.ttl_seconds),
        )
        folder = self._store.checkpoint_folder(parsed)
        with self._core.settings.writing(f"saving {parsed.tinker_path}", folder, _num_bytes(state, kind)):
            write_checkpoint(folder, manifest, state, overwrite=spec.overwrite)
        return parsed.tinker_path

    def load_weights(
        self, run_id: str, seq_id: int | None, path: str, *, optimizer: bool
    ) -> Future[LoadWeightsResponse]:
        run = self._training.loaded(run_id)

        def load() -> LoadWeightsResponse:
            parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
            folder = self._store.checkpoint_folder(parsed)
            manifest, state = read_checkpoint(folder, parsed.tinker_path, optimizer=optimizer)
            self._check_fits(run, manifest)
            run.backend.import_state(run_id, state, optimizer=optimizer)
            if optimizer:
                run.report = run.backend.use_plan(run_id, manifest.plan)
            self._core.scheduler.take_failure(run_id)
            run.since_step = {}
            return LoadWeightsResponse(path=parsed.tinker_path)

        return self._core.scheduler.submit(run_id, seq_id, CallJob(load, Future()))

    def _check_fits(self, run: LoadedRun, manifest: Manifest) -> None:
        record, other = run.record, manifest.lora
        mine = (record.base_model, record.lora.rank, *_flags(record.lora))
        theirs = (manifest.base_model, other.rank, *_flags(other))
        if mine != theirs:
            raise CheckpointError(
                f"checkpoint {manifest.path} is of {_shape(theirs)}; this run is {_shape(mine)}. "
                "Use create_training_client_from_state(path), which makes a run of the checkpoint's shape"
            )

    def weights_info(self, path: str, *, optimizer: bool) -> Future[WeightsInfoResponse]:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        folder = self._store.checkpoint_folder(parsed)
        manifest, _ = read_checkpoint(folder, parsed.tinker_path, optimizer=optimizer)
        rank, unembed, mlp, attn = manifest.lora.rank, *_flags(manifest.lora)
        return done(
            WeightsInfoResponse(
                base_model=manifest.base_model,
                lora_rank=rank,
                train_unembed=unembed,
                train_mlp=mlp,
                train_attn=attn,
                user_metadata=manifest.user_metadata,
            )
        )

    def get_run(self, run_id: str) -> Future[TrainingRun]:
        return done(self._store.training_run(self._store.record(run_id)))

    def list_runs(self, limit: int, offset: int) -> Future[TrainingRunsResponse]:
        records = self._store.records()
        shown = [self._store.training_run(record) for record in records[offset : offset + limit]]
        return done(TrainingRunsResponse(training_runs=shown, cursor=_cursor(limit, offset, len(records))))

    def list_checkpoints(self, run_id: str) -> Future[CheckpointsListResponse]:
        return done(CheckpointsListResponse(checkpoints=list(self._store.checkpoints(run_id))))

    def list_all_checkpoints(self, limit: int, offset: int) -> Future[CheckpointsListResponse]:
        found = [c for record in self._store.records() for c in self._store.checkpoints(record.run_id)]
        found.sort(key=lambda checkpoint: checkpoint.time, reverse=True)
        cursor = _cursor(limit, offset, len(found))
        return done(CheckpointsListResponse(checkpoints=found[offset : offset + limit], cursor=cursor))

    def set_checkpoint_ttl(self, path: str, ttl_seconds: int | None) -> Future[None]:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)

        def set_expiry() -> None:  # on the engine thread: no save of the same name is half-way
            expires_at = _expiry(datetime.now(UTC), ttl_seconds)
            folder = self._store.checkpoint_folder(parsed)
            with self._core.settings.writing(f"setting the expiry of {parsed.tinker_path}", folder):
                write_expiry(folder, parsed.tinker_path, expires_at)

        return self._core.call(set_expiry)

    def delete_checkpoint(self, path: str) -> Future[None]:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)

        def delete() -> None:  # on the engine thread: no save of the same name is half-way
            folder = self._store.checkpoint_folder(parsed)
            with self._core.settings.writing(f"deleting {parsed.tinker_path}", folder):
                delete_checkpoint(folder, parsed.tinker_path)

        return self._core.call(delete)


def add_sampler(core: Core, session_id: str, session: Session, record: SamplerRecord) -> str:
    """Engine thread: register a sampling session and answer with its id."""
    sampler_id = f"{session_id}:sample:{next(session.sampler_numbers)}"
    core.samplers[sampler_id] = record
    session.samplers.add(sampler_id)
    return sampler_id


def _num_bytes(state: AdapterState, kind: CheckpointType) -> int:
    """Of the tensors that a checkpoint holds; the rest is small."""
    parts = [state.tensors, *([state.exp_avg, state.exp_avg_sq] if kind == "training" else [])]
    return sum(array.nbytes for part in parts for array in part.values())


def _expiry(now: datetime, ttl_seconds: int | None) -> datetime | None:
    return None if ttl_seconds is None else now + timedelta(seconds=ttl_seconds)


def _flags(lora: LoraConfig) -> tuple[bool, bool, bool]:
    return lora.train_unembed, lora.train_mlp, lora.train_attn


def _shape(shape: tuple[object, ...]) -> str:
    base, rank, unembed, mlp, attn = shape
    return f"{base}, rank {rank}, train_attn={attn}, train_mlp={mlp}, train_unembed={unembed}"


def _cursor(limit: int, offset: int, total: int) -> Cursor:
    return Cursor(offset=offset, limit=limit, total_count=total)
