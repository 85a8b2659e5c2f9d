"""In which order an epoch takes its rows: (seed, epoch) alone decides."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from mint.errors import InputError


class Order(Protocol):
    """position in the epoch -> number of the row; every row once."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: int, /) -> int | np.int64: ...


def require_shuffle_buffer(shuffle_buffer: int | None) -> None:
    if shuffle_buffer is not None and shuffle_buffer < 1:
        raise InputError(f"shuffle_buffer={shuffle_buffer}: must be at least 1")


def epoch_order(num_rows: int, seed: int, epoch: int, shuffle_buffer: int | None = None) -> Order:
    """A permutation of all rows; with `shuffle_buffer` one of blocks of that many rows, for rows that are read forward."""
    if shuffle_buffer is not None:
        return BlockOrder(num_rows, seed, epoch, shuffle_buffer)
    return _generator(seed, epoch).permutation(num_rows)


class BlockOrder:
    """Rows in blocks of `block`, each shuffled by itself, so a row comes at most `block` - 1 places early or late.

    Where blocks begin differs from epoch to epoch, so rows do not keep their company. Memory: that of one block.
    """

    def __init__(self, num_rows: int, seed: int, epoch: int, block: int) -> None:
        self._num_rows, self._seed, self._epoch, self._block = num_rows, seed, epoch, block
        self._shift = int(_generator(seed, epoch).integers(block))
        self._known: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, position: int, /) -> int:
        if not 0 <= position < self._num_rows:
            raise IndexError(f"position {position} of {self._num_rows}")
        which = (position + self._shift) // self._block
        first = max(0, which * self._block - self._shift)
        if self._known is None or self._known[0] != which:
            size = min(self._num_rows, (which + 1) * self._block - self._shift) - first
            self._known = which, _generator(self._seed, self._epoch, 1 + which).permutation(size)
        return first + int(self._known[1][position - first])


def _generator(seed: int, epoch: int, part: int = 0) -> np.random.Generator:
    """Streams of their own for each epoch and part: the part stands in the counter's highest word."""
    key, counter = np.array([seed % 2**64, epoch], np.uint64), np.array([0, 0, 0, part], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
