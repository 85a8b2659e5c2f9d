"""Sampling sessions in this process."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from concurrent.futures import Future

from mint.engine.backend import GenerateRequest, Generation, PromptScores, StopCheck
from mint.errors import ClosedError, InputError
from mint.hub import resolve_model
from mint.local.checkpoints import read_checkpoint
from mint.local.core import Core, SamplerRecord
from mint.local.futures import combine, done
from mint.local.jobs import WorkJob
from mint.local.runs import RunStore
from mint.local.saving import add_sampler
from mint.local.stop import any_of, new_stop_check
from mint.service import OnToken, SamplingSession
from mint.types import GetSamplerResponse, ParsedCheckpointTinkerPath, SampleResponse
from mint.types.requests import SampleInput


class SamplingOps:
    def __init__(self, core: Core, store: RunStore, tenant: str) -> None:
        self._core, self._store, self._tenant = core, store, tenant

    def create_session(
        self, session_id: str, base_model: str | None, model_path: str | None
    ) -> Future[SamplingSession]:
        core = self._core
        session = core.session(session_id, self._tenant)
        if base_model is None and model_path is None:
            raise InputError("create_sampling_client: give model_path (a checkpoint) or base_model")
        saved = None
        if model_path is not None:
            parsed = ParsedCheckpointTinkerPath.from_tinker_path(model_path)
            saved = read_checkpoint(self._store.checkpoint_folder(parsed), parsed.tinker_path, optimizer=False)
            base_model = saved[0].base_model
        assert base_model is not None
        name = base_model

        def create() -> SamplingSession:
            source = resolve_model(name, settings=core.settings)

            def load() -> SamplingSession:
                core.session(session_id, self._tenant)  # it may have been closed during a download
                backend = core.backend(source)
                adapter = backend.add_snapshot(saved[0].lora, saved[1]) if saved is not None else None
                record = SamplerRecord(self._tenant, name, source, backend, adapter, model_path)
                return SamplingSession(add_sampler(core, session_id, session, record), name, model_path)

            return core.call(load, waits=False).result()

        return core.background(create)

    def get_sampler(self, sampling_session_id: str) -> Future[GetSamplerResponse]:
        record = self._record(sampling_session_id)
        return done(
            GetSamplerResponse(
                sampler_id=sampling_session_id, base_model=record.base_model, model_path=record.model_path
            )
        )

    def _record(self, sampling_session_id: str) -> SamplerRecord:
        record = self._core.samplers.get(sampling_session_id)
        if record is None or record.tenant != self._tenant:
            raise ClosedError(f"sampling session {sampling_session_id} is closed; make a new sampling client")
        return record

    def close_session(self, sampling_session_id: str) -> Future[None]:
        record = self._core.samplers.get(sampling_session_id)
        if record is None or record.tenant != self._tenant:
            return done(None)
        return self._core.release(lambda: self._core.drop_sampler(sampling_session_id))

    def sample(
        self, sampling_session_id: str, sample_input: SampleInput, on_token: OnToken | None
    ) -> Future[SampleResponse]:
        assert on_token is None or sample_input.num_samples == 1
        core = self._core
        core.check_process()
        record = self._record(sampling_session_id)
        max_new = _max_new(record, sample_input)
        prompt, futures = sample_input.prompt, []
        if sample_input.num_samples:
            request = self._request(record, sample_input, max_new, on_token)
            futures.append(core.scheduler.submit_sample(record.backend, request))
        if sample_input.prompt_logprobs or sample_input.num_prompt_topk:
            topk = sample_input.num_prompt_topk
            job = WorkJob(lambda: record.backend.score_prompt(prompt, record.adapter, topk), Future())
            futures.append(core.scheduler.submit(None, None, job, waits=False))
        return combine(futures, lambda results: _response(sample_input, results))

    def _request(
        self, record: SamplerRecord, sample_input: SampleInput, max_new: int, on_token: OnToken | None
    ) -> GenerateRequest:
        params = sample_input.params
        stop_tokens = params.extra_stop_tokens
        if params.stops_at_end_of_text:
            stop_tokens = stop_tokens | set(record.backend.limits.eos_token_ids)
        new_checks: list[Callable[[], StopCheck]] = []
        if params.stop_strings:
            decode = self._core.decode_function(record.source)
            new_checks.append(functools.partial(new_stop_check, params.stop_strings, decode))
        if on_token is not None:
            check = on_token
            new_checks.append(lambda: check)
        return GenerateRequest(
            prompt=sample_input.prompt,
            adapter=record.adapter,
            num_samples=sample_input.num_samples,
            max_new=max_new,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            stop_tokens=stop_tokens,
            new_stop_check=functools.partial(any_of, new_checks) if new_checks else None,
            num_topk=sample_input.num_sample_topk,
            tenant=self._tenant,
        )


def _max_new(record: SamplerRecord, sample_input: SampleInput) -> int:
    """Tokens to generate at most. Raises InputError on what the model cannot take."""
    limits, prompt = record.backend.limits, sample_input.prompt
    largest = max(prompt)
    if largest >= limits.vocab_size:
        raise InputError(
            f"prompt: token id {largest} is outside the model's vocabulary of {limits.vocab_size}; "
            "was it tokenized for another model?"
        )
    room = limits.max_context - len(prompt)
    wanted = sample_input.params.max_tokens if sample_input.num_samples else 0
    if room < (wanted or 0) or (wanted is None and room < 1):
        raise InputError(
            f"prompt of {len(prompt)} tokens and max_tokens={wanted} exceed the context of {limits.max_context}; "
            f"at most {max(room, 0)} tokens can follow this prompt"
        )
    return room if wanted is None else wanted


def _response(sample_input: SampleInput, results: list[Generation | PromptScores]) -> SampleResponse:
    generation = next((r for r in results if isinstance(r, Generation)), None)
    scores = next((r for r in results if isinstance(r, PromptScores)), None)
    return SampleResponse(
        sequences=generation.sequences if generation is not None else [],
        prompt_logprobs=scores.logprobs if scores is not None and sample_input.prompt_logprobs else None,
        topk_prompt_logprobs=scores.topk if scores is not None else None,
        prompt_cache_hit_tokens=generation.cached_tokens if generation is not None else 0,
    )
