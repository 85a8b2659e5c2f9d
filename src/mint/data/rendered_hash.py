"""A fingerprint of datums: two measurements are comparable only where they measured the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from mint import types


def rendered_hash(datums: Iterable[types.Datum]) -> str:
    """SHA-256 (64 hexadecimal digits) over the tokens and loss weights of datums for `cross_entropy`, in their order.

    Of each datum, all little endian: its number of input tokens (int64), input ids (int64), target ids (int64), weights
    (float32). So it changes with the rows, their order, the chat template, the tokenizer and what is trained.
    """
    digest = hashlib.sha256()
    for datum in datums:
        ids = np.asarray(datum.model_input.to_ints(), dtype="<i8")
        digest.update(np.array(len(ids), dtype="<i8").tobytes())
        digest.update(ids.tobytes())
        digest.update(datum.loss_fn_inputs["target_tokens"].to_numpy().astype("<i8").tobytes())
        digest.update(datum.loss_fn_inputs["weights"].to_numpy().astype("<f4").tobytes())
    return digest.hexdigest()
