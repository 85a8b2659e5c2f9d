"""Conversations to training data: tokens, loss weights, datums. Knows no family; the renderer does.

The unit is the trained turn: the prompt that the sampler would get, followed by the answer. A turn whose prompt
continues the turn before, token for token, shares its example; where the template rewrites the history, each turn has
its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from mint import types
from mint.chat.encoding import Tokenizer
from mint.chat.layout import Span, answer_spans, injected_system, prompt_spans
from mint.chat.messages import Message, check_messages, data_error
from mint.chat.renderer import Renderer, get_renderer
from mint.errors import InputError

TrainOn = Literal["all_assistant", "last_assistant"]
OnOverlong = Literal["drop", "truncate_right", "truncate_left_turns", "error"]


@dataclass(frozen=True, slots=True)
class Rules:
    """Which turns to train and what to do with those that are too long; see `conversation_to_datums`."""

    max_length: int
    train_on: TrainOn = "all_assistant"
    on_overlong: OnOverlong = "drop"

    def __post_init__(self) -> None:
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2:
            raise InputError(f"max_length={self.max_length!r}: expected a whole number of tokens, at least 2")
        if self.train_on not in get_args(TrainOn):
            raise InputError(
                f"train_on={self.train_on!r}: allowed are {', '.join(map(repr, get_args(TrainOn)))}; "
                "training on system and user turns is not supported"
            )
        if self.on_overlong not in get_args(OnOverlong):
            raise InputError(
                f"on_overlong={self.on_overlong!r}: allowed are {', '.join(map(repr, get_args(OnOverlong)))}"
            )


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens to train on; they end with the last trained one.

    weights: one per token, 1.0 for those the model has to learn to write, else 0.0.
    prompt_length: how many tokens the sampler is given before the last answer.
    """

    tokens: list[int] = field(repr=False)
    weights: list[float] = field(repr=False)
    prompt_length: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted conversation and what was done to it.

    examples: none where nothing that should be trained fits. turns: assistant turns that should be trained.
    length: tokens of the longest example before anything was cut.
    cut_tokens: tokens that were cut off or left out to keep to max_length.
    shortened_turns: trained turns that lost a part of their answer or of their history.
    dropped_turns: assistant turns that should have been trained, but do not fit.
    trailing_messages: messages after the last assistant turn, which nothing is trained on.
    is_split: several examples were made because the template writes earlier turns differently later on.
    """

    examples: list[Example]
    turns: int
    length: int
    cut_tokens: int
    shortened_turns: int
    dropped_turns: int
    trailing_messages: int
    is_split: bool
    has_control_text: bool
    injected_system: str | None


def conversation_to_datums(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
    *,
    on_overlong: OnOverlong = "drop",
) -> list[types.Datum]:
    """Datums that train a model to give a conversation's answers; for the loss `cross_entropy`.

    Weight 1.0 have the tokens of an answer and its end-of-turn token; headers, other roles, think blocks without a
    thought and what stands between turns have 0.0. Every answer stands after exactly the ids that `build_prompt` gives
    for the messages before it. It is one datum where the template leaves earlier turns as they are, else (Qwen3 with
    several turns) one per answer.

    messages: mappings with "role" (system, user, assistant) and "content" (text or text parts); see `check_messages`.
    tokenizer: a transformers tokenizer, or the renderer made from it where `thinking` or `date` matter.
    max_length: the most tokens, counted before the shift, so that a datum has one less.
    train_on: "all_assistant", or "last_assistant" for the last assistant message. Messages after it are left out.
    on_overlong: what is done with an answer that does not fit together with its prompt.
        "drop": it is not trained.
        "truncate_right": the tokens are cut at max_length.
        "truncate_left_turns": the oldest turns are left out, up to a user message, and the system message is kept; a
        long conversation then becomes several datums, each answer with as much history as fits.
        "error": DataError.

    Raises DataError, whose reason `skip_reason` tells, for a conversation that cannot be used or of which nothing is
    left to train; InputError for a wrong option; UnsupportedError as `get_renderer`.
    """
    rules = Rules(max_length, train_on, on_overlong)
    conversion = convert(check_messages(messages), as_renderer(tokenizer), rules)
    return [to_datum(example) for example in require_examples(conversion, rules)]


def conversation_to_datum(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
) -> types.Datum:
    """The one datum of a conversation; what is longer than max_length is cut off at the right.

    Raises InputError where one datum would be wrong (see `conversation_to_datums`), and as `conversation_to_datums`.
    """
    return to_datum(_only_example(messages, tokenizer, Rules(max_length, train_on, "truncate_right")))


def tokenize_conversation(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Token ids of a conversation and as many loss weights (1.0 trained, 0.0 not), before the next-token shift.

    The ids end with the last trained token; what is longer than max_length is cut off at the right. Raises as
    `conversation_to_datum`.
    """
    example = _only_example(messages, tokenizer, Rules(max_length, train_on, "truncate_right"))
    return example.tokens, np.array(example.weights, dtype=np.float32)


def shift(tokens: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[int], list[float]]:
    """The next-token form of N tokens and their N weights: inputs, targets and target weights, N - 1 of each.

    inputs[i] is tokens[i], which predicts targets[i] = tokens[i + 1], whose weight is weights[i + 1]. Nothing predicts
    the first token, so its weight is lost. Raises InputError for fewer than two tokens or unequal lengths.
    """
    if len(tokens) != len(weights):
        raise InputError(f"shift: {len(tokens)} tokens but {len(weights)} weights; expected one weight per token")
    if len(tokens) < 2:
        raise InputError(f"shift: got {len(tokens)} token(s); next-token prediction needs at least 2")
    return list(tokens[:-1]), list(tokens[1:]), list(weights[1:])


def as_renderer(tokenizer: Tokenizer | Renderer) -> Renderer:
    return tokenizer if isinstance(tokenizer, Renderer) else get_renderer(tokenizer)


def to_datum(example: Example) -> types.Datum:
    inputs, targets, weights = shift(example.tokens, example.weights)
    return types.Datum(
        model_input=types.ModelInput.from_ints(inputs),
        loss_fn_inputs={
            "target_tokens": types.TensorData(targets, "int64"),
            "weights": types.TensorData(weights, "float32"),
        },
    )


def convert(messages: tuple[Message, ...], renderer: Renderer, rules: Rules) -> Conversion:
    """The examples of a checked conversation, none where all are too long. Raises DataError where it cannot be used."""
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise data_error("no_assistant", "the conversation has no assistant message, so there is nothing to train on")
    trailing = len(messages) - 1 - turns[-1]
    if rules.train_on == "last_assistant":
        turns = turns[-1:]
    builder = _Builder(renderer, rules)
    fits = [builder.fit(messages[: turn + 1]) for turn in turns]
    examples = _join([fit.example for fit in fits if fit.example])
    return Conversion(
        examples,
        turns=len(turns),
        length=max(fit.length for fit in fits),
        cut_tokens=sum(fit.length - (len(fit.example.tokens) if fit.example else 0) for fit in fits),
        shortened_turns=sum(fit.example is not None and fit.length > len(fit.example.tokens) for fit in fits),
        dropped_turns=sum(fit.example is None for fit in fits),
        trailing_messages=trailing,
        is_split=len(examples) > 1 and not any(fit.length > rules.max_length for fit in fits),
        has_control_text=renderer.encoder.has_control_text(list(builder.encoded)),
        injected_system=injected_system(renderer.layout, messages),
    )


def require_examples(conversion: Conversion, rules: Rules) -> list[Example]:
    """The examples; DataError where there are none."""
    if not conversion.examples:
        raise data_error(
            "overlong",
            f"no trained token is within max_length={rules.max_length} with on_overlong={rules.on_overlong!r}; "
            "raise max_length or leave the row out",
        )
    return conversion.examples


class _Fit(NamedTuple):
    """A trained turn within max_length, None if it does not fit; how many tokens it takes uncut."""

    example: Example | None
    length: int


@dataclass(frozen=True, slots=True)
class _Builder:
    """Builds the trained turns of one conversation; encodes a span once however many turns' prompts contain it."""

    renderer: Renderer
    rules: Rules
    encoded: dict[Span, list[int]] = field(default_factory=dict)

    def fit(self, messages: tuple[Message, ...]) -> _Fit:
        """The last message as a trained turn."""
        limit, turn = self.rules.max_length, len(messages) - 1
        example = self.build(messages)
        length = len(example.tokens)
        if length <= limit:
            return _Fit(example, length)
        match self.rules.on_overlong:
            case "error":
                raise data_error(
                    "overlong",
                    f"message {turn} and its prompt take {length} tokens, max_length is {limit}; raise "
                    "max_length, or choose on_overlong='drop', 'truncate_right' or 'truncate_left_turns'",
                )
            case "truncate_right" if any(example.weights[:limit]):
                return _Fit(replace(example, tokens=example.tokens[:limit], weights=example.weights[:limit]), length)
            case "truncate_left_turns":
                for shorter in _without_oldest_turns(messages):
                    example = self.build(shorter)
                    if len(example.tokens) <= limit:
                        return _Fit(example, length)
        return _Fit(None, length)

    def build(self, messages: tuple[Message, ...]) -> Example:
        """The last message after the prompt of the others."""
        *history, answer = messages
        if not history:
            raise data_error(
                "no_prompt",
                "message 0 is an assistant turn with nothing before it to answer; remove it, put a system or "
                "user message before it, or use train_on='last_assistant'",
            )
        layout = self.renderer.layout
        prompt = self._encode(prompt_spans(layout, history))
        tokens, weights = list(prompt), [0.0] * len(prompt)
        for part in answer_spans(layout, answer, f"message {len(history)}"):
            ids = self._encode([part.span])
            tokens += ids
            weights += [float(part.trained)] * len(ids)
        return Example(tokens, weights, prompt_length=len(prompt))

    def _encode(self, spans: Sequence[Span]) -> list[int]:
        for span in spans:
            if span not in self.encoded:
                self.encoded[span] = self.renderer.encoder.encode_span(span)
        return [token for span in spans for token in self.encoded[span]]


def _join(turns: Sequence[Example]) -> list[Example]:
    """Examples in which each turn is put into its predecessor's wherever its prompt continues that one exactly."""
    joined: list[Example] = []
    for turn in turns:
        before = joined[-1] if joined else None
        length = len(before.tokens) if before else 0
        if before and length <= turn.prompt_length and turn.tokens[:length] == before.tokens:
            joined[-1] = replace(turn, weights=before.weights + turn.weights[length:])
        else:
            joined.append(turn)
    return joined


def _without_oldest_turns(messages: tuple[Message, ...]) -> Iterator[tuple[Message, ...]]:
    """Ever shorter ends of a conversation that start with a user message, after the system message if there is one."""
    first = 1 if messages[0].role == "system" else 0
    for start in range(first + 1, len(messages) - 1):
        if messages[start].role == "user":
            yield messages[:first] + messages[start:]


def _only_example(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer | Renderer, rules: Rules) -> Example:
    renderer = as_renderer(tokenizer)
    examples = require_examples(convert(check_messages(messages), renderer, rules), rules)
    if len(examples) > 1:
        raise InputError(
            f"one datum cannot train all {len(examples)} answers of this conversation: the "
            f"{renderer.layout.family.name} template writes earlier answers differently once more messages follow. Use "
            "conversation_to_datums, which gives one datum per answer, or train_on='last_assistant'"
        )
    return examples[0]
