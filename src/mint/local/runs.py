"""Runs as folders under MINT_HOME/runs: run.json, metrics.jsonl and the checkpoints. Listings read the folders.

Ownership is checked here and nowhere else: whatever is asked for by name goes through `RunStore.record`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mint.errors import CheckpointError, CheckpointNotFoundError
from mint.local import checkpoints
from mint.types import Checkpoint, LoraConfig, ParsedCheckpointTinkerPath, TrainingRun
from mint.types.checkpoints import SEGMENTS, is_run_id

logger = logging.getLogger("mint")

RUN_FILE, METRICS_FILE = "run.json", "metrics.jsonl"


class RunRecord(BaseModel):
    """What a run is, as written when it was created."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    tenant: str
    base_model: str
    lora: LoraConfig
    seed: int
    created: datetime
    user_metadata: dict[str, str]


class RunStore:
    """All runs of one tenant. `:` in a run's id is `_` in its folder's name."""

    def __init__(self, runs_dir: Path, tenant: str) -> None:
        self._runs_dir, self._tenant = runs_dir, tenant

    def folder(self, run_id: str) -> Path:
        return self._runs_dir / run_id.replace(":", "_")

    def create(self, record: RunRecord) -> None:
        folder = self.folder(record.run_id)
        folder.mkdir(parents=True)
        try:
            (folder / RUN_FILE).write_text(record.model_dump_json(indent=2), encoding="utf-8")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def record(self, run_id: str) -> RunRecord:
        """Raises CheckpointNotFoundError where there is no such run, or it is another tenant's."""
        record = _read_record(self.folder(run_id) / RUN_FILE) if is_run_id(run_id) else None
        if record is None or record.run_id != run_id or record.tenant != self._tenant:
            raise CheckpointNotFoundError(f"no run {run_id!r}; list what there is with RestClient.list_training_runs()")
        return record

    def records(self) -> list[RunRecord]:
        """The newest first."""
        found = [(path.parent, _read_record(path)) for path in self._runs_dir.glob(f"*/{RUN_FILE}")]
        own = [
            r for folder, r in found if r is not None and r.tenant == self._tenant and folder == self.folder(r.run_id)
        ]
        return sorted(own, key=lambda record: record.created, reverse=True)

    def checkpoint_folder(self, parsed: ParsedCheckpointTinkerPath) -> Path:
        self.record(parsed.training_run_id)
        return self.folder(parsed.training_run_id) / SEGMENTS[parsed.checkpoint_type] / parsed.name

    def checkpoints(self, run_id: str) -> Iterator[Checkpoint]:
        """The run's checkpoints, newest first; what is half-written, damaged or expired is no checkpoint."""
        self.record(run_id)
        found = []
        for segment in SEGMENTS.values():
            parent = self.folder(run_id) / segment
            for name in checkpoints.names(parent):
                path = f"tinker://{run_id}/{segment}/{name}"
                try:
                    found.append(checkpoints.describe(parent / name, path))
                except CheckpointNotFoundError:
                    continue  # expired
                except CheckpointError as error:
                    logger.warning("not listed: %s", error)
        yield from sorted(found, key=lambda checkpoint: checkpoint.time, reverse=True)

    def training_run(self, record: RunRecord) -> TrainingRun:
        saved = list(self.checkpoints(record.run_id))
        metrics = self.folder(record.run_id) / METRICS_FILE
        touched = [record.created, *(c.time for c in saved)]
        if metrics.is_file():
            touched.append(datetime.fromtimestamp(metrics.stat().st_mtime, UTC))
        return TrainingRun(
            training_run_id=record.run_id,
            base_model=record.base_model,
            model_owner=record.tenant,
            lora_rank=record.lora.rank,
            last_request_time=max(touched),
            last_checkpoint=next((c for c in saved if c.checkpoint_type == "training"), None),
            last_sampler_checkpoint=next((c for c in saved if c.checkpoint_type == "sampler"), None),
            user_metadata=record.user_metadata,
        )

    def append_metrics(self, run_id: str, records: list[dict[str, Any]]) -> None:
        """All of them, a line each, or, with the OSError, none."""
        rest = "".join(json.dumps(record) + "\n" for record in records).encode()
        with (self.folder(run_id) / METRICS_FILE).open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(before)
                raise


def _read_record(path: Path) -> RunRecord | None:
    """None where there is no run or its file is not one of ours."""
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
