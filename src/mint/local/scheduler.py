"""The engine thread: takes jobs in the order each run gave them, shares time between training and sampling.

Knows the Backend and jobs; nothing of files, sessions or tenants' rights. One thread computes; every other only waits.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from mint.engine.backend import Backend, GenerateRequest, Generation, Part, PartResult
from mint.errors import ClosedError, OperationError
from mint.local.policy import Head, Kind, charge, charge_tenant, next_heads, next_kind
from mint.types.requests import TrainingInput

logger = logging.getLogger("mint")

PassMode = Literal["forward", "forward_backward"]
Work = Generator[None, None, Any]


@dataclass(slots=True, repr=False)
class PassJob:
    """A run's share of a pass that others may join. `finish` turns the part's result into the future's."""

    backend: Backend
    mode: PassMode
    training_input: TrainingInput
    finish: Callable[[PartResult], Any]
    future: Future[Any]


@dataclass(slots=True, repr=False)
class WorkJob:
    """Something long of one run (or of none): a generator's maker, and the backend whose gradient it adds to."""

    start: Callable[[], Work]
    future: Future[Any]
    trains: Backend | None = None


@dataclass(slots=True, repr=False)
class CallJob:
    """Something short."""

    call: Callable[[], Any]
    future: Future[Any]


Job = PassJob | WorkJob | CallJob


@dataclass(slots=True, repr=False)
class RunQueue:
    """Jobs of one run by seq_id; the head is the job numbered `next_seq`, and nothing overtakes it."""

    tenant: str
    jobs: dict[int, tuple[float, Job]] = field(default_factory=dict)
    next_seq: int = 1
    failed: str | None = None  # what failed since the last optim_step


@dataclass(slots=True, repr=False)
class _Current:
    """The work in progress and whose it is."""

    work: Work
    jobs: list[tuple[str, Job]]


def _trained_backend(job: Job) -> Backend | None:
    """Whose gradient the job adds to."""
    if isinstance(job, PassJob):
        return job.backend if job.mode == "forward_backward" else None
    return job.trains if isinstance(job, WorkJob) else None


class Scheduler:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[str, RunQueue] = {}
        self._loose: list[tuple[float, Job]] = []  # jobs of no run, in order
        self._samples: dict[tuple[int, int], tuple[Backend, Future[Generation]]] = {}
        self._new_samples: list[tuple[Backend, GenerateRequest, Future[Generation]]] = []
        self._current: _Current | None = None
        self._spent: dict[Kind, float] = {"train": 0.0, "sample": 0.0}
        self._spent_by_tenant: dict[str, float] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="mint-engine", daemon=True)
        self._thread.start()

    # any thread

    def add_queue(self, run_id: str, tenant: str) -> None:
        with self._changed:
            self._queues[run_id] = RunQueue(tenant)

    def remove_queue(self, run_id: str) -> None:
        """Waiting jobs of the run fail with ClosedError."""
        with self._changed:
            queue = self._queues.pop(run_id)
        for _, job in queue.jobs.values():
            job.future.set_exception(ClosedError(f"run {run_id} was unloaded before this operation ran"))

    def refuse_engine_thread(self) -> None:
        """Raises OperationError in a loss function: whatever it waited for would wait for it."""
        if threading.current_thread() is self._thread:
            raise OperationError(
                "a loss function runs inside the engine and cannot call MinT; compute outside and pass the numbers in"
            )

    def submit(self, run_id: str | None, seq_id: int | None, job: Job) -> Future[Any]:
        """Set the job running in its turn; `seq_id` None is the run's next.

        Raises ClosedError after `close`, OperationError from the engine thread.
        """
        self.refuse_engine_thread()
        job.future.set_running_or_notify_cancel()  # from here on no waiter can cancel it
        with self._changed:
            if self._closing:
                raise ClosedError("this MinT service is closed; make a new ServiceClient")
            if run_id is None:
                self._loose.append((time.monotonic(), job))
            else:
                queue = self._queues.get(run_id)
                if queue is None:
                    raise ClosedError(f"run {run_id} is not loaded; it was closed or unloaded")
                if seq_id is None:
                    seq_id = max(queue.jobs, default=queue.next_seq - 1) + 1
                assert seq_id >= queue.next_seq and seq_id not in queue.jobs, f"seq_id {seq_id} was used before"
                queue.jobs[seq_id] = (time.monotonic(), job)
            self._changed.notify()
        return job.future

    def post(self, call: Callable[[], Any]) -> Future[Any]:
        """A short job of no run, from any thread and even from a finaliser on the engine thread; nobody may wait there."""
        job = CallJob(call, Future())
        job.future.set_running_or_notify_cancel()
        with self._changed:
            if self._closing:
                job.future.set_exception(ClosedError("this MinT service is closed"))
            else:
                self._loose.append((time.monotonic(), job))
                self._changed.notify()
        return job.future

    def drop_backend(self, backend: Backend) -> None:
        """Engine thread: fail what is sampled or waits to be sampled on a backend that goes away."""
        error = ClosedError("the session was closed while this sample was waiting or running")
        with self._changed:
            waiting = [entry for entry in self._new_samples if entry[0] is backend]
            self._new_samples = [entry for entry in self._new_samples if entry[0] is not backend]
        for _, _, future in waiting:
            future.set_exception(error)
        self._fail_samples(backend, error)

    def submit_sample(self, backend: Backend, request: GenerateRequest) -> Future[Generation]:
        self.refuse_engine_thread()
        future: Future[Generation] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._closing:
                raise ClosedError("this MinT service is closed; make a new ServiceClient")
            self._new_samples.append((backend, request, future))
            self._changed.notify()
        return future

    def take_failure(self, run_id: str) -> str | None:
        """Engine thread: what failed since the last optim_step; forgotten by asking."""
        queue = self._queues[run_id]
        failed, queue.failed = queue.failed, None
        return failed

    def close(self) -> None:
        """Finish the unit in progress, fail everything that waits, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # the engine thread

    def _run(self) -> None:
        error: BaseException = ClosedError("the MinT service was closed while this operation was waiting or running")
        try:
            while self._wait_for_work():
                self._one_unit()
        except BaseException as fault:
            error = fault
            raise
        finally:  # whatever ended the thread, nobody may wait for it in vain
            self._fail_all(error)

    def _wait_for_work(self) -> bool:
        """Block until there is something to do; False: the service closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._has_work())
            if self._closing:
                return False
            fresh, self._new_samples = self._new_samples, []
        for backend, request, future in fresh:
            try:
                number = backend.add_request(request)
            except Exception as error:  # handed to whoever asked
                future.set_exception(error)
            else:
                self._samples[id(backend), number] = (backend, future)
        return True

    def _has_work(self) -> bool:
        return bool(self._new_samples) or self._trains() or bool(self._samples)

    def _trains(self) -> bool:
        return (
            self._current is not None or bool(self._loose) or any(q.next_seq in q.jobs for q in self._queues.values())
        )

    def _one_unit(self) -> None:
        with self._changed:
            train, sample = self._trains(), bool(self._samples)
        kind = next_kind(train=train, sample=sample, spent=self._spent)
        if kind is None:
            return
        started = time.monotonic()
        if kind == "train":
            self._train_unit()
        else:
            self._sample_unit()
        self._spent = charge(self._spent, kind, time.monotonic() - started, contended=train and sample)

    def _sample_unit(self) -> None:
        for backend in {id(b): b for b, _ in self._samples.values()}.values():
            try:
                finished = backend.step()
            except Exception as error:  # the batch is lost; every request in it must hear why
                logger.exception("sampling failed")
                self._fail_samples(backend, error)
                continue
            for generation in finished:
                _, future = self._samples.pop((id(backend), generation.request))
                future.set_result(generation)

    def _fail_samples(self, backend: Backend, error: BaseException) -> None:
        for key in [key for key, (owner, _) in self._samples.items() if owner is backend]:
            _, future = self._samples.pop(key)
            backend.cancel(key[1])
            future.set_exception(error)

    def _train_unit(self) -> None:
        if self._current is None:
            self._start_next()
            return
        current, started = self._current, time.monotonic()
        try:
            next(current.work)
        except StopIteration as end:
            self._current = None
            self._finish(current, end.value)
        except BaseException as error:  # handed to everyone whose work it was; a loss function may raise anything
            self._current = None
            self._fail(current.jobs, error)
        share = (time.monotonic() - started) / len(current.jobs)
        with self._changed:
            waiting = {queue.tenant for queue in self._queues.values() if queue.next_seq in queue.jobs}
            tenants = [self._queues[run_id].tenant for run_id, _ in current.jobs if run_id in self._queues]
        for tenant in tenants:
            self._spent_by_tenant = charge_tenant(self._spent_by_tenant, tenant, share, waiting)

    def _start_next(self) -> None:
        with self._changed:
            chosen = self._take_jobs()
        first = chosen[0][1]
        if isinstance(first, CallJob):
            self._settle(chosen[0], first.call)
        elif isinstance(first, WorkJob):
            self._current = _Current(first.start(), chosen)
        else:
            self._start_pass(chosen)

    def _take_jobs(self) -> list[tuple[str, Job]]:
        """Jobs that go now, each with its run. Their place in the queue is kept until they are done."""
        heads = []
        for run_id, queue in self._queues.items():
            if queue.next_seq in queue.jobs:
                arrived, job = queue.jobs[queue.next_seq]
                joins = (id(job.backend), job.mode) if isinstance(job, PassJob) else None
                heads.append(Head(run_id, queue.tenant, arrived, joins))
        if self._loose and (not heads or self._loose[0][0] <= min(h.arrived for h in heads)):
            return [("", self._loose.pop(0)[1])]
        return [
            (run_id, self._queues[run_id].jobs[self._queues[run_id].next_seq][1])
            for run_id in next_heads(heads, self._spent_by_tenant)
        ]

    def _start_pass(self, chosen: list[tuple[str, Job]]) -> None:
        """Whoever's input the model cannot take fails alone; the others share the pass."""
        good: list[tuple[str, Job]] = []
        for run_id, job in chosen:
            assert isinstance(job, PassJob)
            try:
                job.backend.check_training_input(run_id, job.training_input)
            except Exception as error:  # handed to whoever asked
                self._fail([(run_id, job)], error)
            else:
                good.append((run_id, job))
        if good:
            first = good[0][1]
            assert isinstance(first, PassJob)
            parts = [Part(run_id, job.training_input) for run_id, job in good if isinstance(job, PassJob)]
            work = first.backend.forward(parts) if first.mode == "forward" else first.backend.forward_backward(parts)
            self._current = _Current(work, good)

    def _finish(self, current: _Current, value: Any) -> None:
        first = current.jobs[0][1]
        if not isinstance(first, PassJob):
            self._settle(current.jobs[0], lambda: value)
            return
        for (run_id, job), result in zip(current.jobs, value, strict=True):
            assert isinstance(job, PassJob)
            if result.error is not None:
                self._fail([(run_id, job)], result.error)
            else:
                self._settle((run_id, job), functools.partial(job.finish, result))

    def _fail(self, jobs: list[tuple[str, Job]], error: BaseException) -> None:
        for run_id, job in jobs:
            trained = _trained_backend(job)
            if trained is not None and (queue := self._queues.get(run_id)) is not None:
                queue.failed = queue.failed or f"forward_backward (operation {queue.next_seq}) failed: {error}"
                trained.discard_gradient(run_id)
            self._done(run_id)
            job.future.set_exception(error)

    def _settle(self, owned: tuple[str, Job], call: Callable[[], Any]) -> None:
        """Run `call` and hand its result or exception to the job's future, after the queue has moved on."""
        run_id, job = owned
        try:
            value = call()
        except BaseException as error:  # the future's owner decides what to do with it
            self._done(run_id)
            job.future.set_exception(error)
        else:
            self._done(run_id)
            job.future.set_result(value)

    def _done(self, run_id: str) -> None:
        with self._changed:
            queue = self._queues.get(run_id)
            if queue is not None:
                queue.jobs.pop(queue.next_seq, None)
                queue.next_seq += 1

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            waiting = [job.future for _, job in self._loose]
            waiting += [job.future for queue in self._queues.values() for _, job in queue.jobs.values()]
            waiting += [future for _, future in self._samples.values()] + [f for _, _, f in self._new_samples]
            if self._current is not None:
                waiting += [job.future for _, job in self._current.jobs]
                self._current.work.close()
        for future in dict.fromkeys(waiting):
            if not future.done():
                future.set_exception(error)
