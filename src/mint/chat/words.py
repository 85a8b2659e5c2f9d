"""Token ids of text word by word, from memory. Words repeat, and looking their ids up takes a fifth of the time that the
tokenizer library takes to find them again.

Byte-pair encoding joins nothing across the words that a tokenizer's pre-tokenizer makes of a text. A text may therefore be
cut wherever every text's words are certain to be cut, and its parts encoded apart. With the pre-tokenizers of GPT-2, GPT-4
and their descendants that is, whatever stands before and after:

    before a blank and an ASCII letter: they write a blank with the word that follows it;
    behind an ASCII letter, where the next character is ASCII, no letter, and no apostrophe (of which "'s" and the like
    begin): a word's letters end there, and neither side can compose with the other in NFC.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

_TOGETHER: Final = 32  # texts from which on they are encoded on all cores
_LONGEST: Final = 64  # characters of a part that may come again
_MAX_BYTES: Final = 40_000_000  # of what is remembered

# either letters up to a place to cut, or anything up to the next blank and letter
_PART: Final = re.compile(r" ?[A-Za-z]+(?=[\x00-&(-@\[-`{-\x7f]|\Z)|[\s\S]+?(?= [A-Za-z]|\Z)")

_CONTRACTED: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS: Final = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# as tokenizer.json has them of Qwen2 to Qwen3, Qwen3.5, Llama 3, gpt-oss, and Mistral's of 2024 and later
_KNOWN: Final = frozenset(
    words + _BLANKS
    for words in (
        _CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        _CONTRACTED + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        _CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    )
)


class Words:
    """Encodes texts with a tokenizer (of the tokenizers library) of which `are_words_apart` is true."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[str, list[int]] = {}
        self._bytes = 0  # about

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode_whole` makes them."""
        if self._bytes > _MAX_BYTES:
            self._known, self._bytes = {}, 0
        known, passing = self._known, dict[str, list[int]]()
        parts = [_PART.findall(text) for text in texts]
        new = list(set(chain.from_iterable(parts)).difference(known))
        for part, ids in zip(new, encode_whole(self._backend, new, len(texts) >= _TOGETHER), strict=True):
            if len(part) > _LONGEST:
                passing[part] = ids
            else:
                known[part] = ids
                self._bytes += 200 + len(part) + 36 * len(ids)
        if passing:
            return [[i for p in found for i in (passing if p in passing else known)[p]] for found in parts]
        return [list(chain.from_iterable(map(known.__getitem__, found))) for found in parts]


def encode_whole(backend: Any, texts: Sequence[str], together: bool | None = None) -> list[list[int]]:
    """The ids of each text, by the tokenizer library. together: on all cores; by default, where there are many."""
    if together is None:
        together = len(texts) >= _TOGETHER
    # handing a few texts to other threads costs more than it saves, and disturbs those that train
    batches = [list(texts)] if together else [[text] for text in texts]
    return [made.ids for batch in batches for made in backend.encode_batch_fast(batch, add_special_tokens=False)]


def are_words_apart(backend: Any) -> bool:
    """Whether every text's parts, as `Words` makes them, can be encoded apart. Only what is known for sure is true."""
    added = backend.get_added_tokens_decoder().values()
    return (
        type(backend.model).__name__ == "BPE"
        and not backend.model.dropout
        and (backend.normalizer is None or _described(backend.normalizer).get("type") == "NFC")
        and backend.pre_tokenizer is not None
        and _cuts(_described(backend.pre_tokenizer))
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        # no part ends within such a token; its text is looked for in normalised text
        and not any(re.search("^[A-Za-z]| ", unicodedata.normalize("NFC", token.content)) for token in added)
    )


def _described(component: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json has it; nothing of one that is written in Python and cannot be there."""
    try:
        described: dict[str, Any] = json.loads(component.__getstate__())
    except Exception as error:  # the library has no narrower one
        if "Custom" not in str(error):
            raise
        return {}
    return described


def _cuts(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether it cuts at the places above; further cuts, within those, do no harm."""
    cuts = False
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        match step:
            case {"type": "Digits"}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
                cuts = True
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False} if cuts:
                pass  # what follows sees no blanks any more
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(words)}}:
                if words not in _KNOWN:
                    return False
                cuts = True
            case _:
                return False
    return cuts
