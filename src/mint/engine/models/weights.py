"""Reading a dense decoder's weights from safetensors. Projections that share an input are stored as one matrix.

Weight shapes are [out, in]; the weights of norms are float32, as they are used. D hidden size, F MLP width, O width of q,
k and v together, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mint.engine.models.config import DecoderConfig, decoder_config
from mint.engine.models.linear import Linear
from mint.errors import InputError, ModelNotFoundError, UnsupportedError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(slots=True, repr=False)
class LayerWeights:
    input_norm_D: Tensor
    qkv: Linear  # [O, D]
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    o: Linear  # [D, heads x head_dim]
    mlp_norm_D: Tensor
    gate_up: Linear  # [2 F, D]
    down: Linear  # [D, F]

    def linears(self) -> list[Linear]:
        return [self.qkv, self.o, self.gate_up, self.down]


@dataclass(slots=True, repr=False)
class DecoderWeights:
    """The unembedding's matrix is the embedding itself where the model ties them."""

    embed_VD: Tensor
    layers: list[LayerWeights]
    final_norm_D: Tensor
    unembed: Linear  # [V, D]

    def linears(self) -> list[Linear]:
        return [self.unembed, *(linear for layer in self.layers for linear in layer.linears())]

    def num_bytes(self) -> int:
        """Tied matrices count once."""
        tensors = {self.embed_VD, self.final_norm_D, *(t for linear in self.linears() for t in linear.tensors())}
        for layer in self.layers:
            norms = (layer.input_norm_D, layer.mlp_norm_D, layer.q_norm, layer.k_norm)
            tensors.update(t for t in norms if t is not None)
        return sum(t.numel() * t.element_size() for t in tensors)

    def pack(self) -> bool:
        """Prepare every projection for decoding; whether all could be (see `Linear.pack`)."""
        exact_shapes: dict[tuple[int, int, bool], bool] = {}
        packed = [linear.pack(exact_shapes) for linear in self.linears()]
        return all(packed)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, `{}` where the file is absent. Raises InputError naming the file on anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name} of the model is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path.name} of the model does not hold a JSON object")
    return value


def read_config(folder: Path) -> DecoderConfig:
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"{folder} holds no config.json; give a Hugging Face model folder")
    return decoder_config(read_json(folder / "config.json"), read_json(folder / "generation_config.json"))


def open_weights(folder: Path) -> dict[str, Any]:
    """Of every tensor of a model folder, single file or sharded, the safetensors file that holds it, opened lazily."""
    index = read_json(folder / WEIGHTS_INDEX).get("weight_map")
    files: Iterable[str] = sorted(set(index.values())) if index else [WEIGHTS]
    file_of: dict[str, Any] = {}
    for name in files:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ModelNotFoundError(f"{folder} lacks the weight file {name!r}; MinT reads safetensors only")
        handle = safe_open(path, framework="pt")
        names: list[str] = handle.keys()  # type: ignore[no-untyped-call]
        file_of.update(dict.fromkeys(names, handle))
    return file_of


class _Checkpoint:
    """The tensors of one model folder; remembers what was asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._file_of = open_weights(folder)
        self.unread = set(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, *shape: int) -> Tensor:
        if name not in self._file_of:
            raise InputError(f"the model's weight files hold no tensor {name!r}")
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"tensor {name!r} has shape {list(tensor.shape)}, config.json says {list(shape)}")
        self.unread.discard(name)
        return tensor.to(self._device, self._dtype, copy=True)


def load_weights(folder: Path, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """All weights in `dtype`. Every tensor of the files must be used, so that nothing of a model is silently left out."""
    ckpt = _Checkpoint(folder, dtype, device)
    embed = ckpt.read(EMBEDDING, config.vocab_size, config.hidden_size)
    layers = [_load_layer(ckpt, config, f"model.layers.{i}") for i in range(config.num_layers)]
    final_norm = ckpt.read("model.norm.weight", config.hidden_size).float()
    if config.tied:
        unembed = embed
        ckpt.unread.discard(UNEMBEDDING)  # some files repeat the tied matrix
    else:
        unembed = ckpt.read(UNEMBEDDING, config.vocab_size, config.hidden_size)
    left = sorted(name for name in ckpt.unread if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise UnsupportedError(
            f"the model has {len(left)} tensors that a {config.model_type} decoder does not use, e.g. {', '.join(left[:3])}"
        )
    return DecoderWeights(embed, layers, final_norm, Linear(unembed))


def _load_layer(ckpt: _Checkpoint, config: DecoderConfig, prefix: str) -> LayerWeights:
    hidden, width = config.hidden_size, config.intermediate_size
    attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    qkv = {"q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size}
    return LayerWeights(
        input_norm_D=ckpt.read(f"{prefix}.input_layernorm.weight", hidden).float(),
        qkv=_linear(ckpt, attn, qkv, hidden, bias=config.qkv_bias),
        q_norm=ckpt.read(f"{attn}.q_norm.weight", config.head_dim).float() if config.qk_norm else None,
        k_norm=ckpt.read(f"{attn}.k_norm.weight", config.head_dim).float() if config.qk_norm else None,
        o=_linear(ckpt, attn, {"o_proj": hidden}, config.q_size, bias=config.o_bias),
        mlp_norm_D=ckpt.read(f"{prefix}.post_attention_layernorm.weight", hidden).float(),
        gate_up=_linear(ckpt, mlp, {"gate_proj": width, "up_proj": width}, hidden, bias=config.mlp_bias),
        down=_linear(ckpt, mlp, {"down_proj": hidden}, width, bias=config.mlp_bias),
    )


def _linear(ckpt: _Checkpoint, prefix: str, outs: dict[str, int], num_in: int, *, bias: bool) -> Linear:
    """Projections of one input as one matrix."""
    weight = torch.cat([ckpt.read(f"{prefix}.{name}.weight", size, num_in) for name, size in outs.items()])
    if not bias:
        return Linear(weight)
    return Linear(weight, torch.cat([ckpt.read(f"{prefix}.{name}.bias", size) for name, size in outs.items()]))
