"""How far training is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINES = 10  # printed over a whole run where there is no terminal


class TrainingProgress:
    """Fed with the rows of metrics.jsonl. The time left is the tokens left (at their mean so far) over the speed."""

    def __init__(self, console: Console, num_steps: int, done: int = 0) -> None:
        self._console, self._num_steps, self._first = console, num_steps, done
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  waited {task.fields[waited]}"),
            TimeElapsedColumn(), TextColumn("left {task.fields[left]}{task.fields[test]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(
            "train", total=num_steps, completed=done, loss="-", speed="-", waited="-", left="-:--", test=""
        )

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def step_done(self, row: Mapping[str, Any]) -> None:
        self._tokens += row["tokens"]
        self._seconds += row["seconds"]
        self._waited += row["wait_seconds"]
        step, speed = row["step"], self._tokens / self._seconds
        tokens_left = (self._num_steps - step) * self._tokens / (step - self._first)
        left = str(timedelta(seconds=round(tokens_left / speed)))
        waited = f"{self._waited / self._seconds:.1%}"  # for data
        self._bar.update(
            self._task, completed=step, loss=f"{row['loss']:.4f}", speed=f"{speed:.0f}", waited=waited, left=left
        )
        if not self._console.is_terminal and (step % max(1, self._num_steps // LINES) == 0 or step == self._num_steps):
            self._console.print(
                f"step {step:>4}/{self._num_steps}  loss {row['loss']:.4f}  {speed:.0f} tokens/s  "
                f"waited for data {waited}  left {left}"
            )

    def evaluated(self, row: Mapping[str, Any]) -> None:
        self._bar.update(self._task, test=f"  test NLL {row['test_nll']:.4f}")
        if not self._console.is_terminal:
            self._console.print(f"step {row['step']:>4}/{self._num_steps}  test NLL {row['test_nll']:.4f}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
