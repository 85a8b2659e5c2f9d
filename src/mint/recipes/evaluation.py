"""How well a model predicts held-out answers: from forward outputs and datums to numbers. Calls no model.

    held_out = evaluation_set(rows, tokenizer)                                  # rows: the datums of each conversation
    result = measure(client.forward(held_out.datums).result(), held_out)

Two evaluations may be compared where their `rendered_hash` is the same. Bits per byte may also be compared between
tokenizers and templates, as long as the rows are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mint import types
from mint.data.rendered_hash import rendered_hash
from mint.errors import InputError

Floats = npt.NDArray[np.float64]


class Decoder(Protocol):
    """The part of a transformers tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], **options: object) -> str: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model made of held-out answers. NLL: negative log-probability in nats.

    nll: mean over trained tokens, weighted as in training. row_mean_nll: the mean over rows of each row's `nll`, so that
        a short answer counts as much as a long one. perplexity: exp(nll).
    bits_per_byte: NLL of all trained tokens in bits, each counted once whatever its weight, over `bytes`; inf where
        the trained text is empty. The NLL of end-of-turn tokens is counted, since the model has to write them; they
        add no byte.
    rows: conversations. tokens: trained ones, end-of-turn tokens among them.
    bytes: of the trained text in UTF-8, without control tokens.
    rendered_hash: of what was measured, see `mint.data.rendered_hash`.
    """

    nll: float
    row_mean_nll: float
    perplexity: float
    bits_per_byte: float
    rows: int
    tokens: int
    bytes: int
    rendered_hash: str

    def row(self, step: int) -> dict[str, float | str]:
        """As it stands in a run's metrics.jsonl, measured after `step` steps."""
        return {
            "step": step, "test_nll": self.nll, "test_row_nll": self.row_mean_nll, "test_perplexity": self.perplexity,
            "test_bits_per_byte": self.bits_per_byte, "test_tokens": self.tokens, "test_hash": self.rendered_hash,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """Held-out rows, each as its datums, with what does not depend on the model; see `evaluation_set`."""

    rows: tuple[tuple[types.Datum, ...], ...] = field(repr=False)
    bytes: int
    rendered_hash: str

    @property
    def datums(self) -> list[types.Datum]:
        """Those of all rows, in order, as a forward pass takes them."""
        return [datum for row in self.rows for datum in row]


def evaluation_set(rows: Sequence[Sequence[types.Datum]], tokenizer: Decoder) -> EvaluationSet:
    """rows: the datums of each conversation, as `conversation_to_datums` or a `Converter` gives them.

    tokenizer: the one they were made with. Of the trained text, control tokens are those it calls special; a character
    that truncation cut in two counts three bytes. Raises InputError where nothing, or a row without a trained token, is
    given.
    """
    if not rows:
        raise InputError("evaluation_set: no rows; give at least one held-out conversation")
    made = tuple(tuple(row) for row in rows)
    for number, row in enumerate(made):
        if not any(np.any(_weights(datum) != 0) for datum in row):
            raise InputError(f"evaluation_set: row {number} has no trained token; leave it out")
    datums = [datum for row in made for datum in row]
    num_bytes = sum(
        len(tokenizer.decode(run, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())
        for datum in datums
        for run in _trained_runs(datum)
    )
    return EvaluationSet(made, num_bytes, rendered_hash(datums))


def measure(output: types.ForwardBackwardOutput, held_out: EvaluationSet) -> Evaluation:
    """The evaluation of a forward pass over `held_out.datums`, in float64. Raises InputError for another number of datums."""
    scored = iter(_scored(output, held_out.datums))
    rows = [[next(scored) for _ in row] for row in held_out.rows]
    total, weight = _sums([datum for row in rows for datum in row])
    nll = total / weight
    row_sums = [_sums(row) for row in rows]
    trained = [nlls[weights != 0] for row in rows for nlls, weights in row]
    bits = sum(float(nlls.sum()) for nlls in trained) / math.log(2)
    return Evaluation(
        nll=nll,
        row_mean_nll=sum(total / weight for total, weight in row_sums) / len(rows),
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        bits_per_byte=bits / held_out.bytes if held_out.bytes else math.inf,
        rows=len(rows),
        tokens=sum(len(nlls) for nlls in trained),
        bytes=held_out.bytes,
        rendered_hash=held_out.rendered_hash,
    )


def comparison(before: Evaluation, after: Evaluation) -> str:
    """Both as a small table; the second alone, and why, where they did not measure the same tokens."""
    comparable = before.rendered_hash == after.rendered_hash
    values = {
        "test NLL:": (before.nll, after.nll),
        "mean of rows:": (before.row_mean_nll, after.row_mean_nll),
        "perplexity:": (before.perplexity, after.perplexity),
        "bits per byte:": (before.bits_per_byte, after.bits_per_byte),
    }
    lines = [
        f"{name:<14} {f'{first:.4f} -> ' if comparable else ''}{second:.4f}" for name, (first, second) in values.items()
    ]
    lines[0] += f"  ({after.rows} held-out rows, {after.tokens:,} trained tokens)"
    if not comparable:
        lines.append("before training other tokens were measured, so there is nothing to compare these numbers with")
    return "\n".join(lines)


def mean_nll(output: types.ForwardBackwardOutput, datums: Sequence[types.Datum]) -> float:
    """Nats per trained token of `forward` or `forward_backward` with `cross_entropy`: its sum over the sum of weights.

    datums: those that the output is of, in the same order. Raises InputError for another number of datums, or where
    their weights add up to nothing.
    """
    total, weight = _sums(_scored(output, datums))
    if weight == 0:
        raise InputError("mean_nll: the weights of these datums add up to 0, so there is no mean")
    return total / weight


def _weights(datum: types.Datum) -> Floats:
    return datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64)


def _scored(output: types.ForwardBackwardOutput, datums: Sequence[types.Datum]) -> list[tuple[Floats, Floats]]:
    """NLL and weight of every target, per datum."""
    if len(output.loss_fn_outputs) != len(datums):
        raise InputError(
            f"the output is of {len(output.loss_fn_outputs)} datums, but {len(datums)} were given; "
            "give those that were passed to forward"
        )
    return [
        (-scores["logprobs"].to_numpy().astype(np.float64), _weights(datum))
        for scores, datum in zip(output.loss_fn_outputs, datums, strict=True)
    ]


def _sums(scored: Sequence[tuple[Floats, Floats]]) -> tuple[float, float]:
    """Weighted NLL and weight, summed."""
    return sum(float((nlls * weights).sum()) for nlls, weights in scored), sum(float(w.sum()) for _, w in scored)


def _trained_runs(datum: types.Datum) -> Iterator[list[int]]:
    """The unbroken runs of trained targets."""
    targets, trained = datum.loss_fn_inputs["target_tokens"].to_numpy(), _weights(datum) != 0
    borders = np.flatnonzero(np.diff(trained)) + 1
    for run, is_trained in zip(np.split(targets, borders), np.split(trained, borders), strict=True):
        if is_trained.any():
            yield run.tolist()
