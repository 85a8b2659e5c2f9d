"""Many conversations to datums, at once or row by row, with an account of everything that was left out or added."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mint import types
from mint.chat.datums import to_datum
from mint.chat.encoding import Tokenizer
from mint.chat.examples import (
    Conversion,
    Draft,
    Encoded,
    OnOverlong,
    Rules,
    TrainOn,
    finish,
    require_examples,
    write_draft,
)
from mint.chat.messages import Dialog, Message, PlainText, check_row, skip_reason
from mint.chat.renderer import Renderer, as_renderer
from mint.chat.seen import SeenDigests, SeenNumbers
from mint.errors import DataError

CHUNK_ROWS = 128  # encoded together
LISTED_ROWS = 100  # row numbers kept per reason
_NUMBERS_SHOWN = 10  # row numbers printed per reason
_as_json = json.JSONEncoder(sort_keys=True).encode


@dataclass(slots=True)
class ConversionReport:
    """What became of the rows of `convert_conversations`. Prints as a short table.

    rows: conversations read. datums, tokens: what was made; a datum's tokens are those of its model input.
    trained_tokens: targets with a weight other than zero.
    skipped: how many rows gave no datum, by reason. skipped_rows: the numbers (from 0) of the first 100 of them;
        first_errors: one message per reason.
    truncated_rows: rows with an answer or a history cut to max_length; dropped_turns: answers that did not fit, in rows
        of which others did; trailing_messages: messages after the last assistant turn, left out.
    control_text_rows: rows with the text of a control token in a message; it was encoded as ordinary text.
    injected_system: system texts that the template added on its own, and in how many rows.
    duplicate_rows: rows whose roles and contents equal those of an earlier row; they are kept.
    """

    rows: int = 0
    datums: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_rows: dict[str, list[int]] = field(default_factory=dict)
    first_errors: dict[str, str] = field(default_factory=dict)
    truncated_rows: int = 0
    dropped_turns: int = 0
    trailing_messages: int = 0
    control_text_rows: int = 0
    injected_system: dict[str, int] = field(default_factory=dict)
    duplicate_rows: int = 0

    @property
    def skipped_fraction(self) -> float:
        """Skipped rows / rows; 0.0 without rows."""
        return sum(self.skipped.values()) / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        lines = [
            f"rows                    {self.rows:,}",
            f"datums                  {self.datums:,}",
            f"tokens                  {self.tokens:,} ({self.trained_tokens:,} trained)",
        ]
        for reason, count in self.skipped.items():
            numbers = self.skipped_rows[reason][:_NUMBERS_SHOWN]
            shown = ", ".join(map(str, numbers)) + (", ..." if count > _NUMBERS_SHOWN else "")
            lines += [f"skipped: {reason:<14} {count:,} (rows {shown})", f"    {self.first_errors[reason]}"]
        counts = {
            "truncated rows": self.truncated_rows,
            "answers too long": self.dropped_turns,
            "trailing messages": self.trailing_messages,
            "control token text": self.control_text_rows,
            "exact duplicates": self.duplicate_rows,
        }
        lines += [f"{name:<23} {count:,}" for name, count in counts.items() if count]
        lines += [f"system text added       {count:,} x {text!r}" for text, count in self.injected_system.items()]
        return "\n".join(lines)

    def add(self, conversion: Conversion, datums: list[types.Datum]) -> None:
        """Count one converted row."""
        self.datums += len(datums)
        self.tokens += sum(datum.model_input.length for datum in datums)
        self.trained_tokens += sum(int(np.count_nonzero(example.weights[1:])) for example in conversion.examples)
        self.truncated_rows += conversion.shortened_turns > 0
        self.dropped_turns += conversion.dropped_turns
        self.trailing_messages += conversion.trailing_messages
        self.control_text_rows += conversion.has_control_text
        if conversion.injected_system is not None:
            text = conversion.injected_system
            self.injected_system[text] = self.injected_system.get(text, 0) + 1

    def skip(self, row: int, error: DataError) -> None:
        """Count one row that cannot be used."""
        reason = skip_reason(error)
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        listed = self.skipped_rows.setdefault(reason, [])
        if len(listed) < LISTED_ROWS:
            listed.append(row)
        self.first_errors.setdefault(reason, f"row {row}: {error}")


def convert_conversations(
    rows: Iterable[Any],
    tokenizer: Tokenizer | Renderer,
    max_length: int,
    train_on: TrainOn = "all_assistant",
    *,
    on_overlong: OnOverlong = "drop",
) -> tuple[list[types.Datum], ConversionReport]:
    """The datums of many conversations, in their order, and the report. Arguments as `conversation_to_datums`.

    rows: message lists. A row that cannot be used is skipped and counted by reason; whether too many are, is the
    caller's decision (`report.skipped_fraction`). Only with on_overlong="error" an overlong row raises DataError.
    """
    converter = Converter(tokenizer, max_length, train_on, on_overlong=on_overlong)
    datums = [datum for outcome in converter.outcomes(enumerate(rows)) for datum in converter.take(outcome)]
    return datums, converter.report


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of row `number`: a conversion, or the error for which it cannot be used, or both.

    conversion: has no examples where the row is too long, and an error stands beside it.
    digest: of roles and contents, equal for equal conversations; None where there is no conversation.
    """

    number: int
    digest: bytes | None
    conversion: Conversion | None
    error: DataError | None


class Converter:
    """As `convert_conversations`, row by row: `converter(number, row)` gives the datums of a row, none where it cannot be
    used. `report` counts a row once, however often it comes.

    It is `take(outcome(number, row))`: the first half costs time and knows nothing of other rows, so it can run in another
    process; the second half counts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | Renderer,
        max_length: int,
        train_on: TrainOn = "all_assistant",
        *,
        on_overlong: OnOverlong = "drop",
    ) -> None:
        self.report = ConversionReport()
        self.renderer, self.rules = as_renderer(tokenizer), Rules(max_length, train_on, on_overlong)
        self._numbers, self._digests = SeenNumbers(), SeenDigests()

    def __call__(self, number: int, row: Any) -> list[types.Datum]:
        """Raises DataError for an overlong row, and only with on_overlong="error"."""
        return self.take(self.outcome(number, row))

    def outcome(self, number: int, row: Any) -> RowOutcome:
        """Converts a row; changes nothing."""
        return self._finished(number, *self._draft(row), {})

    def outcomes(self, rows: Iterable[tuple[int, Any]]) -> Iterator[RowOutcome]:
        """The outcomes of numbered rows, in their order. Rows are encoded by the hundred, which is faster."""
        numbered = iter(rows)
        encoder = self.renderer.style.encoder
        while chunk := list(islice(numbered, CHUNK_ROWS)):
            drafts = [(number, *self._draft(row)) for number, row in chunk]
            encoded = encoder.encode_together(
                text for _, _, draft in drafts if isinstance(draft, Draft) for text in draft.texts()
            )
            for number, digest, draft in drafts:
                yield self._finished(number, digest, draft, encoded)

    def _draft(self, row: Any) -> tuple[bytes | None, Draft | PlainText | DataError]:
        digest = None
        try:
            checked = check_row(row)
            digest = _digest(checked)
            return digest, write_draft(checked, self.renderer, self.rules)
        except DataError as error:
            return digest, error

    def _finished(
        self, number: int, digest: bytes | None, draft: Draft | PlainText | DataError, encoded: Encoded
    ) -> RowOutcome:
        if isinstance(draft, DataError):
            return RowOutcome(number, digest, None, draft)
        conversion = None
        try:
            conversion = finish(draft, self.renderer, self.rules, encoded)
            require_examples(conversion, self.rules)
        except DataError as error:
            return RowOutcome(number, digest, conversion, error)
        return RowOutcome(number, digest, conversion, None)

    def take(self, outcome: RowOutcome) -> list[types.Datum]:
        """Counts an outcome and gives its datums. Raises as `converter(number, row)`."""
        is_new = self._numbers.add(outcome.number)
        report = self.report if is_new else ConversionReport()
        report.rows += 1
        if outcome.digest is not None and is_new:
            report.duplicate_rows += not self._digests.add(outcome.digest)
        if outcome.error is not None:
            if self.rules.on_overlong == "error" and skip_reason(outcome.error) == "overlong":
                raise DataError(f"{outcome.error} (row {outcome.number})")
            report.skip(outcome.number, outcome.error)
            return []
        assert outcome.conversion is not None
        made = [to_datum(example) for example in outcome.conversion.examples]
        report.add(outcome.conversion, made)
        return made


def _digest(row: Dialog | PlainText) -> bytes:
    said: Any = row.text if isinstance(row, PlainText) else [[_said(message) for message in row.messages], row.tools]
    return hashlib.blake2b(_as_json(said).encode(), digest_size=16).digest()


def _said(message: Message) -> list[Any]:
    calls = [(call.name, call.arguments) for call in message.tool_calls]
    return [message.role, message.content, message.reasoning, calls]
