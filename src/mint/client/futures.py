"""`APIFuture`: one result, for threads and for coroutines. Sync and async meet here and nowhere else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from mint.errors import ClosedError, OperationError, ResultTimeoutError

logger = logging.getLogger("mint")

T = TypeVar("T")

REMIND_AFTER_SECONDS = 60.0

_here = threading.local()


@contextlib.contextmanager
def inside_loss() -> Iterator[None]:
    """While a caller's loss function runs on this thread, which is the engine's."""
    _here.inside_loss = True
    try:
        yield
    finally:
        _here.inside_loss = False


def refuse_inside_loss() -> None:
    """Raises OperationError where waiting for the engine would wait for oneself."""
    if getattr(_here, "inside_loss", False):
        raise OperationError(
            "a loss function runs inside the engine and cannot call MinT; compute outside and pass the numbers in"
        )


class APIFuture(Generic[T]):
    """The result of an operation that is already running. No waiter can cancel it.

    `.result(timeout)` blocks, `await future` and `.result_async()` do not. A time-out raises ResultTimeoutError and the
    work goes on. `convert` shapes the raw result once; `owner` is kept alive until the result is there.
    """

    def __init__(
        self, future: Future[Any], convert: Callable[[Any], T] | None = None, owner: object = None, what: str = ""
    ) -> None:
        self._future = future
        self._convert = convert
        self._owner = owner
        self._what = what or "the operation"
        self._pid = os.getpid()
        self._converted: list[T] = []

    def _value(self) -> T:
        self._owner = None
        if not self._converted:
            raw = self._future.result()
            self._converted.append(raw if self._convert is None else self._convert(raw))
        return self._converted[0]

    def _check_process(self) -> None:
        if os.getpid() != self._pid and not self._future.done():
            raise ClosedError("this process is a fork of the one that started the operation; its result arrives there")

    def done(self) -> bool:
        return self._future.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result or raise what went wrong. `timeout` in seconds; None waits as long as it takes."""
        self._check_process()
        if not self._future.done():
            refuse_inside_loss()
        deadline = None if timeout is None else time.monotonic() + timeout
        started = time.monotonic()
        while not self._future.done():
            left = REMIND_AFTER_SECONDS if deadline is None else min(deadline - time.monotonic(), REMIND_AFTER_SECONDS)
            try:
                self._future.exception(max(left, 0.0))
            except concurrent.futures.TimeoutError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise self._timeout_error(timeout) from None
                logger.info(
                    "%s: still waiting after %.0f s; the engine is at work", self._what, time.monotonic() - started
                )
        return self._value()

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, without blocking the event loop. Cancelling the awaiting task does not cancel the work."""
        self._check_process()
        if not self._future.done():
            refuse_inside_loss()
        waiter = asyncio.wrap_future(self._future)
        waiter.add_done_callback(lambda f: f.cancelled() or f.exception())  # heard, even if nobody waits any more
        try:
            await asyncio.wait_for(asyncio.shield(waiter), timeout)
        except TimeoutError:
            if not self._future.done():
                raise self._timeout_error(timeout) from None
            raise
        return self._value()

    def _timeout_error(self, timeout: float | None) -> ResultTimeoutError:
        return ResultTimeoutError(f"{self._what}: no result within {timeout} s; it is still running, ask again later")

    def future(self) -> Future[T]:
        """The result as a concurrent future; cancelling it does nothing. The owner is kept alive for it, too."""
        result: Future[T] = Future()
        result.set_running_or_notify_cancel()

        def on_done(_: Future[Any]) -> None:
            error = self._future.exception()
            result.set_exception(error) if error is not None else result.set_result(self._value())

        self._future.add_done_callback(on_done)
        return result

    def coroutine(self) -> Coroutine[Any, Any, T]:
        return self.result_async()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        return f"<APIFuture of {self._what}: {'done' if self.done() else 'running'}>"
