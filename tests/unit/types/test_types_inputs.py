"""ModelInput and Datum: their fields, what they accept, copy and refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mint import InputError, UnsupportedError
from mint.types import Datum, EncodedTextChunk, ModelInput, TensorData

TOKENS = ModelInput.from_ints([1, 2, 3])
WEIGHTS = {"data": [1, 0, 1], "dtype": "float32", "shape": [3]}


def test_fields_and_defaults_are_the_protocols() -> None:
    assert list(EncodedTextChunk.model_fields) == ["tokens", "type"]
    assert EncodedTextChunk(tokens=[1]).type == "encoded_text"
    assert list(ModelInput.model_fields) == ["chunks"]
    assert list(Datum.model_fields) == ["model_input", "loss_fn_inputs"]
    assert Datum(model_input=TOKENS).loss_fn_inputs == {}


@pytest.mark.parametrize(
    "given", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int32), torch.tensor([1, 2, 3]), TensorData([1, 2, 3])]
)
def test_tokens_come_from_lists_numpy_and_torch(given: Any) -> None:
    model_input = ModelInput.from_ints(given)
    assert model_input.to_ints() == [1, 2, 3]
    assert all(type(token) is int for token in model_input.to_ints())
    assert model_input.length == 3
    assert model_input == TOKENS


def test_chunks_are_joined_and_appending_makes_a_new_input() -> None:
    longer = TOKENS.append(EncodedTextChunk(tokens=[4, 5])).append_int(6)
    assert longer.to_ints() == [1, 2, 3, 4, 5, 6]
    assert [chunk.length for chunk in longer.chunks] == [3, 2, 1]
    assert TOKENS.to_ints() == [1, 2, 3]
    assert ModelInput.empty().length == 0 == ModelInput.from_ints([]).length
    assert ModelInput(chunks=[]) == ModelInput.empty()


def test_the_protocols_json_is_accepted() -> None:
    model_input = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"tokens": [3]}]}
    made = Datum(model_input=model_input, loss_fn_inputs={"weights": WEIGHTS})  # type: ignore[arg-type]
    assert made.model_input.to_ints() == [1, 2, 3]
    assert made.loss_fn_inputs["weights"] == TensorData([1.0, 0.0, 1.0])


def test_changing_the_source_later_changes_nothing() -> None:
    tokens, weights = np.array([1, 2, 3]), [1.0, 0.0, 1.0]
    made = Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs={"weights": weights})
    tokens[0], weights[0] = 9, 9.0
    assert made.model_input.to_ints() == [1, 2, 3]
    assert made.loss_fn_inputs["weights"].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "given", "dtype"),
    [
        ("target_tokens", [1, 2, 3], "int64"),
        ("target_tokens", [1.0, 2.0, 3.0], "int64"),
        ("weights", [1, 0, 1], "float32"),
        ("advantages", [1, 0, 1], "float32"),
        ("logprobs", [-1, 0, -1], "float32"),
        ("clip_low_threshold", [1], "float32"),
        ("clip_high_threshold", [1], "float32"),
        ("my_ids", [1, 2], "int64"),
        ("my_numbers", [1.5], "float32"),
        ("weights", torch.tensor([1, 0], dtype=torch.int32), "float32"),
        ("weights", torch.tensor([1.5], dtype=torch.bfloat16), "float32"),
    ],
)
def test_a_loss_input_has_the_type_of_its_name(name: str, given: Any, dtype: str) -> None:
    made = Datum(model_input=TOKENS, loss_fn_inputs={name: given})
    assert made.loss_fn_inputs[name].dtype == dtype
    assert made.loss_fn_inputs[name].tolist() == (given.tolist() if isinstance(given, torch.Tensor) else given)


IN_WEIGHTS = r"loss_fn_inputs\['weights'\]: TensorData: "


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"loss_fn_inputs": [1]}, "loss_fn_inputs: expected a dict of tensors, got list"),
        ({"loss_fn_inputs": {"weights": "abc"}}, f"{IN_WEIGHTS}expected a list, numpy array or torch tensor"),
        ({"loss_fn_inputs": {"weights": [[1.0], [1.0, 2.0]]}}, f"{IN_WEIGHTS}rows of different lengths"),
        ({"loss_fn_inputs": {"weights": [True]}}, f"{IN_WEIGHTS}expected numbers, got elements of type bool"),
        ({"loss_fn_inputs": {"weights": {**WEIGHTS, "shape": [4]}}}, f"{IN_WEIGHTS}3 values do not fill shape"),
        ({"loss_fn_inputs": {"target_tokens": [0.5]}}, r"loss_fn_inputs\['target_tokens'\]: .*fractions"),
        ({"weights": [1.0]}, "weights: Extra inputs are not permitted"),
        ({"model_input": [1, 2, 3]}, "model_input: Input should be a valid dictionary or instance of ModelInput"),
    ],
)
def test_a_datum_says_which_part_it_cannot_take(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Datum(**({"model_input": TOKENS} | given))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([1, -1], r"tokens: token ids lie in 0..2147483647, got -1..1"),
        ([2**31], r"tokens: token ids lie in 0..2147483647, got 2147483648..2147483648"),
        ([1.0, 2.0], "tokens: token ids are whole numbers, got float64"),
        ([[1, 2]], r"tokens: expected one flat list of token ids, got shape \[1, 2\]"),
        (np.array(3), r"tokens: expected one flat list of token ids, got shape \[\]"),
        ("abc", "tokens: expected a list, numpy array or torch tensor of numbers, got str"),
        ([True], "tokens: expected numbers, got elements of type bool"),
        ([None], "tokens: expected numbers, got elements of type object"),
    ],
)
def test_what_is_no_token_id_is_refused(tokens: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelInput.from_ints(tokens)


@pytest.mark.parametrize("kind", ["image", "image_asset_pointer", "dmel"])
def test_other_kinds_of_chunks_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=f"ModelInput chunk of type '{kind}': only 'encoded_text' is supported"):
        ModelInput(chunks=[{"type": kind}])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ModelInput(chunks=[{"type": "image"}]), UnsupportedError),  # type: ignore[list-item]
        (lambda: ModelInput.from_ints([-1]), InputError),
        (lambda: Datum(model_input=TOKENS, loss_fn_inputs={"weights": "abc"}), InputError),  # type: ignore[dict-item]
    ],
    ids=["chunk", "tokens", "loss-input"],
)
def test_what_a_type_refuses_is_an_error_of_mints(make: Any, error: type[InputError]) -> None:
    with pytest.raises(error):
        make()


@pytest.mark.parametrize(
    "make", [lambda: ModelInput(tokens=[1]), lambda: EncodedTextChunk(tokens=[1], start=0)], ids=["input", "chunk"]
)
def test_an_unknown_keyword_raises(make: Any) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        make()


def test_they_are_frozen_and_their_repr_prints_no_tokens() -> None:
    made = Datum(model_input=ModelInput.from_ints([123456]), loss_fn_inputs={"weights": [0.625]})
    for thing in (made, made.model_input, made.model_input.chunks[0], made.loss_fn_inputs):
        assert "123456" not in repr(thing) and "0.625" not in repr(thing)
    assert repr(made) == "Datum(1 tokens, inputs: weights)"
    with pytest.raises(ValueError, match="frozen"):
        made.model_input = TOKENS
    with pytest.raises(ValueError, match="frozen"):
        made.model_input.chunks = []
