"""What the engine thread does: jobs, and the queue that keeps a run's jobs in the order in which they were numbered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from mint.engine.backend import Backend, MicroBatch, PartResult, PausingWork
from mint.local.policy import Head
from mint.types.requests import TrainingInput

PassMode = Literal["forward", "forward_backward"]
Work = PausingWork[Any]


@dataclass(slots=True, repr=False)
class PassJob:
    """Micro-batches of one run, each its share of a pass that others may join.

    `finish` turns the joined results into the future's. waiting: not computed yet, None before they are planned.
    """

    backend: Backend
    mode: PassMode
    training_input: TrainingInput
    finish: Callable[[PartResult], Any]
    future: Future[Any]
    waiting: deque[MicroBatch] | None = None
    results: list[PartResult] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        return bool(self.results)

    def next_share(self, run_id: str) -> MicroBatch:
        """Raises InputError where the model cannot take the input."""
        if self.waiting is None:
            self.waiting = deque(self.backend.micro_batches(run_id, self.training_input))
        return self.waiting[0]

    def take(self, result: PartResult) -> bool:
        """The result of the next share; whether it was the last."""
        assert self.waiting is not None
        self.waiting.popleft()
        self.results.append(result)
        return not self.waiting

    def abandon(self) -> None: ...


@dataclass(slots=True, repr=False)
class WorkJob:
    """Something long of one run (or of none): a generator's maker, and the backend whose gradient it adds to.

    work: what was begun and may be paused.
    """

    start: Callable[[], Work]
    future: Future[Any]
    trains: Backend | None = None
    work: Work | None = None

    @property
    def begun(self) -> bool:
        return self.work is not None

    def abandon(self) -> None:
        if self.work is not None:
            self.work.close()


@dataclass(slots=True, repr=False)
class CallJob:
    """Something short."""

    call: Callable[[], Any]
    future: Future[Any]
    begun: Literal[False] = False

    def abandon(self) -> None: ...


Job = PassJob | WorkJob | CallJob


@dataclass(frozen=True, slots=True, repr=False)
class LooseJob:
    """A job of no run. waits: until everything is done that was asked for before it; else it may come between the passes of
    what has begun."""

    arrived: float
    job: Job
    waits: bool

    def may_go(self, heads: Sequence[Head]) -> bool:
        return all(self.arrived <= head.arrived for head in heads if self.waits or not head.begun)


def trained_backend(job: Job) -> Backend | None:
    """Whose gradient the job adds to."""
    if isinstance(job, PassJob):
        return job.backend if job.mode == "forward_backward" else None
    return job.trains if isinstance(job, WorkJob) else None


@dataclass(slots=True, repr=False)
class RunQueue:
    """Jobs of one run by seq_id; the head is the job numbered `next_seq`, and nothing overtakes it."""

    tenant: str
    jobs: dict[int, tuple[float, Job]] = field(default_factory=dict)
    next_seq: int = 1
    failed: str | None = None  # what failed since the last optim_step

    def head(self) -> Job:
        return self.jobs[self.next_seq][1]
