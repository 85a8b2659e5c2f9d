"""`Backend`: what computes. Tokens in, numbers and tokens out; no torch here, so that any process may import it.

Long operations are generators ("work"): each `next` does a bounded unit, such as one layer of a pass, so that whoever
drives them can share time; the generator's return value is the result. Within a pass no other may begin; where a work of
several passes yields PAUSE, one may. A Backend is used by one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mint.errors import MintError
from mint.types.params import AdamParams, LoraConfig
from mint.types.requests import TrainingInput
from mint.types.results import SampledSequence, TopkLogprobs

T = TypeVar("T")
FloatArray = npt.NDArray[np.float32]
Metrics = dict[str, float]
PAUSE: Literal[True] = True
PausingWork = Generator[Literal[True] | None, None, T]

# a caller's loss: torch logprobs of every datum, [N] or [N, K], with gradient -> (scalar, metrics)
CustomLoss = Callable[[Sequence[Any]], tuple[Any, Metrics]]


@dataclass(frozen=True, slots=True)
class BackendLimits:
    """What this backend can do, asked once instead of probed. backend: "decoder" (MinT's own) or "transformers"; kernels:
    "torch" or what compiled MinT's own."""

    backend: str
    base_model: str
    architecture: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    num_threads: int
    torch_version: str
    kernels: str = "torch"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Numbers that decide a run's bits; recorded in its checkpoints and reused on resume."""

    max_tokens_per_pass: int
    max_tokens: int
    dtype: str
    num_threads: int
    torch_version: str
    kernels: str = "torch"


@dataclass(frozen=True, slots=True)
class RunReport:
    """What adding a run made: the modules wrapped, the number of trained values, its plan, and of how many layers a full
    pass computes the activations twice (which changes no bits and is no part of the plan)."""

    modules: tuple[str, ...]
    num_parameters: int
    plan: RunPlan
    recomputed_layers: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Part:
    """One run's share of a pass that several runs may join."""

    run_id: str
    input: TrainingInput


@dataclass(frozen=True, slots=True, repr=False)
class PartResult:
    """logprobs: per datum, [N] or [N, K] as its targets; `error` where the part alone failed, and then its gradient
    must be discarded."""

    logprobs: list[FloatArray]
    metrics: Metrics
    error: MintError | None = None


@dataclass(frozen=True, slots=True, repr=False)
class MicroBatch:
    """The share of one pass: some of an operation's datums, which count as `num_tokens` together (fewer than they have where
    they begin alike). Other runs may join as long as the pass has at most `max_tokens`."""

    input: TrainingInput
    num_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, repr=False)
class AdapterState:
    """Everything a run must restore: tensors by PEFT name (float32), Adam moments by the same names, steps taken."""

    tensors: dict[str, FloatArray]
    exp_avg: dict[str, FloatArray] = field(default_factory=dict)
    exp_avg_sq: dict[str, FloatArray] = field(default_factory=dict)
    step: int = 0


StopCheck = Callable[[int], bool]  # fed every generated token in order; True: a stop string is complete


@dataclass(frozen=True, slots=True, repr=False)
class GenerateRequest:
    """A prompt and the sequences to grow from it. `adapter`: a snapshot's handle, or None for the base model. Those that
    wait begin in turns of their tenants.

    Sequence i owns the random stream (seed, i), so neither the batch nor its neighbours can change it.
    max_new: at least 1. new_stop_check: makes one StopCheck per sequence.
    """

    prompt: tuple[int, ...]
    adapter: int | None
    num_samples: int
    max_new: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_tokens: frozenset[int]
    new_stop_check: Callable[[], StopCheck] | None = None
    num_topk: int = 0
    tenant: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Generation:
    """A finished request: its sequences in order; prompt tokens whose prefill was found in the prefix cache; or why it failed."""

    request: int
    sequences: list[SampledSequence]
    cached_tokens: int
    error: MintError | None = None


@dataclass(frozen=True, slots=True, repr=False)
class PromptScores:
    """logprobs[i] and topk[i] score prompt[i] given what stands before it; entry 0 is None."""

    logprobs: list[float | None]
    topk: TopkLogprobs | None


def drain(work: PausingWork[T]) -> T:
    """Do all of a work at once; its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result


def join_results(results: Sequence[PartResult]) -> PartResult:
    """Of an operation, from those of its micro-batches in order; the first error stands for all."""
    error = next((result.error for result in results if result.error is not None), None)
    if error is not None:
        return PartResult([], {}, error)
    metrics: Metrics = {}
    for result in results:
        for name, value in result.metrics.items():
            assert name.endswith(":sum"), f"{name} does not add up"
            metrics[name] = metrics.get(name, 0.0) + value
    return PartResult([array for result in results for array in result.logprobs], metrics)


class Backend(Protocol):
    """One base model and the runs, snapshots and sequences that live on it."""

    @property
    def limits(self) -> BackendLimits: ...

    def add_run(self, run_id: str, lora: LoraConfig, seed: int) -> RunReport:
        """A new adapter from `seed`, with a plan chosen from the machine's memory."""

    def use_plan(self, run_id: str, plan: RunPlan) -> RunReport:
        """Go on with the plan of a checkpoint, so that a resumed run computes as the saved one would have."""

    def remove_run(self, run_id: str) -> None: ...

    def micro_batches(self, run_id: str, training_input: TrainingInput) -> list[MicroBatch]:
        """The input in order, cut as the run's plan says. It depends on this input alone.

        Raises InputError on token ids or lengths that the model or the memory cannot take.
        """

    def forward(self, parts: Sequence[Part]) -> Generator[None, None, list[PartResult]]:
        """One pass: logprobs and loss; no gradient is touched."""

    def forward_backward(self, parts: Sequence[Part]) -> Generator[None, None, list[PartResult]]:
        """The same, and each run's gradient added to what it has accumulated."""

    def forward_backward_custom(self, part: Part, loss: CustomLoss) -> PausingWork[PartResult]:
        """As forward_backward, of as many micro-batches as it takes, with a loss that reads all logprobs at once.

        Raises InputError as `micro_batches` does.
        """

    def discard_gradient(self, run_id: str) -> None: ...

    def optim_step(self, run_id: str, params: AdamParams) -> Metrics:
        """One AdamW update from the accumulated gradient, which is cleared. Raises NumericsError, changing nothing."""

    def export_state(self, run_id: str) -> AdapterState: ...

    def import_state(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        """Replace weights, and moments with `optimizer` (else they start anew); the gradient is cleared."""

    def snapshot(self, run_id: str) -> int:
        """A frozen copy of the run's adapter for sampling; training goes on while it is used."""

    def add_snapshot(self, lora: LoraConfig, state: AdapterState) -> int:
        """The same from saved weights."""

    def drop_snapshot(self, handle: int) -> None: ...

    def score_prompt(
        self, prompt: tuple[int, ...], adapter: int | None, num_topk: int
    ) -> Generator[None, None, PromptScores]: ...

    def add_request(self, request: GenerateRequest) -> int:
        """Put a request into the running batch; returns its number."""

    def step(self) -> list[Generation]:
        """One prefill pass, or one token for every sequence that has started; returns the requests that ended."""

    def cancel(self, request: int) -> None: ...

    @property
    def num_requests(self) -> int:
        """Requests in flight."""

    def close(self) -> None:
        """Free the model, the runs and the buffers."""
