"""Which Linears of a model an adapter wraps, decided by their paths.

    unembed   the output embedding
    attn      inside a layer of the decoder, below a module with "attn" or "attention" in its name
    mlp       anything else inside a layer, but routers of experts

A layer is what stands in a numbered list of the decoder (vision towers stand outside). GPT-2's Conv1D is a Linear with a
transposed weight. Experts that are stored as fused tensors are no Linears: they stay as they are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from mint.engine.lora import AdapterLayout, lay_out
from mint.errors import UnsupportedError
from mint.types.params import LoraConfig

logger = logging.getLogger("mint")

Group = Literal["attn", "mlp", "unembed"]
ROUTERS = {"gate", "router", "shared_expert_gate"}


@dataclass(frozen=True, slots=True, repr=False)
class FoundLinear:
    name: str
    group: Group
    module: nn.Module
    num_in: int
    num_out: int


def find_linears(model: Any) -> list[FoundLinear]:
    """In the order of the model's modules."""
    head, inside = model.get_output_embeddings(), set(model.get_decoder().modules())
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        group = "unembed" if module is head else group_of(name) if module in inside else None
        if group is not None:
            num_out, num_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.t().shape
            found.append(FoundLinear(name, group, module, num_in, num_out))
    return found


def num_fused_experts(model: Any) -> int:
    """Matrices of experts that lie in one tensor, [experts, out, in]: no adapter wraps them."""
    fused = (
        parameter
        for module in model.get_decoder().modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3
    )
    return sum(len(parameter) for parameter in fused)


def group_of(name: str) -> Group | None:
    """attn, mlp or neither, of a Linear in the decoder."""
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if layer is None or not ROUTERS.isdisjoint(parts[layer:]):
        return None
    return "attn" if any("attn" in part or "attention" in part for part in parts[layer:-1]) else "mlp"


def choose_linears(linears: list[FoundLinear], lora: LoraConfig, architecture: str) -> AdapterLayout:
    """The layout of an adapter on the groups that `lora` asks for; says which of them has nothing to wrap.

    Raises UnsupportedError where none has.
    """
    asked = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    wanted = [group for group, wanted in asked.items() if wanted]
    empty = [f"train_{group}" for group in wanted if not any(linear.group == group for linear in linears)]
    if len(empty) == len(wanted):
        raise UnsupportedError(f"{architecture} has no Linear module for {', '.join(empty)}: there is nothing to train")
    if empty:
        logger.warning("%s has no Linear module for %s: the others are trained", architecture, ", ".join(empty))
    planned = [
        ((i, linear.name), linear.num_in, {linear.name: linear.num_out})
        for i, linear in enumerate(linears)
        if asked[linear.group]
    ]
    return lay_out(lora, planned)
