"""What a chat set is for one model: the record that `mint data check` writes, and the judgement of it.

A certificate depends on nothing but the data, the tokenizer, the rules and MinT's version: it holds no time and no path of
its own, so two of the same are equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from mint.data.duplicates import Duplicates
from mint.errors import DataError

SCHEMA_VERSION: Final = 1
LISTED_ROWS: Final = 100
MAX_LOSS: Final = 0.01
METADATA_KEY: Final = "data_certificate"  # of a checkpoint's user_metadata; the compact form as JSON text
UNUSUAL_TRAINED_SHARE: Final = (0.05, 0.95)  # outside of it a note says so
_NAME_CHARACTERS: Final = 300  # of a name in the compact form

Verdict = Literal["ok", "refused", "incomplete"]


@dataclass(slots=True)
class RowList:
    """How many rows, and the numbers (from 0) of the first LISTED_ROWS."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < LISTED_ROWS:
            self.first.append(number)


@dataclass(slots=True)
class DroppedRows:
    """Rows that give no example, all for one reason, and what was wrong with the first."""

    first_error: str
    rows: RowList = field(default_factory=RowList)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Percentiles (nearest rank) of the rows' lengths in tokens before anything is cut: of a row's longest example."""

    p50: int
    p90: int
    p95: int
    p99: int
    max: int


@dataclass(slots=True)
class SplitCertificate:
    """Of the training rows or of the test rows.

    rows_in_set: all there are; rows: those looked at. used_rows: those that give at least one of the examples.
    turns: answers that should be trained, of rows that could be read; dropped_turns: those too long to be trained.
    tokens: that the model reads; trained_tokens: those of its targets that have a weight.
    truncated: rows of which an answer or its history was cut; shortened_turns: the answers it happened to.
    cut_tokens: tokens that were cut off or left out to keep to the length.
    dropped: rows that give nothing, by reason code (see `mint.chat.skip_reason`).
    split: rows made into several examples, since the template writes earlier turns differently later on.
    control_text: rows with the text of a control token in a message; it is encoded as ordinary text.
    injected_system: system texts that the template adds, with the number of rows; of further texts only how many rows.
    trailing_messages: messages after the last answer, which are left out.
    rendered_sha256: of all ids and weights in the order of the rows, see `rendered_hash`.

    Rows that are dropped only for their length count in turns, dropped_turns, cut_tokens and lengths; all else is of
    used rows.
    """

    rows_in_set: int
    rows: int = 0
    used_rows: int = 0
    examples: int = 0
    turns: int = 0
    dropped_turns: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    lengths: Lengths | None = None
    truncated: RowList = field(default_factory=RowList)
    shortened_turns: int = 0
    cut_tokens: int = 0
    dropped: dict[str, DroppedRows] = field(default_factory=dict)
    split: RowList = field(default_factory=RowList)
    control_text: RowList = field(default_factory=RowList)
    injected_system: dict[str, int] = field(default_factory=dict)
    further_injected_system: int = 0
    trailing_messages: int = 0
    rendered_sha256: str = ""

    @property
    def dropped_rows(self) -> int:
        return self.rows - self.used_rows

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """For whom the data was rendered. context: the most tokens the model takes; None where that is not known."""

    name: str
    revision: str | None
    template_sha256: str | None
    tokenizer_sha256: str
    context: int | None


@dataclass(frozen=True, slots=True)
class Certificate:
    """See the module. renderer: `Renderer.settings`. rules: max_length, train_on, on_overlong. max_loss: the share that
    may be lost. is_sample: evenly spaced rows were looked at, not all. is_interrupted: the check was stopped early."""

    mint_version: str
    dataset: str
    model: ModelFacts
    renderer: dict[str, Any]
    rules: dict[str, Any]
    max_loss: float
    is_sample: bool
    is_interrupted: bool
    train: SplitCertificate
    test: SplitCertificate
    duplicates: Duplicates

    @property
    def lost_share(self) -> float:
        """The larger of two shares, that of rows and that of answers lost; of training rows alone or of all."""
        return max(_lost_rows(self), _lost_answers(self))

    @property
    def verdict(self) -> Verdict:
        if self.is_interrupted:
            return "incomplete"
        return "refused" if problems(self) else "ok"

    def to_json(self) -> dict[str, Any]:
        """Everything, as it is written to a file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "lost_share": round(self.lost_share, 6),
            "problems": problems(self),
            "notes": notes(self),
            **asdict(self),
        }

    def compact(self) -> dict[str, Any]:
        """What a checkpoint's metadata holds of it; 2 kB at the most."""
        kept = ("rows", "used_rows", "tokens", "trained_tokens", "rendered_sha256")
        return {
            "schema_version": SCHEMA_VERSION,
            "mint_version": self.mint_version,
            "verdict": self.verdict,
            "lost_share": round(self.lost_share, 6),
            "dataset": self.dataset[:_NAME_CHARACTERS],
            "model": self.model.name[:_NAME_CHARACTERS],
            "template_sha256": self.model.template_sha256,
            "tokenizer_sha256": self.model.tokenizer_sha256,
            "rules": self.rules,
            "is_sample": self.is_sample,
            "train": {name: getattr(self.train, name) for name in kept},
            "test": {name: getattr(self.test, name) for name in kept},
        }


def compact_line(compact: dict[str, Any]) -> str:
    """One line for people of `Certificate.compact()`."""
    train, share = compact["train"], compact["train"]["trained_tokens"] / max(1, compact["train"]["tokens"])
    sample = ", a sample" if compact["is_sample"] else ""
    return (
        f"{compact['verdict']}: {compact['dataset']}, {train['used_rows']:,} of {train['rows']:,} training rows{sample}, "
        f"{train['tokens']:,} tokens, {share:.1%} trained, rendered {train['rendered_sha256'][:12]}"
    )


def problems(certificate: Certificate) -> list[str]:
    """Why this set should not be trained on as it is; empty where nothing speaks against it."""
    train, limit = certificate.train, certificate.max_loss
    found = []
    if not train.trained_tokens:
        found.append("nothing would be trained: no training row gives a token with a weight")
    for what, share in (("rows", _lost_rows(certificate)), ("answers", _lost_answers(certificate))):
        if share > limit:
            found.append(f"{share:.2%} of the {what} would be lost, allowed are {limit:.2%}")
    return found


def ways_out(certificate: Certificate) -> list[str]:
    """What can be done about the problems."""
    parts = (certificate.train, certificate.test)
    reasons = {reason: dropped for part in parts for reason, dropped in part.dropped.items()}
    found = []
    if "overlong" in reasons or any(part.dropped_turns for part in parts):
        longest = max((part.lengths.max for part in parts if part.lengths), default=None)  # None: all were refused
        told = "" if longest is None else f"the longest row takes {longest:,} tokens; "
        context = certificate.model.context
        if context is None or certificate.rules["max_length"] < context:
            found.append(f"raise --max-length ({told}auto proposes a length)")
        found.append("shorten the rows")
    mendable = [reason for reason in reasons if reason != "overlong"]
    if mendable:
        found.append(f"mend or remove the rows dropped as {', '.join(mendable)}")
    if certificate.train.trained_tokens:
        found.append(f"allow it with --max-loss {math.ceil(certificate.lost_share * 1000) / 1000:g}")
    return found


def notes(certificate: Certificate) -> list[str]:
    """What is remarkable, though nothing is lost by it."""
    parts = {"training": certificate.train, "test": certificate.test}
    found = []
    low, high = UNUSUAL_TRAINED_SHARE
    share = certificate.train.trained_share
    if certificate.train.trained_tokens and not low <= share <= high:
        found.append(
            f"{share:.1%} of the training tokens are trained, which is unusually {'few' if share < low else 'many'}"
        )
    date = certificate.renderer.get("date")
    if date is not None:
        found.append(f"the template writes a date; it is frozen to {date!r}")
    if any(part.injected_system for part in parts.values()):
        found.append("the template adds text that is not in the data")
    found += [
        _per_part(parts, "split", "rows became one example per answer, since the template rewrites earlier turns")
    ]
    found += [_per_part(parts, "control_text", "rows hold the text of a control token; it is encoded as plain text")]
    context, longest = certificate.model.context, certificate.rules["max_length"]
    if context is not None and longest > context:
        found.append(f"max_length={longest} is more than the model's context of {context} tokens")
    duplicates = certificate.duplicates
    overlap = duplicates.overlap_exact.count + duplicates.overlap_near.count
    if overlap:
        found.append(f"{overlap:,} test rows stand among the training rows too, exactly or nearly: test losses flatter")
    if duplicates.uncompared:
        found.append(f"{duplicates.uncompared:,} more pairs of rows may be near duplicates; they were not compared")
    return [note for note in found if note]


def require_acceptable(certificate: Certificate, where: str) -> None:
    """Raises DataError where there are problems. where: the file or command that tells more."""
    found = problems(certificate)
    if found:
        raise DataError(
            f"data set {certificate.dataset}: {'; '.join(found)}. {'; '.join(ways_out(certificate))}. All of it: {where}"
        )


def require_same_data(before: dict[str, Any], now: Certificate) -> None:
    """Raises DataError where the data renders to other tokens than in an earlier certificate (its JSON, of any form)."""
    hashes = {
        name: (before.get(name, {}).get("rendered_sha256"), getattr(now, name).rendered_sha256)
        for name in ("train", "test")
    }
    changed = [name for name, (then, today) in hashes.items() if then != today]
    if changed:
        then, today = hashes[changed[0]]
        raise DataError(
            f"data set {now.dataset}: the {' and '.join(changed)} rows render to other tokens than when this run began "
            f"({str(then)[:12]}, now {today[:12]}). The data, the tokenizer or MinT has changed; bring back what was, or "
            "declare it with --data-changed"
        )


def model_facts(name: str, tokenizer: Any, *, revision: str | None = None, context: int | None = None) -> ModelFacts:
    """Facts of a transformers tokenizer."""
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return ModelFacts(name, revision, _sha256(template) if template else None, _tokenizer_sha256(tokenizer), context)


def _tokenizer_sha256(tokenizer: Any) -> str:
    if not tokenizer.is_fast:
        return _sha256(json.dumps(sorted(tokenizer.get_vocab().items())))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # these two are a call's options, which the tokenizer keeps until the next
    return _sha256(json.dumps({**state, "truncation": None, "padding": None}, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _lost_rows(certificate: Certificate) -> float:
    return max(
        _share(sum(part.dropped_rows for part in parts), sum(part.rows for part in parts))
        for parts in _views(certificate)
    )


def _lost_answers(certificate: Certificate) -> float:
    return max(
        _share(sum(part.dropped_turns for part in parts), sum(part.turns for part in parts))
        for parts in _views(certificate)
    )


def _views(certificate: Certificate) -> tuple[Sequence[SplitCertificate], ...]:
    return (certificate.train,), (certificate.train, certificate.test)


def _share(lost: int, of: int) -> float:
    return lost / of if of else 0.0


def _per_part(parts: dict[str, SplitCertificate], field_name: str, text: str) -> str:
    counts = {name: getattr(part, field_name).count for name, part in parts.items()}
    return (
        f"{' and '.join(f'{count:,} {name}' for name, count in counts.items() if count)} {text}"
        if any(counts.values())
        else ""
    )
