"""`mint models`: base models on this machine and how to get them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from mint import settings as settings_module
from mint.cli.common import JsonOption, command, make_console, print_json
from mint.errors import MintError

app = typer.Typer(no_args_is_help=True, help="Base models: list, pull, show.")

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or packaged model.")]


@app.command("list", epilog="Example: mint models list")
def list_models(as_json: JsonOption = False) -> None:
    """Packaged models and those in the Hugging Face cache."""
    console = make_console(stderr=as_json)
    with command(console):
        rows = [*_packaged(), *_cached()]
        if as_json:
            print_json(rows)
            return
        table = Table("model", "from", Column("on this machine", overflow="fold"), "size")
        for row in rows:
            here = row["path"] or "no; mint models pull fetches it"
            table.add_row(row["name"], row["origin"], here, _size(row["bytes"]))
        console.print(table)
        console.print("any other model of the hub: mint models pull OWNER/NAME", style="dim")


def _packaged() -> list[dict[str, Any]]:
    from mint.hub import PACKAGED_MODELS

    folder = settings_module.load().models_dir
    rows = []
    for name in PACKAGED_MODELS:
        found = sorted(folder.glob(f"{name}*/config.json"))
        place = found[0].parent if found else None
        rows.append({
            "name": name, "origin": "package", "path": str(place) if place else None,
            "bytes": _bytes(place) if place else None,
        })  # fmt: skip
    return rows


def _cached() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    rows = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        files = {file.file_name for revision in repo.revisions for file in revision.files}
        if repo.repo_type == "model" and "config.json" in files and any(f.endswith(".safetensors") for f in files):
            rows.append({
                "name": repo.repo_id, "origin": "hub cache", "path": str(repo.repo_path), "bytes": repo.size_on_disk
            })  # fmt: skip
    return rows


@app.command(epilog="Example: mint models pull Qwen/Qwen3-0.6B")
def pull(name: ModelArgument, as_json: JsonOption = False) -> None:
    """Fetch a model, so that later runs need no network."""
    from mint.hub import load_tokenizer, resolve_model

    console = make_console(stderr=as_json)
    with command(console):
        source = resolve_model(name)
        load_tokenizer(source)
        if as_json:
            print_json({"name": name, "path": str(source.path), "revision": source.revision, "note": source.note})
        else:
            console.print(f"{name}: {source.note}\n{source.path}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: mint models show SmolLM2-135M-Instruct")
def show(name: ModelArgument, as_json: JsonOption = False) -> None:
    """What a model is: architecture, size, context, chat template. Fetches it if need be."""
    from mint.hub import resolve_model

    console = make_console(stderr=as_json)
    with command(console):
        source = resolve_model(name)
        facts = {"name": name, "note": source.note, "path": str(source.path), **_facts(source.path)}
        facts["chat template"] = _template(name)
        if as_json:
            print_json(facts)
        else:
            _print_facts(facts, console)


def _facts(folder: Path) -> dict[str, Any]:
    import json

    from mint.engine.models.config import uncovered

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    gap = uncovered(config)
    text = config.get("text_config", config)
    names = {
        "num_hidden_layers": "layers", "hidden_size": "hidden size", "vocab_size": "vocabulary",
        "max_position_embeddings": "context", "tie_word_embeddings": "tied embeddings",
    }  # fmt: skip
    parameters, dtypes = _weights(folder)
    return {
        "architecture": ", ".join(config.get("architectures") or [str(config.get("model_type"))]),
        "runs on": "MinT's own decoder" if gap is None else f"transformers (the decoder does not cover {gap})",
        "parameters": parameters,
        "stored as": ", ".join(sorted(dtypes)),
        "bytes": _bytes(folder),
        **{label: text[key] for key, label in names.items() if key in text},
    }


def _weights(folder: Path) -> tuple[int, set[str]]:
    """Number of values in the weight files, and their dtypes; only the headers are read."""
    from safetensors import safe_open

    count, dtypes = 0, set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            for key in opened.keys():  # noqa: SIM118  # not a mapping
                part = opened.get_slice(key)
                size = 1
                for length in part.get_shape():
                    size *= length
                count += size
                dtypes.add(part.get_dtype())
    return count, dtypes


def _template(name: str) -> str:
    from mint.chat import get_renderer
    from mint.hub import load_tokenizer

    try:
        renderer = get_renderer(load_tokenizer(name))
        return f"{renderer.settings['family']}{', can think' if renderer.can_think else ''}"
    except MintError as error:
        return f"none that MinT renders ({error})"


def _print_facts(facts: dict[str, Any], console: Console) -> None:
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        shown = _size(value) if key == "bytes" else f"{value:,}" if type(value) is int else str(value)
        table.add_row("size on disk" if key == "bytes" else key, shown)
    console.print(table)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f} MB"
