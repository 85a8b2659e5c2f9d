"""The engine thread: takes jobs in the order each run gave them, shares time between training and sampling.

Knows the Backend and jobs; nothing of files, sessions or tenants' rights. One thread computes; every other only waits.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from mint.engine.backend import PAUSE, Backend, GenerateRequest, Generation, Part, join_results
from mint.errors import ClosedError, OperationError
from mint.local.jobs import CallJob, Job, LooseJob, PassJob, RunQueue, Work, WorkJob, trained_backend
from mint.local.policy import Head, Kind, charge, next_heads, next_kind, whose_turn

logger = logging.getLogger("mint")


@dataclass(slots=True, repr=False)
class _Current:
    """The work in progress and whose it is."""

    work: Work
    jobs: list[tuple[str, Job]]


class Scheduler:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queues: dict[str, RunQueue] = {}
        self._loose: list[LooseJob] = []  # in order
        self._samples: dict[tuple[int, int], tuple[Backend, Future[Generation]]] = {}
        self._new_samples: list[tuple[Backend, GenerateRequest, Future[Generation]]] = []
        self._current: _Current | None = None
        self._spent: dict[Kind, float] = {"train": 0.0, "sample": 0.0}
        self._turn = 0
        self._last_turn: dict[str, int] = {}  # of every tenant that had one
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
            if all(other.tenant != queue.tenant for other in self._queues.values()):
                self._last_turn.pop(queue.tenant, None)
        for _, job in queue.jobs.values():
            job.abandon()
            job.future.set_exception(ClosedError(f"run {run_id} was unloaded before this operation ran"))

    def refuse_engine_thread(self) -> None:
        """Raises OperationError in a loss function: whatever it waited for would wait for it."""
        if threading.current_thread() is self._thread:
            raise OperationError(
                "a loss function runs inside the engine and cannot call MinT; compute outside and pass the numbers in"
            )

    def submit(self, run_id: str | None, seq_id: int | None, job: Job, *, waits: bool = True) -> Future[Any]:
        """Set the job running in its turn; `seq_id` None is the run's next. `waits`: see LooseJob, for one of no run.

        Raises ClosedError after `close`, OperationError from the engine thread.
        """
        self.refuse_engine_thread()
        job.future.set_running_or_notify_cancel()  # from here on no waiter can cancel it
        with self._changed:
            if self._closing:
                raise ClosedError("this MinT service is closed; make a new ServiceClient")
            if run_id is None:
                self._loose.append(LooseJob(time.monotonic(), job, waits))
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
                self._loose.append(LooseJob(time.monotonic(), job, waits=True))
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
                if generation.error is not None:
                    future.set_exception(generation.error)
                else:
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
        current = self._current
        try:
            paused = next(current.work)
        except StopIteration as end:
            self._current = None
            self._finish(current, end.value)
        except BaseException as error:  # handed to everyone whose work it was; a loss function may raise anything
            self._current = None
            self._fail(current.jobs, error)
        else:
            if paused is PAUSE:  # the job keeps the work until its run's next turn
                self._current = None

    def _start_next(self) -> None:
        """Begin or go on with what goes now. A job's place in its queue is kept until it is done."""
        heads = self._heads()
        with self._changed:
            loose = next((loose for loose in self._loose if loose.may_go(heads)), None)
            if loose is not None:
                self._loose.remove(loose)
                chosen = [("", loose.job)]
            else:
                runs = next_heads(heads, self._last_turn)
                chosen = [(run_id, self._queues[run_id].head()) for run_id in runs]
                self._turn += 1
                self._last_turn |= dict.fromkeys(whose_turn(heads, runs), self._turn)
        if not chosen:
            return
        first = chosen[0][1]
        if isinstance(first, CallJob):
            self._settle(chosen[0], first.call)
        elif isinstance(first, WorkJob):
            first.work = first.work or first.start()
            self._current = _Current(first.work, chosen)
        else:
            self._start_pass(chosen)

    def _heads(self) -> list[Head]:
        """The first waiting operation of every run, its micro-batches planned. What the model cannot take fails here, alone."""
        with self._changed:
            waiting = [(run_id, queue) for run_id, queue in self._queues.items() if queue.next_seq in queue.jobs]
        heads = []
        for run_id, queue in waiting:
            arrived, job = queue.jobs[queue.next_seq]
            head = Head(run_id, queue.tenant, arrived, begun=job.begun)
            if isinstance(job, PassJob):
                try:
                    share = job.next_share(run_id)
                except Exception as error:  # handed to whoever asked
                    self._fail([(run_id, job)], error)
                    continue
                joins = (id(job.backend), job.mode)
                head = replace(head, joins=joins, num_tokens=share.num_tokens, max_tokens=share.max_tokens)
            heads.append(head)
        return heads

    def _start_pass(self, chosen: list[tuple[str, Job]]) -> None:
        first = chosen[0][1]
        assert isinstance(first, PassJob)
        parts = [Part(run_id, job.next_share(run_id).input) for run_id, job in chosen if isinstance(job, PassJob)]
        work = first.backend.forward(parts) if first.mode == "forward" else first.backend.forward_backward(parts)
        self._current = _Current(work, chosen)

    def _finish(self, current: _Current, value: Any) -> None:
        first = current.jobs[0][1]
        if not isinstance(first, PassJob):
            self._settle(current.jobs[0], lambda: value)
            return
        for (run_id, job), result in zip(current.jobs, value, strict=True):
            assert isinstance(job, PassJob)
            if result.error is not None:
                self._fail([(run_id, job)], result.error)
            elif job.take(result):
                self._settle((run_id, job), functools.partial(job.finish, join_results(job.results)))

    def _fail(self, jobs: list[tuple[str, Job]], error: BaseException) -> None:
        for run_id, job in jobs:
            trained = trained_backend(job)
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
            queued = [loose.job for loose in self._loose]
            queued += [job for queue in self._queues.values() for _, job in queue.jobs.values()]
            if self._current is not None:
                queued += [job for _, job in self._current.jobs]
                self._current.work.close()
            for job in queued:
                job.abandon()
            waiting = [job.future for job in queued]
            waiting += [future for _, future in self._samples.values()] + [f for _, _, f in self._new_samples]
        for future in dict.fromkeys(waiting):
            if not future.done():
                future.set_exception(error)
