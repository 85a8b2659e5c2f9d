"""A transformers model as this engine uses it: from safetensors, frozen, its Linears open to adapters.

Whatever `AutoModelForCausalLM` knows is loaded, and refused where it does not compute as a causal model with a key/value
cache does. Logits are always the model's own, so scalings and caps of its head are in them.
Shape letters: T tokens of one sequence, V vocabulary, I inputs and O outputs of a Linear, R rank.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mint.engine.device import Device
from mint.engine.hf.linears import FoundLinear, find_linears, num_fused_experts
from mint.engine.lora import AdapterWeights, Site
from mint.engine.models.config import eos_token_ids, refuse_quantised
from mint.engine.models.weights import read_json
from mint.errors import InputError, UnsupportedError

logger = logging.getLogger("mint")

CONTEXT_FIELDS = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions")
# relative difference between what the cache and what a whole pass computes; a model without working cache is at 1
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


class CausalModel:
    """One sequence at a time through a model whose Linears add the low-rank term of the adapter in use.

    linears: what adapters may wrap, in the model's order; the site of linears[i] is (i, its name).
    """

    def __init__(self, folder: Path, device: Device) -> None:
        """Raises UnsupportedError or InputError naming what cannot be run."""
        self._model = _load(folder, device)
        self._device = device.torch_device
        self._active: AdapterWeights = {}
        self.architecture = type(self._model).__name__
        self.linears: list[FoundLinear] = find_linears(self._model)
        for i, linear in enumerate(self.linears):
            self._open((i, linear.name), linear.module)
        if num_fused := num_fused_experts(self._model):
            logger.warning(
                "%s: %d expert matrices are fused tensors, which adapters do not wrap", self.architecture, num_fused
            )
        text = self._model.config.get_text_config()
        self.max_context = _max_context(text, self.architecture)
        self.eos_token_ids = eos_token_ids(text.to_dict(), read_json(folder / "generation_config.json"))
        self.vocab_size = min(self._model.get_input_embeddings().num_embeddings, self._check_cache(device.dtype))

    def _open(self, site: Site, module: nn.Module) -> None:
        """Let the active adapter add its term to what the Linear computes; its weight is not touched, tied or not."""

        def add_low_rank(_: nn.Module, inputs: tuple[Tensor, ...], output_O: Tensor) -> Tensor:
            w = self._active.get(site)
            if w is None:
                return output_O
            dtype = output_O.dtype  # some models keep some modules in float32
            u_TR = inputs[0].flatten(0, -2) @ w.a_RI.to(dtype).t()
            return torch.addmm(output_O.flatten(0, -2), u_TR, w.b_OR.to(dtype).t()).view_as(output_O)

        module.register_forward_hook(add_low_rank)

    def _check_cache(self, dtype: torch.dtype) -> int:
        """Refuse a model whose last token, computed with the cache of those before it, is not that of a whole pass.

        It would be one that looks ahead, or whose state is not in `past_key_values`. The answer is the width of logits.
        """
        tokens = list(range(min(8, self.max_context)))
        with torch.no_grad():
            logits_TV, _ = self.forward(tokens, {})
            _, cache = self.forward(tokens[:-1], {}, keep_cache=True)
            if cache is None:
                raise UnsupportedError(
                    f"{self.architecture} keeps no key/value cache (past_key_values); it cannot be run"
                )
            cached_TV, _ = self.forward(tokens[-1:], {}, cache=cache)
        difference = float((cached_TV[-1].float() - logits_TV[-1].float()).norm() / logits_TV[-1].float().norm())
        if not difference <= CACHE_TOLERANCE[dtype]:
            raise UnsupportedError(
                f"{self.architecture}: a token's logits with a key/value cache differ by {difference:.1%} from those of a "
                "whole pass; it is not a causal language model, or its cache holds less than its state"
            )
        return logits_TV.shape[-1]

    def forward(
        self,
        tokens: list[int],
        adapter: AdapterWeights,
        *,
        cache: Any = None,
        keep_cache: bool = False,
        last_only: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits [T, V], or [1, V] of the last token with `last_only`, and the cache.

        cache: of the tokens before these; it is extended in place.
        """
        input_1T = torch.tensor([tokens], device=self._device)
        self._active = adapter
        output = self._model(
            input_ids=input_1T,
            past_key_values=cache,
            use_cache=keep_cache or cache is not None,
            logits_to_keep=1 if last_only else 0,
        )
        return output.logits.squeeze(0), getattr(output, "past_key_values", None)

    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages().values())

    def kept_bytes(self, adapter: AdapterWeights, num_tokens: int) -> int:
        """What a forward pass of that length keeps for its backward, measured by running one."""
        own = {*self._storages(), *(t.data_ptr() for w in adapter.values() for t in (w.a_RI, w.b_OR))}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            graph, _ = self.forward([i % self.vocab_size for i in range(num_tokens)], adapter)
        del graph  # it held the memory until here, so that no address was counted for two tensors
        return sum(kept.values())

    def _storages(self) -> dict[int, torch.UntypedStorage]:
        """Memory of the base by address; tied matrices are one."""
        tensors = (*self._model.parameters(), *self._model.buffers())
        return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def _load(folder: Path, device: Device) -> Any:
    raw = read_json(folder / "config.json")
    refuse_quantised(raw)
    model_type, names = raw.get("model_type"), ", ".join(raw.get("architectures") or ["?"])
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"architecture {model_type!r} ({names}): transformers {transformers.__version__} has no causal language model "
            "of that type, and code in model folders is never run. Choose another model, or a newer transformers"
        )
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=device.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # named below
            output_loading_info=True,
        )
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"transformers cannot load the model in {folder} ({names}): {error}") from error
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise UnsupportedError(f"{type(model).__name__} is a part of another model, not a language model of its own")
    _check_complete(info, type(model).__name__)
    return model.to(device.torch_device).eval().requires_grad_(False)


def _check_complete(info: Mapping[str, Any], architecture: str) -> None:
    """transformers fills in random numbers where the files lack a tensor."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise InputError(f"tensor {name!r} has shape {list(found)}, {architecture} expects {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"the model's weight files lack {len(missing)} tensors of {architecture}, e.g. {', '.join(missing[:3])}"
        )
    if spare := sorted(info["unexpected_keys"]):
        logger.warning(
            "%s does not use %d tensors of its files, e.g. %s", architecture, len(spare), ", ".join(spare[:3])
        )


def _max_context(config: Any, architecture: str) -> int:
    """Raises UnsupportedError where the configuration names none."""
    longest = next((value for field in CONTEXT_FIELDS if (value := getattr(config, field, None))), None)
    if longest is None:
        raise UnsupportedError(
            f"{architecture}: its config.json names no context length ({' or '.join(CONTEXT_FIELDS)}); it cannot be run"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for given in (rope, *rope.values()):  # one for the model, or one per kind of layer
        if isinstance(given, dict) and given.get("rope_type") in ("longrope", "dynamic"):
            # a longer text rotates all positions otherwise, and what is cached would not fit
            longest = min(longest, given.get("original_max_position_embeddings") or longest)
    return int(longest)
