"""LoRA adapters: which modules they touch, their float32 parameters, and the low-rank part of forward and backward.

Source: LoRA (arXiv 2106.09685); initialisation and names follow PEFT, scale = alpha / rank with alpha 32 the Tinker
protocol. Modules that share an input ("site") are computed together: their A matrices are stacked, their B matrices form
a block diagonal. Shape letters: T rows, I inputs and O outputs of a site, R ranks of a site's modules together, P all
parameters of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mint.engine.models.config import DecoderConfig
from mint.errors import CheckpointError
from mint.types.params import LORA_ALPHA, LoraConfig

QKV, O, GATE_UP, DOWN, UNEMBED = "qkv", "o", "gate_up", "down", "unembed"  # noqa: E741
Site = tuple[int, str]  # (layer, site name); the unembedding has layer -1
UNEMBED_SITE: Site = (-1, UNEMBED)


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One wrapped Linear. `row` is where its outputs start in the site's; offsets count in the flat parameters."""

    name: str
    num_in: int
    num_out: int
    row: int
    a_offset: int
    b_offset: int


@dataclass(frozen=True, slots=True)
class LoraSite:
    site: Site
    modules: tuple[LoraModule, ...]
    num_in: int
    num_out: int


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where every module's A [rank, in] and B [out, rank] lie in one flat float32 vector of `size` values."""

    config: LoraConfig
    sites: tuple[LoraSite, ...]
    size: int

    @property
    def rank(self) -> int:
        return self.config.rank

    @property
    def scale(self) -> float:
        return LORA_ALPHA / self.config.rank

    @property
    def modules(self) -> list[LoraModule]:
        return [module for site in self.sites for module in site.modules]


def adapter_layout(model: DecoderConfig, lora: LoraConfig) -> AdapterLayout:
    """The modules that train_attn, train_mlp and train_unembed choose, in a fixed order."""
    hidden, width = model.hidden_size, model.intermediate_size
    attn = [
        (QKV, hidden, {"q_proj": model.q_size, "k_proj": model.kv_size, "v_proj": model.kv_size}, "self_attn"),
        (O, model.q_size, {"o_proj": hidden}, "self_attn"),
    ]
    mlp = [
        (GATE_UP, hidden, {"gate_proj": width, "up_proj": width}, "mlp"),
        (DOWN, width, {"down_proj": hidden}, "mlp"),
    ]
    per_layer = (attn if lora.train_attn else []) + (mlp if lora.train_mlp else [])
    planned: list[tuple[Site, int, Mapping[str, int]]] = [
        ((layer, site), num_in, {f"model.layers.{layer}.{part}.{name}": size for name, size in outs.items()})
        for layer in range(model.num_layers)
        for site, num_in, outs, part in per_layer
    ]
    if lora.train_unembed:
        planned.append((UNEMBED_SITE, hidden, {"lm_head": model.vocab_size}))
    return lay_out(lora, planned)


def lay_out(lora: LoraConfig, planned: Sequence[tuple[Site, int, Mapping[str, int]]]) -> AdapterLayout:
    """The sites (site, inputs, outputs of each module by name) one after the other in the flat vector."""
    rank = lora.rank
    sites, offset = [], 0
    for site, num_in, outs in planned:
        a_offset, b_offset, row, modules = offset, offset + len(outs) * rank * num_in, 0, []
        for name, num_out in outs.items():
            modules.append(LoraModule(name, num_in, num_out, row, a_offset, b_offset))
            a_offset, b_offset, row = a_offset + rank * num_in, b_offset + num_out * rank, row + num_out
        sites.append(LoraSite(site, tuple(modules), num_in, row))
        offset = b_offset
    return AdapterLayout(lora, tuple(sites), offset)


def module_views(layout: AdapterLayout, flat_P: Tensor, module: LoraModule) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of one module as views of a flat vector."""
    rank = layout.rank
    a = flat_P[module.a_offset : module.a_offset + rank * module.num_in].view(rank, module.num_in)
    b = flat_P[module.b_offset : module.b_offset + module.num_out * rank].view(module.num_out, rank)
    return a, b


def stacked_a(layout: AdapterLayout, flat_P: Tensor, site: LoraSite) -> Tensor:
    """A [ranks of all modules, in] of a site as a view of a flat vector."""
    first, total = site.modules[0], layout.rank * len(site.modules)
    return flat_P[first.a_offset : first.a_offset + total * site.num_in].view(total, site.num_in)


def initial_parameters(layout: AdapterLayout, seed: int) -> Tensor:
    """A uniform in +-1/sqrt(in) (PEFT's kaiming_uniform with a = sqrt 5), B zero. The same on every machine."""
    generator = torch.Generator().manual_seed(seed % 2**64)
    flat_P = torch.zeros(layout.size, dtype=torch.float32)
    for module in layout.modules:
        bound = module.num_in**-0.5
        module_views(layout, flat_P, module)[0].uniform_(-bound, bound, generator=generator)
    return flat_P


@dataclass(frozen=True, slots=True, repr=False)
class SiteWeights:
    """What a pass multiplies with, in the base dtype: stacked A, block-diagonal B with the scale folded in."""

    a_RI: Tensor
    b_OR: Tensor


AdapterWeights = Mapping[Site, SiteWeights]
# The same for whatever computes: torch's decoder takes AdapterWeights, the compiled one a PackedAdapter.
AnyAdapter = Mapping[Site, Any]


def adapter_weights(layout: AdapterLayout, flat_P: Tensor, dtype: torch.dtype) -> AdapterWeights:
    """A fresh copy; it does not follow later changes of `flat_P`, so a sampler may keep it."""
    rank, weights = layout.rank, {}
    for site in layout.sites:
        a_RI = stacked_a(layout, flat_P, site).to(dtype, copy=True)
        b_OR = flat_P.new_zeros((site.num_out, len(a_RI)), dtype=dtype)
        for i, module in enumerate(site.modules):
            block = b_OR[module.row : module.row + module.num_out, i * rank : (i + 1) * rank]
            torch.mul(module_views(layout, flat_P, module)[1], layout.scale, out=block)
        weights[site.site] = SiteWeights(a_RI, b_OR)
    return weights


class AdapterGradient:
    """The accumulating float32 gradient of one adapter."""

    def __init__(self, layout: AdapterLayout, device: torch.device) -> None:
        self.flat_P = torch.zeros(layout.size, dtype=torch.float32, device=device)
        self._scale = layout.scale
        # of every site: A of its modules, stacked, and of each module which part of the dense B it is, and B
        self._sites: dict[Site, tuple[Tensor, list[tuple[slice, slice, Tensor]]]] = {}
        for site in layout.sites:
            blocks = []
            for i, module in enumerate(site.modules):
                ranks = slice(i * layout.rank, (i + 1) * layout.rank)
                outs = slice(module.row, module.row + module.num_out)
                blocks.append((ranks, outs, module_views(layout, self.flat_P, module)[1]))
            self._sites[site.site] = stacked_a(layout, self.flat_P, site), blocks

    def add(self, site: Site, grad_a_RI: Tensor, grad_b_RO: Tensor) -> None:
        """grad_b_RO: gradient by the scaled, transposed, dense B; only its diagonal blocks belong to parameters."""
        a_RI, blocks = self._sites[site]
        a_RI.add_(grad_a_RI)
        for ranks, outs, grad_b in blocks:
            grad_b.add_(grad_b_RO[ranks, outs].t(), alpha=self._scale)


@dataclass(frozen=True, slots=True, repr=False)
class Segment:
    """Rows [start, end) of a packed row that one run owns; no adapter: the base model; no gradient: forward only."""

    start: int
    end: int
    weights: AnyAdapter | None = None
    gradient: AdapterGradient | None = None

    def at(self, site: Site) -> SiteWeights | None:
        return self.weights.get(site) if self.weights is not None else None

    def rows(self, row: Tensor) -> Tensor:
        """Its part of a packed row; where that is all, no view is made: in a decode step a view costs as much as a product."""
        return row if self.start == 0 and self.end == len(row) else row[self.start : self.end]


def lora_forward(x_TI: Tensor, y_TO: Tensor, segments: list[Segment], site: Site) -> None:
    """y += (x A^T) B^T over each segment that adapts this site."""
    for segment in segments:
        if (w := segment.at(site)) is not None:
            segment.rows(y_TO).addmm_(segment.rows(x_TI) @ w.a_RI.t(), w.b_OR.t())


def lora_backward(grad_TO: Tensor, x_TI: Tensor, grad_x_TI: Tensor | None, segments: list[Segment], site: Site) -> None:
    """Add A's and B's gradients to the segments' and, where wanted, the low-rank part of the input's gradient."""
    for segment in segments:
        if (w := segment.at(site)) is None:
            continue
        grad, x = segment.rows(grad_TO), segment.rows(x_TI)
        grad_u_TR = grad @ w.b_OR
        if segment.gradient is not None:
            u_TR = x @ w.a_RI.t()
            segment.gradient.add(site, grad_u_TR.t() @ x, u_TR.t() @ grad)
        if grad_x_TI is not None:
            segment.rows(grad_x_TI).addmm_(grad_u_TR, w.a_RI)


def named_tensors(layout: AdapterLayout, flat_P: Tensor) -> dict[str, Tensor]:
    """Copies under PEFT's names: base_model.model.MODULE.lora_A.weight [rank, in] and lora_B.weight [out, rank]."""
    tensors = {}
    for module in layout.modules:
        a, b = module_views(layout, flat_P, module)
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = a.detach().cpu().clone()
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = b.detach().cpu().clone()
    return tensors


def flat_from_named(layout: AdapterLayout, tensors: Mapping[str, Tensor]) -> Tensor:
    """The inverse of `named_tensors`. Raises CheckpointError naming a tensor that is missing, spare or misshapen."""
    flat_P = torch.empty(layout.size, dtype=torch.float32)
    left = set(tensors)
    for module in layout.modules:
        for part, view in zip(("lora_A", "lora_B"), module_views(layout, flat_P, module), strict=True):
            name = f"base_model.model.{module.name}.{part}.weight"
            given = tensors.get(name)
            if given is None or given.shape != view.shape:
                found = "no such tensor" if given is None else f"shape {list(given.shape)}"
                raise CheckpointError(f"adapter weights: {name} should have shape {list(view.shape)}, found {found}")
            view.copy_(given)
            left.discard(name)
    if left:
        raise CheckpointError(
            f"adapter weights: {len(left)} tensors belong to no trained module, e.g. {sorted(left)[0]}"
        )
    return flat_P
