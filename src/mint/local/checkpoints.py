"""Checkpoints on disk: written aside, flushed, renamed; verified before they are believed. Knows numpy, not torch.

A checkpoint is a folder RUN/weights/NAME or RUN/sampler_weights/NAME with

    adapter_model.safetensors, adapter_config.json   the adapter in PEFT's format, as PEFT reads it
    optimizer.safetensors                            training only: Adam's moments by the adapter's names
    manifest.json                                    everything else, the SHA-256 of each file, and its own digest

Folders whose name starts with a dot are no checkpoints: ".new-*" is being written, ".deleted-*" removed. ".old-NAME" is
what an overwrite replaces, and stands for NAME while there is no folder of that name. Readers change nothing; what a
killed process left is tidied by the next save of the run, which only the process that made it can train and save.
Deleting, and setting the expiry, may come from any process at any time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mint.engine.backend import AdapterState, RunPlan
from mint.errors import CheckpointError, CheckpointNotFoundError
from mint.types import Checkpoint, LoraConfig, ParsedCheckpointTinkerPath
from mint.types.checkpoints import CheckpointType
from mint.types.params import LORA_ALPHA

T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
ADAPTER, ADAPTER_CONFIG, OPTIMIZER = "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"


class Manifest(BaseModel):
    """What a checkpoint says of itself. `modules`: the wrapped Linears, by Hugging Face name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    path: str
    checkpoint_type: CheckpointType
    time: datetime
    base_model: str
    lora: LoraConfig
    seed: int
    modules: list[str]
    plan: RunPlan
    step: int
    user_metadata: dict[str, str]
    expires_at: datetime | None = None
    sha256: dict[str, str] = {}
    digest: str = ""


def peft_config(manifest: Manifest) -> dict[str, Any]:
    """adapter_config.json for the adapter of `manifest`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base_model,
        "r": manifest.lora.rank,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in manifest.modules}),
        "inference_mode": True,
    }


def write_checkpoint(folder: Path, manifest: Manifest, state: AdapterState, *, overwrite: bool) -> None:
    """Atomic: after it returns the checkpoint is on disk; if it does not, whatever stood there before still stands."""
    _tidy(folder)
    if folder.exists() and not overwrite and not _expired(folder, manifest.path):
        raise CheckpointError(f"checkpoint {manifest.path} exists; save under another name or with overwrite=True")
    fresh = folder.parent / f".new-{uuid.uuid4().hex}"
    fresh.mkdir(parents=True)
    try:
        _write_files(fresh, manifest, state)
        if folder.exists():
            _replace(folder, fresh)
        else:
            fresh.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def adapter_files(manifest: Manifest, state: AdapterState) -> dict[str, bytes]:
    """The two files of a PEFT adapter, by name."""
    return {
        ADAPTER: save(dict(state.tensors), metadata={"format": "pt"}),
        ADAPTER_CONFIG: json.dumps(peft_config(manifest), indent=2).encode(),
    }


def _write_files(fresh: Path, manifest: Manifest, state: AdapterState) -> None:
    sums: dict[str, str] = {}

    def write(name: str, content: bytes) -> None:
        (fresh / name).write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()

    for name, content in adapter_files(manifest, state).items():
        write(name, content)
    if manifest.checkpoint_type == "training":
        moments = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        write(OPTIMIZER, save({f"{kind}.{k}": v for kind, part in moments.items() for k, v in part.items()}))
    (fresh / MANIFEST).write_bytes(_signed(manifest.model_copy(update={"sha256": sums})))
    for path in fresh.iterdir():
        flush(path)
    flush(fresh)


def _signed(manifest: Manifest) -> bytes:
    return manifest.model_copy(update={"digest": _digest(manifest)}).model_dump_json(indent=2).encode()


def write_expiry(folder: Path, path: str, expires_at: datetime | None) -> None:
    """Replace the manifest alone, atomically. Raises as `read_manifest` does."""
    _unchanging(folder, path, lambda opened: _write_expiry(opened, path, expires_at))


def _write_expiry(opened: int, path: str, expires_at: datetime | None) -> None:
    content = _signed(_read_manifest(opened, path).model_copy(update={"expires_at": expires_at}))
    fresh = f".new-{uuid.uuid4().hex}"
    try:
        with open(fresh, "xb", opener=partial(os.open, mode=0o666, dir_fd=opened)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, MANIFEST, src_dir_fd=opened, dst_dir_fd=opened)
        os.fsync(opened)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=opened)


def _replace(folder: Path, fresh: Path) -> None:
    old = _old(folder)
    with contextlib.suppress(FileNotFoundError):  # another process deleted it meanwhile
        folder.rename(old)
    flush(folder.parent)
    fresh.rename(folder)
    flush(folder.parent)
    _remove(old)


def _old(folder: Path) -> Path:
    return folder.parent / f".old-{folder.name}"


def _tidy(folder: Path) -> None:
    """The writer's: finish or undo what a killed save or delete of this run left."""
    for left in [*folder.parent.glob(".new-*"), *folder.parent.glob(".deleted-*")]:
        _remove(left)
    old = _old(folder)
    if old.is_dir():
        if folder.exists():
            _remove(old)
        else:
            old.rename(folder)


def _remove(folder: Path) -> None:
    """As rmtree, where another process may be removing the same, or put a file (an expiry) there meanwhile."""
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise


def _expired(folder: Path, path: str) -> bool:
    try:
        read_manifest(folder, path)
    except CheckpointNotFoundError:
        return True
    except CheckpointError:
        pass
    return False


def locate(folder: Path) -> Path:
    """Where the checkpoint's files are: what an overwrite replaces stands in until the new one is there."""
    old = _old(folder)
    return old if not folder.is_dir() and old.is_dir() else folder


def names(parent: Path) -> list[str]:
    """Names of the checkpoints in a run's segment."""
    whole = {path.name for path in parent.glob("[!.]*")}
    return sorted(whole | {path.name.removeprefix(".old-") for path in parent.glob(".old-*")})


def delete_checkpoint(folder: Path, path: str) -> None:
    """Gone at once, then removed. Raises CheckpointNotFoundError."""
    if not locate(folder).is_dir():
        raise CheckpointNotFoundError(f"no checkpoint {path}; nothing was deleted")
    aside = []
    for place in (_old(folder), folder):  # what was replaced goes first, or it would stand in again
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if place.is_dir():
                aside.append(place.rename(folder.parent / f".deleted-{uuid.uuid4().hex}"))
    for place in aside:
        _remove(place)


def _unchanging(folder: Path, path: str, use: Callable[[int], T]) -> T:
    """What `use` makes of the checkpoint's open folder, used again where a save or delete replaced that meanwhile."""
    for _ in range(100):  # each a moment; a process that saves without a pause cannot keep up
        place = locate(folder)
        before = _stamp(place)
        try:
            with _opened(place, path) as opened:
                made = use(opened)
                if os.path.samestat(os.fstat(opened), place.stat()):
                    return made
        except (CheckpointError, CheckpointNotFoundError, FileNotFoundError):
            if locate(folder) == place and _stamp(place) == before:
                raise
    with _opened(locate(folder), path) as opened:
        return use(opened)


@contextlib.contextmanager
def _opened(place: Path, path: str) -> Iterator[int]:
    """A descriptor of the folder itself, whatever another process gives its name to meanwhile: files reached through it
    are of one save, some of them gone if that save was replaced."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(path) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stamp(place: Path) -> tuple[int, int] | None:
    try:
        found = (place / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_mtime_ns


def read_manifest(folder: Path, path: str) -> Manifest:
    """Raises CheckpointNotFoundError, or CheckpointError on one that MinT did not write or that is damaged."""
    return _unchanging(folder, path, lambda opened: _read_manifest(opened, path))


def _contents(opened: int, names: Sequence[str]) -> dict[str, bytes]:
    """Of those files that are there. All are opened before the first is read: a save that removes the folder meanwhile
    takes nothing away."""
    with contextlib.ExitStack() as stack:
        files = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                files[name] = stack.enter_context(open(name, "rb", opener=partial(os.open, dir_fd=opened)))
        return {name: file.read() for name, file in files.items()}


def _read_manifest(opened: int, path: str) -> Manifest:
    return _parse_manifest(_contents(opened, [MANIFEST]).get(MANIFEST), path)


def _not_found(path: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"no checkpoint {path}; list what there is with RestClient.list_user_checkpoints()")


def _parse_manifest(content: bytes | None, path: str) -> Manifest:
    if content is None:
        raise _not_found(path)
    try:
        raw = json.loads(content)
        number = raw["format"]
        if number != FORMAT:
            raise CheckpointError(f"checkpoint {path}: format {number}, this MinT reads format {FORMAT}")
        manifest = Manifest.model_validate_json(json.dumps(raw))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(
            f"checkpoint {path}: its manifest is damaged or from another program ({reason})"
        ) from None
    if manifest.digest != _digest(manifest):
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} was changed after it was written (its digest differs)")
    if manifest.path != path:
        raise CheckpointError(
            f"checkpoint {path}: its {MANIFEST} says that it is {manifest.path}; move the folder back"
        )
    if manifest.expires_at is not None and manifest.expires_at < datetime.now(UTC):
        raise CheckpointNotFoundError(f"checkpoint {path} expired at {manifest.expires_at.isoformat()}")
    return manifest


def _digest(manifest: Manifest) -> str:
    """Of everything the manifest says but this. Manifests from before kernels were recorded do not say that they are torch's."""
    unsaid = {"plan": {"kernels"}} if manifest.plan.kernels == "torch" else None
    return hashlib.sha256(
        manifest.model_copy(update={"digest": ""}).model_dump_json(exclude=unsaid).encode()
    ).hexdigest()


def read_checkpoint(folder: Path, path: str, *, optimizer: bool) -> tuple[Manifest, AdapterState]:
    """Every file is compared with its recorded SHA-256 before it is used."""
    return _unchanging(folder, path, lambda opened: _read_checkpoint(opened, path, optimizer=optimizer))


def _read_checkpoint(opened: int, path: str, *, optimizer: bool) -> tuple[Manifest, AdapterState]:
    names = [ADAPTER, ADAPTER_CONFIG, *([OPTIMIZER] if optimizer else [])]
    contents = _contents(opened, [MANIFEST, *names])
    manifest = _parse_manifest(contents.get(MANIFEST), path)
    if optimizer and manifest.checkpoint_type != "training":
        raise CheckpointError(
            f"checkpoint {path} holds sampler weights only, no optimizer; load it without the optimizer"
        )
    for name in names:
        if hashlib.sha256(contents.get(name, b"")).hexdigest() != manifest.sha256.get(name):
            raise CheckpointError(
                f"checkpoint {path}: {name} is missing or damaged (its SHA-256 differs from the manifest's)"
            )
    try:
        tensors = load(contents[ADAPTER])
        moments = load(contents[OPTIMIZER]) if optimizer else {}
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None
    first, second = (_strip(moments, f"{kind}.") for kind in ("exp_avg", "exp_avg_sq"))
    return manifest, AdapterState(tensors, first, second, manifest.step)


def _strip(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def describe(folder: Path, path: str) -> Checkpoint:
    """Raises as `read_manifest` does."""
    return _unchanging(folder, path, lambda opened: _describe(opened, path))


def _describe(opened: int, path: str) -> Checkpoint:
    manifest = _read_manifest(opened, path)
    return Checkpoint(
        checkpoint_id=ParsedCheckpointTinkerPath.from_tinker_path(path).checkpoint_id,
        checkpoint_type=manifest.checkpoint_type,
        time=manifest.time,
        tinker_path=path,
        size_bytes=sum(os.stat(name, dir_fd=opened).st_size for name in os.listdir(opened) if name[0] != "."),
        user_metadata=manifest.user_metadata,
        expires_at=manifest.expires_at,
    )


def flush(path: Path) -> None:
    """Return when what was written to a file, or what a folder lists, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
