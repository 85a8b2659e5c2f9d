"""Learning rate by step."""

from __future__ import annotations

import math
from typing import Literal, get_args

from mint.errors import InputError

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_at(step: int, num_steps: int, peak: float, schedule: Schedule, warmup_steps: int = 0) -> float:
    """The rate of step `step` (from 0) of `num_steps`.

    It rises linearly over the first `warmup_steps` (step 0 has peak / warmup_steps) to `peak`; then it stays
    ("constant") or falls towards 0, which the step after the last would reach, on a line or half a cosine.
    """
    if schedule not in get_args(Schedule):
        raise InputError(f"schedule={schedule!r}: allowed are {', '.join(get_args(Schedule))}")
    if not 0 <= warmup_steps <= num_steps:
        raise InputError(f"warmup_steps={warmup_steps}: must lie in 0..{num_steps}, the number of steps")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant" or num_steps == warmup_steps:
        return peak
    done = (step - warmup_steps) / (num_steps - warmup_steps)
    return peak * (1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
