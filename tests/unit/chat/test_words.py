"""Texts encoded word by word have the ids that the tokenizer library gives the whole text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from tests.unit.chat.test_families import renderer_of
from tests.unit.chat.tiny_tokenizers import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf import gguf_tokenizer_mapping
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN3_5

from mint.chat import words
from mint.chat.words import Words, are_words_apart, encode_whole

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
GPT_OSS = next(
    text
    for text in vars(gguf_tokenizer_mapping).values()
    if isinstance(text, str) and r"{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/" in text
)
# one of each kind that the pre-tokenizers tell apart, of contractions, of what composes in NFC; and an added token
CHARACTERS = ["s", "S", "'", " ", "\n", "\r", "\t", "\u00a0", "7", "/", ",", "é", "\u0301", "<|x|>"]
# so that pairs are joined wherever they may be
TEXTS = [*CORPUS, *("".join(pair) * 9 for pair in itertools.product(CHARACTERS, repeat=2)), " s" * 9, "ssss sss 777 "]


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def make(pre_tokenizer: Any, *, normalizer: Any = None, added: AddedToken | str = "<|x|>", **options: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.add_tokens([added])
    return backend


def smollm2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])


@pytest.mark.parametrize(
    "make_backend",
    [
        lambda: make(GPT2),
        lambda: make(smollm2()),
        lambda: make(split(QWEN2), normalizer=normalizers.NFC()),
        lambda: make(split(QWEN3_5), normalizer=normalizers.NFC()),
        lambda: make(split(LLAMA3), ignore_merges=True),
        lambda: make(split(GPT_OSS)),
    ],
    ids=["gpt2", "smollm2", "qwen2", "qwen3_5", "llama3", "gpt_oss"],
)
def test_ids_are_those_of_the_whole_text(make_backend: Callable[[], Tokenizer]) -> None:
    """All texts of up to four characters of a kind, and 20,000 longer ones."""
    backend = make_backend()
    assert are_words_apart(backend)
    chance = random.Random(0)
    texts = ["".join(text) for length in range(5) for text in itertools.product(CHARACTERS, repeat=length)]
    texts += ["".join(chance.choices([*CHARACTERS, " s", "s", "世"], k=chance.randint(5, 24))) for _ in range(20_000)]
    made = Words().encode(backend, texts)
    wrong = [text for text, ids, whole in zip(texts, made, encode_whole(backend, texts), strict=True) if ids != whole]
    assert wrong == []


def test_a_text_is_cut_at_its_words() -> None:
    backend, remembered = make(GPT2), Words()
    remembered.encode(backend, ["Don't cut (me), said 7 cats.\nOr: I'll go"])
    assert set(remembered._known) == {"Don't", " cut", " (me),", " said", " 7", " cats", ".\nOr:", " I'll", " go"}


def test_every_tokenizer_whose_words_depend_on_their_neighbours_is_left_alone() -> None:
    def rstripped(**options: bool) -> Tokenizer:
        return make(GPT2, added=AddedToken("<|x|>", **options))

    others: dict[str, Tokenizer] = {
        "unknown words": make(split(r"\p{L}+ \p{L}+|\s+|\S+")),
        "no words": make(BYTES),
        "a blank before the text": make(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "sentence pieces": make(pre_tokenizers.Metaspace()),
        "joined differently": make(pre_tokenizers.Split(Regex(QWEN2), "merged_with_next")),
        "at random": make(GPT2, dropout=0.5),
        "other text": make(GPT2, normalizer=normalizers.Lowercase()),
        "composed": make(GPT2, normalizer=normalizers.NFKC()),
        "takes blanks after it": rstripped(rstrip=True),
        "takes blanks before it": rstripped(lstrip=True),
        "stands alone": rstripped(single_word=True),
        "a token of two words": make(GPT2, added="two words"),
        "a token with a word's start": make(GPT2, added="a|b"),
        "no byte pairs": Tokenizer(models.WordLevel({"a": 0})),
    }
    assert [name for name, backend in others.items() if are_words_apart(backend)] == []


def test_a_token_of_two_words_would_be_torn() -> None:
    """What the refusals are for."""
    backend = make(GPT2, added="two words")
    text = ["see two words here"]
    assert Words().encode(backend, text) != encode_whole(backend, text)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, remembered = make(GPT2), Words()
    monkeypatch.setattr(words, "_MAX_CHARACTERS", 200)
    for start in range(0, 1000, 10):
        texts = [f" word{number} and more" for number in range(start, start + 10)]
        assert remembered.encode(backend, texts) == encode_whole(backend, texts)
        assert sum(map(len, remembered._known)) <= 200 + sum(map(len, texts))


@pytest.mark.parametrize(("name", "has_words"), [("smollm2", True), ("gemma3_pieces", False), ("phi3_pieces", False)])
def test_tokenizers_of_families(name: str, has_words: bool) -> None:
    assert (renderer_of(name, False).style.encoder.words is not None) == has_words
