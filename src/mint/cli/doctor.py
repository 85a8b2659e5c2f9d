"""`mint doctor`: what this machine can do, what is wrong with the installation, what to set. It changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

import mint
from mint import settings as settings_module
from mint.cli.common import EXIT_FAILED, JsonOption, command, make_console, print_json
from mint.cli.doctor_model import advise, as_facts, as_rows, report_on
from mint.settings import Settings

DISTRIBUTION = "mint-toolkit"
LIBRARIES = ("torch", "transformers", "datasets", "huggingface_hub", "safetensors", "numpy", "peft", "gguf", "numba")
PROBE_MODEL = "SmolLM2-135M-Instruct"
FAST_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")
BUSY_SECONDS = 0.3  # how long other programs are watched


def doctor(
    model: Annotated[
        str,
        typer.Option(
            help="Base model to forecast: hub id, folder or packaged model. Nothing is fetched: its config.json on this "
            "machine is enough for a forecast; with its weights it is measured too."
        ),
    ] = PROBE_MODEL,
    measure: Annotated[
        bool, typer.Option(help="Measure the host (about two seconds), and the model where its weights are here.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """What this machine can do, what is wrong with the installation, what a model will do here, what to change.

    Device, precision, memory, versions, a shadowed `mint`, the hub; for the model expected and measured tokens per
    second of training and of sampling 1, 8 and 32 sequences at once, and the memory of a run. Exit code 1: a problem.
    """
    console = make_console(stderr=as_json)
    with command(console, verbose=False):
        settings = settings_module.load()
        facts, device = machine_facts(settings)
        facts |= installation_facts() | {"hub": hub_state(), "MINT_HOME": home_state(settings)}
        report = report_on(model, settings, measure=measure)
        problems, advice = judge(facts, device)
        advice += advise(report, facts, settings.max_tokens_per_pass)
        if as_json:
            print_json({**facts, **as_facts(report), "problems": problems, "advice": advice})
        else:
            _print(facts, as_rows(report), problems, advice, console)
        if problems:
            raise typer.Exit(EXIT_FAILED)


def machine_facts(settings: Settings) -> tuple[dict[str, Any], str]:
    from mint.engine.compute import why_not_here
    from mint.engine.device import BF16_FLAGS, choose_device, processor_flags, usable_cores

    device, flags = choose_device(settings), processor_flags()
    facts = {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "device": str(device.torch_device),
        "dtype": device.dtype_name,
        "threads": device.num_threads,
        "cores": usable_cores(),
        "kernels": kernels_state(why_not_here(device, settings)),
        "processor": ", ".join(sorted(flags & set(FAST_FLAGS))) or "no flags known",
        "bf16_products": bool(flags & BF16_FLAGS) if flags else None,
        "memory_limit_bytes": device.memory_bytes,
        "memory_available_bytes": psutil.virtual_memory().available,
        "busy_cores": busy_cores(),
    }
    return facts, device.torch_device.type


def kernels_state(reason: str | None) -> str:
    """What computes MinT's own decoder, and why."""
    return "compiled by numba" if reason is None else f"torch's ({reason})"


def busy_cores() -> float:
    """How many of this process's cores other programs keep busy at this moment."""
    shares = psutil.cpu_percent(interval=BUSY_SECONDS, percpu=True)
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    return round(float(sum(shares[core] for core in ours if core < len(shares))) / 100, 1)


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


def judge(facts: dict[str, Any], device: str) -> tuple[list[str], list[str]]:
    """(what is wrong, what could be better), each with what to do."""
    problems, advice = [], []
    if facts["other_distributions_named_mint"]:
        names = ", ".join(facts["other_distributions_named_mint"])
        problems.append(f"{names} installs a package `mint` too: uninstall it here, or use an environment of its own")
    if "NOT WRITABLE" in facts["MINT_HOME"]:
        problems.append("MINT_HOME cannot be written: set MINT_HOME to a folder of yours")
    if facts["busy_cores"] + facts["threads"] > facts["cores"] + 0.5:
        advice.append(
            f"other programs keep {facts['busy_cores']:.1f} of {facts['cores']} cores busy: compute threads then wait for "
            "each other, and the speeds here are too low; stop the others, lower MINT_THREADS, or set "
            "OMP_WAIT_POLICY=passive (slower when alone, but no stalls)"
        )
    if facts["threads"] > facts["cores"]:
        advice.append(f"MINT_THREADS={facts['threads']} is more than the {facts['cores']} cores: unset it")
    if facts["threads"] < facts["cores"]:
        advice.append(
            f"MINT_THREADS={facts['threads']} leaves {facts['cores'] - facts['threads']} of {facts['cores']} cores unused: "
            "unset it, unless other programs need them"
        )
    if device == "cpu" and facts["dtype"] == "float32" and facts["bf16_products"]:
        advice.append("MINT_DTYPE=float32 on a processor that multiplies bf16 in hardware: unset it for speed")
    if "mint-toolkit[fast]" in facts["kernels"]:
        advice.append(
            "this processor can run compiled kernels, which train 1.5 and sample 2 to 3 times as fast: "
            'pip install "mint-toolkit[fast]"'
        )
    if "MINT_KERNELS=torch" in facts["kernels"]:
        advice.append("MINT_KERNELS=torch where compiled kernels could run, which are faster: unset it")
    if facts["memory_available_bytes"] < 2 * 2**30:
        advice.append("less than 2 GiB of memory is free: close programs, or expect swapping")
    if "does not answer" in facts["hub"]:
        advice.append("without the hub: mint sft --offline, local folders, and models that are in the cache")
    if facts["versions"]["gguf"] == "not installed":
        advice.append('the packaged model needs gguf: pip install "mint-toolkit[offline]"')
    return problems, advice


def _print(
    facts: dict[str, Any], model_rows: list[tuple[str, str]], problems: list[str], advice: list[str], console: Console
) -> None:
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key.endswith("_bytes"):
            table.add_row(key.removesuffix("_bytes").replace("_", " "), f"{value / 2**30:.1f} GiB")
        elif key == "versions":
            table.add_row("versions", ", ".join(f"{name} {version}" for name, version in value.items()))
        elif key == "busy_cores":
            table.add_row("other programs", f"keep {value:.1f} cores busy")
        elif key not in ("other_distributions_named_mint", "bf16_products"):
            table.add_row(key.replace("_", " "), str(value))
    for label, text in model_rows:
        table.add_row(label, text)
    console.print(table, highlight=False)
    for problem in problems:
        console.print(f"[red]problem:[/red] {problem}", highlight=False)
    for hint in advice:
        console.print(f"[yellow]advice:[/yellow] {hint}", highlight=False)
    if not problems and not advice:
        console.print("[green]nothing to improve[/green]")
