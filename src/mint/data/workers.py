"""Rows prepared in processes of their own, while this one trains; the outcomes come back in the order of the rows.

A worker is a fresh interpreter that imports what the preparation needs and never the user's script, so that needs no
`if __name__ == "__main__"`. A worker has the next chunk at hand when it has done one, and reads while it writes: neither
side waits for the other, and no thread stands beside the one that trains. A worker ends when its pipe closes, also where
this process was killed.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from mint.errors import ClosedError, InputError, MintError, OperationError

T = TypeVar("T")
O = TypeVar("O")  # noqa: E741  # an outcome

CHUNK_ROWS = 32  # rows that go to a worker in one message where no batch says how many are needed at a time
CHUNKS_AT_HAND = 2  # of each worker: one that it works on and one to go on with
_SERVE = "from mint.data.workers import serve; serve()"


class Preparation(Protocol[O, T]):
    """What makes rows ready in two halves, as `mint.chat.Converter`: `outcomes` of (number, row) pairs, in their order, is
    pure and may run in another process; `take` counts an outcome and gives what its row contributes.
    """

    def outcomes(self, rows: Iterable[tuple[int, Any]], /) -> Iterable[O]: ...
    def take(self, outcome: O, /) -> list[T]: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands for the outcome of a row whose preparation raised. error: MinT's as it was, any other as OperationError."""

    error: MintError


def successful(outcome: O | Failure) -> O:
    """The outcome; raises the error of a Failure."""
    if isinstance(outcome, Failure):
        raise outcome.error
    return outcome


Rows = Sequence[tuple[int, Any]]
Outcomes = Callable[[Rows], Iterable[O]]


@dataclass(slots=True)
class _Worker:
    """chunks: the numbers of those it has, in the order in which it answers."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    chunks: deque[int] = field(default_factory=deque)

    def send(self, message: bytes) -> None:
        with self._naming_its_end():
            self.pipe.send_bytes(message)

    def receive(self) -> Any:
        with self._naming_its_end():
            return pickle.loads(self.pipe.recv_bytes())

    @contextlib.contextmanager
    def _naming_its_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            code = self.process.wait()
            if code < 0:
                how = f"was ended by {signal.Signals(-code).name}; the system does that where memory runs short"
            else:
                how = f"ended with exit code {code}; what it printed stands above"
            raise OperationError(
                f"a worker process that prepares rows {how}. Go on from the last checkpoint, with fewer workers or "
                "none (workers=0)"
            ) from None


class Workers(Generic[O]):
    """`count` processes that compute `outcomes(rows)`. Close them, or use `with`; they end with this object, too.

    outcomes: a pure function of (number, row) pairs that can be pickled; it is sent once. chunk_rows: rows of one message.
    No more than 2 * count chunks are prepared or in preparation at a time, so memory does not depend on how many rows
    there are. Raises InputError for what cannot be pickled, and for a count below one.
    """

    def __init__(self, outcomes: Outcomes[O], count: int, chunk_rows: int = CHUNK_ROWS) -> None:
        if count < 1 or chunk_rows < 1:
            raise InputError(f"{count} worker processes with {chunk_rows} rows a message: both must be at least 1")
        setup = _pickled(outcomes, f"{type(getattr(outcomes, '__self__', outcomes)).__name__}")
        self._chunk_rows = chunk_rows
        self._workers = [_start() for _ in range(count)]
        self._finalizer = weakref.finalize(self, _end, self._workers, os.getpid())
        self._rows: Iterator[tuple[int, Any]] = iter(())
        self._finished: dict[int, list[O | Failure]] = {}
        self._sent = self._taken = 0  # chunks
        with self._closing_if_cut_short():
            for worker in self._workers:
                worker.send(setup)

    def outcomes(self, rows: Iterable[tuple[int, Any]]) -> Iterator[O | Failure]:
        """The outcomes of (number, row) pairs, in their order. Work begins at once, and what was asked for before is
        given up: one stream at a time.

        A Failure stands for the outcome of a row whose preparation raised; see `successful`. Raises OperationError where
        a worker died, ClosedError after `close` or an interrupt, InputError for a row that cannot be pickled.
        """
        while any(worker.chunks for worker in self._workers):
            self._collect(None)
        self._rows, self._finished, self._sent, self._taken = iter(rows), {}, 0, 0
        self._hand_out()
        return self._in_order()

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        self._finalizer()

    def __enter__(self) -> Workers[O]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _in_order(self) -> Iterator[O | Failure]:
        while True:
            self._collect(0)
            while self._taken not in self._finished:
                if self._taken == self._sent:
                    return
                self._collect(None)
                self._hand_out()
            made = self._finished.pop(self._taken)
            self._taken += 1
            self._hand_out()
            yield from made

    def _hand_out(self) -> None:
        """Gives the workers what they have room for, within the limit."""
        while self._sent - self._taken < CHUNKS_AT_HAND * len(self._workers):
            worker = min(self._workers, key=lambda worker: len(worker.chunks))
            rows = list(islice(self._rows, self._chunk_rows))
            if not rows:
                return
            message = _pickled(rows, f"rows {rows[0][0]} to {rows[-1][0]}")
            with self._closing_if_cut_short():
                worker.send(message)
                worker.chunks.append(self._sent)
                self._sent += 1

    def _collect(self, timeout: float | None) -> None:
        """Takes in finished chunks; waits `timeout` seconds for one, None for ever."""
        busy = {worker.pipe: worker for worker in self._workers if worker.chunks}
        with self._closing_if_cut_short():
            for pipe in wait(list(busy), timeout) if busy else []:
                worker = busy[pipe]  # type: ignore[index]  # typeshed allows more to be waited for than Connections
                made = worker.receive()
                self._finished[worker.chunks.popleft()] = made

    @contextlib.contextmanager
    def _closing_if_cut_short(self) -> Iterator[None]:
        """A message that Ctrl-C or a death has cut in two leaves a pipe that nothing more can be read from."""
        if not self._finalizer.alive:
            raise ClosedError("the worker processes were closed; make new batches from the last cursor")
        try:
            yield
        except BaseException:
            self.close()
            raise


def _start() -> _Worker:
    ours, theirs = Pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
        "OMP_NUM_THREADS": "1",  # a worker is one core's
        "TOKENIZERS_PARALLELISM": "false",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _SERVE],
        stdin=theirs.fileno(),
        stdout=2,  # standard output belongs to the program
        env=environment,
        process_group=0,  # Ctrl-C in the terminal is this process's business
    )
    theirs.close()
    return _Worker(process, ours)


def _end(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:  # a fork, which they do not belong to
        return
    for worker in workers:
        worker.pipe.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.wait()


def _pickled(value: object, name: str) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise InputError(
            f"{name} cannot be sent to a worker process ({error}); use workers=0, which prepares rows in this one"
        ) from error


def serve() -> None:
    """The whole life of a worker; its end of the pipe is its standard input."""
    pipe = Connection(0)
    messages: SimpleQueue[bytes | None] = SimpleQueue()

    def read() -> None:
        try:
            while True:
                messages.put(pipe.recv_bytes())
        except (EOFError, OSError):  # the parent has closed its end, or is gone
            messages.put(None)

    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(OSError):
        setup = messages.get()
        outcomes = _received(setup) if setup is not None else None
        while outcomes is not None and (message := messages.get()) is not None:
            pipe.send_bytes(pickle.dumps(_attempt(outcomes, pickle.loads(message))))


def _received(setup: bytes) -> Outcomes[Any]:
    try:
        outcomes: Outcomes[Any] = pickle.loads(setup)
    except Exception as error:
        unusable = InputError(
            f"the preparation of rows could not be set up in a worker process ({type(error).__name__}: {error}); it "
            "must consist of classes that can be imported. Use workers=0, which prepares rows in the process itself"
        )

        def outcomes(rows: Rows) -> Iterable[Any]:
            raise unusable

    return outcomes


def _attempt(outcomes: Outcomes[O], rows: Rows) -> list[O | Failure]:
    try:
        made: list[O | Failure] = list(outcomes(rows))
    except Exception as error:
        if len(rows) > 1:  # which of them was it? the others are usable
            return [outcome for row in rows for outcome in _attempt(outcomes, [row])]
        return [_failure(rows[0][0], error)]
    assert len(made) == len(rows)
    return made


def _failure(number: int, error: Exception) -> Failure:
    if isinstance(error, MintError):
        return Failure(error)
    told = OperationError(f"row {number}: preparing it failed in a worker process ({type(error).__name__}: {error})")
    told.add_note("In the worker process:\n" + "".join(traceback.format_exception(error)))
    return Failure(told)


def stream_outcomes(rows: Iterable[Any], preparation: Preparation[O, T], workers: int = 0) -> Iterator[O]:
    """The outcomes of all rows in their order, for `preparation.take`; computed by `workers` processes, or here (0)."""
    if not workers:
        yield from preparation.outcomes(enumerate(rows))
        return
    with Workers(preparation.outcomes, workers) as pool:
        for outcome in pool.outcomes(enumerate(rows)):
            yield successful(outcome)
