"""The Backend of `models/decoder.py`: one base model in memory, the runs trained on it, the sequences sampled from it."""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mint.engine.backend import (
    AdapterState,
    BackendLimits,
    CustomLoss,
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
from mint.engine.compute import make_compute
from mint.engine.device import choose_device, returning_freed_memory
from mint.engine.lora import AnyAdapter, Segment, adapter_layout
from mint.engine.models.decoder import PackedRow
from mint.engine.models.head import Targets
from mint.engine.models.packed_attention import PackedSequence
from mint.engine.models.weights import load_weights, read_config, read_json
from mint.engine.plan import ONE_DATUM_PER_PASS, Plan, make_plan, pass_budget
from mint.engine.runs import TrainingRun, custom_in_passes, flat_parameters
from mint.engine.sampling.choose import top_logprobs
from mint.engine.sampling.sampler import Sampler
from mint.engine.training import Trainer
from mint.errors import ClosedError
from mint.settings import Settings
from mint.types.params import AdamParams, LoraConfig
from mint.types.requests import TrainingInput
from mint.types.results import TopkLogprobs

logger = logging.getLogger("mint")

# keys and values, as shares of the memory limit
PREFIX_CACHE_SHARE = 1 / 64
SEQUENCES_SHARE = 1 / 8


class DecoderBackend:
    """See `Backend`. Everything runs under inference mode: no autograd graph exists but a caller's own loss."""

    def __init__(self, folder: Path, name: str, settings: Settings) -> None:
        """Load the model in `folder`. Raises UnsupportedError or InputError naming what cannot be run."""
        self._settings = settings
        self._device = choose_device(settings)
        torch.set_num_threads(self._device.num_threads)
        config = read_config(folder)
        with torch.inference_mode(), returning_freed_memory(self._device.torch_device):
            weights = load_weights(folder, config, self._device.dtype, self._device.torch_device)
            self._compute = make_compute(config, weights, self._device, settings)
            del weights
            copies = self._compute.pass_memory.copies_per_token
            self._trainer = Trainer(self._compute.decoder, self._compute.head, self._recomputed_layers, copies)
            self._adapters: dict[int, AnyAdapter] = {}
            self._sampler = Sampler(
                self._compute.passes,
                self._adapters,
                prefix_bytes=int(self._device.memory_bytes * PREFIX_CACHE_SHARE),
                sequence_bytes=int(self._device.memory_bytes * SEQUENCES_SHARE),
            )
        self._next_handle = 0
        self._closed = False
        self._limits = BackendLimits(
            backend="decoder",
            base_model=name,
            architecture=str((read_json(folder / "config.json").get("architectures") or [config.model_type])[0]),
            vocab_size=config.vocab_size,
            max_context=config.max_context,
            eos_token_ids=config.eos_token_ids,
            device=str(self._device.torch_device),
            dtype=self._device.dtype_name,
            num_threads=self._device.num_threads,
            torch_version=torch.__version__,
            kernels=self._compute.kernels,
        )
        logger.info(
            "%s on %s: %s, %d threads, kernels of %s, %.2f GiB of base weights",
            name, self._limits.device, self._limits.dtype, self._limits.num_threads, self._limits.kernels,
            self._compute.base_bytes / 2**30,
        )  # fmt: skip

    @property
    def limits(self) -> BackendLimits:
        return self._limits

    # runs

    @torch.inference_mode()
    def add_run(self, run_id: str, lora: LoraConfig, seed: int) -> RunReport:
        decoder = self._trainer.decoder
        layout = adapter_layout(decoder.config, lora)
        asked = ONE_DATUM_PER_PASS if self._settings.batch_invariant else self._settings.max_tokens_per_pass
        plan = make_plan(self._compute.pass_memory, self._free_bytes, asked)
        self._trainer.runs[run_id] = TrainingRun(
            layout, seed, plan, decoder.device, lambda params_P: self._compute.weights_of(layout, params_P, True),
            self._compute.optimizer,
        )  # fmt: skip
        logger.info("%s: %s", run_id, self._plan_text(plan))
        return self._report(run_id)

    def _report(self, run_id: str) -> RunReport:
        report = self._trainer.runs[run_id].report(self._limits)
        return replace(report, recomputed_layers=self._recomputed_layers(report.plan.max_tokens_per_pass))

    @property
    def _free_bytes(self) -> int:
        return self._device.memory_bytes - self._compute.base_bytes

    def _recomputed_layers(self, num_tokens: int) -> int:
        """As asked for, else the fewest with which the pass stays within its share of the memory."""
        if self._settings.recompute_layers is not None:
            return min(self._settings.recompute_layers, self._compute.pass_memory.config.num_layers)
        return self._compute.pass_memory.recomputed_layers(num_tokens, pass_budget(self._free_bytes))

    def _plan_text(self, plan: Plan) -> str:
        """For the log."""
        passes = "every datum is a pass of its own"
        if plan.max_tokens_per_pass > ONE_DATUM_PER_PASS:
            passes = f"passes of up to {self._cost_text(plan.max_tokens_per_pass)}"
        return f"{passes}; a datum of up to {self._cost_text(plan.max_tokens)}"

    def _cost_text(self, num_tokens: int) -> str:
        recomputed, layers = self._recomputed_layers(num_tokens), self._compute.pass_memory.config.num_layers
        size = self._compute.pass_memory.of_pass(num_tokens, recomputed) / 2**30
        return f"{num_tokens:,} tokens ({size:.2f} GiB, {recomputed} of {layers} layers recomputed in backward)"

    def use_plan(self, run_id: str, plan: RunPlan) -> RunReport:
        if self._settings.batch_invariant:
            plan = replace(plan, max_tokens_per_pass=ONE_DATUM_PER_PASS)
        self._trainer.runs[run_id].follow(plan, self._limits)
        return self._report(run_id)

    def remove_run(self, run_id: str) -> None:
        del self._trainer.runs[run_id]

    def micro_batches(self, run_id: str, training_input: TrainingInput) -> list[MicroBatch]:
        self._trainer.runs[run_id].check(training_input, self._limits)
        return self._trainer.micro_batches(run_id, training_input)

    @torch.inference_mode()
    def forward(self, parts: Sequence[Part]) -> Generator[None, None, list[PartResult]]:
        return (yield from self._trainer.run_pass(parts, backward=False))

    @torch.inference_mode()
    def forward_backward(self, parts: Sequence[Part]) -> Generator[None, None, list[PartResult]]:
        return (yield from self._trainer.run_pass(parts, backward=True))

    @torch.inference_mode()
    def forward_backward_custom(self, part: Part, loss: CustomLoss) -> PausingWork[PartResult]:
        if len(self.micro_batches(part.run_id, part.input)) == 1:
            return (yield from self._trainer.run_custom(part, loss))
        return (yield from custom_in_passes(self, part, loss))

    @torch.inference_mode()
    def discard_gradient(self, run_id: str) -> None:
        self._trainer.runs[run_id].clear_gradient()

    @torch.inference_mode()
    def optim_step(self, run_id: str, params: AdamParams) -> Metrics:
        return self._trainer.runs[run_id].optim_step(params)

    def export_state(self, run_id: str) -> AdapterState:
        return self._trainer.runs[run_id].export_state()

    @torch.inference_mode()
    def import_state(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        self._trainer.runs[run_id].import_state(state, optimizer=optimizer)

    # sampling

    @torch.inference_mode()
    def snapshot(self, run_id: str) -> int:
        run = self._trainer.runs[run_id]
        return self._keep(self._compute.weights_of(run.layout, run.params_P, False))

    @torch.inference_mode()
    def add_snapshot(self, lora: LoraConfig, state: AdapterState) -> int:
        layout = adapter_layout(self._trainer.decoder.config, lora)
        flat_P = flat_parameters(layout, state.tensors).to(self._device.torch_device)
        return self._keep(self._compute.weights_of(layout, flat_P, False))

    def _keep(self, weights: AnyAdapter) -> int:
        self._next_handle += 1
        self._adapters[self._next_handle] = weights
        return self._next_handle

    def drop_snapshot(self, handle: int) -> None:
        del self._adapters[handle]
        self._sampler.forget_adapter(handle)

    @torch.inference_mode()
    def score_prompt(
        self, prompt: tuple[int, ...], adapter: int | None, num_topk: int
    ) -> Generator[None, None, PromptScores]:
        self._check_open()
        if adapter is not None and adapter not in self._adapters:
            raise ClosedError("the sampling session was closed before this prompt was scored; make a new one")
        decoder, head = self._trainer.decoder, self._trainer.head
        tokens_T = torch.tensor(prompt, device=decoder.device)
        segment = Segment(0, len(prompt), self._adapters[adapter] if adapter is not None else None)
        positions_T = torch.arange(len(prompt), device=decoder.device)
        row = PackedRow(tokens_T, positions_T, [segment])
        attention = decoder.packed_attention([PackedSequence(np.arange(len(prompt)))])
        final_TD, _ = yield from decoder.forward(row, attention, keep=False)
        normed_TD, _ = head.normalise(final_TD)
        scored = torch.arange(len(prompt) - 1, device=decoder.device)
        logprob_P = yield from head.score(normed_TD, Targets(scored, scored, tokens_T[1:]), segment)
        topk: TopkLogprobs | None = None
        if num_topk:
            topk = [None]
            step = head.rows_per_chunk
            for first in range(0, len(prompt) - 1, step):
                rows = normed_TD[first : min(first + step, len(prompt) - 1)]
                topk += top_logprobs(head.logits_for(rows, segment), num_topk)
                yield
        return PromptScores([None, *logprob_P.tolist()], topk)

    def add_request(self, request: GenerateRequest) -> int:
        self._check_open()
        return self._sampler.add(request)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the base model was unloaded: every session that used it is closed")

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        return self._sampler.step()

    @torch.inference_mode()
    def cancel(self, request: int) -> None:
        self._sampler.cancel(request)

    @property
    def num_requests(self) -> int:
        return self._sampler.num_requests

    def close(self) -> None:
        self._closed = True
        with returning_freed_memory(self._device.torch_device):
            self._adapters.clear()
            del self._trainer, self._sampler, self._compute
