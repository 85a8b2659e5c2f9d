"""NLLs of shown rows: those that training computes for the same datum."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from tests.support.clients import train
from tests.support.shown import plain_row, token

import mint
from mint import types
from mint.chat import Converter, ShownRow, get_renderer, show_row
from mint.data.figures import figures
from mint.data.scored import scored_rows
from mint.errors import NumericsError
from mint.recipes.evaluation import mean_nll

ROWS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "What is the answer?"}],
    [
        {"role": "user", "content": "capital of France"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "Sure, here it is: Paris."},
    ],
]


def test_nlls_are_those_that_forward_gives_before_and_after_training(tiny_model: str) -> None:
    with mint.ServiceClient() as service:
        run = service.create_lora_training_client(tiny_model, rank=4, seed=0)
        converter = Converter(get_renderer(run.get_tokenizer()), 256)
        datums = [datum for number, row in enumerate(ROWS) for datum in converter(number, row)]
        before = run.forward(datums, "cross_entropy").result()
        train(run, 2)
        after = run.forward(datums, "cross_entropy").result()
        tuned = run.save_weights_and_get_sampling_client()
        base = service.create_sampling_client(None, tiny_model)
        shown = [show_row(number, row, converter) for number, row in enumerate(ROWS)]
        scored = list(scored_rows(shown, tuned, base))

    assert len(scored[1].examples) == 2  # one an answer: the template rewrites history
    examples = [example for row in scored for example in row.examples]
    for name, output in (("nll", after), ("nll_before", before)):
        for example, given in zip(examples, output.loss_fn_outputs, strict=True):
            assert getattr(example[0], name) is None
            nlls = [getattr(token, name) for token in example[1:]]
            assert nlls == pytest.approx((-given["logprobs"].to_numpy()).tolist(), abs=1e-4)
    total = figures(scored)
    assert total.nll == pytest.approx(mean_nll(after, datums), abs=1e-4)
    assert total.nll_before == pytest.approx(mean_nll(before, datums), abs=1e-4)
    assert abs(total.change or 0) > 1e-3


@dataclass
class Stub:
    """Gives the n-th token of a prompt the log-probability -n, and keeps the prompts."""

    step: float = 1.0
    asked: list[list[int]] = field(default_factory=list)
    answer: list[float | None] = field(default_factory=list)

    def compute_logprobs(self, prompt: types.ModelInput) -> Stub:
        ids = prompt.to_ints()
        self.asked.append(ids)
        return Stub(answer=[None, *(-self.step * place for place in range(1, len(ids)))])

    def result(self) -> list[float | None]:
        return self.answer


def test_what_is_cut_off_is_not_scored_wherever_it_stands() -> None:
    row = ShownRow(0, (), ((token("a"), token("b", "truncated"), token("c"), token("d", "trained")),))
    tuned, base = Stub(), Stub(step=2.0)
    (scored,) = scored_rows([row], tuned, base)
    assert tuned.asked == base.asked == [[ord("a"), ord("c"), ord("d")]]
    assert [t.nll for t in scored.examples[0]] == [None, None, 1.0, 2.0]
    assert [t.nll_before for t in scored.examples[0]] == [None, None, 2.0, 4.0]


def test_all_rows_are_asked_for_before_the_first_answer_is_waited_for() -> None:
    tuned = Stub()
    next(scored_rows([plain_row(0, "x"), plain_row(1, "y")], tuned, Stub()))
    assert len(tuned.asked) == 2


def test_dropped_rows_stay_as_they_are() -> None:
    tuned = Stub()
    gone = ShownRow(3, (), (), "overlong", "[overlong] too long")
    cut = ShownRow(4, (), ((token("a", "truncated"),),))
    assert list(scored_rows([gone, cut], tuned, Stub())) == [gone, cut]
    assert tuned.asked == []


def test_a_log_probability_that_is_no_number_is_an_error() -> None:
    with pytest.raises(NumericsError, match="row 5: a token has the log-probability -inf; the weights are damaged"):
        list(scored_rows([plain_row(5, "x")], Stub(step=float("inf")), Stub()))
