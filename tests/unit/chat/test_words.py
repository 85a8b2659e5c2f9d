"""Texts encoded word by word have the ids that the tokenizer library gives the whole text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.unit.chat.test_families import renderer_of
from tests.unit.chat.tiny_tokenizers import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN3_5

from mint.chat import words
from mint.chat.words import Words, are_words_apart, encode_whole

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# one of each kind that the pre-tokenizers tell apart, and of what composes in NFC; and an added token
CHARACTERS = ["s", "S", "'", " ", "\n", "\r", "\t", "\u00a0", "7", "/", ",", "é", "\u0301", "<|x|>"]
# of more blanks, of letters and marks that become ASCII in NFC or in another case, and of none of all that
OTHERS = [" s", "'ll", "\u017f", "\u212a", "\u1fef", "\u037e", "\x85", "\u2003", "\u200b", "世", "🙂"]
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
        lambda: make(split(GGUF_PRE_TOKENIZER_SPLITS["llama3"]), ignore_merges=True),
        lambda: make(split(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"])),
        lambda: make(split(GGUF_PRE_TOKENIZER_SPLITS["tekken"])),
    ],
    ids=["gpt2", "smollm2", "qwen2", "qwen3_5", "llama3", "gpt_oss", "mistral"],
)
def test_ids_are_those_of_the_whole_text(make_backend: Callable[[], Tokenizer]) -> None:
    """All texts of up to four characters of a kind, and 8,000 longer ones."""
    backend = make_backend()
    assert are_words_apart(backend)
    chance = random.Random(0)
    texts = ["".join(text) for length in range(5) for text in itertools.product(CHARACTERS, repeat=length)]
    texts += ["".join(chance.choices([*CHARACTERS, *OTHERS], k=chance.randint(5, 90))) for _ in range(8_000)]
    made = Words(backend).encode(texts)
    wrong = [text for text, ids, whole in zip(texts, made, encode_whole(backend, texts), strict=True) if ids != whole]
    assert wrong == []


def test_a_text_is_cut_at_its_words() -> None:
    remembered = Words(make(GPT2))
    remembered.encode(["Don't cut (me), said 7 cats.\nOr: I'll go"])
    assert set(remembered._known) == {"Don't", " cut", " (me),", " said", " 7", " cats", ".\nOr:", " I'll", " go"}


class Unknown:
    def pre_tokenize(self, text: Any) -> None:
        text.split(lambda _, piece: [piece])

    def normalize(self, text: Any) -> None:
        text.lowercase()


def test_every_tokenizer_whose_words_may_depend_on_their_neighbours_is_left_alone() -> None:
    def with_token(**options: bool) -> Tokenizer:
        return make(GPT2, added=AddedToken("<|x|>", **options))

    def with_python(**written: Any) -> Tokenizer:
        backend = make(GPT2)
        for name, component in written.items():
            setattr(backend, name, component)
        return backend

    def sequence(*steps: Any) -> Tokenizer:
        return make(pre_tokenizers.Sequence(list(steps)))

    words = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    others: dict[str, Tokenizer] = {
        "unknown words": make(split(r"\p{L}+ \p{L}+|\s+|\S+")),
        "no words": make(BYTES),
        "no pre-tokenizer": with_python(pre_tokenizer=None),
        "words of what are no blanks any more": sequence(BYTES, words),
        "the same": sequence(BYTES, GPT2),
        "a blank before the text": make(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "sentence pieces": make(pre_tokenizers.Metaspace()),
        "joined differently": sequence(pre_tokenizers.Split(Regex(QWEN2), "merged_with_next"), BYTES),
        "what stands between": sequence(pre_tokenizers.Split(Regex(QWEN2), "isolated", invert=True), BYTES),
        "left out": sequence(pre_tokenizers.Split(Regex(QWEN2), "removed"), BYTES),
        "written in Python": with_python(pre_tokenizer=pre_tokenizers.PreTokenizer.custom(Unknown())),
        "text changed in Python": with_python(normalizer=normalizers.Normalizer.custom(Unknown())),
        "at random": make(GPT2, dropout=0.5),
        "other text": make(GPT2, normalizer=normalizers.Lowercase()),
        "composed": make(GPT2, normalizer=normalizers.NFKC()),
        "takes blanks after it": with_token(rstrip=True),
        "takes blanks before it": with_token(lstrip=True),
        "stands alone": with_token(single_word=True),
        "a token of two words": make(GPT2, added="two words"),
        "a token with a word's start": make(GPT2, added="a|b"),
        "the same once it is normalised": make(GPT2, added="\u212a|b"),
        "no byte pairs": Tokenizer(models.WordLevel({"a": 0})),
    }
    assert [name for name, backend in others.items() if are_words_apart(backend)] == []


@pytest.mark.parametrize("token", ["two words", "a|b"])
def test_such_a_token_would_be_torn(token: str) -> None:
    """What the refusals are for."""
    backend, text = make(GPT2, added=token), [f"see {token} here"]
    assert Words(backend).encode(text) != encode_whole(backend, text)


def test_the_order_of_words_and_bytes_matters() -> None:
    backend = make(pre_tokenizers.Sequence([BYTES, pre_tokenizers.Split(Regex(QWEN2), "isolated")]))
    assert Words(backend).encode(["s" + " s" * 9]) != encode_whole(backend, ["s" + " s" * 9])


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = make(GPT2)
    remembered, per_call = Words(backend), 10 * (200 + 64 + 36 * 64)
    monkeypatch.setattr(words, "_MAX_BYTES", 9_000)
    for start in range(0, 1000, 10):
        texts = [f" word{number} and more" for number in range(start, start + 10)]
        assert remembered.encode(texts) == encode_whole(backend, texts)
        assert sum(200 + len(word) + 36 * len(ids) for word, ids in remembered._known.items()) <= 9_000 + per_call


def test_long_parts_are_not_remembered() -> None:
    backend = make(GPT2)
    remembered, texts = Words(backend), ["世界" * 40, "see " + "世" * 63 + " now", "7" * 65, ""]
    assert remembered.encode(texts) == encode_whole(backend, texts)
    assert set(remembered._known) == {"see", " " + "世" * 63, " now"}


@pytest.mark.parametrize(("texts", "batches"), [(1, 200), (31, 200), (32, 1)])
def test_few_texts_stay_on_one_thread_however_many_words_they_have(texts: int, batches: int) -> None:
    class Counting:
        def __init__(self) -> None:
            self.backend, self.calls = make(GPT2), 0

        def encode_batch_fast(self, batch: list[str], **options: Any) -> Any:
            self.calls += 1
            return self.backend.encode_batch_fast(batch, **options)

    counting = Counting()
    Words(counting).encode(["".join(f" {'a' * (n % 60)}{'b' * (n // 60)}" for n in range(1, 201))] * texts)
    assert counting.calls == batches


def test_threads_may_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while it is cleared again and again."""
    monkeypatch.setattr(words, "_MAX_BYTES", 3_000)
    backend, chance = make(GPT2), random.Random(0)
    remembered = Words(backend)
    texts = [" ".join(chance.choices(["a", "bb", "ccc", "7", "'s", "\n"], k=12)) for _ in range(400)]
    expected = encode_whole(backend, texts)
    with ThreadPoolExecutor(4) as pool:
        turned = list(pool.map(lambda start: remembered.encode(texts[start:] + texts[:start]), range(40)))
        found = list(pool.map(lambda text: remembered.encode([text])[0], texts))
    assert found == expected and turned == [expected[start:] + expected[:start] for start in range(40)]


@pytest.mark.parametrize(("name", "has_words"), [("smollm2", True), ("gemma3_pieces", False), ("phi3_pieces", False)])
def test_tokenizers_of_families(name: str, has_words: bool) -> None:
    assert (renderer_of(name, False).style.encoder.words is not None) == has_words
