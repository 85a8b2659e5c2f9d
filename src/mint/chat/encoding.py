"""Text to token ids with control tokens under guard. Knows tokenizers, not families or roles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mint.chat.layout import Span


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
    def chat_template(self) -> Any: ...  # str, dict of str, or None
    def get_chat_template(self) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any: ...
    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...
    def decode(self, token_ids: list[int], **options: Any) -> str: ...


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Encoder:
    """Encodes spans with one tokenizer.

    control_ids: text and id of every control token: an added token that is special or that the template writes.
    pattern: finds control tokens in text; its one group keeps them when it splits.
    """

    tokenizer: Tokenizer
    control_ids: Mapping[str, int]
    pattern: re.Pattern[str]

    def encode_span(self, span: Span) -> list[int]:
        """Token ids of a span. Only its markup can give control tokens; the same text in a body stays ordinary text."""
        ids: list[int] = []
        text = ""  # not yet encoded
        for piece in span:
            chunks = self.pattern.split(piece.text) if piece.is_markup else _cut_inside(self.pattern, piece.text)
            for number, chunk in enumerate(chunks):
                if number and not piece.is_markup:  # the border that keeps a control token's text apart
                    ids += self._encode_text(text)
                    text = ""
                if piece.is_markup and chunk in self.control_ids:
                    ids += [*self._encode_text(text), self.control_ids[chunk]]
                    text = ""
                else:
                    text += chunk
        return ids + self._encode_text(text)

    def has_control_text(self, spans: Sequence[Span]) -> bool:
        """Whether the text of a message contains the text of a control token."""
        return any(self.pattern.search(piece.text) for span in spans for piece in span if not piece.is_markup)

    def _encode_text(self, text: str) -> list[int]:
        # not verbose: transformers warns about the model's context length, which is max_length's business
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False) if text else []


def make_encoder(tokenizer: Tokenizer, template: str) -> Encoder:
    """The encoder of a tokenizer whose chat template has the source `template`."""
    control_ids = {
        token.content: int(token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if len(token.content) > 1 and (token.special or token.content in template)
    }
    longest_first = sorted(control_ids, key=len, reverse=True)
    # without control tokens: a pattern that matches nothing
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "((?!))")
    return Encoder(tokenizer, control_ids, pattern)


def _cut_inside(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    """`text` in pieces none of which contains a control token: each is cut after its first character.

    Encoded apart, the pieces are ordinary text to any tokenizer. Its `split_special_tokens` switch would do the same
    for special tokens only, and by changing a state that other threads share.
    """
    start = 0
    while found := pattern.search(text, start):
        yield text[start : found.start() + 1]
        start = found.start() + 1
    yield text[start:]
