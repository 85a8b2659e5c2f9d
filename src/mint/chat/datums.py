"""Conversations to datums, for the loss `cross_entropy`; and the next-token shift, the only one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mint import types
from mint.chat.encoding import Tokenizer
from mint.chat.examples import Example, OnOverlong, Rules, TrainOn, convert, require_examples
from mint.chat.messages import check_row
from mint.chat.renderer import Renderer, as_renderer
from mint.errors import InputError

Row = Sequence[Mapping[str, Any]] | Mapping[str, Any]


def conversation_to_datums(
    messages: Row,
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
    *,
    on_overlong: OnOverlong = "drop",
) -> list[types.Datum]:
    """Datums that train a model to give a conversation's answers; for the loss `cross_entropy`.

    Weight 1.0 have the tokens of an answer and its end-of-turn token; headers, other roles, think blocks without a
    thought and what stands between turns have 0.0. Every answer stands after exactly the ids that `prompt` gives
    for the messages before it. It is one datum where the template leaves earlier turns as they are, else (Qwen3 with
    several turns) one per answer.

    messages: mappings with "role" (system, user, assistant) and "content" (text or text parts); see `check_messages`.
    tokenizer: a transformers tokenizer, or the renderer made from it where `thinking` or `date` matter.
    max_length: the most tokens, counted before the shift, so that a datum has one less.
    train_on: "all_assistant"; "last_assistant", the last assistant message; or "all", every token up to the last
        assistant message's end. Messages after it are left out. A message's own "train" or "weight" comes first.
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
    conversion = convert(check_row(messages), as_renderer(tokenizer), rules)
    return [to_datum(example) for example in require_examples(conversion, rules)]


def conversation_to_datum(
    messages: Row,
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
) -> types.Datum:
    """The one datum of a conversation; what is longer than max_length is cut off at the right.

    Raises InputError where one datum would be wrong (see `conversation_to_datums`), and as `conversation_to_datums`.
    """
    return to_datum(_only_example(messages, tokenizer, Rules(max_length, train_on, "truncate_right")))


def tokenize_conversation(
    messages: Row,
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Token ids of a conversation and as many loss weights (1.0 trained, 0.0 not), before the next-token shift.

    The ids end with the last trained token; what is longer than max_length is cut off at the right. Raises as
    `conversation_to_datum`.
    """
    example = _only_example(messages, tokenizer, Rules(max_length, train_on, "truncate_right"))
    return example.tokens, example.weights


def shift(
    tokens: Sequence[int], weights: Sequence[float] | npt.NDArray[np.float32]
) -> tuple[list[int], list[int], list[float]]:
    """The next-token form of N tokens and their N weights: inputs, targets and target weights, N - 1 of each.

    inputs[i] is tokens[i], which predicts targets[i] = tokens[i + 1], whose weight is weights[i + 1]. Nothing predicts
    the first token, so its weight is lost. Raises InputError for fewer than two tokens or unequal lengths.
    """
    if len(tokens) != len(weights):
        raise InputError(f"shift: {len(tokens)} tokens but {len(weights)} weights; expected one weight per token")
    if len(tokens) < 2:
        raise InputError(f"shift: got {len(tokens)} token(s); next-token prediction needs at least 2")
    return list(tokens[:-1]), list(tokens[1:]), [float(weight) for weight in weights[1:]]


def to_datum(example: Example) -> types.Datum:
    inputs, targets, weights = shift(example.tokens, example.weights.tolist())
    return types.Datum(
        model_input=types.ModelInput.from_ints(inputs),
        loss_fn_inputs={
            "target_tokens": types.TensorData(targets, "int64"),
            "weights": types.TensorData(weights, "float32"),
        },
    )


def _only_example(messages: Row, tokenizer: Tokenizer | Renderer, rules: Rules) -> Example:
    renderer = as_renderer(tokenizer)
    examples = require_examples(convert(check_row(messages), renderer, rules), rules)
    if len(examples) > 1:
        raise InputError(
            f"one datum cannot train all {len(examples)} answers of this conversation: the chat template writes "
            "earlier answers differently once more messages follow. Use "
            "conversation_to_datums, which gives one datum per answer, or train_on='last_assistant'"
        )
    return examples[0]
