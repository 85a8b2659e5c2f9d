"""Model and data set folders small enough to make inside a test: random weights, a real tokenizer, real file formats.

    write_tiny_model(tmp_path / "qwen3", "qwen3")  # 2 layers, hidden 64, 384 tokens; milliseconds once torch is loaded
    write_tiny_dataset(root / "datasets" / NO_ROBOTS, NO_ROBOTS)

torch, transformers, tokenizers and pyarrow are imported inside the functions.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "qwen2", "qwen3", "mistral", "smollm"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "mistral", "smollm")

NO_ROBOTS = "HuggingFaceH4/no_robots"
TULU3 = "allenai/tulu-3-sft-mixture"

QWEN3_TEMPLATE = Path(__file__).parents[1] / "fixtures" / "chat_templates" / "qwen3.jinja"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SMOLLM_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen and its relatives split text by before byte pairs are merged.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Answer the question of the user in one short sentence.",
    "Write a list of three things:\n\n1. one\n2. two\n3. three\n",
    "Can you explain how the weather changes when the wind comes from the north?",
    "Thanks! Please write that again, but shorter. Sure, here it is:",
    "I think that this is the answer to the question that you asked me, and not the other one.",
    "system user assistant\n\n<tool> {'name': 'value'} </tool>\n",
)


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes of a tiny model. Defaults keep every dimension different from the others where the family allows it."""

    vocab_size: int = 384
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = None  # None: hidden // heads; qwen3: twice that, as in the small published ones
    intermediate: int = 160
    context: int = 512


def write_tiny_model(
    folder: Path,
    family: Family = "qwen3",
    *,
    tied: bool | None = None,
    seed: int = 0,
    tokenizer: bool = True,
    chat_template: str | None = None,
    **shape: int,
) -> Path:
    """Write a Hugging Face model folder of random float32 weights and return it.

    tied: one matrix for embedding and output; None takes the family's habit (smollm and qwen3 tied, others not).
    tokenizer: also `write_tiny_tokenizer` (qwen style; smollm style for the smollm family) with `chat_template`.
    shape: fields of TinyShape. The same arguments give the same bytes. Raises TypeError on an unknown field.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TinyShape(**shape)
    config = tiny_config(family, tied=family in ("smollm", "qwen3") if tied is None else tied, sizes=sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill_with_random_weights(model, seed)
    model.save_pretrained(folder)
    if tokenizer:
        style: Literal["qwen", "smollm"] = "smollm" if family == "smollm" else "qwen"
        write_tiny_tokenizer(folder, style=style, vocab_size=sizes.vocab_size, chat_template=chat_template)
    return folder


def tiny_config(family: Family, *, tied: bool, sizes: TinyShape) -> Any:
    """The transformers config of a tiny model of that family."""
    import transformers

    head_dim = sizes.head_dim or sizes.hidden // sizes.heads * (2 if family == "qwen3" else 1)
    common: dict[str, Any] = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        **special_ids("smollm" if family == "smollm" else "qwen", sizes.vocab_size),
    }
    rope = {"rope_type": "default", "rope_theta": {"llama": 5e5, "smollm": 1e5}.get(family, 1e6)}
    common["rope_parameters"] = rope
    match family:
        case "llama" | "smollm":
            return transformers.LlamaConfig(head_dim=head_dim, rms_norm_eps=1e-5, **common)
        case "mistral":
            return transformers.MistralConfig(head_dim=head_dim, rms_norm_eps=1e-5, sliding_window=None, **common)
        case "qwen2":  # head_dim is always hidden // heads; biases on q, k, v
            return transformers.Qwen2Config(rms_norm_eps=1e-6, **common)
        case "qwen3":
            return transformers.Qwen3Config(head_dim=head_dim, rms_norm_eps=1e-6, **common)
    raise ValueError(f"no tiny model of family {family!r}; there are {', '.join(FAMILIES)}")


def write_tiny_transformers(folder: Path, model_type: str, *, context: int = 2048, seed: int = 0) -> Path:
    """A tiny model of another kind that AutoModelForCausalLM knows, sized as TinyShape; three layers, no tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = TinyShape()
    config = AutoConfig.for_model(
        model_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden,
        num_hidden_layers=3,
        num_attention_heads=sizes.heads,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=sizes.vocab_size - 3,
        **_own_sizes(model_type, sizes, context),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill_with_random_weights(model, seed)
    model.save_pretrained(folder)
    return folder


def _own_sizes(model_type: str, sizes: TinyShape, context: int) -> dict[str, Any]:
    """Fields that not every kind of model has."""
    width = {"intermediate_size": sizes.intermediate}
    grouped = {**width, "num_key_value_heads": sizes.kv_heads, "max_position_embeddings": context}
    match model_type:
        case "gemma2" | "gemma3_text":  # layers in turns with and without a window
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            return {**grouped, "head_dim": 16, "sliding_window": 32, "layer_types": kinds}
        case "phi3":
            return grouped
        case "qwen3_moe":
            return {**grouped, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        case "mixtral":
            return {**grouped, "num_local_experts": 4, "num_experts_per_tok": 2}
        case "gpt_neox" | "bert":
            return {**width, "max_position_embeddings": context}
        case "opt":
            return {"ffn_dim": sizes.intermediate, "max_position_embeddings": context}
        case "trocr":
            return {"d_model": sizes.hidden, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        case "gpt2":
            return {"n_positions": context}
        case "mamba":
            return {"state_size": 4}
    raise ValueError(f"no tiny model of type {model_type!r}")


def _fill_with_random_weights(model: Any, seed: int) -> None:
    """Large matrices (logits far from flat), norms away from one and biases away from zero: a term left out shows."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2 or name.endswith(".bias"):
                weight.copy_(0.2 * noise)
            else:
                weight.copy_(1.0 + 0.2 * noise)


def special_ids(style: Literal["qwen", "smollm"], vocab_size: int = 384) -> dict[str, int]:
    """bos/eos/pad ids as `write_tiny_tokenizer` gives them. Qwen has no bos and keeps its specials at the end."""
    if style == "smollm":
        return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return {"eos_token_id": vocab_size - 3, "pad_token_id": vocab_size - 5}


def write_tiny_tokenizer(
    folder: Path,
    *,
    style: Literal["qwen", "smollm"] = "qwen",
    vocab_size: int = 384,
    chat_template: str | None = None,
) -> Path:
    """Train a byte-level BPE on CORPUS and write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    qwen: the last five ids are <|endoftext|> (pad), <|im_start|>, <|im_end|> (eos), <think>, </think>; the two think
    tokens are not `special`. Template: tests/fixtures/chat_templates/qwen3.jinja if it is there, else ChatML.
    smollm: the first three ids are <|endoftext|>, <|im_start|> (bos), <|im_end|> (eos, pad); digits stand alone; the
    template adds a default system turn. No style adds a bos by itself. `vocab_size` counts every token (at least 300).
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    turns = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    thoughts = ["<think>", "</think>"] if style == "qwen" else []
    tokenizer = Tokenizer(models.BPE())
    if style == "smollm":
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
        first, last = turns, []
        template = SMOLLM_CHATML
    else:
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        first, last = [], [*turns, *thoughts]
        template = QWEN3_TEMPLATE.read_text() if QWEN3_TEMPLATE.is_file() else CHATML
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(last),
        special_tokens=first,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(vocab_size), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in turns])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in thoughts])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size}, but the text yields {tokenizer.get_vocab_size()} tokens")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>" if style == "smollm" else None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>" if style == "smollm" else "<|endoftext|>",
        "unk_token": "<|endoftext|>" if style == "smollm" else None,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (folder / "chat_template.jinja").write_text(chat_template if chat_template is not None else template)
    return folder


def _training_text(vocab_size: int) -> list[str]:
    """CORPUS, and for larger vocabularies made-up words, so that the trainer finds as many merges as it needs."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(2 * max(0, vocab_size - 384))]
    return [*CORPUS, " ".join(words)]


def write_tiny_gguf(path: Path, model: Path, *, quantised: bool = False) -> Path:
    """Write the smollm-family model in folder `model` as a GGUF file, laid out as llama.cpp's converter does it.

    quantised: matrices in Q4_1 and the embedding in Q8_0, as in the packaged model; else everything float32.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_gguf_tokenizer(writer, model)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(model / "model.safetensors").items():
        part = name.split(".")[-2]
        if part in heads:  # llama.cpp interleaves the two rotary halves of each head
            weight = weight.reshape(heads[part], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kind = gguf.GGMLQuantizationType.F32
        if quantised and weight.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0 if part == "embed_tokens" else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_tokenizer(writer: Any, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template((model / "chat_template.jinja").read_text())


def _gguf_name(name: str) -> str:
    renamed = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for theirs, short in renamed.items():
        name = name.replace(theirs, short)
    return name


def write_tiny_dataset(folder: Path, name: str, *, rows: int = 64) -> Path:
    """Write the parquet files of a small stand-in for NO_ROBOTS (train and test) or TULU3 (train, in two shards).

    folder: the data set's own folder, e.g. `hub_root / "datasets" / name`. rows: rows of train; test has a quarter.
    Every third row has several turns, every fifth begins with a system turn; keys of a message are content, role.
    """
    folder = Path(folder)
    if name == NO_ROBOTS:
        _write_parquet(folder / "data" / "train-00000-of-00001.parquet", [_no_robots_row(i) for i in range(rows)])
        test = [_no_robots_row(i) for i in range(rows, rows + max(1, rows // 4))]
        _write_parquet(folder / "data" / "test-00000-of-00001.parquet", test)
    elif name == TULU3:
        half = rows // 2
        shards = (range(half), range(half, rows))
        for number, shard in enumerate(shards):
            path = folder / "data" / f"train-{number:05d}-of-{len(shards):05d}.parquet"
            _write_parquet(path, [_tulu_row(i) for i in shard])
    else:
        raise ValueError(f"no stand-in for data set {name!r}; there are {NO_ROBOTS} and {TULU3}")
    return folder


_CATEGORIES = ("Generation", "Open QA", "Brainstorm", "Chat", "Rewrite", "Summarize", "Coding", "Classify")
_PLACES = ("France", "Peru", "Kenya", "Japan", "Norway", "Chile", "Ghana", "Nepal")


def _messages(index: int) -> list[dict[str, str]]:
    """A conversation that differs for every index, so that shuffles and splits can be told apart."""
    place = _PLACES[index % len(_PLACES)]
    question = f"Question {index}: what is {place} known for?"
    turns = [("user", question), ("assistant", f"{place} is known for tea no. {index}.")]
    if index % 3 == 0:
        turns += [("user", "Thanks! Please make it shorter."), ("assistant", f"Tea no. {index}.")]
    if index % 5 == 0:
        turns.insert(0, ("system", "You are a helpful assistant. Answer in one short sentence."))
    return [{"content": content, "role": role} for role, content in turns]


def _no_robots_row(index: int) -> dict[str, Any]:
    messages = _messages(index)
    prompt = next(message["content"] for message in messages if message["role"] == "user")
    category = _CATEGORIES[index % len(_CATEGORIES)]
    return {"prompt": prompt, "prompt_id": f"{index:064x}", "messages": messages, "category": category}


def _tulu_row(index: int) -> dict[str, Any]:
    source = ("ai2-adapt-dev/oasst1_converted", "ai2-adapt-dev/flan_v2_converted")[index % 2]
    return {"id": f"{source.split('/')[1]}_{index}", "messages": _messages(index), "source": source}


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
