"""How a base model is computed: by torch's operations, or by compiled kernels where model and processor are made for them.

Both sides are decoder, head, what they multiply an adapter with, its optimizer, and the sampler's passes; nobody else asks
which it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mint.engine.device import Device, processor_flags
from mint.engine.kernels.available import kernels_version, missing, unfit
from mint.engine.lora import AdapterLayout, AnyAdapter, Segment, adapter_weights
from mint.engine.models.config import DecoderConfig
from mint.engine.models.decoder import Decoder, PackedRow
from mint.engine.models.head import Derivative, Head, Targets
from mint.engine.models.packed_attention import PackedSequence
from mint.engine.models.weights import DecoderWeights
from mint.engine.optim import TORCH_OPTIMIZER, Optimizer
from mint.engine.plan import PassMemory, compiled_pass_memory, torch_pass_memory
from mint.engine.sampling.passes import Passes
from mint.engine.sampling.torch_passes import TorchPasses
from mint.engine.workspace import Workspace
from mint.errors import InputError
from mint.settings import Settings

logger = logging.getLogger("mint")

# several times as fast as AVX-512 for products of many rows; compiled kernels have not been run beside it
AMX_FLAG = "amx_bf16"


class AnyDecoder(Protocol):
    """See models/decoder.py. What `packed_attention` and `forward` make is for the decoder itself."""

    config: DecoderConfig
    ws: Workspace
    dtype: torch.dtype
    device: torch.device

    def packed_attention(self, sequences: Sequence[PackedSequence]) -> Any: ...

    def forward(
        self, row: PackedRow, attention: Any, *, keep: bool, recompute: int = 0
    ) -> Generator[None, None, tuple[Tensor, list[Any]]]: ...

    def backward(
        self, row: PackedRow, attention: Any, grad_TD: Tensor, kept: list[Any]
    ) -> Generator[None, None, None]: ...


class AnyHead(Protocol):
    """See models/head.py. rows_per_chunk: of which `logits` makes all at once."""

    rows_per_chunk: int

    def normalise(self, final_TD: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward_norm(self, grad_TD: Tensor, final_TD: Tensor, rstd: Tensor) -> Tensor: ...

    def logits_for(self, normed_CD: Tensor, segment: Segment) -> Tensor: ...

    def score(
        self,
        normed_TD: Tensor,
        targets: Targets,
        segment: Segment,
        derivative: Derivative | None = None,
        grad_normed_TD: Tensor | None = None,
    ) -> Generator[None, None, Tensor]: ...


@dataclass(frozen=True, slots=True, repr=False)
class Compute:
    """kernels: "torch" or what compiled them. weights_of: what passes multiply with, a copy of an adapter's flat parameters,
    for backward too where `back`. base_bytes: of the weights in memory."""

    kernels: str
    decoder: AnyDecoder
    head: AnyHead
    weights_of: Callable[[AdapterLayout, Tensor, bool], AnyAdapter]
    optimizer: Optimizer
    passes: Passes
    pass_memory: PassMemory
    base_bytes: int


def make_compute(config: DecoderConfig, weights: DecoderWeights, device: Device, settings: Settings) -> Compute:
    """Takes the weights over. Raises InputError where MINT_KERNELS asks for what cannot be."""
    reason = why_not_compiled(config, device, settings)
    if reason is None:
        return _compiled_compute(config, weights, device)
    if settings.kernels == "compiled":
        raise InputError(f"MINT_KERNELS=compiled: {reason}. Unset it to let MinT choose")
    if device.dtype == torch.bfloat16 and device.torch_device.type == "cpu":
        logger.info("compiled kernels are not used: %s", reason)
    return _torch_compute(config, weights, device, settings)


def why_not_compiled(config: DecoderConfig, device: Device, settings: Settings) -> str | None:
    """Why torch computes this model; None where compiled kernels do."""
    if (reason := why_not_here(device, settings)) is not None:
        return reason
    return unfit(config)


def why_not_here(device: Device, settings: Settings) -> str | None:
    """The same of any model."""
    flags = processor_flags()
    if (reason := missing(device.torch_device, device.dtype, flags)) is not None:
        return reason
    if settings.kernels is None and AMX_FLAG in flags:
        return f"torch multiplies with {AMX_FLAG}, these kernels cannot"
    return "MINT_KERNELS=torch" if settings.kernels == "torch" else None


def _torch_compute(config: DecoderConfig, weights: DecoderWeights, device: Device, settings: Settings) -> Compute:
    decoder = Decoder(config, weights, Workspace(device.torch_device))
    # a paused training pass keeps its buffers, so the sampler has its own
    sampling = Decoder(config, weights, Workspace(device.torch_device))
    return Compute(
        kernels="torch",
        decoder=decoder,
        head=Head(decoder),
        weights_of=lambda layout, flat_P, _: adapter_weights(layout, flat_P, device.dtype),
        optimizer=TORCH_OPTIMIZER,
        passes=TorchPasses(sampling, batch_invariant=settings.batch_invariant),
        pass_memory=torch_pass_memory(config, device.dtype.itemsize),
        base_bytes=weights.num_bytes(),
    )


def _compiled_compute(config: DecoderConfig, weights: DecoderWeights, device: Device) -> Compute:
    from mint.engine.kernels.adam import OPTIMIZER
    from mint.engine.kernels.adapter import SpareStorage, pack_adapter
    from mint.engine.kernels.decoder import CompiledDecoder
    from mint.engine.kernels.head import CompiledHead
    from mint.engine.kernels.rows import RowsModel
    from mint.engine.kernels.weights import PackedWeights
    from mint.engine.sampling.compiled_passes import CompiledPasses

    embed_VD, packed = weights.embed_VD, PackedWeights(config, weights)
    spares = SpareStorage()
    training, sampling = Workspace(device.torch_device), Workspace(device.torch_device)
    return Compute(
        kernels=kernels_version(),
        decoder=CompiledDecoder(config, embed_VD, packed, training),
        head=CompiledHead(config, packed, training),
        weights_of=lambda layout, flat_P, back: pack_adapter(
            layout, flat_P, config.num_layers, back=back, spares=spares
        ),
        optimizer=OPTIMIZER,
        passes=CompiledPasses(RowsModel(config, embed_VD, packed, sampling)),
        pass_memory=compiled_pass_memory(config, device.num_threads),
        base_bytes=embed_VD.nbytes + packed.num_bytes(),
    )
