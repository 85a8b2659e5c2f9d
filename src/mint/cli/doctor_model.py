"""What `mint doctor` says about a model on this host: expected and measured speed, memory of a run, what to change."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mint.settings import Settings

if TYPE_CHECKING:  # the engine loads torch
    from mint.engine.backend import Backend
    from mint.engine.forecast import HostSpeed, MemoryNeed, Speed
    from mint.hub import LocalModel

RANK = 16
PROBE_DATUMS, PROBE_LENGTH = 4, 200
SAMPLED_TOKENS = 32
MEASURE_SECONDS = 60  # a model that would take longer is not measured
SHORT_PASS = 1000  # tokens; products of fewer rows are slower
SLOWER_THAN_EXPECTED = 0.6  # measured / expected from which on something seems wrong
GIB = 2**30


@dataclass(frozen=True, slots=True)
class ModelReport:
    """`notes` say why something below them is None. memory: of a run of rank 16 on every module."""

    model: str
    notes: list[str]
    host: HostSpeed | None = None
    expected: Speed | None = None
    measured: Speed | None = None
    memory: MemoryNeed | None = None


def report_on(model: str, settings: Settings, *, measure: bool) -> ModelReport:
    """Nothing is fetched or written. Without `measure` no speeds.

    Raises ModelNotFoundError for what cannot name a model, InputError for a config.json that no Backend can run.
    """
    from mint.hub import local_model

    local = local_model(model, settings=settings)
    if local is None:
        note = f"no forecast: {model} is not on this machine; {_how_to_get(model)}"
        return ModelReport(model, [note])
    notes, host, expected, memory = [], None, None, None
    if gap := _no_forecast(local.path, settings):
        notes.append(f"no forecast: {gap}")
    else:
        host, expected, memory = _forecast(local.path, settings, measure=measure)
        if measure and host is None:
            notes.append("no forecast: its figures were measured on processors, not on accelerators")
    measured = None
    if measure:
        if reason := _not_measured(local, expected, memory):
            notes.append(f"not measured: {reason}")
        else:
            measured = measured_speed(local.path, model, settings)
    return ModelReport(model, notes, host, expected, measured, memory)


def _how_to_get(model: str) -> str:
    pull = f"mint models pull {model} fetches it"
    repo, _, revision = model.partition("@")
    if "/" not in repo:
        return pull
    shape = f"hf download {repo} config.json" + (f" --revision {revision}" if revision else "")
    return f"{shape} fetches its shape, which is enough for a forecast, and {pull}"


def _no_forecast(folder: Path, settings: Settings) -> str | None:
    """Why the model runs through transformers; None where MinT's own decoder runs it."""
    from mint.engine.models.config import refuse_quantised, uncovered
    from mint.engine.models.weights import read_json

    raw = read_json(folder / "config.json")
    refuse_quantised(raw)
    if settings.backend == "decoder":
        return None
    gap = "MINT_BACKEND=hf" if settings.backend else uncovered(raw)
    if gap is None:
        return None
    cause = gap if settings.backend else f"MinT's own decoder does not cover {gap}"
    return f"it runs through transformers, for which no speed is claimed ({cause})"


def _forecast(folder: Path, settings: Settings, *, measure: bool) -> tuple[HostSpeed | None, Speed | None, MemoryNeed]:
    from mint.engine.compute import why_not_compiled
    from mint.engine.device import choose_device
    from mint.engine.forecast import COMPILED, PACKING, PLAIN, expected_speed, memory_need, projections
    from mint.engine.host import measure_host
    from mint.engine.models.weights import read_config

    config, device = read_config(folder), choose_device(settings)
    element_size, processor = device.dtype.itemsize, device.torch_device.type == "cpu"
    manner = PACKING if processor and element_size == 2 else PLAIN
    if why_not_compiled(config, device, settings) is None:
        manner = COMPILED
    memory = memory_need(
        config, element_size, device.memory_bytes,
        asked=settings.max_tokens_per_pass, manner=manner, rank=RANK, threads=device.num_threads,
    )  # fmt: skip
    if not measure or not processor:
        return None, None, memory
    host = measure_host(device, projections(config))
    return host, expected_speed(config, element_size, host, manner), memory


def _not_measured(local: LocalModel, expected: Speed | None, memory: MemoryNeed | None) -> str | None:
    """Why the model is not loaded; None where it can be."""
    if local.missing:
        return f"its weights are not here ({', '.join(local.missing)} missing in {local.path})"
    on_disk = sum(file.stat().st_size for file in local.path.glob("*.safetensors"))
    needed = memory.base_bytes + memory.decoding_bytes if memory else on_disk
    free = psutil.virtual_memory().available
    if needed > free or (memory is not None and memory.refusal is not None):
        return f"it takes {_gib(needed)} to load, and {_gib(free)} of {_gib(_limit(memory))} are free"
    if expected is not None and (seconds := _seconds_to_measure(expected)) > MEASURE_SECONDS:
        return f"it would take about {seconds / 60:.0f} minutes"
    return None


def _limit(memory: MemoryNeed | None) -> int:
    return memory.limit_bytes if memory else int(psutil.virtual_memory().total)


def _seconds_to_measure(expected: Speed) -> float:
    training = 3 * PROBE_DATUMS * PROBE_LENGTH / expected.training
    return training + sum((SAMPLED_TOKENS + 1) * n / speed for n, speed in expected.sampling.items())


def measured_speed(folder: Path, model: str, settings: Settings) -> Speed:
    """Training and sampling on a few hundred random tokens, the second and later times. Nothing is written."""
    import numpy as np

    from mint import types
    from mint.client.connect import make_backend
    from mint.engine.backend import Part, drain
    from mint.engine.forecast import SEQUENCES, Speed
    from mint.types.requests import prepare_training_input

    backend = make_backend(folder, model, settings)
    backend.add_run("probe", types.LoraConfig(rank=RANK, seed=0), 0)
    tokens = np.random.default_rng(0).integers(0, backend.limits.vocab_size, (PROBE_DATUMS, PROBE_LENGTH + 1))
    datums = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData(row[1:]),
                "weights": types.TensorData(np.ones(PROBE_LENGTH)),
            },
        )
        for row in tokens
    ]
    part = Part("probe", prepare_training_input(datums, "cross_entropy"))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        drain(backend.forward_backward([part]))
        backend.optim_step("probe", types.AdamParams())
        seconds.append(time.perf_counter() - started)
    prompt = tuple(tokens[0].tolist())
    _sampling_seconds(backend, prompt, 1, 1)  # prepares the weights
    sampling = {n: n * SAMPLED_TOKENS / _sampling_seconds(backend, prompt, n, SAMPLED_TOKENS) for n in SEQUENCES}
    backend.close()
    return Speed(PROBE_DATUMS * PROBE_LENGTH / min(seconds[1:]), sampling)


def _sampling_seconds(backend: Backend, prompt: tuple[int, ...], num_samples: int, num_tokens: int) -> float:
    from mint.engine.backend import GenerateRequest

    started = time.perf_counter()
    backend.add_request(GenerateRequest(prompt, None, num_samples, num_tokens, 1.0, -1, 1.0, 0, frozenset()))
    while backend.num_requests:
        backend.step()
    return time.perf_counter() - started


def as_facts(report: ModelReport) -> dict[str, Any]:
    """For scripts: plain values, None for what is not known."""
    host, memory = report.host, report.memory
    return {
        "model": report.model,
        "notes": report.notes,
        "host": host and {
            "gflop_per_second": round(host.flop_per_second / 1e9, 1),
            "read_gb_per_second": round(host.bytes_per_second / 1e9, 1),
        },
        "expected": report.expected and _speed_facts(report.expected),
        "measured": report.measured and _speed_facts(report.measured),
        "run_memory": memory and {
            "base_bytes": memory.base_bytes, "adapter_bytes": memory.adapter_bytes,
            "decoding_bytes": memory.decoding_bytes, "pass_bytes": memory.pass_bytes,
            "pass_tokens": memory.pass_tokens, "total_bytes": memory.total_bytes, "fits": memory.fits,
        },
    }  # fmt: skip


def _speed_facts(speed: Speed) -> dict[str, Any]:
    return {
        "training_tokens_per_second": round(speed.training, 1),
        "sampling_tokens_per_second": {str(n): round(tokens, 1) for n, tokens in speed.sampling.items()},
    }


def as_rows(report: ModelReport) -> list[tuple[str, str]]:
    """(label, text) for people."""
    rows = [("model", report.model)]
    if report.host is not None:
        flop, read = report.host.flop_per_second / 1e9, report.host.bytes_per_second / 1e9
        rows.append(("host", f"{flop:,.0f} GFLOP/s in its products, reads {read:.1f} GB/s"))
    speeds = [(word, speed) for word, speed in (("expected", report.expected), ("measured", report.measured)) if speed]
    if speeds:
        rows.append(("training tokens/s", ", ".join(f"{word} {_rate(speed.training)}" for word, speed in speeds)))
        label = f"sampling tokens/s, {' / '.join(map(str, speeds[0][1].sampling))} at once"
        texts = (f"{word} {' / '.join(map(_rate, speed.sampling.values()))}" for word, speed in speeds)
        rows.append((label, ", ".join(texts)))
    if (m := report.memory) is not None:
        parts = f"base {_gib(m.base_bytes)}, adapter {_gib(m.adapter_bytes)}"
        parts += f", copy for sampling {_gib(m.decoding_bytes)}" if m.decoding_bytes else ""
        parts += f", a pass of {m.pass_tokens:,} tokens {_gib(m.pass_bytes)}"
        verdict = "fits" if m.fits else "DOES NOT FIT"
        rows.append((f"memory of a run, rank {RANK}", f"{_gib(m.total_bytes)} ({parts}): {verdict}"))
    return rows + [("", note) for note in report.notes]


def advise(report: ModelReport, machine: dict[str, Any], asked_tokens: int | None) -> list[str]:
    """What to change for this model. `machine`: the facts dtype, processor and memory_available_bytes."""
    advice = []
    if report.memory is not None:
        advice += _memory_advice(report.memory, report.model, machine)
        advice += _pass_advice(report.memory, asked_tokens)
    if report.host is not None and not machine["bf16_products"] and machine["dtype"] == "float32":
        advice.append(
            "this processor has no bf16 products (AVX-512 bf16, AMX or ARM's): expect no more than the figures above; "
            "one that has them multiplies several times faster and takes half the memory for weights"
        )
    speed = report.measured or report.expected
    trainable = report.memory is None or report.memory.refusal is None
    if trainable and speed is not None and speed.sampling[8] > speed.sampling[1]:
        one, eight = speed.sampling[1], speed.sampling[8]
        advice.append(
            f"8 sequences at once sample {eight / one:.1f} times as fast as one ({_rate(eight)} tokens/s against "
            f"{_rate(one)}): ask for several together (num_samples, mint sample -n 8, several prompts)"
        )
    if report.measured is not None and report.expected is not None:
        share = report.measured.training / report.expected.training
        if share < SLOWER_THAN_EXPECTED:
            advice.append(
                f"training runs at {share:.0%} of what this host's products allow: see that no other program computes, "
                "and measure again"
            )
    return advice


def _memory_advice(memory: MemoryNeed, model: str, machine: dict[str, Any]) -> list[str]:
    total, limit, free = memory.total_bytes, memory.limit_bytes, machine["memory_available_bytes"]
    lower = f"lower MINT_MAX_TOKENS_PER_PASS (now {memory.pass_tokens:,}) or take a smaller base model"
    if memory.refusal is not None:
        halves = "set MINT_DTYPE=bfloat16, which halves the weights, or " if machine["dtype"] == "float32" else ""
        return [
            f"{model} cannot be trained in {_gib(limit)}: its weights take {_gib(memory.base_bytes)} and the smallest "
            f"pass {_gib(memory.pass_bytes)}; {halves}take a smaller base model or a machine with more memory"
        ]
    if not memory.fits:
        return [f"a run of {model} that also samples takes {_gib(total)} of {_gib(limit)}: {lower}"]
    if total > free:
        return [f"a run of {model} takes up to {_gib(total)} and {_gib(free)} are free: close programs, or {lower}"]
    return []


def _pass_advice(memory: MemoryNeed, asked_tokens: int | None) -> list[str]:
    if memory.refusal is not None or memory.pass_tokens >= SHORT_PASS:
        return []
    cause = (
        f"MINT_MAX_TOKENS_PER_PASS={asked_tokens}: unset it, and give steps of several conversations (--batch-size)"
        if asked_tokens == memory.pass_tokens
        else "memory holds no more: a smaller base model would train faster per parameter"
    )
    return [
        f"passes of {memory.pass_tokens} tokens are short, and products of less than {SHORT_PASS:,} rows slow; {cause}"
    ]


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.1f}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
