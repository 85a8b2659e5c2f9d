"""BPE tokenizers trained in the test session, with the special tokens and chat template of each family.

Byte-level ones, and for Gemma and Phi-3 also ones like their SentencePiece vocabularies, which write a space as "▁".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tests.support.tiny_models import QWEN_SPLIT

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "chat_templates"

# as whitespace up to and including newlines is one piece (QWEN_SPLIT), byte pairs merge across line ends
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
    template: str = ""  # file name without ".jinja", where it is not `name`
    adds_bos: bool = False  # encode() puts a BOS in front unless told not to
    # "blank": as Phi-3's, with a blank before every text between special tokens, which swallow whitespace after them
    vocabulary: Literal["bytes", "pieces", "blank"] = "bytes"
    closing: str = ""  # what stands between an answer and its end_of_turn


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
        Family("llama3", _LLAMA, "<|eot_id|>", "<|eot_id|>", bos=_LLAMA[0], adds_bos=True),
        Family("llama3_1", _LLAMA, "<|eot_id|>", "<|eot_id|>", bos=_LLAMA[0], adds_bos=True),
        Family("llama3_2", _LLAMA, "<|eot_id|>", "<|eot_id|>", bos=_LLAMA[0], adds_bos=True),
    )
}
DATED = ("llama3_1", "llama3_2")

_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
_PHI3 = ("<|endoftext|>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001, the bars are full-width
    *("<｜User｜>", "<｜Assistant｜>"),  # noqa: RUF001
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),  # noqa: RUF001
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),  # noqa: RUF001
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁sep｜>"),  # noqa: RUF001
)
_GLM = ("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GLM_ADDED = ("/nothink", *_QWEN_ADDED, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_GPTOSS = (
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>"),
    *("<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>"),
)
_LFM2 = (
    *("<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
)
_COHERE = (
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>"),
    *("<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
_IM_END, _EOT, _DEEPSEEK_END = "<|im_end|>", "<end_of_turn>", _DEEPSEEK[1]

MORE_FAMILIES = {
    family.name: family
    for family in (
        Family("qwen3_5_think", _CHATML, _IM_END, _IM_END, added=_QWEN_ADDED),
        Family("qwen3_5_nothink", _CHATML, _IM_END, _IM_END, added=_QWEN_ADDED),
        Family("qwen3_6", _CHATML, _IM_END, _IM_END, added=_QWEN_ADDED),
        Family("gemma", _GEMMA, "<eos>", _EOT, bos="<bos>", adds_bos=True),
        Family("gemma3", _GEMMA, "<eos>", _EOT, bos="<bos>", adds_bos=True),
        Family(
            "gemma3_pieces", _GEMMA, "<eos>", _EOT, bos="<bos>", adds_bos=True, template="gemma3", vocabulary="pieces"
        ),
        Family("phi3", _PHI3, "<|endoftext|>", "<|end|>", bos="<s>"),
        Family("phi3_pieces", _PHI3, "<|endoftext|>", "<|end|>", bos="<s>", template="phi3", vocabulary="blank"),
        Family("deepseekv3", _DEEPSEEK, _DEEPSEEK_END, _DEEPSEEK_END, bos=_DEEPSEEK[0], added=_QWEN_ADDED[:2]),
        Family("deepseek_r1_distill", _DEEPSEEK, _DEEPSEEK_END, _DEEPSEEK_END, bos=_DEEPSEEK[0], added=_QWEN_ADDED[:2]),
        Family("glm4moe", _GLM, "<|endoftext|>", "<|user|>", added=_GLM_ADDED),
        Family("gptoss", _GPTOSS, "<|return|>", "<|return|>", bos="<|startoftext|>"),
        Family("lfm2_v2", _LFM2, _IM_END, _IM_END, bos="<|startoftext|>", adds_bos=True),
        Family(
            "cohere2",
            _COHERE,
            "<|END_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            bos="<BOS_TOKEN>",
            adds_bos=True,
            closing="<|END_RESPONSE|>",
        ),
        Family("nemotron_3_nano", _CHATML, _IM_END, _IM_END, bos="<s>", added=_QWEN_ADDED),
        Family("qwen2_5_training", _CHATML, _IM_END, _IM_END, added=_QWEN_ADDED[2:], default_system=_QWEN),
    )
}
ALL_FAMILIES = FAMILIES | MORE_FAMILIES


@cache
def _trained_bpe() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator(CORPUS, trainer)
    return str(bpe.to_str())


@cache
def _trained_pieces(blank: bool) -> str:
    """Like a SentencePiece vocabulary; `blank`: with a space before every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    spaced = normalizers.Replace(" ", "▁")
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaced]) if blank else spaced
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence(  # a word starts with its blank; newlines merge with newlines only
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(Regex("\\n+"), "isolated")]
    )
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=128, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocab = {text: number for number, text in enumerate(texts)}
    merges = [(left, right) for left, right in learned["merges"]]
    pieces = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    pieces.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if blank else steps)
    return str(pieces.to_str())


def make_tokenizer(name: str, template: str | None = None) -> Any:
    """A fresh tokenizer of that family; `template` instead of the family's own."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    family = ALL_FAMILIES[name]
    swallows = family.vocabulary == "blank"
    backend = Tokenizer.from_str(_trained_pieces(swallows) if family.vocabulary != "bytes" else _trained_bpe())
    backend.add_special_tokens(
        [
            AddedToken(
                text, special=True, normalized=False, rstrip=swallows and text.startswith("<|") and text != family.eos
            )
            for text in family.specials
        ]
    )
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    if family.adds_bos:
        bos = family.bos
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    source = TEMPLATES / f"{family.template or family.name}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template if template is not None else source.read_text(encoding="utf-8"),
    )


@cache
def tokenizer_of(name: str) -> Any:
    """The family's tokenizer, shared by tests that do not change it."""
    return make_tokenizer(name)
