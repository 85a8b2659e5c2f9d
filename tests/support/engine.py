"""Driving the engine by hand on small models, and what transformers and PEFT compute for the same tokens.

    backend = open_backend(folder)
    add_random_run(backend, "run", LoraConfig(rank=4), seed=1)
    result = forward_backward(backend, "run", weighted_datums(np.random.default_rng(0), [5, 40], 384))
    model, parameters = peft_model(folder, backend.export_state("run").tensors, rank=4)

torch models are compared in one thread: the number of threads decides the last bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from mint import types
from mint.engine.backend import (
    AdapterState,
    Backend,
    GenerateRequest,
    Generation,
    Part,
    PartResult,
    drain,
    join_results,
)
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.device import processor_flags
from mint.engine.hf.backend import HfBackend
from mint.engine.kernels.available import missing
from mint.engine.lora import named_tensors
from mint.engine.models.decoder import PackedRow
from mint.local.policy import Head, next_heads
from mint.settings import Settings
from mint.types.requests import prepare_training_input
from tests.support import tiny_models

T = TypeVar("T")
# what compiled kernels lack here; None: nothing
MISSING = missing(torch.device("cpu"), torch.bfloat16, processor_flags())
COMPILED = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
# of bf16; tiny models need head_dim=32
both_kernels = pytest.mark.parametrize("kernels", ["torch", pytest.param("compiled", marks=COMPILED)])
Config = Mapping[str, float]

# numerics contract (docs/architecture.md, section 3a): fp32, any packing, and against transformers and PEFT
FP32_LOGPROB = 1e-4
FP32_GRADIENT = 1e-4
VOCAB = tiny_models.TinyShape().vocab_size


def open_backend(
    folder: Path,
    dtype: str = "float32",
    *,
    max_tokens_per_pass: int | None = None,
    recompute_layers: int | None = None,
    num_threads: int = 1,
    kernels: str | None = None,
) -> DecoderBackend:
    settings = Settings(
        folder, None, dtype, num_threads, max_tokens_per_pass, recompute_layers=recompute_layers, kernels=kernels
    )
    return DecoderBackend(folder, folder.name, settings)


def open_hf(folder: Path, dtype: str = "float32") -> HfBackend:
    return HfBackend(folder, folder.name, Settings(folder, None, dtype, 1))


def run_child(module: ModuleType, *arguments: object) -> list[str]:
    """Run a module of this repository in a new process; the words it prints. Fails with its error output."""
    child = subprocess.run(
        [sys.executable, "-m", module.__name__, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.split()


# models


def write_variant(folder: Path, family: tiny_models.Family, *, tied: bool = False, **overrides: Any) -> Path:
    """As `write_tiny_model` (no tokenizer), with further fields of its transformers config set."""
    from transformers import AutoModelForCausalLM

    sizes = {name: overrides.pop(name) for name in tiny_models.TinyShape.__slots__ if name in overrides}
    config = tiny_models.tiny_config(family, tied=tied, sizes=tiny_models.TinyShape(**sizes))
    for name, value in overrides.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tiny_models._fill_with_random_weights(model, seed=0)
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, *drop: str, **fields: Any) -> Path:
    """Change config.json in place."""
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **fields}))
    return folder


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def peft_model(
    folder: Path, tensors: Mapping[str, np.ndarray], rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model of that base with these adapter weights, and its trained parameters by PEFT's own names."""
    from peft import LoraConfig, get_peft_model

    targets = sorted({name.split(".")[-3] for name in tensors})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own: about tied unembeddings, and what transformers deprecates
        config = LoraConfig(r=rank, lora_alpha=types.params.LORA_ALPHA, lora_dropout=0.0, target_modules=targets)
        model = get_peft_model(transformers_model(folder, dtype), config)
    named = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert set(named) == set(tensors)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
    return model, named


def reference_logprobs(model: Any, datum: types.Datum) -> Tensor:
    """Logprobs of a datum's targets under a transformers model, in its graph and in the targets' shape."""
    tokens = torch.tensor([datum.model_input.to_ints()])
    targets = datum.loss_fn_inputs["target_tokens"].to_torch()
    logprobs = model(tokens).logits[0].float().log_softmax(-1)
    return logprobs.gather(1, targets.view(len(targets), -1)).view(targets.shape)


def reference_gradient(
    model: Any,
    parameters: Mapping[str, Tensor],
    data: Sequence[types.Datum],
    loss: Callable[[list[Tensor]], Tensor],
) -> tuple[list[np.ndarray], Tensor]:
    """Every datum's logprobs, and the gradient of `loss` of them, flattened as `flatten` does."""
    logprobs = [reference_logprobs(model, datum) for datum in data]
    names = sorted(parameters)
    found = torch.autograd.grad(loss(logprobs), [parameters[name] for name in names], allow_unused=True)
    gradient = {n: torch.zeros_like(parameters[n]) if g is None else g for n, g in zip(names, found, strict=True)}
    return [p.detach().numpy() for p in logprobs], flatten(gradient)


def cross_entropy_loss(data: Sequence[types.Datum]) -> Callable[[list[Tensor]], Tensor]:
    """-sum w p as a function of the datums' logprobs."""

    def loss(logprobs: list[Tensor]) -> Tensor:
        weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
        return -torch.stack([(w * p).sum() for w, p in zip(weights, logprobs, strict=True)]).sum()

    return loss


# runs


def add_random_run(
    backend: Backend, run_id: str, lora: types.LoraConfig, seed: int = 0, scale: float = 0.05
) -> dict[str, np.ndarray]:
    """A run whose B is random instead of zero, so that the adapter matters; its tensors by PEFT's names."""
    backend.add_run(run_id, lora, seed)
    generator = np.random.default_rng(seed)
    tensors = {
        name: array if ".lora_A." in name else scale * generator.standard_normal(array.shape, np.float32)
        for name, array in backend.export_state(run_id).tensors.items()
    }
    set_tensors(backend, run_id, tensors)
    return tensors


def set_tensors(backend: Backend, run_id: str, tensors: dict[str, np.ndarray]) -> None:
    backend.import_state(run_id, AdapterState(tensors), optimizer=False)


def part(
    run_id: str, data: Sequence[types.Datum], loss_fn: str = "cross_entropy", config: Config | None = None
) -> Part:
    return Part(run_id, prepare_training_input(data, loss_fn, config))


def in_passes(backend: Backend, mode: str, parts: Sequence[Part]) -> list[PartResult]:
    """The micro-batches of several runs, sharing passes as the scheduler has them share."""
    waiting = {part.run_id: backend.micro_batches(part.run_id, part.input) for part in parts}
    results: dict[str, list[PartResult]] = {part.run_id: [] for part in parts}
    while any(waiting.values()):
        firsts = [(run_id, shares[0]) for run_id, shares in waiting.items() if shares]
        heads = [Head(run_id, "", i, mode, s.num_tokens, s.max_tokens) for i, (run_id, s) in enumerate(firsts)]
        chosen = next_heads(heads, {})
        share_parts = [Part(run_id, waiting[run_id].pop(0).input) for run_id in chosen]
        for run_id, result in zip(chosen, drain(getattr(backend, mode)(share_parts)), strict=True):
            results[run_id].append(result)
    return [join_results(results[part.run_id]) for part in parts]


def forward(backend: Backend, run_id: str, data: Sequence[types.Datum], loss_fn: str = "cross_entropy") -> PartResult:
    return _only(in_passes(backend, "forward", [part(run_id, data, loss_fn)]))


def forward_backward(
    backend: Backend,
    run_id: str,
    data: Sequence[types.Datum],
    loss_fn: str = "cross_entropy",
    config: Config | None = None,
) -> PartResult:
    return _only(in_passes(backend, "forward_backward", [part(run_id, data, loss_fn, config)]))


def _only(results: list[PartResult]) -> PartResult:
    (result,) = results
    if result.error is not None:
        raise result.error
    return result


def gradient(backend: Backend, run_id: str) -> Tensor:
    """The run's accumulated gradient, flattened as `flatten` does. The one place that reaches for it."""
    runs = backend._runs if isinstance(backend, HfBackend) else backend._trainer.runs  # type: ignore[attr-defined]
    run = runs[run_id]
    return flatten(named_tensors(run.layout, run.gradient.flat_P))


def parameters(backend: Backend, run_id: str) -> Tensor:
    return flatten(backend.export_state(run_id).tensors)


def base_tensors(backend: DecoderBackend) -> list[Tensor]:
    """Every tensor of the frozen base model, whatever records hold them."""
    found: list[Tensor] = []

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            for item in value:
                visit(item)
        else:
            for name in getattr(type(value), "__slots__", ()):
                visit(getattr(value, name))

    visit(backend._trainer.decoder.weights)
    return found


def flatten(tensors: Mapping[str, Any]) -> Tensor:
    """One float64 vector, tensors in the order of their names."""
    return torch.cat([torch.as_tensor(tensors[name]).detach().double().flatten() for name in sorted(tensors)])


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found - expected).norm() / expected.norm())


def largest_difference(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Over all datums; their shapes must agree."""
    assert [np.shape(a) for a in found] == [np.shape(b) for b in expected]
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(found, expected, strict=True))


def record_passes(backend: DecoderBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that fills with the number of tokens of every pass that training makes from now on."""
    seen: list[int] = []
    decoder = backend._trainer.decoder
    whole = decoder.forward

    def counting(row: PackedRow, *args: Any, **options: Any) -> Any:
        seen.append(len(row.tokens_T))
        return whole(row, *args, **options)

    monkeypatch.setattr(decoder, "forward", counting)
    return seen


# datums


def make_datum(tokens: Any, targets: Any, **inputs: Any) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(np.asarray(tokens)), loss_fn_inputs={"target_tokens": targets, **inputs}
    )


def weighted_datums(
    generator: np.random.Generator, lengths: Sequence[int], vocab_size: int = VOCAB, *, common: int = 0
) -> list[types.Datum]:
    """Cross-entropy datums of random tokens, the first `common` the same in all; about a third of the weights are 0, the
    first never is."""
    data = []
    beginning = generator.integers(0, vocab_size, common)
    for length in lengths:
        tokens = generator.integers(0, vocab_size, length + 1)
        tokens[:common] = beginning
        weights = generator.uniform(0.2, 2.0, length) * (generator.random(length) < 0.7)
        weights[0] = 1.0
        data.append(make_datum(tokens[:-1], tokens[1:], weights=weights))
    return data


def policy_datums(
    generator: np.random.Generator, data: Sequence[types.Datum], logprobs: Sequence[np.ndarray], spread: float = 0.3
) -> list[types.Datum]:
    """The same tokens for importance_sampling and ppo: q lies around the model's own `logprobs`, some advantages are 0."""
    policy = []
    for datum, p in zip(data, logprobs, strict=True):
        q = p + spread * generator.standard_normal(p.shape)
        advantages = generator.standard_normal(p.shape) * (generator.random(p.shape) < 0.8)
        advantages[0] = 1.0
        targets = datum.loss_fn_inputs["target_tokens"]
        policy.append(make_datum(datum.model_input.to_ints(), targets, logprobs=q, advantages=advantages))
    return policy


# sampling


def request(prompt: Sequence[int], **options: Any) -> GenerateRequest:
    """One sample of 16 tokens at temperature 1 from the base model, nothing stops it; `options` change that."""
    defaults = {
        "adapter": None,
        "num_samples": 1,
        "max_new": 16,
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "seed": 0,
        "stop_tokens": frozenset(),
    }
    return GenerateRequest(tuple(int(token) for token in prompt), **{**defaults, **options})


def generate(backend: Backend, *requests: GenerateRequest) -> list[Generation]:
    """Put all requests into one batch and run it until every one has ended; answers in their order."""
    numbers = [backend.add_request(given) for given in requests]
    done: dict[int, Generation] = {}
    while backend.num_requests:
        done.update({generation.request: generation for generation in backend.step()})
    return [done[number] for number in numbers]


def random_prompt(length: int, seed: int = 0, vocab_size: int = VOCAB) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()


def continuation(prompt: Sequence[int], tokens: Sequence[int]) -> types.Datum:
    """A datum whose last `len(tokens)` targets are the generated tokens."""
    whole = [*prompt, *tokens]
    return make_datum(whole[:-1], whole[1:], weights=np.zeros(len(whole) - 1))
