"""What `resolve_model` hands out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the files of a base model are on this machine, and where they came from.

    name: what was asked for, unchanged; asking for it again gives the same model.
    path: an existing folder with config.json, *.safetensors and normally the tokenizer's files. Read only.
    origin: "folder" (given by the user), "cache" (Hugging Face cache), "hub" (downloaded just now), "package".
    revision: commit of the hub, or `distribution==version` of a package; None for a folder.
    note: one sentence for people.
    """

    name: str
    path: Path
    origin: Literal["folder", "cache", "hub", "package"]
    revision: str | None
    note: str


@dataclass(frozen=True, slots=True)
class LocalModel:
    """What of a base model is on this machine: a folder with config.json at least. `missing`: files it lacks to be loaded."""

    path: Path
    missing: tuple[str, ...]
