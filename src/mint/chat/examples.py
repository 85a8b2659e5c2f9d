"""Transcripts to token ids and loss weights, kept to a length. Knows no family; the template and the scribe do.

The unit is the trained turn: the prompt that the sampler would get, followed by the answer. A turn whose prompt
continues the turn before shares its example; where the template rewrites the history, each turn has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from mint.chat.messages import Dialog, Message, PlainText, data_error
from mint.chat.renderer import Renderer
from mint.chat.transcript import MarksMatterError, Stretch, Transcript, whole_text, without_marks
from mint.errors import InputError

TrainOn = Literal["all_assistant", "last_assistant", "all"]
Encoded = Mapping[str, list[int]]
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
            raise InputError(f"train_on={self.train_on!r}: allowed are {', '.join(map(repr, get_args(TrainOn)))}")
        if self.on_overlong not in get_args(OnOverlong):
            raise InputError(
                f"on_overlong={self.on_overlong!r}: allowed are {', '.join(map(repr, get_args(OnOverlong)))}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Tokens to train on; they end with the last trained one.

    weights: one per token, 0.0 for those that are not trained.
    answers: of every trained answer its message number, and how many tokens there are up to its end.
    """

    tokens: list[int] = field(repr=False)
    weights: npt.NDArray[np.float32] = field(repr=False)
    answers: tuple[tuple[int, int], ...]

    def cut(self, length: int, answers: int) -> Example:
        return Example(self.tokens[:length], self.weights[:length], self.answers[:answers])


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted row and what was done to it.

    examples: none where nothing that should be trained fits. turns: answers that should be trained.
    length: tokens of the longest example before anything was cut.
    cut_tokens: tokens that were cut off or left out to keep to max_length.
    shortened_turns: trained turns that lost a part of their answer or of their history.
    dropped_turns: assistant turns that should have been trained, but do not fit.
    trailing_messages: messages after the last assistant turn, which nothing is trained on.
    is_split: several examples were made because the template writes earlier turns differently later on.
    injected_system: text that the template adds on its own, as a system message or elsewhere.
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


@dataclass(frozen=True, slots=True)
class Draft:
    """A row written down, not yet encoded. dialog: up to the last answer. weights: of the trained ones."""

    dialog: Dialog
    weights: dict[int, float]
    transcript: Transcript
    trailing_messages: int

    def texts(self) -> Iterator[str]:
        """What there is to encode."""
        for run in self.transcript.runs:
            for stretch in run:
                yield from (piece for piece in stretch.pieces if isinstance(piece, str))


def convert(row: Dialog | PlainText, renderer: Renderer, rules: Rules) -> Conversion:
    """The examples of a checked row, none where all are too long. Raises DataError where it cannot be used."""
    return finish(write_draft(row, renderer, rules), renderer, rules, {})


def write_draft(row: Dialog | PlainText, renderer: Renderer, rules: Rules) -> Draft | PlainText:
    """The first half of `convert`. Raises DataError."""
    if isinstance(row, PlainText):
        return row
    last = max((index for index, message in enumerate(row.messages) if message.role == "assistant"), default=None)
    if last is None:
        raise data_error("no_assistant", "the conversation has no assistant message, so there is nothing to train on")
    dialog = replace(row, messages=row.messages[: last + 1])
    weights = turn_weights(dialog.messages, rules.train_on)
    transcript = renderer.scribe.write(dialog)
    for index in weights:
        if index in transcript.refused:
            raise transcript.refused[index]
    return Draft(dialog, weights, transcript, len(row.messages) - 1 - last)


def finish(draft: Draft | PlainText, renderer: Renderer, rules: Rules, encoded: Encoded) -> Conversion:
    """The second half. encoded: what of the draft's texts is encoded already. Raises DataError."""
    if isinstance(draft, PlainText):
        return _convert_text(draft, renderer, rules)
    dialog, weights, transcript = draft.dialog, draft.weights, draft.transcript
    if rules.train_on == "all":
        whole = [_whole_example(renderer, dialog)]
    else:
        made = (_example(renderer, run, weights, encoded) for run in transcript.runs)
        whole = [example for example in made if example is not None]
    fits = [_fit(renderer, rules, dialog, weights, example) for example in whole]
    kept = [example for fit in fits for example in fit.examples]
    return Conversion(
        kept,
        turns=sum(len(example.answers) for example in whole),
        length=max(len(example.tokens) for example in whole),
        cut_tokens=sum(fit.cut_tokens for fit in fits),
        shortened_turns=sum(fit.shortened_turns for fit in fits),
        dropped_turns=sum(fit.dropped_turns for fit in fits),
        trailing_messages=draft.trailing_messages,
        is_split=len(whole) > 1,
        has_control_text=renderer.scribe.has_control_text(dialog),
        injected_system="\n".join(transcript.added) or None,
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


def turn_weights(messages: Sequence[Message], train_on: TrainOn) -> dict[int, float]:
    """Message number -> loss weight, of the answers that are trained: their own weight, else what `train_on` says."""
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    weights = {}
    for index in answers:
        own = messages[index].weight
        if train_on == "all" and own not in (None, 1.0):
            raise data_error(
                "bad_weight",
                f"message {index} has its own weight {own:g}, but train_on='all' trains every token alike; remove its "
                "'train' or 'weight', or use train_on='all_assistant'",
            )
        weight = float(train_on != "last_assistant" or index == answers[-1]) if own is None else own
        if weight:
            weights[index] = weight
    if not weights:
        raise data_error("untrained", "every answer has weight 0 (or train: false), so there is nothing to train on")
    return weights


def encode_run(renderer: Renderer, run: Sequence[Stretch], known: Encoded) -> list[tuple[list[int], int]]:
    """The token ids of each stretch, and how many of them are an answer: up to and with the first end-of-turn token."""
    ends = renderer.end_token_ids
    encoded = []
    for stretch, ids in zip(run, renderer.style.encoder.encode_pieces([s.pieces for s in run], known), strict=True):
        learned = 0
        if stretch.message is not None:
            learned = 1 + min(ids.index(end) for end in ends if end in ids)
        encoded.append((ids, learned))
    return encoded


def _example(renderer: Renderer, run: Sequence[Stretch], weights: dict[int, float], encoded: Encoded) -> Example | None:
    """The example of a run, up to the end of its last trained answer; None where none of its answers is."""
    tokens: list[int] = []
    spans: list[tuple[int, int, int]] = []  # message, first token, end
    for stretch, (ids, learned) in zip(run, encode_run(renderer, run, encoded), strict=True):
        if stretch.message in weights:
            spans.append((stretch.message, len(tokens), len(tokens) + learned))
        tokens += ids
    if not spans:
        return None
    end = spans[-1][2]
    loss_weights = np.zeros(end, np.float32)
    for message, start, stop in spans:
        loss_weights[start:stop] = weights[message]
    return Example(tokens[:end], loss_weights, tuple((message, stop) for message, _, stop in spans))


def _whole_example(renderer: Renderer, dialog: Dialog) -> Example:
    messages, tools = renderer.scribe.mark(dialog)
    try:
        stretch = whole_text(renderer.style, messages, tools)
    except MarksMatterError:
        stretch = whole_text(renderer.style, [without_marks(message) for message in messages], tools)
    (ids,) = renderer.style.encoder.encode([stretch.text])
    return _all_trained(ids, len(messages) - 1)


def _all_trained(ids: list[int], message: int) -> Example:
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0.0  # nothing predicts the first token
    return Example(ids, weights, ((message, len(ids)),))


def _convert_text(row: PlainText, renderer: Renderer, rules: Rules) -> Conversion:
    """Text as it stands, with the tokenizer's end-of-text token after it; every token is trained."""
    encoder = renderer.style.encoder
    (ids,) = encoder.encode([encoder.guard(row.text)])
    eos = encoder.tokenizer.eos_token_id
    ids = ids if eos is None else [*ids, eos]
    if len(ids) < 2:
        raise data_error("untrained", "the row's text is a single token, and nothing predicts the first token")
    example = _all_trained(ids, 0)
    fit = _cut_to_length(rules, example)
    return Conversion(
        fit.examples,
        turns=1,
        length=len(example.tokens),
        cut_tokens=fit.cut_tokens,
        shortened_turns=fit.shortened_turns,
        dropped_turns=fit.dropped_turns,
        trailing_messages=0,
        is_split=False,
        has_control_text=encoder.find_control(row.text) is not None,
        injected_system=None,
    )


class _Fit(NamedTuple):
    """What is left of an example within max_length."""

    examples: list[Example]
    cut_tokens: int = 0
    shortened_turns: int = 0
    dropped_turns: int = 0


def _fit(renderer: Renderer, rules: Rules, dialog: Dialog, weights: dict[int, float], example: Example) -> _Fit:
    if len(example.tokens) <= rules.max_length:
        return _Fit([example])
    if rules.on_overlong != "truncate_left_turns" or rules.train_on == "all":
        return _cut_to_length(rules, example)
    fitting = sum(end <= rules.max_length for _, end in example.answers)
    kept = [example.cut(example.answers[fitting - 1][1], fitting)] if fitting else []
    shortened = dropped = cut = 0
    for index, end in example.answers[fitting:]:
        shorter = _with_less_history(renderer, rules, dialog, weights[index], index)
        cut += end - (len(shorter.tokens) if shorter else 0)
        if shorter is None:
            dropped += 1
        else:
            shortened += 1
            kept = _joined(kept, shorter)
    return _Fit(kept, cut, shortened, dropped)


def _cut_to_length(rules: Rules, example: Example) -> _Fit:
    limit, length = rules.max_length, len(example.tokens)
    if length <= limit:
        return _Fit([example])
    if rules.on_overlong == "error":
        message, end = next((message, end) for message, end in example.answers if end > limit)
        raise data_error(
            "overlong",
            f"message {message} and its prompt take {end} tokens, max_length is {limit}; raise max_length, or choose "
            "on_overlong='drop', 'truncate_right' or 'truncate_left_turns'",
        )
    answers = len(example.answers)
    fitting = sum(end <= limit for _, end in example.answers)
    end = example.answers[fitting - 1][1] if fitting else 0
    if rules.on_overlong == "truncate_right" and example.weights[end:limit].any():
        return _Fit([example.cut(limit, fitting)], length - limit, 1, answers - fitting - 1)
    if not fitting:
        return _Fit([], length, 0, answers)
    return _Fit([example.cut(end, fitting)], length - end, 0, answers - fitting)


def _with_less_history(renderer: Renderer, rules: Rules, dialog: Dialog, weight: float, index: int) -> Example | None:
    """Answer `index` after as much of its history as fits: whole turns, from a user message on, and the system message."""
    for numbers in without_oldest_turns(dialog.messages, index):
        messages = tuple(dialog.messages[number] for number in numbers)
        last = len(messages) - 1
        transcript = renderer.scribe.write(replace(dialog, messages=messages))
        if last in transcript.refused:
            continue
        example = _example(renderer, transcript.runs[-1], {last: weight}, {})
        if example is not None and len(example.tokens) <= rules.max_length:
            return replace(example, answers=((index, len(example.tokens)),))
    return None


def _joined(examples: list[Example], turn: Example) -> list[Example]:
    """The turn put into the last example where it continues that one exactly, else after it."""
    before = examples[-1] if examples else None
    length = len(before.tokens) if before else 0
    if before is None or turn.tokens[:length] != before.tokens or turn.weights[:length].any():
        return [*examples, turn]
    weights = np.concatenate([before.weights, turn.weights[length:]])
    return [*examples[:-1], Example(turn.tokens, weights, (*before.answers, *turn.answers))]


def without_oldest_turns(messages: Sequence[Message], answer: int) -> Iterator[tuple[int, ...]]:
    """Numbers of the messages up to `answer`, ever fewer: from a user message on, after the system message if there is
    one."""
    first = 1 if messages[0].role in ("system", "developer") else 0
    for start in range(first + 1, answer):
        if messages[start].role == "user":
            yield (*range(first), *range(start, answer + 1))
