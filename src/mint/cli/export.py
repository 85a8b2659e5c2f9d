"""A checkpoint as files that other programs load: a PEFT adapter, or a whole model with the adapter merged in.

Written aside, read back into a fresh model, compared with the checkpoint, and only then given its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mint import settings as settings_module
from mint.cli.common import JsonOption, checkpoint_named, command, make_console
from mint.client.connect import EMBEDDED_TENANT, make_backend
from mint.engine.backend import AdapterState, FloatArray, drain
from mint.errors import CheckpointError, InputError, MintError, OperationError, UnsupportedError
from mint.hub import ModelSource, load_tokenizer, resolve_model
from mint.hub.folders import tokenizer_files
from mint.local.checkpoints import ADAPTER, Manifest, adapter_files, flush, peft_config, read_checkpoint
from mint.local.runs import RunStore
from mint.settings import Settings
from mint.types import LoraConfig, ParsedCheckpointTinkerPath

if TYPE_CHECKING:
    from mint.engine.merge import Merged

GENERATION_CONFIG = "generation_config.json"
SHARD_BYTES = 5 * 10**9
PROBE_TOKENS = 64
PROBE = (
    "user: In three short steps, how do I make tea?\n"
    "assistant: 1. Boil 250 ml of water. 2. Pour it over the leaves and wait for 4 minutes. "
    "3. Take the leaves out; add milk or lemon if you like.\n\ndef double(x):\n    return 2 * x\n"
)
SAME_FILES = 1e-6  # nats: the same numbers through the same arithmetic
SAME_MODEL = 1e-4  # nats: one model computed in two ways in float32 (docs/numerics.md)
# Rounding moves a merged weight by up to half the spacing `eps` of its dtype. In bf16 (eps 1/128) that moved SmolLM2's
# logprobs by 0.02 to 0.04 nats on average; ROUNDING * eps is three times as much.
ROUNDING = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """Means of |logprob difference| over the tokens of a fixed text, in nats, computed in float32.

    effect: base against checkpoint. difference: checkpoint against what was exported, at most `allowed`.
    """

    tokens: int
    effect: float
    difference: float
    allowed: float


@dataclass(frozen=True, slots=True)
class ExportReport:
    """files: bytes by name. untied: the merged model has an unembedding of its own, its base uses the embedding.
    usage: the lines of Python that load it."""

    checkpoint: str
    base_model: str
    folder: Path
    merged: bool
    untied: bool
    files: dict[str, int]
    probe: Probe
    usage: str

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "folder": str(self.folder)}, indent=2)

    def __str__(self) -> str:
        probe, kind = self.probe, "merged model" if self.merged else "PEFT adapter"
        lines = [f"{kind} of {self.checkpoint} in {self.folder}, {sum(self.files.values()) / 1e6:,.1f} MB"]
        lines += [f"  {name}: {size:,} bytes" for name, size in self.files.items()]
        if self.untied:
            lines.append("the base uses its embedding as unembedding; the merged model has both, as the adapter needs")
        lines.append(
            f"read back and compared on {probe.tokens} tokens: mean |logprob difference| to the checkpoint "
            f"{probe.difference:.2g} nats, allowed {probe.allowed:.2g}; the adapter's own effect is {probe.effect:.2g}"
        )
        return "\n".join([*lines, "", self.usage])


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="tinker://RUN/weights/NAME, its sampler_weights, or the folder of a run.")
    ],
    folder: Annotated[Path, typer.Argument(help="Where to write; must not exist yet, or be empty.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model, with the adapter merged in.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a PEFT adapter, or with --merged as a Hugging Face model; checked before it is there."""
    with command(make_console(stderr=True)):
        report = export_checkpoint(checkpoint_named(checkpoint), folder, merged=merged)
    typer.echo(report.to_json() if as_json else str(report))


def export_checkpoint(path: str, folder: Path, *, merged: bool = False, shard_bytes: int = SHARD_BYTES) -> ExportReport:
    """Write the checkpoint `path` of MINT_HOME into `folder`, which does not exist yet or is empty.

    merged: False: adapter, tokenizer and model card; the base model is named, not copied. True: base with the adapter
        merged in, in the dtypes that the base is stored in; weight files of at most `shard_bytes`.
    Needs memory for the base model in float32: what was written is read back and compared on a short text.
    Raises InputError (path, folder), CheckpointNotFoundError, CheckpointError (a damaged checkpoint, or the export
    computes something else), UnsupportedError, OperationError (disk), and what `resolve_model` raises; `folder` is then
    as it was.
    """
    target = _free_folder(folder)
    settings = dataclasses.replace(settings_module.load(), dtype="float32")
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
    saved = RunStore(settings.runs_dir, EMBEDDED_TENANT).checkpoint_folder(parsed)
    manifest, state = read_checkpoint(saved, parsed.tinker_path, optimizer=False)
    source = resolve_model(manifest.base_model, settings=settings)
    tokenizer = load_tokenizer(source)
    tokens = tuple(tokenizer.encode(PROBE)[:PROBE_TOKENS])
    base, tuned = _logprobs(source.path, source.name, settings, tokens, None, (manifest.lora, state))
    effect = float(np.abs(tuned - base).mean())
    untied = False
    with _written_aside(target) as fresh:
        for file in tokenizer_files(source.path):
            shutil.copyfile(file, fresh / file.name)
        if merged:
            made = _write_merged(source.path, fresh, manifest, state, shard_bytes)
            (found,) = _logprobs(fresh, "the merged model", settings, tokens, None)
            # what rounding explains, and never so much that the result is as close to the base as to the checkpoint
            allowed = SAME_MODEL + min(ROUNDING * made.eps, effect / 2)
            untied = made.untied
        else:
            for name, content in adapter_files(manifest, state).items():
                (fresh / name).write_bytes(content)
            read_back = AdapterState(load_file(fresh / ADAPTER))
            (found,) = _logprobs(source.path, source.name, settings, tokens, (manifest.lora, read_back))
            allowed = SAME_FILES
        probe = Probe(len(tokens), effect, float(np.abs(found - tuned).mean()), allowed)
        _check(probe, manifest.path, merged=merged)
        _check_tokenizer(tokenizer, ModelSource(source.name, fresh, "folder", None, ""))
        (fresh / "README.md").write_text(_model_card(target.name, manifest, source, merged=merged), encoding="utf-8")
    files = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    usage = _usage(str(target), source, merged=merged)
    return ExportReport(manifest.path, manifest.base_model, target, merged, untied, files, probe, usage)


def _free_folder(folder: Path) -> Path:
    target = folder.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; an export overwrites nothing, give a new name")
    return target


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that gets its name when the block ends; a block that fails leaves nothing."""
    fresh = target.parent / f".new-{target.name}-{uuid.uuid4().hex}"
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in [*fresh.iterdir(), fresh]:
            flush(path)
        fresh.rename(target)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        # safetensors reports a full disk as an error of its own
        if isinstance(error, (OSError, SafetensorError)) and not isinstance(error, MintError):
            raise OperationError(
                f"{target} could not be written: {error}. Nothing was left behind; make room there or give another place"
            ) from error
        raise


def _logprobs(
    folder: Path,
    name: str,
    settings: Settings,
    tokens: tuple[int, ...],
    *adapters: tuple[LoraConfig, AdapterState] | None,
) -> list[FloatArray]:
    """Of every token after the first, under a fresh model of `folder` with each adapter (None: without)."""
    scores = []
    with contextlib.closing(make_backend(folder, name, settings)) as backend:
        if max(tokens) >= backend.limits.vocab_size:
            raise InputError(
                f"the tokenizer of {name!r} writes token {max(tokens)}, its model knows {backend.limits.vocab_size} "
                "tokens; give it the tokenizer that belongs to it"
            )
        for adapter in adapters:
            handle = None if adapter is None else backend.add_snapshot(*adapter)
            logprobs = drain(backend.score_prompt(tokens, handle, 0)).logprobs
            scores.append(np.array(logprobs[1:], np.float32))
    return scores


def _write_merged(base: Path, fresh: Path, manifest: Manifest, state: AdapterState, shard_bytes: int) -> Merged:
    from mint.engine.merge import merge_adapter

    if (base / GENERATION_CONFIG).is_file():
        shutil.copyfile(base / GENERATION_CONFIG, fresh / GENERATION_CONFIG)
    return merge_adapter(base, fresh, manifest.lora, state, shard_bytes=shard_bytes)


def _check(probe: Probe, path: str, *, merged: bool) -> None:
    if probe.difference <= probe.allowed:  # false for NaN
        return
    advice = "What is read back is not what was written: check the disk, then try again"
    if merged:
        advice = (
            "A merged weight is rounded to the dtype that the base is stored in, which can swallow an adapter that "
            "changes little: export without --merged, where nothing is rounded, or train longer"
        )
    raise CheckpointError(
        f"{path}: what was exported does not compute what the checkpoint does: on {probe.tokens} tokens logprobs differ "
        f"by {probe.difference:.2g} nats on average, allowed {probe.allowed:.2g} (the adapter's own effect is "
        f"{probe.effect:.2g}). Nothing was written. {advice}"
    )


def _check_tokenizer(original: Any, copied: ModelSource) -> None:
    copy = load_tokenizer(copied)
    if copy.encode(PROBE) != original.encode(PROBE) or copy.chat_template != original.chat_template:
        raise UnsupportedError(
            f"the tokenizer of {copied.name!r} needs more than its tokenizer files: a copy of them writes other tokens or "
            "has another chat template. Nothing was written; save it once with tokenizer.save_pretrained into the base's "
            "folder"
        )


def _usage(folder: str, source: ModelSource, *, merged: bool) -> str:
    """Python that loads an export lying in `folder`."""
    here = json.dumps(folder)
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({here})"
    if merged:
        model = f"model = AutoModelForCausalLM.from_pretrained({here})"
        return "\n".join(["from transformers import AutoModelForCausalLM, AutoTokenizer", "", model, tokenizer])
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    match source.origin:
        case "package":
            imports.insert(0, "from mint.hub import resolve_model")
            base = f"resolve_model({json.dumps(source.name)}).path"
        case "folder":
            base = json.dumps(str(source.path))
        case "hub" | "cache":
            base = f"{json.dumps(_hub_repo(source))}, revision={json.dumps(source.revision)}"
    return "\n".join(
        [
            *imports,
            "",
            f"base = AutoModelForCausalLM.from_pretrained({base})",
            f"model = PeftModel.from_pretrained(base, {here})",
            tokenizer,
        ]
    )


def _hub_repo(source: ModelSource) -> str:
    return source.name.partition("@")[0]


def _model_card(name: str, manifest: Manifest, source: ModelSource, *, merged: bool) -> str:
    adapter = peft_config(manifest)
    base = f"{source.name} ({source.revision})" if source.revision else source.name
    facts = {
        "base model": base,
        "rank": adapter["r"],
        "alpha": adapter["lora_alpha"],
        "adapted modules": ", ".join(adapter["target_modules"]),
        "optimizer steps": manifest.step,
        "checkpoint": manifest.path,
    }
    metadata = [f"library_name: {'transformers' if merged else 'peft'}"]
    if source.origin in ("hub", "cache"):
        metadata.append(f"base_model: {_hub_repo(source)}")
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            f"# {name}",
            "",
            f"{'A model with a LoRA adapter merged in' if merged else 'A LoRA adapter'}, trained with MinT.",
            "",
            *(f"- {key}: {value}" for key, value in facts.items()),
            "",
            "Loading, in this folder:",
            "",
            "```python",
            _usage(".", source, merged=merged),
            "```",
            "",
        ]
    )
