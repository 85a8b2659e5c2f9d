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
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

_TOGETHER: Final = 32  # texts from which on they are encoded on all cores
_MAX_CHARACTERS: Final = 1_000_000  # of the words remembered: some 40 MB

# either letters up to a place to cut, or anything up to the next blank and letter
_PART: Final = re.compile(r" ?[A-Za-z]+(?=[\x00-&(-@\[-`{-\x7f]|\Z)|[\s\S]+?(?= [A-Za-z]|\Z)")


_TAIL: Final = r"]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# as tokenizer.json has them of Qwen2 to Qwen3, Qwen3.5, Llama 3, and gpt-oss
_CUTS_AT_BLANKS: Final = frozenset(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}" + _TAIL,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}" + _TAIL,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}" + _TAIL,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


class Words:
    """Encodes texts with one tokenizer of which `are_words_apart` is true."""

    def __init__(self) -> None:
        self._known: dict[str, list[int]] = {}
        self._characters = 0

    def encode(self, backend: Any, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode_whole` makes them."""
        if self._characters > _MAX_CHARACTERS:
            self._known, self._characters = {}, 0
        known = self._known
        parts = [_PART.findall(text) for text in texts]
        new = list(set(chain.from_iterable(parts)).difference(known))
        if new:
            known.update(zip(new, encode_whole(backend, new), strict=True))
            self._characters += sum(map(len, new))
        return [list(chain.from_iterable(map(known.__getitem__, found))) for found in parts]


def encode_whole(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, by the tokenizer library."""
    # handing a few texts to other threads costs more than it saves, and disturbs those that train
    batches = [list(texts)] if len(texts) >= _TOGETHER else [[text] for text in texts]
    return [made.ids for batch in batches for made in backend.encode_batch_fast(batch, add_special_tokens=False)]


def are_words_apart(backend: Any) -> bool:
    """Whether the parts of a text that `Words` makes can be encoded apart, for all that can be told of a tokenizer."""
    added = backend.get_added_tokens_decoder().values()
    return (
        type(backend.model).__name__ == "BPE"
        and not backend.model.dropout
        and (backend.normalizer is None or _described(backend.normalizer) == {"type": "NFC"})
        and backend.pre_tokenizer is not None
        and _cuts_at_blanks(_described(backend.pre_tokenizer))
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and not any(re.search("^[A-Za-z]| ", token.content) for token in added)  # no part ends within such a token
    )


def _described(component: Any) -> dict[str, Any]:
    """A part of a tokenizer as tokenizer.json has it."""
    described: dict[str, Any] = json.loads(component.__getstate__())
    return described


def _cuts_at_blanks(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether it cuts at the places above; further cuts, within those, do no harm."""
    cuts = False
    for step in pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]:
        match step:
            case {"type": "Digits"}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(has_words)}:
                cuts = cuts or has_words
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str(words)}}:
                if words not in _CUTS_AT_BLANKS:
                    return False
                cuts = True
            case _:
                return False
    return cuts
