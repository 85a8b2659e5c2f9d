"""A GGUF file of the Llama architecture with the SmolLM tokenizer -> a Hugging Face model folder, with numpy alone.

transformers can read GGUF too, but marks the dequantised model as quantised (it can then be neither saved nor trained),
and it ignores `tokenizer.ggml.pre`, so that digits after white space are tokenized otherwise than in training.
Only what the packaged models need is covered; everything else is refused by name.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mint.errors import MissingExtraError, UnsupportedError
from mint.hub.folders import CONFIG, WEIGHTS

# Part of the manifest: folders made by another version are made again.
CONVERTER_VERSION = 1

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_TOP_TENSORS = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def require_gguf() -> None:
    """Raise MissingExtraError unless the `gguf` module can be imported."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "the packaged models are GGUF files, and the module `gguf` that reads them is not installed; "
            'install it with: pip install "mint-toolkit[offline]"'
        ) from error


def convert_llama_gguf(gguf_file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (bfloat16), tokenizer.json and tokenizer_config.json into `folder`.

    The weights are dequantised to float32 and rounded to the nearest bfloat16. `folder` must exist.
    Raises UnsupportedError for another architecture, tokenizer or tensor; MissingExtraError without `gguf`.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    metadata = _Metadata(reader, gguf_file.name)
    metadata.require("general.architecture", "llama")
    metadata.require("tokenizer.ggml.model", "gpt2")
    metadata.require("tokenizer.ggml.pre", "smollm")
    tensors = [_tensor(raw, metadata) for raw in reader.tensors if raw.name != "rope_freqs.weight"]
    _write_safetensors(folder / WEIGHTS, sorted(tensors, key=lambda tensor: tensor.name))
    tied = all(tensor.name != "lm_head.weight" for tensor in tensors)
    _write_json(folder / CONFIG, _config(metadata, tied=tied))
    _write_tokenizer(folder, metadata)


class _Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: Any, file_name: str) -> None:
        self._fields = reader.fields
        self._file_name = file_name

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise UnsupportedError(f"{self._file_name} has no {key!r}, which the conversion needs")
        return self._fields[key].contents()

    def require(self, key: str, value: str) -> None:
        if self[key] != value:
            raise UnsupportedError(
                f"{self._file_name} has {key} = {self[key]!r}; only {value!r} can be converted. "
                "Use the model's own *.safetensors files instead"
            )


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One weight under its Hugging Face name, still quantised.

    heads: for q and k projections, whose rows llama.cpp stores in another order; else None.
    """

    name: str
    raw: Any
    heads: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self.raw.shape))

    def bfloat16(self) -> npt.NDArray[np.uint16]:
        from gguf.quants import dequantize

        values = dequantize(self.raw.data, self.raw.tensor_type).reshape(self.shape)
        if self.heads is not None:
            values = _rotary_halves(values, self.heads)
        return to_bfloat16(values)


def _tensor(raw: Any, metadata: _Metadata) -> _Tensor:
    match raw.name.split("."):
        case [top, "weight"] if top in _TOP_TENSORS:
            return _Tensor(_TOP_TENSORS[top], raw, None)
        case ["blk", layer, part, "weight"] if part in _LAYER_TENSORS:
            heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(part)
            name = f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"
            return _Tensor(name, raw, metadata[heads] if heads else None)
    raise UnsupportedError(f"the GGUF file has a tensor {raw.name!r} that the conversion does not know")


def _rotary_halves(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo llama.cpp's row order of q and k: it interleaves the two rotary halves of each head. Shape unchanged."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bit patterns of the nearest bfloat16 numbers, ties to even, as torch's `.to(torch.bfloat16)` gives them."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    nearest[np.isnan(values)] = 0x7FC0
    return nearest


def _write_safetensors(path: Path, tensors: list[_Tensor]) -> None:
    """Write one bfloat16 safetensors file, holding one tensor at a time in memory.

    The format: length of the header (8 bytes, little endian), the header as JSON padded with spaces to a multiple of
    8 bytes, the data. Names sorted and no space in the JSON, as the safetensors library writes it.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + 2 * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            file.write(tensor.bfloat16().astype("<u2", copy=False).tobytes())


def _config(metadata: _Metadata, *, tied: bool) -> dict[str, Any]:
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    theta = metadata["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        # GGUF keeps a float32; the decimal it was made from has few digits
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,  # where programs older than rope_parameters look
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(folder: Path, metadata: _Metadata) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # What `tokenizer.ggml.pre = smollm` stands for: every digit is a word of its own, so "\n\n1" is "\n\n" and "1".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in _control_tokens(tokens, metadata)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        config[f"{ours}_token"] = tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]]
    config["model_max_length"] = metadata["llama.context_length"]
    config["clean_up_tokenization_spaces"] = False
    config["chat_template"] = metadata["tokenizer.chat_template"]
    _write_json(folder / "tokenizer_config.json", config)


def _control_tokens(tokens: list[str], metadata: _Metadata) -> Iterator[str]:
    kinds = metadata["tokenizer.ggml.token_type"]
    return (token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
