"""prepare_*: what every operation checks before it is accepted; each refusal with its words, and what is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.clients import datum, prompt

from mint import InputError, UnsupportedError
from mint.losses import LOSSES
from mint.types import Datum, ModelInput, SamplingParams
from mint.types.requests import (
    MAX_SAMPLES,
    check_ttl,
    check_user_metadata,
    prepare_custom_input,
    prepare_sample_input,
    prepare_training_input,
    refuse,
)

TEN_YEARS = 10 * 365 * 86_400


def of(num_tokens: int = 3, **inputs: Any) -> Datum:
    return Datum(model_input=ModelInput.from_ints(list(range(num_tokens))), loss_fn_inputs=inputs)


def good(loss_fn: str, num_tokens: int = 3) -> dict[str, list[float]]:
    return {"target_tokens": [1] * num_tokens, **{name: [0.5] * num_tokens for name in LOSSES[loss_fn].inputs}}


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_good_datum_is_kept_whole(loss_fn: str) -> None:
    made = prepare_training_input([of(**good(loss_fn))], loss_fn)
    (row,) = made.data
    assert row.tokens_N.tolist() == [0, 1, 2] and row.length == 3 and row.flat
    assert row.targets_NK.tolist() == [[1], [1], [1]]
    assert {name: values.tolist() for name, values in row.inputs.items()} == {
        name: [[0.5]] * 3 for name in LOSSES[loss_fn].inputs
    }
    assert made.loss_fn == loss_fn
    assert made.loss_fn_config == LOSSES[loss_fn].config


def test_many_targets_per_position_stay_a_matrix() -> None:
    made = prepare_training_input([of(2, target_tokens=[[1, 2], [3, 4]], weights=[[1, 0], [0, 1]])], "cross_entropy")
    assert made.data[0].targets_NK.tolist() == [[1, 2], [3, 4]]
    assert made.data[0].inputs["weights"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert not made.data[0].flat


def test_weights_of_any_sign_and_size_are_kept() -> None:
    made = prepare_training_input([of(target_tokens=[1, 2, 3], weights=[-2.0, 0.0, 1e30])], "cross_entropy")
    assert made.data[0].inputs["weights"].ravel().tolist() == [-2.0, 0.0, np.float32(1e30)]


def test_the_config_is_filled_with_defaults_and_numbers() -> None:
    data = [of(**good("ppo"))]
    assert prepare_training_input(data, "ppo").loss_fn_config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    made = prepare_training_input(data, "ppo", {"clip_high_threshold": np.float32(1.5)})
    assert made.loss_fn_config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5}
    assert prepare_training_input(data, "ppo", {"clip_low_threshold": 1, "clip_high_threshold": 1})


def test_arrays_are_copied() -> None:
    given = datum()
    made = prepare_training_input([given], "cross_entropy").data[0]
    targets = given.loss_fn_inputs["target_tokens"].to_numpy()
    assert not np.shares_memory(made.targets_NK, targets)
    assert not np.shares_memory(made.inputs["weights"], given.loss_fn_inputs["weights"].to_numpy())
    data = [given]
    kept = prepare_training_input(data, "cross_entropy")
    data.append(given)
    assert len(kept.data) == 1


GOOD = of(**good("cross_entropy"))
RATIO = "ratio bounds need 0 <= low <= high"

BAD_DATA: list[tuple[Any, str, str]] = [
    (GOOD, "cross_entropy", "data: expected a list of types.Datum, got Datum"),
    (None, "cross_entropy", "data: expected a list of types.Datum, got NoneType"),
    (iter([GOOD]), "cross_entropy", "data: expected a list of types.Datum, got list_iterator"),
    ([], "cross_entropy", "data: the list of datums is empty; give at least one"),
    ([GOOD, {"model_input": 1}], "cross_entropy", r"data\[1\]: expected types.Datum, got dict"),
    ([GOOD], "hinge", "unknown loss_fn 'hinge'; supported: cross_entropy, importance_sampling, ppo"),
    (
        [of(0, target_tokens=[], weights=[])],
        "cross_entropy",
        r"data\[0\]: model_input is empty; a datum needs at least",
    ),
    (
        [of()],
        "cross_entropy",
        r"data\[0\]: cross_entropy needs loss_fn_inputs 'target_tokens', 'weights'; given: none",
    ),
    (
        [GOOD, of(target_tokens=[1, 2, 3])],
        "cross_entropy",
        r"data\[1\]: cross_entropy needs loss_fn_inputs 'weights'; given: target_tokens",
    ),
    ([of(**good("cross_entropy"))], "ppo", r"ppo needs loss_fn_inputs 'logprobs', 'advantages'; given: target_tokens"),
    (
        [of(**good("cross_entropy"), mask=[1, 1, 1])],
        "cross_entropy",
        r"data\[0\]: cross_entropy takes no loss_fn_inputs 'mask'; it takes target_tokens, weights",
    ),
    (
        [of(**good("importance_sampling"), weights=[1.0] * 3)],
        "importance_sampling",
        r"importance_sampling takes no loss_fn_inputs 'weights'; it takes target_tokens, logprobs, advantages",
    ),
    (
        [of(target_tokens=[1, 2], weights=[1.0, 1.0])],
        "cross_entropy",
        r"target_tokens has shape \[2\], but model_input has 3 tokens: expected \[3\] or \[3, K\]",
    ),
    (
        [of(target_tokens=[[1], [2]], weights=[[1.0], [1.0]])],
        "cross_entropy",
        r"target_tokens has shape \[2, 1\], but model_input has 3 tokens",
    ),
    (
        [of(**{name: [v] * 3 for name, v in good("ppo", 2).items()})],
        "ppo",
        r"target_tokens has shape \[3, 2\], but model_input has 3 tokens: expected \[3\]$",
    ),
    ([of(target_tokens=[[[1]]] * 3, weights=[[[1]]] * 3)], "cross_entropy", r"target_tokens has shape \[3, 1, 1\]"),
    ([of(target_tokens=[1, -100, 3], weights=[1.0] * 3)], "cross_entropy", r"holds -100; token ids are not negative"),
    (
        [of(target_tokens=[1, 2, 3], weights=[1.0, 1.0])],
        "cross_entropy",
        r"data\[0\]: weights has shape \[2\], target_tokens \[3\]: they must agree",
    ),
    (
        [of(target_tokens=[1, 2, 3], weights=[[1.0]] * 3)],
        "cross_entropy",
        r"weights has shape \[3, 1\], target_tokens \[3\]: they must agree",
    ),
    (
        [of(target_tokens=[1, 2, 3], weights=[1.0, float("nan"), 1.0])],
        "cross_entropy",
        r"data\[0\]: weights holds NaN or infinity at position 1",
    ),
    (
        [of(target_tokens=[1] * 3, logprobs=[0.0, 0.0, float("-inf")], advantages=[0.0] * 3)],
        "importance_sampling",
        r"data\[0\]: logprobs holds NaN or infinity at position 2",
    ),
]


@pytest.mark.parametrize(("data", "loss_fn", "text"), BAD_DATA)
def test_bad_data_is_refused_naming_datum_and_field(data: Any, loss_fn: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        prepare_training_input(data, loss_fn)


@pytest.mark.parametrize(
    ("loss_fn", "config", "text"),
    [
        ("cross_entropy", {"beta": 1.0}, "loss_fn_config: cross_entropy knows no key 'beta'; allowed: none"),
        ("ppo", {"beta": 1}, "ppo knows no key 'beta'; allowed: clip_low_threshold, clip_high_threshold"),
        ("ppo", {"clip_low_threshold": "x"}, r"loss_fn_config\['clip_low_threshold'\]='x': expected a finite number"),
        ("ppo", {"clip_low_threshold": True}, "=True: expected a finite number"),
        ("ppo", {"clip_high_threshold": float("nan")}, "=nan: expected a finite number"),
        ("ppo", {"clip_high_threshold": None}, "=None: expected a finite number"),
        ("ppo", {"clip_low_threshold": -0.1}, f"clip_low_threshold=-0.1, clip_high_threshold=1.2: {RATIO}"),
        ("ppo", {"clip_high_threshold": 0.5}, f"clip_low_threshold=0.8, clip_high_threshold=0.5: {RATIO}"),
    ],
)
def test_a_bad_config_is_refused_by_name(loss_fn: str, config: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        prepare_training_input([of(**good(loss_fn))], loss_fn, config)


def test_a_loss_of_ones_own_needs_targets_and_may_carry_anything_else() -> None:
    made = prepare_custom_input([of(target_tokens=[1, 2, 3], rewards=[9.0], weights=[float("nan")])])
    assert (made.loss_fn, made.loss_fn_config, made.data[0].inputs) == ("custom", {}, {})
    with pytest.raises(
        InputError, match=r"data\[0\]: a custom loss needs loss_fn_inputs 'target_tokens'; given: weights"
    ):
        prepare_custom_input([of(weights=[1.0])])
    with pytest.raises(InputError, match="data: the list of datums is empty"):
        prepare_custom_input([])


def test_a_good_prompt_is_kept_with_its_defaults() -> None:
    given = prompt(length=5)
    made = prepare_sample_input(given, 1, SamplingParams())
    assert made.prompt == tuple(given.to_ints())
    assert (made.num_samples, made.prompt_logprobs, made.num_prompt_topk, made.num_sample_topk) == (1, False, 0, 0)
    assert prepare_sample_input(given, MAX_SAMPLES, SamplingParams(), num_prompt_topk=100, num_sample_topk=100)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"prompt": [1, 2]}, r"prompt: expected types.ModelInput \(e.g. ModelInput.from_ints\(tokens\)\), got list"),
        ({"prompt": "text"}, "prompt: expected types.ModelInput .*, got str"),
        ({"prompt": ModelInput.empty()}, "prompt: it is empty; sampling needs at least one token"),
        ({"params": {"max_tokens": 3}}, "sampling_params: expected types.SamplingParams, got dict"),
        ({"num_samples": 0}, "num_samples=0: must be a whole number in 1..1024"),
        ({"num_samples": 1025}, "num_samples=1025: must be a whole number in 1..1024"),
        ({"num_samples": 1.0}, "num_samples=1.0: expected a whole number"),
        ({"num_samples": True}, "num_samples=True: expected a whole number"),
        ({"num_prompt_topk": -1}, "topk_prompt_logprobs=-1: must be a whole number in 0..100"),
        ({"num_prompt_topk": 101}, "topk_prompt_logprobs=101: must be a whole number in 0..100"),
        ({"num_sample_topk": 2.5}, "topk_sample_logprobs=2.5: expected a whole number"),
    ],
)
def test_bad_sampling_arguments_are_refused_by_the_name_the_caller_knows(changed: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"prompt": prompt(), "num_samples": 1, "params": SamplingParams()} | changed
    with pytest.raises(InputError, match=text):
        prepare_sample_input(**given)


def test_options_that_are_not_supported_are_refused_when_used() -> None:
    for unused in (None, 0, False):
        refuse("prompt_alt_tokens_k", unused)
    with pytest.raises(UnsupportedError, match=r"^prompt_alt_tokens_k=2 is not supported; leave it out$"):
        refuse("prompt_alt_tokens_k", 2)


@pytest.mark.parametrize("seconds", [None, 3600, TEN_YEARS])
def test_a_time_to_live_within_its_borders(seconds: int | None) -> None:
    assert check_ttl(seconds) == seconds


@pytest.mark.parametrize("seconds", [0, 3599, TEN_YEARS + 1, -1])
def test_a_time_to_live_outside_its_borders(seconds: Any) -> None:
    with pytest.raises(InputError, match=r"ttl_seconds=.*: must be None \(keep\) or a whole number from 3600"):
        check_ttl(seconds)


@pytest.mark.parametrize("seconds", [7200.0, "7200", True])
def test_a_time_to_live_that_is_no_whole_number(seconds: Any) -> None:
    with pytest.raises(InputError, match=f"ttl_seconds={seconds!r}: expected a whole number"):
        check_ttl(seconds)


def test_user_metadata_is_a_small_dict_of_strings() -> None:
    given = {"a": "b"}
    kept = check_user_metadata(given)
    given["c"] = "d"
    assert kept == {"a": "b"}
    assert check_user_metadata(None) == {}
    assert check_user_metadata({"k": "x" * 65_535})
    for bad in ({"a": 1}, {1: "a"}, ["a"], "a"):
        with pytest.raises(InputError, match="user_metadata: expected a dict of strings to strings"):
            check_user_metadata(bad)
    with pytest.raises(InputError, match="user_metadata: more than 64 KiB"):
        check_user_metadata({"k": "x" * 65_536})
