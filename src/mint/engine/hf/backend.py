"""The Backend of transformers models: whatever `models/decoder.py` does not cover. Correct and plain, no claim of speed.

Every datum is a pass of its own, so that its numbers depend on no other, and torch differentiates it.
Shape letters: N tokens of a datum, K targets per token, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mint.engine.backend import (
    AdapterState,
    BackendLimits,
    CustomLoss,
    FloatArray,
    GenerateRequest,
    Generation,
    Metrics,
    MicroBatch,
    Part,
    PartResult,
    PausingWork,
    PromptScores,
    RunPlan,
    RunReport,
)
from mint.engine.device import choose_device, returning_freed_memory
from mint.engine.hf.linears import choose_linears
from mint.engine.hf.model import CausalModel
from mint.engine.hf.sampler import SequenceSampler
from mint.engine.lora import AdapterWeights, SiteWeights, adapter_weights
from mint.engine.models.head import rows_per_chunk
from mint.engine.plan import Plan, refuse_small
from mint.engine.runs import TrainingRun, custom_in_passes, flat_parameters, part_result, settle_gradient
from mint.engine.sampling.choose import top_logprobs
from mint.errors import ClosedError
from mint.losses import LOSSES
from mint.settings import Settings
from mint.types.params import AdamParams, LoraConfig
from mint.types.requests import PreparedDatum, TrainingInput
from mint.types.results import TopkLogprobs

logger = logging.getLogger("mint")

PROBE_TOKENS = 32  # passes of this length and of twice that measure what a token needs
GAPS = 1.5  # a process grows by so much more than the tensors of a pass: the allocator leaves gaps between them

# (logprobs [C, K], which rows of the datum they are) -> derivative of the loss by them
Derivative = Callable[[Tensor, slice], Tensor]


class HfBackend:
    """See `Backend`."""

    def __init__(self, folder: Path, name: str, settings: Settings) -> None:
        """Load the model in `folder`. Raises UnsupportedError or InputError naming what cannot be run."""
        self._device = choose_device(settings)
        torch.set_num_threads(self._device.num_threads)
        with returning_freed_memory(self._device.torch_device):
            self._model = CausalModel(folder, self._device)
        self._sampler = SequenceSampler(self._model)
        self._runs: dict[str, TrainingRun] = {}
        self._adapters: dict[int, AdapterWeights] = {}
        self._next_handle = 0
        self._closed = False
        self._base_bytes = self._model.num_bytes()
        self._limits = BackendLimits(
            backend="transformers",
            base_model=name,
            architecture=self._model.architecture,
            vocab_size=self._model.vocab_size,
            max_context=self._model.max_context,
            eos_token_ids=self._model.eos_token_ids,
            device=str(self._device.torch_device),
            dtype=self._device.dtype_name,
            num_threads=self._device.num_threads,
            torch_version=torch.__version__,
        )
        logger.info(
            "%s on %s: %s, %d threads, %.2f GiB of base weights",
            name, self._limits.device, self._limits.dtype, self._limits.num_threads, self._base_bytes / 2**30,
        )  # fmt: skip
        for name in ("max_tokens_per_pass", "recompute_layers"):
            if getattr(settings, name) is not None:
                logger.warning(
                    "MINT_%s is not used: through transformers every datum is a pass of its own, with all activations kept",
                    name.upper(),
                )

    @property
    def limits(self) -> BackendLimits:
        return self._limits

    # runs

    def add_run(self, run_id: str, lora: LoraConfig, seed: int) -> RunReport:
        layout = choose_linears(self._model.linears, lora, self._model.architecture)
        run = TrainingRun(
            layout,
            seed,
            Plan(0, 0),
            self._device.torch_device,
            lambda params_P: adapter_weights(layout, params_P, self._device.dtype),
        )
        most = self._longest_datum(run.weights())
        run.plan = Plan(most, most)
        self._runs[run_id] = run
        return run.report(self._limits)

    def _longest_datum(self, adapter: AdapterWeights) -> int:
        """What the memory beside the base holds of a n + b n^2 bytes; a quarter is left to the caller.

        a and b are measured; attention that is not computed in blocks is what grows with the square.
        """
        n = min(PROBE_TOKENS, self._limits.max_context // 2)
        once, twice = (GAPS * self._pass_bytes(adapter, length) for length in (n, 2 * n))
        b = max(twice - 2 * once, 0) / (2 * n * n)
        a = once / n - b * n
        free = self._device.memory_bytes - self._base_bytes
        usable = max(free * 3 // 4, 0)
        most = min(int(2 * usable / (a + math.sqrt(a * a + 4 * b * usable))), self._limits.max_context)
        refuse_small(most, free, self._limits.max_context)
        return most

    def _pass_bytes(self, adapter: AdapterWeights, num_tokens: int) -> int:
        """What the forward keeps, the logits, and their gradient."""
        logits = num_tokens * self._limits.vocab_size * self._device.dtype.itemsize
        return self._model.kept_bytes(_leaves(adapter), num_tokens) + 2 * logits

    def use_plan(self, run_id: str, plan: RunPlan) -> RunReport:
        self._runs[run_id].follow(plan, self._limits)
        return self._runs[run_id].report(self._limits)

    def remove_run(self, run_id: str) -> None:
        del self._runs[run_id]

    def micro_batches(self, run_id: str, training_input: TrainingInput) -> list[MicroBatch]:
        self._runs[run_id].check(training_input, self._limits)
        return [
            MicroBatch(dataclasses.replace(training_input, data=(datum,)), datum.length, datum.length)
            for datum in training_input.data
        ]

    def forward(self, parts: Sequence[Part]) -> Generator[None, None, list[PartResult]]:
        results = []
        for part in parts:
            results.append(part_result(part, (yield from self._score(part, backward=False))))
        return results

    def forward_backward(self, parts: Sequence[Part]) -> Generator[None, None, list[PartResult]]:
        results = []
        for part in parts:
            result = part_result(part, (yield from self._score(part, backward=True)))
            results.append(settle_gradient(self._runs[part.run_id], part, result))
        return results

    def forward_backward_custom(self, part: Part, loss: CustomLoss) -> PausingWork[PartResult]:
        return (yield from custom_in_passes(self, part, loss))

    def _score(self, part: Part, *, backward: bool) -> Generator[None, None, list[FloatArray]]:
        """Every datum's logprobs, in the shape of its targets; yields between datums."""
        logprobs = []
        for datum in part.input.data:
            logprob_NK = self._score_datum(self._runs[part.run_id], datum, part.input, backward=backward)
            array = logprob_NK.cpu().numpy()
            logprobs.append(array.ravel() if datum.flat else array)
            yield
        return logprobs

    @torch.enable_grad()
    def _score_datum(self, run: TrainingRun, datum: PreparedDatum, given: TrainingInput, *, backward: bool) -> Tensor:
        """With a graph in any case: without one other kernels could run, and forward must equal forward_backward."""
        leaves = _leaves(run.weights())
        logits_NV, _ = self._model.forward(datum.tokens_N.tolist(), leaves)
        inputs = {k: torch.from_numpy(v).to(logits_NV.device) for k, v in datum.inputs.items()}

        def derivative(logprob_CK: Tensor, rows: slice) -> Tensor:
            chunk = {k: v[rows] for k, v in inputs.items()}
            gradient: Tensor = LOSSES[given.loss_fn].terms(torch, logprob_CK, chunk, given.loss_fn_config)[1]
            return gradient

        targets_NK = torch.from_numpy(datum.targets_NK).to(logits_NV.device)
        logprob_NK, grad_NV = score(logits_NV.detach(), targets_NK, derivative if backward else None)
        if grad_NV is not None:
            wanted = [tensor for w in leaves.values() for tensor in (w.a_RI, w.b_OR)]
            found = torch.autograd.grad(logits_NV, wanted, grad_NV, allow_unused=True)
            for site, a, b in zip(leaves, found[::2], found[1::2], strict=True):
                if a is not None and b is not None:  # None: no token came to this expert
                    run.gradient.add(site, a, b.t())
        return logprob_NK

    def discard_gradient(self, run_id: str) -> None:
        self._runs[run_id].clear_gradient()

    def optim_step(self, run_id: str, params: AdamParams) -> Metrics:
        return self._runs[run_id].optim_step(params)

    def export_state(self, run_id: str) -> AdapterState:
        return self._runs[run_id].export_state()

    def import_state(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        self._runs[run_id].import_state(state, optimizer=optimizer)

    # sampling

    def snapshot(self, run_id: str) -> int:
        return self._keep(self._runs[run_id].weights())  # a step makes new ones and leaves these

    def add_snapshot(self, lora: LoraConfig, state: AdapterState) -> int:
        layout = choose_linears(self._model.linears, lora, self._model.architecture)
        flat_P = flat_parameters(layout, state.tensors).to(self._device.torch_device)
        return self._keep(adapter_weights(layout, flat_P, self._device.dtype))

    def _keep(self, weights: AdapterWeights) -> int:
        self._next_handle += 1
        self._adapters[self._next_handle] = weights
        return self._next_handle

    def drop_snapshot(self, handle: int) -> None:
        del self._adapters[handle]

    @torch.no_grad()
    def score_prompt(
        self, prompt: tuple[int, ...], adapter: int | None, num_topk: int
    ) -> Generator[None, None, PromptScores]:
        logits_TV, _ = self._model.forward(list(prompt), self._adapters[adapter] if adapter is not None else {})
        yield
        targets_NK = torch.tensor(prompt[1:], device=logits_TV.device)[:, None]
        logprob_NK, _ = score(logits_TV[:-1], targets_NK, None)
        topk: TopkLogprobs | None = None
        if num_topk:
            topk = [None]
            for chunk_CV in torch.split(logits_TV[:-1], rows_per_chunk(self._limits.vocab_size)):
                topk += top_logprobs(chunk_CV, num_topk)
        return PromptScores([None, *logprob_NK[:, 0].tolist()], topk)

    def add_request(self, request: GenerateRequest) -> int:
        if self._closed:
            raise ClosedError("the base model was unloaded: every session that used it is closed")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ClosedError("the sampling session was closed before this sample began; make a new sampling client")
        return self._sampler.add(request, self._adapters[request.adapter] if request.adapter is not None else {})

    def step(self) -> list[Generation]:
        return self._sampler.step()

    def cancel(self, request: int) -> None:
        self._sampler.cancel(request)

    @property
    def num_requests(self) -> int:
        return self._sampler.num_requests

    def close(self) -> None:
        self._closed = True
        with returning_freed_memory(self._device.torch_device):
            self._adapters.clear()
            self._runs.clear()
            del self._model, self._sampler


def _leaves(weights: AdapterWeights) -> dict[tuple[int, str], SiteWeights]:
    """The same memory as leaves of a graph."""
    return {
        site: SiteWeights(w.a_RI.detach().requires_grad_(), w.b_OR.detach().requires_grad_())
        for site, w in weights.items()
    }


def score(logits_NV: Tensor, targets_NK: Tensor, derivative: Derivative | None) -> tuple[Tensor, Tensor | None]:
    """Float32 logprobs [N, K] of the targets, and with `derivative` the gradient of the loss by the logits [N, V].

    In chunks of rows, so that float32 values of the whole vocabulary exist for few rows at a time.
    """
    logprob_NK = torch.empty(targets_NK.shape, dtype=torch.float32, device=logits_NV.device)
    grad_NV = torch.empty_like(logits_NV) if derivative is not None else None
    step = rows_per_chunk(logits_NV.shape[1])
    for first in range(0, len(logits_NV), step):
        rows = slice(first, first + step)
        logprobs_CV = logits_NV[rows].float().log_softmax(-1)
        logprob_NK[rows] = logprobs_CV.gather(1, targets_NK[rows])
        if derivative is not None and grad_NV is not None:
            grad_CK = derivative(logprob_NK[rows], rows)
            grad_CV = logprobs_CV.exp_().mul_(-grad_CK.sum(-1, keepdim=True))
            grad_NV[rows] = grad_CV.scatter_add_(1, targets_NK[rows], grad_CK)
    return logprob_NK, grad_NV
