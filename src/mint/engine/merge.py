"""An adapter merged into a copy of its base's weight files: W' = W + (alpha / rank) B A in float32, rounded once.

One tensor is in memory at a time, so a model of any size can be merged. The files are therefore written by hand: the
safetensors library wants every tensor of a file at once. Names, shapes and stored dtypes stay those of the base.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mint.engine.backend import AdapterState
from mint.engine.lora import adapter_layout, flat_from_named, module_views
from mint.engine.models.weights import (
    EMBEDDING,
    UNEMBEDDING,
    WEIGHTS,
    WEIGHTS_INDEX,
    open_weights,
    read_config,
    read_json,
)
from mint.errors import InputError, UnsupportedError
from mint.types.params import LoraConfig

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by their names in safetensors


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written. eps: spacing at 1 of the coarsest dtype of a merged matrix. untied: the base has one matrix for
    embedding and unembedding, the merged model two."""

    eps: float
    untied: bool


@dataclass(frozen=True, slots=True, repr=False)
class _Update:
    """scale * b [out, rank] @ a [rank, in], float32."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True, repr=False)
class _Tensor:
    """A tensor to write: tensor `source` of an open file of the base, plus `update`. `stored`: a key of DTYPES."""

    name: str
    file: Any
    source: str
    stored: str
    shape: tuple[int, ...]
    update: _Update | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def make(self) -> Tensor:
        weight: Tensor = self.file.get_tensor(self.source)
        if self.update is None:
            return weight
        return torch.addmm(weight.float(), self.update.b, self.update.a, alpha=self.update.scale).to(self.dtype)


def merge_adapter(base: Path, folder: Path, lora: LoraConfig, state: AdapterState, *, shard_bytes: int) -> Merged:
    """Write config.json and the weight files of `base` with the adapter merged in into the existing `folder`.

    shard_bytes: the largest weight file; a larger tensor gets a file of its own.
    Raises CheckpointError where the adapter does not fit the base, UnsupportedError on a dtype that is not in DTYPES.
    """
    config = read_config(base)
    layout = adapter_layout(config, lora)
    flat_P = flat_from_named(layout, {name: torch.from_numpy(array) for name, array in state.tensors.items()})
    updates = {
        f"{module.name}.weight": _Update(*module_views(layout, flat_P, module), layout.scale)
        for module in layout.modules
    }
    untied = config.tied and lora.train_unembed
    tensors = _plan(base, updates, untied=untied)
    _write_config(base, folder, untied=untied)
    _write_weights(folder, tensors, shard_bytes)
    return Merged(max(torch.finfo(t.dtype).eps for t in tensors if t.update is not None), untied)


def _plan(base: Path, updates: dict[str, _Update], *, untied: bool) -> list[_Tensor]:
    file_of = open_weights(base)
    sources = {name: name for name in file_of}
    if untied:
        sources[UNEMBEDDING] = EMBEDDING
    if missing := sorted(updates.keys() - sources.keys()):
        raise InputError(f"the model's weight files hold no tensor {missing[0]!r}")
    tensors = []
    for name, source in sources.items():
        header = file_of[source].get_slice(source)
        if header.get_dtype() not in DTYPES:
            raise UnsupportedError(
                f"tensor {name!r} is stored as {header.get_dtype()}; merging knows {', '.join(DTYPES)}. "
                "Export the adapter without merging"
            )
        shape = tuple(header.get_shape())
        tensors.append(_Tensor(name, file_of[source], source, header.get_dtype(), shape, updates.get(name)))
    return tensors


def _write_config(base: Path, folder: Path, *, untied: bool) -> None:
    name = "config.json"
    if untied:
        config = {**read_json(base / name), "tie_word_embeddings": False}
        (folder / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(base / name, folder / name)


def _write_weights(folder: Path, tensors: list[_Tensor], shard_bytes: int) -> None:
    # wide dtypes first: readers need each tensor's bytes to start at a multiple of its element size
    shards = list(_shards(sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize), shard_bytes))
    if len(shards) == 1:
        _write_file(folder / WEIGHTS, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        weight_map.update({tensor.name: file for tensor in shard})
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: list[_Tensor], shard_bytes: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    for tensor in tensors:
        if shard and sum(t.num_bytes for t in shard) + tensor.num_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write_file(path: Path, tensors: list[_Tensor]) -> None:
    """The safetensors format: length of the header (8 bytes, little-endian), the header as JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.stored, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.make().contiguous().view(-1).view(torch.uint8).numpy().data)
