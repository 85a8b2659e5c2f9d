"""Names and records of sessions, runs and checkpoints. Source: Tinker protocol, paths and management types. No torch."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from mint.errors import InputError

CheckpointType = Literal["training", "sampler"]
SEGMENTS: dict[CheckpointType, str] = {"training": "weights", "sampler": "sampler_weights"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,239}")  # room for a prefix in a file name
_RUN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-]{0,239}")


def is_run_id(value: object) -> bool:
    """Whether it can be the id of a run: such a name cannot leave the folder of runs."""
    return isinstance(value, str) and _RUN.fullmatch(value) is not None


def check_checkpoint_name(name: object) -> str:
    """A checkpoint name as given, or InputError: 1-240 of A-Z a-z 0-9 _ - . and no leading dot or dash."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"checkpoint name {name!r}: use 1 to 240 letters, digits, '_', '-' or '.', starting with a letter, digit or '_'"
        )
    return name


class ParsedCheckpointTinkerPath(NamedTuple):
    """`tinker://RUN/{weights,sampler_weights}/NAME` taken apart; `mint://` is accepted on input."""

    training_run_id: str
    checkpoint_type: CheckpointType
    name: str

    @classmethod
    def from_tinker_path(cls, path: object) -> ParsedCheckpointTinkerPath:
        """Raises InputError on any other form; the parts cannot leave the folder of their run."""
        expected = "a checkpoint path has the form tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME"
        if not isinstance(path, str):
            raise InputError(f"checkpoint path {path!r}: {expected}")
        scheme, _, rest = path.partition("://")
        parts = rest.split("/")
        kinds = {segment: kind for kind, segment in SEGMENTS.items()}
        if scheme not in ("tinker", "mint") or len(parts) != 3 or parts[1] not in kinds or not is_run_id(parts[0]):
            raise InputError(f"checkpoint path {path!r}: {expected}")
        return cls(parts[0], kinds[parts[1]], check_checkpoint_name(parts[2]))

    @property
    def checkpoint_id(self) -> str:
        """`weights/NAME` or `sampler_weights/NAME`."""
        return f"{SEGMENTS[self.checkpoint_type]}/{self.name}"

    @property
    def tinker_path(self) -> str:
        return f"tinker://{self.training_run_id}/{self.checkpoint_id}"


class Checkpoint(BaseModel):
    model_config = ConfigDict(frozen=True)

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class TrainingRun(BaseModel):
    model_config = ConfigDict(frozen=True)

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool = True
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class Cursor(BaseModel):
    model_config = ConfigDict(frozen=True)

    offset: int
    limit: int
    total_count: int


class TrainingRunsResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    training_runs: list[TrainingRun]
    cursor: Cursor


class CheckpointsListResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class GetSessionResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ListSessionsResponse(BaseModel):
    model_config = ConfigDict(frozen=True)

    sessions: list[str]


class GetSamplerResponse(BaseModel):
    """What a sampling client samples from; `model_path` None: a base model or an unlisted snapshot."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    sampler_id: str
    base_model: str
    model_path: str | None = None


class WeightsInfoResponse(BaseModel):
    """What is needed to rebuild a run of the same shape from a checkpoint."""

    model_config = ConfigDict(frozen=True)

    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    user_metadata: dict[str, str] | None = None
