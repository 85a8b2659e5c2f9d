"""Counts and means over shown rows."""

import pytest
from tests.support.shown import plain_row, token

from mint.chat import ShownRow
from mint.data.figures import Figures, figures

SCORED = ShownRow(
    0,
    ("user", "assistant"),
    (
        (
            token("a", nll=None, nll_before=None),
            token("b", nll=9.0, nll_before=9.0),
            token("c", "trained", nll=1.0, nll_before=2.0),
            token("d", "trained", weight=0.5, nll=4.0, nll_before=3.5),
            token("e", "truncated"),
            token("f", "truncated", weight=1.0),
        ),
    ),
)


def test_counts_leave_out_what_the_model_never_sees() -> None:
    dropped = ShownRow(7, ("user",), (), "no_assistant", "[no_assistant] nothing to train on")
    found = figures([plain_row(3, "x", "y", "z"), SCORED, dropped])
    assert (found.rows, found.dropped, found.examples) == (3, 1, 2)
    assert (found.tokens, found.trained, found.cut) == (5 + 4, 3 + 2, 2)


def test_mean_nll_is_weighted_as_the_loss() -> None:
    found = figures([SCORED])
    assert found.nll == pytest.approx((1.0 * 1.0 + 0.5 * 4.0) / 1.5)
    assert found.nll_before == pytest.approx((1.0 * 2.0 + 0.5 * 3.5) / 1.5)
    assert found.change == pytest.approx((3.0 - 3.75) / 1.5)


def test_rows_without_scores_have_no_mean() -> None:
    assert figures([]) == Figures(0, 0, 0, 0, 0, 0, None, None)
    found = figures([plain_row(0, "x")])
    assert (found.nll, found.nll_before, found.change) == (None, None, None)
