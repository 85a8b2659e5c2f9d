"""The hash of rendered data, against bytes packed by hand."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
from tests.unit.chat.tiny_tokenizers import tokenizer_of

from mint import types
from mint.chat import Converter
from mint.data import load_demo
from mint.data.rendered_hash import RenderedHash, rendered_hash


def datum(inputs: list[int], targets: list[int], weights: list[float]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(inputs),
        loss_fn_inputs={
            "target_tokens": types.TensorData(targets, "int64"),
            "weights": types.TensorData(weights, "float32"),
        },
    )


def test_it_is_the_sha256_of_lengths_ids_and_weights() -> None:
    packed = struct.pack("<qqqqqff", 2, 7, 8, 8, 9, 0.0, 1.0) + struct.pack("<qqqf", 1, 300_000, 5, 0.5)
    found = rendered_hash([datum([7, 8], [8, 9], [0.0, 1.0]), datum([300_000], [5], [0.5])])
    assert found == hashlib.sha256(packed).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        [datum([1, 2, 3], [2, 3, 4], [0.0, 0.0, 1.0])],
        [datum([1], [2], [0.0]), datum([2, 3], [3, 4], [1.0, 1.0])],
        [datum([1, 2], [2, 3], [0.0, 1.0]), datum([3], [4], [1.0])],
        [],
    ],
    ids=["weights", "borders", "other borders", "nothing"],
)
def test_other_data_has_another_hash(other: list[types.Datum]) -> None:
    assert rendered_hash(other) != rendered_hash([datum([1, 2, 3], [2, 3, 4], [0.0, 1.0, 1.0])])


def test_examples_and_their_datums_have_one_hash() -> None:
    tokenizer: Any = tokenizer_of("qwen3")
    converter, rendered, datums = Converter(tokenizer, 400), RenderedHash(), []
    for number, row in enumerate(load_demo()[1]):
        outcome = converter.outcome(number, row)
        datums += converter.take(outcome)
        assert outcome.conversion is not None
        for example in outcome.conversion.examples:
            rendered.add_example(example.tokens, example.weights)
    assert len(datums) > 10 and rendered.hexdigest() == rendered_hash(datums)
