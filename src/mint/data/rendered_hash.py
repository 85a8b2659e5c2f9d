"""A hash of training data as the model sees it: two losses are comparable where they measured the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mint import types


class RenderedHash:
    """SHA-256 over the tokens and loss weights of datums for `cross_entropy`, fed one by one in their order.

    Of each datum, all little endian: its number of input tokens (int64), input ids (int64), target ids (int64), weights
    (float32). So it changes with the rows, their order, the chat template, the tokenizer and what is trained.
    """

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add_datum(self, datum: types.Datum) -> None:
        inputs = datum.loss_fn_inputs
        self._add(
            np.array(datum.model_input.to_ints()), inputs["target_tokens"].to_numpy(), inputs["weights"].to_numpy()
        )

    def add_example(self, tokens: Sequence[int], weights: npt.NDArray[np.float32]) -> None:
        """An example before the shift to next tokens, as `mint.chat` makes it; as its datum."""
        ids = np.array(tokens)
        self._add(ids[:-1], ids[1:], weights[1:])

    def hexdigest(self) -> str:
        return self._sha.hexdigest()

    def _add(
        self, inputs: npt.NDArray[np.generic], targets: npt.NDArray[np.generic], weights: npt.NDArray[np.generic]
    ) -> None:
        self._sha.update(np.array([len(inputs)], "<i8").tobytes())
        self._sha.update(inputs.astype("<i8").tobytes())
        self._sha.update(targets.astype("<i8").tobytes())
        self._sha.update(weights.astype("<f4").tobytes())


def rendered_hash(datums: Iterable[types.Datum]) -> str:
    """The `RenderedHash` of datums as 64 hexadecimal digits."""
    rendered = RenderedHash()
    for datum in datums:
        rendered.add_datum(datum)
    return rendered.hexdigest()
