"""`mint doctor`: what this machine can do, what is wrong with the installation, what to set. It changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

import mint
from mint import settings as settings_module
from mint.cli.common import EXIT_FAILED, JsonOption, command, make_console, print_json
from mint.errors import MintError
from mint.settings import Settings

DISTRIBUTION = "mint-toolkit"
LIBRARIES = ("torch", "transformers", "datasets", "huggingface_hub", "safetensors", "numpy", "peft", "gguf")
PROBE_MODEL = "SmolLM2-135M-Instruct"
PROBE_DATUMS, PROBE_LENGTH = 4, 200
SAMPLED_TOKENS = 32


def doctor(
    model: Annotated[
        str, typer.Option(help="Measure with this model; one that is not on this machine is not fetched.")
    ] = PROBE_MODEL,
    measure: Annotated[bool, typer.Option(help="Measure the speed of training and sampling.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Device, precision, memory, versions, a shadowed `mint`, the hub, measured speed, advice. Exit code 1: a problem."""
    console = make_console(stderr=as_json)
    with command(console, verbose=False):
        settings = settings_module.load()
        facts, device = machine_facts(settings)
        facts |= installation_facts() | {"hub": hub_state(), "MINT_HOME": home_state(settings)}
        if measure:
            facts |= measured_speed(model, settings)
        problems, advice = judge(facts, device)
        if as_json:
            print_json({**facts, "problems": problems, "advice": advice})
        else:
            _print(facts, problems, advice, console)
        if problems:
            raise typer.Exit(EXIT_FAILED)


def machine_facts(settings: Settings) -> tuple[dict[str, Any], str]:
    from mint.engine.device import choose_device, processor_flags, usable_cores

    device = choose_device(settings)
    fast = sorted(flag for flag in processor_flags() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"))
    facts = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "device": str(device.torch_device),
        "dtype": device.dtype_name,
        "threads": device.num_threads,
        "cores": usable_cores(),
        "processor": ", ".join(fast) or "no flags known",
        "memory_limit_bytes": device.memory_bytes,
        "memory_available_bytes": psutil.virtual_memory().available,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    return facts, device.torch_device.type


def installation_facts() -> dict[str, Any]:
    """Versions, and who else owns the import name `mint`."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    owners = set(importlib.metadata.packages_distributions().get("mint", [])) - {DISTRIBUTION}
    return {
        "mint": f"{mint.__version__} in {Path(mint.__file__).parent}",
        "versions": versions,
        "other_distributions_named_mint": sorted(owners),
    }


def hub_state() -> str:
    """Whether the Hugging Face hub answers, within seconds."""
    from huggingface_hub import HfApi, constants

    from mint.hub.hub_cache import ANSWER_SECONDS, REQUEST_SECONDS, http_error, within

    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    try:
        within(
            ANSWER_SECONDS, lambda: HfApi(library_name="mint").model_info("Qwen/Qwen3-0.6B", timeout=REQUEST_SECONDS)
        )
    except (http_error(), TimeoutError, ValueError) as error:
        words = " ".join(str(error).split())[:120]
        return f"{constants.ENDPOINT} does not answer ({words or type(error).__name__})"
    return f"{constants.ENDPOINT} answers"


def home_state(settings: Settings) -> str:
    place = settings.home
    while not place.exists():
        place = place.parent
    free = psutil.disk_usage(str(place)).free
    state = "writable" if os.access(place, os.W_OK) else "NOT WRITABLE"
    return f"{settings.home}: {state}, {free / 2**30:.1f} GiB free"


def measured_speed(model: str, settings: Settings) -> dict[str, Any]:
    """Training and sampling on a few hundred tokens. Nothing is written."""
    folder = _local_folder(model, settings)
    if folder is None:
        return {"speed": f"not measured: {model} is not on this machine (mint models pull {model})"}
    import numpy as np

    from mint import types
    from mint.client.connect import make_backend
    from mint.engine.backend import GenerateRequest, Part, drain
    from mint.types.requests import prepare_training_input

    backend = make_backend(folder, model, settings)
    backend.add_run("probe", types.LoraConfig(rank=16, seed=0), 0)
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
    started = time.perf_counter()
    prompt = tuple(tokens[0].tolist())
    backend.add_request(GenerateRequest(prompt, None, 8, SAMPLED_TOKENS, 1.0, -1, 1.0, 0, frozenset()))
    while backend.num_requests:
        backend.step()
    sampling = time.perf_counter() - started
    backend.close()
    return {
        "speed": f"measured with {model}",
        "training_tokens_per_second": round(PROBE_DATUMS * PROBE_LENGTH / min(seconds[1:]), 1),
        "sampling_tokens_per_second_8_at_once": round(8 * SAMPLED_TOKENS / sampling, 1),
    }


def _local_folder(model: str, settings: Settings) -> Path | None:
    """Where the model is, if it is here already; nothing is fetched."""
    from mint.hub import PACKAGED_MODELS, resolve_model

    if model in PACKAGED_MODELS:
        if not list(settings.models_dir.glob(f"{model}*/config.json")):
            return None
        return resolve_model(model, settings=settings).path
    if Path(model).is_dir():
        return resolve_model(model, settings=settings).path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except HFValidationError as error:
        raise MintError(f"--model {model!r} is neither a folder nor the name of a model: {error}") from error
    except LocalEntryNotFoundError:
        return None


def judge(facts: dict[str, Any], device: str) -> tuple[list[str], list[str]]:
    """(what is wrong, what could be better), each with what to do."""
    problems, advice = [], []
    if facts["other_distributions_named_mint"]:
        names = ", ".join(facts["other_distributions_named_mint"])
        problems.append(f"{names} installs a package `mint` too: uninstall it here, or use an environment of its own")
    if "NOT WRITABLE" in facts["MINT_HOME"]:
        problems.append("MINT_HOME cannot be written: set MINT_HOME to a folder of yours")
    if facts["load"] is not None and facts["load"] > facts["cores"] + 0.5:
        advice.append(
            f"other programs keep the processor busy (load {facts['load']:.1f} on {facts['cores']} cores): compute "
            "threads then wait for each other; stop the others, lower MINT_THREADS, or set OMP_WAIT_POLICY=passive "
            "(slower when alone, but no stalls)"
        )
    if facts["threads"] > facts["cores"]:
        advice.append(f"MINT_THREADS={facts['threads']} is more than the {facts['cores']} cores: unset it")
    if (
        device == "cpu"
        and facts["dtype"] == "float32"
        and {"avx512_bf16", "amx_bf16", "bf16"} & set(facts["processor"].split(", "))
    ):
        advice.append("MINT_DTYPE=float32 on a processor that multiplies bf16 in hardware: unset it for speed")
    if facts["memory_available_bytes"] < 2 * 2**30:
        advice.append("less than 2 GiB of memory is free: close programs, or expect swapping")
    if "does not answer" in facts["hub"]:
        advice.append("without the hub: mint sft --offline, local folders, and models that are in the cache")
    if facts["versions"]["gguf"] == "not installed":
        advice.append('the packaged model needs gguf: pip install "mint-toolkit[offline]"')
    return problems, advice


def _print(facts: dict[str, Any], problems: list[str], advice: list[str], console: Console) -> None:
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key.endswith("_bytes"):
            table.add_row(key.removesuffix("_bytes").replace("_", " "), f"{value / 2**30:.1f} GiB")
        elif key == "versions":
            table.add_row("versions", ", ".join(f"{name} {version}" for name, version in value.items()))
        elif key == "load":
            table.add_row("load", "" if value is None else f"{value:.1f}")
        elif key != "other_distributions_named_mint":
            table.add_row(key.replace("_", " "), str(value))
    console.print(table, highlight=False)
    for problem in problems:
        console.print(f"[red]problem:[/red] {problem}", highlight=False)
    for hint in advice:
        console.print(f"[yellow]advice:[/yellow] {hint}", highlight=False)
    if not problems and not advice:
        console.print("[green]nothing to improve[/green]")
