"""Text to token ids with control tokens under guard. Knows tokenizers, not families or roles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mint.chat.marks import BREAK
from mint.chat.words import Words, are_words_apart, encode_whole


class AddedToken(Protocol):
    """A token outside the learned vocabulary, as transformers describes it."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this package uses."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...
    @property
    def bos_token(self) -> str | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def name_or_path(self) -> str: ...
    @property
    def is_fast(self) -> bool: ...
    @property
    def chat_template(self) -> Any: ...  # str, dict of str, or None
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Encoder:
    """Encodes text with one tokenizer.

    control_ids: text and id of every control token: an added token that is special or that the template writes.
    pattern: finds control tokens in text; its one group keeps them when it splits. firsts: the characters they begin with.
    adds_blank: the tokenizer writes a blank before text that it takes for the start of something.
    words: remembers words' ids, where the tokenizer encodes them apart.
    """

    tokenizer: Tokenizer
    control_ids: Mapping[str, int]
    pattern: re.Pattern[str]
    firsts: frozenset[str]
    adds_blank: bool
    words: Words | None

    def find_control(self, text: str) -> re.Match[str] | None:
        """The first control token's text in `text`."""
        for first in self.firsts:  # most texts have none of them, and looking for one character is far faster
            if first in text:
                return self.pattern.search(text)
        return None

    def guard(self, text: str) -> str:
        """`text` with a BREAK inside each control token's text, which is thereby no control token any more."""
        found = self.find_control(text)
        if not found:
            return text
        pieces, start = [], 0
        while found:
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 1
            found = self.pattern.search(text, start)
        return BREAK.join([*pieces, text[start:]])

    def encode_pieces(
        self, stretches: Sequence[Sequence[str | tuple[int, ...]]], known: Mapping[str, list[int]]
    ) -> list[list[int]]:
        """As `encode`, of texts in pieces: strings, and ids of what is encoded already. known: see `encode_together`."""
        texts = [piece for pieces in stretches for piece in pieces if isinstance(piece, str)]
        if known and all(text in known for text in texts):
            made = iter([known[text] for text in texts])
        else:
            made = iter(self.encode(texts))
        encoded = []
        for pieces in stretches:
            ids: list[int] = []
            for piece in pieces:
                ids += next(made) if isinstance(piece, str) else piece
            encoded.append(ids)
        return encoded

    def encode_together(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids of texts of many rows, made at once (new ones on all cores); of none where ids depend on what stands before."""
        if not self.tokenizer.is_fast or self.adds_blank:
            return {}
        distinct = list(dict.fromkeys(text for text in texts if BREAK not in text))
        return dict(zip(distinct, self.encode(distinct), strict=True))

    def split_markup(self, text: str) -> list[str | tuple[int, ...]]:
        """Text of a template in pieces: the ids of control tokens, and of what stands between two of them; strings before
        the first and after the last, which go on with other text."""
        chunks = self.pattern.split(text)
        if len(chunks) == 1:
            return [text]
        ids: list[int] = []
        for number, chunk in enumerate(chunks[1:-1], 1):
            ids += [self.control_ids[chunk]] if number % 2 else self.encode([chunk])[0] if chunk else []
        return [chunks[0], tuple(ids), chunks[-1]]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each of `texts`, which follow one another; tokens never reach from one into the next.

        Control tokens' texts become control tokens, but not where a BREAK stands in them.
        """
        if self.tokenizer.is_fast and not self.adds_blank and not any(BREAK in text for text in texts):
            backend = without_leftovers(self.tokenizer.backend_tokenizer)  # type: ignore[attr-defined]
            return encode_whole(backend, texts) if self.words is None else self.words.encode(texts)
        encoded = []
        context = ""
        for text in texts:
            encoded.append(self._encode_broken(text, context))
            control = [found.start() for found in self.pattern.finditer(text)]
            context = (text if control else context + text)[control[-1] if control else 0 :]
        return encoded

    def decode_guarded(self, ids: Sequence[int]) -> str:
        """The text of ids, in which only real control tokens have the text of one; the rest is guarded."""
        names = {token: text for text, token in self.control_ids.items()}
        pieces: list[str] = []
        ordinary: list[int] = []
        for token in ids:
            if token in names:
                pieces += [self.guard(self.decode(ordinary)), names[token]]
                ordinary = []
            else:
                ordinary.append(token)
        return "".join([*pieces, self.guard(self.decode(ordinary))])

    def decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def unguarded(self, text: str) -> str:
        return text.replace(BREAK, "")

    def _encode_broken(self, text: str, context: str) -> list[int]:
        """The ids of text that follows `context`."""
        ids: list[int] = []
        for number, piece in enumerate(text.split(BREAK)):
            ids += self._encode_after(context if number == 0 else "\n", piece)
        return ids

    def _encode_after(self, context: str, text: str) -> list[int]:
        """The ids of text as they are after `context`, where the tokenizer writes a blank before a text that starts."""
        if not text:
            return []
        if context and self.adds_blank:
            before, both = self._encode_text(context), self._encode_text(context + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode_text(text)

    def _encode_text(self, text: str) -> list[int]:
        # not verbose: transformers warns about the model's context length, which is max_length's business
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)


def without_leftovers(backend: Any) -> Any:
    """The backend as it encodes by itself: a call of the tokenizer leaves its truncation and padding there for the next."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens:
        backend.encode_special_tokens = False
    return backend


def make_encoder(tokenizer: Tokenizer, template: str) -> Encoder:
    """The encoder of a tokenizer whose chat template has the source `template`."""
    control_ids = {
        token.content: int(token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if len(token.content) > 1 and (token.special or (token.content in template and token.content.strip()))
    }
    longest_first = sorted(control_ids, key=len, reverse=True)
    # without control tokens: a pattern that matches nothing
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")
    alone, line_end, after = (tokenizer.encode(t, add_special_tokens=False, verbose=False) for t in ("a", "\n", "\na"))
    firsts = frozenset(text[0] for text in control_ids)
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None  # type: ignore[attr-defined]
    words = Words(backend) if backend is not None and are_words_apart(backend) else None
    return Encoder(tokenizer, control_ids, pattern, firsts, adds_blank=after != [*line_end, *alone], words=words)
