"""`get_renderer`: prompts, stop tokens and answers in the form of a tokenizer's chat template. No loss weights here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mint.chat.detect import display_name, find_layout, template_of
from mint.chat.encoding import Encoder, Tokenizer, make_encoder
from mint.chat.layout import FROZEN_DATE, Layout, prompt_spans, split_reasoning
from mint.chat.messages import check_messages
from mint.errors import InputError, UnsupportedError


@dataclass(frozen=True, slots=True)
class Response:
    """An answer that a model has written.

    content: the text without thought and without stop token. thinking: the thought, None where there is none.
    finished: False if sampling ended (max_tokens) before the model ended its turn.
    """

    content: str
    thinking: str | None
    finished: bool

    @property
    def message(self) -> dict[str, str]:
        """The answer as a message to put into the conversation."""
        return {"role": "assistant", "content": self.content}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Renderer:
    """Writes conversations as token ids, in the form that a tokenizer's model was trained on; see `get_renderer`."""

    layout: Layout
    encoder: Encoder

    def __repr__(self) -> str:
        return f"Renderer({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    @property
    def settings(self) -> dict[str, str | bool | None]:
        """What a run has to record so that others render as it did: family, default system text, thinking, date."""
        family = self.layout.family
        return {
            "family": family.name,
            "default_system": self.layout.default_system,
            "thinking": self.layout.thinking,
            "date": self.layout.date if family.dated_system else None,
        }

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which sampling has to stop: end of turn first, then end of text; for `SamplingParams`."""
        family, control_ids = self.layout.family, self.encoder.control_ids
        stops = [control_ids[text] for text in (family.end_of_turn, *family.other_stops) if text in control_ids]
        eos = self.encoder.tokenizer.eos_token_id
        return list(dict.fromkeys(stops if eos is None else [*stops, eos]))

    def build_prompt(self, messages: Sequence[Any]) -> list[int]:
        """Token ids to sample the next assistant turn from; the generation prompt is included.

        messages: see `conversation_to_datums`. Raises DataError.
        """
        spans = prompt_spans(self.layout, check_messages(messages))
        return [token for span in spans for token in self.encoder.encode_span(span)]

    def parse_response(self, tokens: Sequence[int]) -> Response:
        """The answer in sampled token ids (list, numpy or torch), as they come after the prompt, stop token included.

        What follows the first stop token is ignored. Other control tokens stay visible in the text.
        """
        ids = [int(token) for token in tokens]
        stops = set(self.stop_token_ids)
        end = next((index for index, token in enumerate(ids) if token in stops), len(ids))
        text = self.encoder.tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        finished = end < len(ids)
        if not self.layout.family.thinks:
            return Response(text, None, finished)
        if "</think>" not in text and text.lstrip("\n").startswith("<think>"):  # cut off inside the thought
            return Response("", text.split("<think>", 1)[1].strip("\n"), finished)
        thinking, content = split_reasoning(text)
        return Response(content, thinking or None, finished)


def get_renderer(tokenizer: Tokenizer, *, thinking: bool = False, date: str | None = None) -> Renderer:
    """The renderer of a tokenizer's chat template. Cheap: a template is examined once per process.

    tokenizer: a transformers tokenizer with a chat template.
    thinking: for Qwen3. False: prompts carry the empty think block that tells the model to answer at once, which fits
        data without thoughts. True: the model writes its own thought; a thought in an answer (`<think>...</think>`) is
        trained, and where an answer has none the template's empty block is put in, untrained.
    date: for Llama 3.1 and 3.2, whose system turn names today's date; written as given, like "26 Jul 2024", which is
        the default, so that a run does not depend on the day it is started.
    Raises UnsupportedError for a template of no known family, and for an option that the family does not have.
    """
    layout = find_layout(tokenizer)
    encoder = make_encoder(tokenizer, template_of(tokenizer))
    family = layout.family
    if family.end_of_turn not in encoder.control_ids:
        raise UnsupportedError(
            f"{display_name(tokenizer)}: the chat template ends turns with {family.end_of_turn!r}, which is not one "
            "token of this tokenizer; add it as a special token, or use the tokenizer the template belongs to"
        )
    if thinking and not family.thinks:
        raise UnsupportedError(
            f"thinking=True: the {family.name} template of {display_name(tokenizer)} has no thinking switch"
        )
    if date is None:
        return Renderer(replace(layout, thinking=thinking), encoder)
    if not family.dated_system:
        raise UnsupportedError(f"date={date!r}: the {family.name} template of {display_name(tokenizer)} writes no date")
    if not isinstance(date, str) or not date.strip() or "\n" in date:
        raise InputError(f"date={date!r}: expected one line of text such as {FROZEN_DATE!r}")
    return Renderer(replace(layout, thinking=thinking, date=date), encoder)
