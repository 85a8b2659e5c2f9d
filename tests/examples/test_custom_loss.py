"""Preference optimisation as a custom loss: its value, its gradient through the model, and that it works."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

import mint
from mint import types
from mint.chat import get_renderer
from tests.examples.load import example
from tests.support.clients import GUARD, Embedded, batch

custom_loss = example("custom_loss")

BETA, ANCHOR = 0.3, 0.8
START = [0.7, -1.1]


def pairs() -> list[types.Datum]:
    """Two pairs, with weights 0 and 1."""
    return [*batch(0, 2), *batch(1, 2)]


def weights(data: list[types.Datum]) -> list[np.ndarray]:
    return [datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64) for datum in data]


def expected(data: list[types.Datum], logprobs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """By pair, in float64 and one token at a time: the gain on START, and the preferred answer's NLL per token."""
    sums = [sum(w * float(p) for w, p in zip(*pair, strict=True)) for pair in zip(weights(data), logprobs, strict=True)]
    gains = [sums[0] - sums[1] - START[0], sums[2] - sums[3] - START[1]]
    return np.array(gains), np.array([-sums[i] / weights(data)[i].sum() for i in (0, 2)])


def test_the_loss_is_the_formula() -> None:
    data = pairs()
    draw = np.random.default_rng(0)
    logprobs = [-draw.exponential(size=datum.model_input.length) for datum in data]
    loss_fn = custom_loss.preference_loss(torch.tensor(START), BETA, ANCHOR)
    loss, metrics = loss_fn(data, [torch.tensor(p).float() for p in logprobs])
    gains, nll = expected(data, logprobs)
    preference = np.log1p(np.exp(-BETA * gains))
    assert float(loss) == pytest.approx(preference.sum() + ANCHOR * nll.sum(), rel=1e-5)
    means = {"preference": preference.mean(), "gain": gains.mean(), "nll": nll.mean()}
    assert metrics == pytest.approx(means, rel=1e-5)


def test_it_moves_the_adapter_as_the_formula_s_derivative_does(world: Embedded, tiny_model: str) -> None:
    """The derivative by a token's logprob, with its sign turned, is what cross_entropy takes as that token's weight.

    Preferred: weight (BETA sigmoid(-BETA gain) + ANCHOR / length); rejected: -weight BETA sigmoid(-BETA gain).
    """
    service = mint.ServiceClient()
    runs = [service.create_lora_training_client(tiny_model, rank=4, seed=0) for _ in range(2)]
    data = pairs()
    loss_fn = custom_loss.preference_loss(torch.tensor(START), BETA, ANCHOR)
    custom = runs[0].forward_backward_custom(data, loss_fn).result(GUARD)
    gains, _ = expected(data, [output["logprobs"].to_numpy() for output in custom.loss_fn_outputs])
    slopes = BETA / (1 + np.exp(BETA * gains))
    anchors = [ANCHOR / weights(data)[i].sum() for i in (0, 2)]
    factors = [slopes[0] + anchors[0], -slopes[0], slopes[1] + anchors[1], -slopes[1]]
    weighted = [
        types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": factor * w},
        )
        for datum, factor, w in zip(data, factors, weights(data), strict=True)
    ]
    runs[1].forward_backward(weighted).result(GUARD)
    smooth = types.AdamParams(learning_rate=1e-2, eps=1.0)  # the update then follows the gradient's size
    norms = [run.optim_step(smooth).result(GUARD).metrics["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0.1
    one, other = (world.state(run).tensors for run in runs)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)


def test_pairs_are_the_first_paragraph_and_the_whole_answer(world: Embedded, tiny_model: str) -> None:
    tokenizer = mint.ServiceClient().create_sampling_client(base_model=tiny_model).get_tokenizer()
    rows: list[list[dict[str, Any]]] = [
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So.\n\nAnd more.\n\nAnd more still."},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Not\n\nused."},
        ],
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "One paragraph."}],
    ]
    made = custom_loss.make_pairs(rows, get_renderer(tokenizer), 512)
    assert len(made) == 1
    trained = []
    for datum in made[0]:
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        trained.append(tokenizer.decode(targets[datum.loss_fn_inputs["weights"].to_numpy() == 1]))
    assert trained == ["So.<|im_end|>", "So.\n\nAnd more.\n\nAnd more still.<|im_end|>"]


def columns(text: str) -> list[list[float]]:
    """preference, gain and nll by step."""
    number = r" +(-?\d+\.\d{4})"
    steps = re.findall(rf"^step +\d+  preference{number}  gain{number}  nll{number}$", text, re.MULTILINE)
    return [[float(value) for value in column] for column in zip(*steps, strict=True)]


def test_preferences_are_learned(world: Embedded, tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "10", "--learning-rate", "3e-3", "--max-length", "400", "--max-tokens", "8"]
    custom_loss.main(["--model", tiny_model, *options])
    text = capsys.readouterr().out
    preference, gain, nll = columns(text)
    assert len(gain) == 10
    assert preference[0] == pytest.approx(np.log(2), abs=1e-4) and gain[0] == 0  # the adapter is new
    assert preference[-1] < 0.5 and gain[-1] > 10
    held_out = re.search(r"^held out: mean gain (-?\d+\.\d\d), (\d+)% of the pairs", text, re.MULTILINE)
    assert held_out is not None and float(held_out[1]) > 10 and int(held_out[2]) > 80

    custom_loss.main(["--model", tiny_model, *options, "--anchor", "20"])
    _, _, anchored_nll = columns(capsys.readouterr().out)
    assert anchored_nll[0] == nll[0] and anchored_nll[-1] < nll[-1] - 0.3  # more imitation
