"""A byte-level BPE tokenizer trained in the test session, with the special tokens and chat template of each family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"

# the Qwen split: whitespace up to and including newlines is one piece, so byte pairs merge across line ends
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CORPUS = [
    "system user assistant\n\nYou are a helpful assistant.\n\nCutting Knowledge Date: December 2023\nToday Date:\n\n",
    "Hello there! How can I help you today?\n\n1. one\n2. two\n\n\n<think>\n\n</think>\n\n <|im_start|> <|im_end|>",
] * 4


@dataclass(frozen=True)
class Family:
    """What a test has to know about a model family, written down independently of mint.chat."""

    name: str
    specials: tuple[str, ...]
    eos: str
    end_of_turn: str
    bos: str | None = None
    added: tuple[str, ...] = ()  # added tokens that are not special
    default_system: str | None = None


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

FAMILIES = {
    family.name: family
    for family in (
        Family("smollm2", _CHATML, "<|im_end|>", "<|im_end|>", bos="<|im_start|>", default_system=_SMOL),
        Family("qwen2_5", _CHATML, "<|im_end|>", "<|im_end|>", added=_QWEN_ADDED[2:], default_system=_QWEN),
        Family("qwen3", _CHATML, "<|im_end|>", "<|im_end|>", added=_QWEN_ADDED),
        Family("qwen3_instruct_2507", _CHATML, "<|im_end|>", "<|im_end|>", added=_QWEN_ADDED),
        Family("llama3", _LLAMA, "<|eot_id|>", "<|eot_id|>", bos=_LLAMA[0]),
        Family("llama3_1", _LLAMA, "<|eot_id|>", "<|eot_id|>", bos=_LLAMA[0]),
        Family("llama3_2", _LLAMA, "<|eot_id|>", "<|eot_id|>", bos=_LLAMA[0]),
    )
}
DATED = ("llama3_1", "llama3_2")


@cache
def _trained_bpe() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator(CORPUS, trainer)
    return str(bpe.to_str())


def make_tokenizer(name: str, template: str | None = None) -> Any:
    """A fresh tokenizer of that family; `template` instead of the family's own."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    backend = Tokenizer.from_str(_trained_bpe())
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.specials])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    if name.startswith("llama"):  # as the real one: encode() puts a BOS in front unless told not to
        bos = family.specials[0]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template if template is not None else (TEMPLATES / f"{name}.jinja").read_text(),
    )


@cache
def tokenizer_of(name: str) -> Any:
    """The family's tokenizer, shared by tests that do not change it."""
    return make_tokenizer(name)
