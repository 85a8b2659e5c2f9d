"""Ctrl-C as a request: the step in progress is finished, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from rich.console import Console


class StopOnCtrlC:
    """Inside the `with` block the first Ctrl-C sets `requested` and prints what is `said`; a second one is a
    KeyboardInterrupt as ever.

    Ctrl-C is left as it is outside the main thread, where no handler can be set, and where the process was started to
    ignore it (in the background of a script, say).
    """

    def __init__(self, console: Console, said: str = "finishing this step, then saving") -> None:
        self.requested = False
        self._console, self._said = console, said
        self._before: object = None

    def __enter__(self) -> StopOnCtrlC:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._heard)
        return self

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._console.print(f"[yellow]{self._said}; Ctrl-C again stops at once[/yellow]")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]  # what signal.signal itself gave
