"""Runs and their training operations in this process."""

from __future__ import annotations

import logging
import secrets
import time
from concurrent.futures import Future
from datetime import UTC, datetime
from typing import Any

from mint.engine.backend import Part, PartResult
from mint.errors import ClosedError, OperationError, StorageError
from mint.hub import resolve_model
from mint.local.core import Core, LoadedRun
from mint.local.futures import done
from mint.local.jobs import CallJob, PassJob, PassMode, WorkJob
from mint.local.runs import RunRecord, RunStore
from mint.service import LossFromLogprobs, RunSpec
from mint.types import (
    AdamParams,
    ForwardBackwardOutput,
    GetInfoResponse,
    ModelData,
    OptimStepResponse,
    TensorData,
    UnloadModelResponse,
)
from mint.types.requests import TrainingInput

logger = logging.getLogger("mint")


class TrainingOps:
    def __init__(self, core: Core, store: RunStore, tenant: str) -> None:
        self._core, self._store, self._tenant = core, store, tenant

    def loaded(self, run_id: str) -> LoadedRun:
        """Raises ClosedError for an unloaded run, CheckpointNotFoundError for one that is unknown or another tenant's."""
        self._core.check_process()
        run = self._core.runs.get(run_id)
        if run is not None and run.record.tenant == self._tenant:
            return run
        self._store.record(run_id)
        raise ClosedError(
            f"run {run_id} is not loaded: its client was closed. Continue from a checkpoint with "
            "create_training_client_from_state_with_optimizer(path)"
        )

    def create_run(self, spec: RunSpec) -> Future[GetInfoResponse]:
        core = self._core
        session = core.session(spec.session_id, self._tenant)
        run_id = f"{spec.session_id}:train:{next(session.run_numbers)}"
        seed = secrets.randbits(63) if spec.lora.seed is None else spec.lora.seed

        def create() -> GetInfoResponse:
            source = resolve_model(spec.base_model, settings=core.settings)

            def load() -> GetInfoResponse:
                core.session(spec.session_id, self._tenant)  # it may have been closed during a download
                backend = core.backend(source)
                lora = spec.lora.model_copy(update={"seed": seed})
                record = RunRecord(
                    run_id=run_id,
                    tenant=self._tenant,
                    base_model=spec.base_model,
                    lora=lora,
                    seed=seed,
                    created=datetime.now(UTC),
                    user_metadata=spec.user_metadata,
                )
                report = backend.add_run(run_id, lora, seed)
                try:
                    with core.settings.writing(f"creating run {run_id}", self._store.folder(run_id)):
                        self._store.create(record)
                except BaseException:
                    backend.remove_run(run_id)
                    raise
                core.runs[run_id] = LoadedRun(record, source, backend, report)
                session.runs.add(run_id)
                core.scheduler.add_queue(run_id, self._tenant)
                return self._info(run_id)

            return core.call(load, waits=False).result()

        return core.background(create)

    def _info(self, run_id: str) -> GetInfoResponse:
        run = self.loaded(run_id)
        limits, record = run.backend.limits, run.record
        return GetInfoResponse(
            model_id=run_id,
            model_data=ModelData(
                arch=limits.architecture, model_name=record.base_model, tokenizer_id=record.base_model
            ),
            lora_rank=record.lora.rank,
            model_name=record.base_model,
            seed=record.seed,
            lora_modules=list(run.report.modules),
            num_parameters=run.report.num_parameters,
            backend=limits.backend,
            device=limits.device,
            dtype=limits.dtype,
            num_threads=limits.num_threads,
            max_tokens_per_pass=run.report.plan.max_tokens_per_pass,
            recomputed_layers=run.report.recomputed_layers,
        )

    def get_info(self, run_id: str) -> Future[GetInfoResponse]:
        return done(self._info(run_id))

    def unload(self, run_id: str) -> Future[UnloadModelResponse]:
        self.loaded(run_id)

        def unload() -> UnloadModelResponse:
            if run_id in self._core.runs:
                self._core.drop_run(run_id)
            return UnloadModelResponse(model_id=run_id)

        return self._core.release(unload)

    def run_pass(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput, mode: PassMode
    ) -> Future[ForwardBackwardOutput]:
        run = self.loaded(run_id)

        def finish(result: PartResult) -> ForwardBackwardOutput:
            return self._output(run, result, trained=mode == "forward_backward")

        job = PassJob(run.backend, mode, training_input, finish, Future())
        return self._core.scheduler.submit(run_id, seq_id, job)

    def run_custom(
        self, run_id: str, seq_id: int | None, training_input: TrainingInput, loss: LossFromLogprobs
    ) -> Future[ForwardBackwardOutput]:
        run = self.loaded(run_id)

        def work():  # type: ignore[no-untyped-def]  # a Work; its result type is the future's
            result = yield from run.backend.forward_backward_custom(Part(run_id, training_input), loss)
            if result.error is not None:
                raise result.error
            return self._output(run, result, trained=True)

        return self._core.scheduler.submit(run_id, seq_id, WorkJob(work, Future(), trains=run.backend))

    def _output(self, run: LoadedRun, result: PartResult, *, trained: bool) -> ForwardBackwardOutput:
        for key, value in result.metrics.items() if trained else ():
            if key.endswith(":sum"):
                run.since_step[key] = run.since_step.get(key, 0.0) + value
        outputs = [{"logprobs": TensorData(array)} for array in result.logprobs]
        return ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=outputs, metrics=result.metrics)

    def optim_step(self, run_id: str, seq_id: int | None, params: AdamParams) -> Future[OptimStepResponse]:
        run = self.loaded(run_id)

        def step() -> OptimStepResponse:
            sums, run.since_step = run.since_step, {}
            failed = self._core.scheduler.take_failure(run_id)
            if failed is not None:
                run.backend.discard_gradient(run_id)
                raise OperationError(
                    f"optim_step refused: {failed}. Nothing was changed and the gradient was cleared; "
                    "repeat the forward_backward, then step"
                )
            metrics = run.backend.optim_step(run_id, params)
            self._record(run, {"time": time.time(), **metrics, **sums})
            return OptimStepResponse(metrics=metrics)

        return self._core.scheduler.submit(run_id, seq_id, CallJob(step, Future()))

    def _record(self, run: LoadedRun, metrics: dict[str, Any]) -> None:
        """A step that was taken has succeeded, also where its line cannot be written: it is kept and written later."""
        run.unwritten.append(metrics)
        run_id = run.record.run_id
        try:
            with self._core.settings.writing(f"writing the metrics of {run_id}", self._store.folder(run_id)):
                self._store.append_metrics(run_id, run.unwritten)
        except StorageError as error:
            if len(run.unwritten) == 1:  # once, not at every step
                logger.error("%s. Training goes on; the lines are kept and written with a later step's", error)
        else:
            run.unwritten = []
