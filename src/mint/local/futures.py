"""Futures that carry what went wrong before any work was accepted, and futures made of two others."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from mint.errors import ClosedError, MintError

P = ParamSpec("P")
T = TypeVar("T")


def done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def failed(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def errors_in_future(method: Callable[P, Future[T]]) -> Callable[P, Future[T]]:
    """A look-up or check that fails answers through the future, as it would over any other door.

    ClosedError is raised at once: there is nothing left that could answer.
    """

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Future[T]:
        try:
            return method(*args, **kwargs)
        except ClosedError:
            raise
        except MintError as error:
            return failed(error)

    return wrapped


def combine(futures: list[Future[Any]], make: Callable[[list[Any]], T]) -> Future[T]:
    """make(results) once all are there; the first failure otherwise."""
    combined: Future[T] = Future()
    combined.set_running_or_notify_cancel()
    lock, left = threading.Lock(), [len(futures)]

    def on_done(_: Future[Any]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        error = next((e for f in futures if (e := f.exception()) is not None), None)
        if error is not None:
            combined.set_exception(error)
        else:
            combined.set_result(make([f.result() for f in futures]))

    for future in futures:
        future.add_done_callback(on_done)
    return combined
