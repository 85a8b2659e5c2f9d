"""What all embedded clients of a process share: the engine thread, one copy of each base model, what is loaded.

Fields are changed by the engine thread alone, except where a lock is named.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mint.engine.backend import Backend, RunReport
from mint.errors import ClosedError
from mint.hub import ModelSource, load_tokenizer
from mint.local.jobs import CallJob
from mint.local.runs import RunRecord
from mint.local.scheduler import Scheduler
from mint.settings import Settings

logger = logging.getLogger("mint")
T = TypeVar("T")

MakeBackend = Callable[[Path, str, Settings], Backend]


@dataclass(slots=True, repr=False)
class LoadedRun:
    record: RunRecord
    source: ModelSource
    backend: Backend
    report: RunReport
    since_step: dict[str, float] = field(default_factory=dict)  # sums of forward_backward metrics since the last step
    unwritten: list[dict[str, Any]] = field(default_factory=list)  # metrics of steps that the disk did not take


@dataclass(frozen=True, slots=True, repr=False)
class SamplerRecord:
    """A sampling session: a base model, with the snapshot of an adapter or without."""

    tenant: str
    base_model: str
    source: ModelSource
    backend: Backend
    adapter: int | None
    model_path: str | None


@dataclass(slots=True, repr=False)
class Session:
    tenant: str
    user_metadata: dict[str, str]
    display_name: str | None = None
    runs: set[str] = field(default_factory=set)
    samplers: set[str] = field(default_factory=set)
    run_numbers: itertools.count[int] = field(default_factory=itertools.count)
    sampler_numbers: itertools.count[int] = field(default_factory=itertools.count)


class Core:
    def __init__(self, settings: Settings, make_backend: MakeBackend) -> None:
        self.settings = settings
        self.scheduler = Scheduler()
        self.runs: dict[str, LoadedRun] = {}
        self.samplers: dict[str, SamplerRecord] = {}
        self.sessions: dict[str, Session] = {}
        self.backends: dict[Path, Backend] = {}
        self._make_backend = make_backend
        self._decoders: dict[Path, Callable[[list[int]], str]] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def check_process(self) -> None:
        """Raises ClosedError in a forked child: the engine thread stayed in the parent."""
        if os.getpid() != self._pid:
            raise ClosedError(
                "this process is a fork of the one that opened MinT, and the engine did not come along; "
                "use MinT in the parent, or start workers with the 'spawn' method and a ServiceClient of their own"
            )

    def call(self, function: Callable[[], T], *, waits: bool = True) -> Future[T]:
        """Run a short function on the engine thread, in no run's order: when everything asked for before is done, or
        without `waits` between two passes."""
        self.check_process()
        return self.scheduler.submit(None, None, CallJob(function, Future()), waits=waits)

    def release(self, function: Callable[[], T]) -> Future[T]:
        """As `call`, and allowed from finalisers, which may run on any thread."""
        self.check_process()
        return self.scheduler.post(function)

    def background(self, function: Callable[[], T]) -> Future[T]:
        """Run what waits (downloads, the engine) on a thread of its own; no waiter can cancel it."""
        self.check_process()
        self.scheduler.refuse_engine_thread()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:  # the future's owner decides
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=run, name="mint-background", daemon=True).start()
        return future

    def backend(self, source: ModelSource) -> Backend:
        """Engine thread: the base model, loaded once."""
        if source.path not in self.backends:
            if source.note:
                logger.info("%s: %s", source.name, source.note)
            self.backends[source.path] = self._make_backend(source.path, source.name, self.settings)
        return self.backends[source.path]

    def decode_function(self, source: ModelSource) -> Callable[[list[int]], str]:
        """Tokens to text, special tokens included; any thread."""
        with self._lock:
            if source.path not in self._decoders:
                tokenizer: Any = load_tokenizer(source)
                self._decoders[source.path] = lambda tokens: str(
                    tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                )
            return self._decoders[source.path]

    def session(self, session_id: str, tenant: str) -> Session:
        """Raises ClosedError for one that is closed or another tenant's."""
        session = self.sessions.get(session_id)
        if session is None or session.tenant != tenant:
            raise ClosedError(f"session {session_id} is closed; make a new ServiceClient")
        return session

    def new_session(self, session: Session) -> str:
        session_id = uuid.uuid4().hex[:16]
        self.sessions[session_id] = session
        return session_id

    def drop_run(self, run_id: str) -> None:
        """Engine thread."""
        loaded = self.runs.pop(run_id)
        if loaded.unwritten:
            logger.error("%s: the metrics of its last %d steps were never written", run_id, len(loaded.unwritten))
        self.scheduler.remove_queue(run_id)
        loaded.backend.remove_run(run_id)
        for session in list(self.sessions.values()):
            session.runs.discard(run_id)

    def drop_sampler(self, sampling_session_id: str) -> None:
        """Engine thread; dropping twice is allowed."""
        record = self.samplers.pop(sampling_session_id, None)
        if record is not None and record.adapter is not None:
            record.backend.drop_snapshot(record.adapter)
        for session in list(self.sessions.values()):
            session.samplers.discard(sampling_session_id)

    def drop_session(self, session_id: str) -> None:
        """Engine thread: free what the session made; with the last session go the base models."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return
        for run_id in list(session.runs):
            self.drop_run(run_id)
        for sampler in list(session.samplers):
            self.drop_sampler(sampler)
        if not self.sessions:
            for backend in self.backends.values():
                self.scheduler.drop_backend(backend)
                backend.close()
            self.backends.clear()
            with self._lock:
                self._decoders.clear()

    def close(self) -> None:
        if os.getpid() == self._pid:
            self.scheduler.close()
