"""Rows that say the same thing: exact and near duplicates, within the training rows, within the test rows, and across.

Near are two rows whose sets of three-word shingles have a Jaccard similarity of at least NEAR. Candidates are found with
MinHash: 16 bands of 5 minima, so a pair of similarity s is found with the probability 1 - (1 - s^5)^16: 0.998 at 0.8,
0.99992 at 0.85. Each candidate is then compared in full, so no pair is reported by chance.

A row costs 84 bytes until the comparison.
"""

from __future__ import annotations

import json
import re
import zlib
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from tempfile import SpooledTemporaryFile
from typing import IO, Any, Final, Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "test"]
Hashes = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]

NEAR: Final = 0.8
BANDS, MINIMA = 16, 5
LISTED_PAIRS: Final = 100
MAX_COMPARISONS: Final = 200_000

# scripts without spaces between words: every character is taken for one
_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_SYSTEM_ROLES: Final = ("system", "developer")
_IN_MEMORY: Final = 8 * 2**20  # bytes of shingles; beyond they are in a temporary file
_AT_ONCE: Final = 4096  # shingles: 2.6 MB of products
_SPLITS: Final[tuple[Split, Split]] = ("train", "test")


@dataclass(frozen=True, slots=True)
class Pair:
    """Row `row`, which says what the earlier row `of` says; similarity is 1.0 where they are equal."""

    row: int
    of: int
    similarity: float


@dataclass(slots=True)
class Pairs:
    """How many rows were found, and the first LISTED_PAIRS of them."""

    count: int = 0
    first: list[Pair] = field(default_factory=list)

    def add(self, pair: Pair) -> None:
        self.count += 1
        if len(self.first) < LISTED_PAIRS:
            self.first.append(pair)


@dataclass(slots=True)
class Duplicates:
    """Row numbers count from 0 within train and within test. A row stands in a list once, with the earliest row found.

    train_exact, test_exact: rows equal to an earlier row of their own side: the same roles and contents.
    overlap_exact: test rows (`row`) equal to a training row (`of`); they are not listed under test_exact, too.
    train_near, test_near, overlap_near: the same for rows that are near an earlier one and equal to none.
    uncompared: candidate pairs beyond MAX_COMPARISONS, which were not looked at.
    """

    train_exact: Pairs = field(default_factory=Pairs)
    test_exact: Pairs = field(default_factory=Pairs)
    overlap_exact: Pairs = field(default_factory=Pairs)
    train_near: Pairs = field(default_factory=Pairs)
    test_near: Pairs = field(default_factory=Pairs)
    overlap_near: Pairs = field(default_factory=Pairs)
    uncompared: int = 0


class DuplicateFinder:
    """Fed with every row of train, then with every row of test; `find` compares them."""

    def __init__(self) -> None:
        self._numbers, self._digests, self._bands = array("Q"), array("Q"), array("I")
        self._num_train = 0

    def add(self, split: Split, number: int, row: Any, digest: bytes) -> None:
        """digest: equal for equal rows; the first 8 bytes are used."""
        assert split == "test" or self._num_train == len(self._numbers), "train rows come first"
        self._num_train += split == "train"
        self._numbers.append(number)
        self._digests.append(int.from_bytes(digest[:8], "little"))
        self._bands.frombytes(band_hashes(shingles(row)).tobytes())

    def find(self, row_at: Callable[[Split, int], Any]) -> Duplicates:
        """row_at(split, number) reads a row again, for the comparison in full: each at most once, and in their order."""
        found = Duplicates()
        digests = np.frombuffer(self._digests, np.uint64)
        self._find_exact(digests, found)
        first_of_its_kind = np.sort(np.unique(digests, return_index=True)[1])
        pairs = candidates(np.frombuffer(self._bands, np.uint32).reshape(-1, BANDS), first_of_its_kind)
        comparisons = 0
        with SpooledTemporaryFile(max_size=_IN_MEMORY) as file:
            kept = _KeptShingles(file, np.unique(pairs[:, 1]))
            for index in np.unique(pairs):
                said = shingles(row_at(*self._place(index)))
                first, end = np.searchsorted(pairs[:, 0], (index, index + 1))
                for of in pairs[first:end, 1]:
                    if comparisons == MAX_COMPARISONS:
                        found.uncompared += 1
                        continue
                    comparisons += 1
                    similarity = jaccard(said, kept.read(of))
                    if similarity >= NEAR:
                        self._list(found, "near", index, of, similarity)
                        break
                kept.write(index, said)
        return found

    def _find_exact(self, digests: Hashes, found: Duplicates) -> None:
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        first_anywhere = first[inverse]
        for row in np.flatnonzero(first_anywhere < np.arange(len(digests))):
            self._list(found, "exact", row, first_anywhere[row], 1.0)

    def _list(self, found: Duplicates, kind: str, row: np.int64, of: np.int64, similarity: float) -> None:
        (split, number), (other, of_number) = self._place(row), self._place(of)
        pairs: Pairs = getattr(found, f"{split if split == other else 'overlap'}_{kind}")
        pairs.add(Pair(number, of_number, round(similarity, 4)))

    def _place(self, index: np.int64) -> tuple[Split, int]:
        return _SPLITS[int(index >= self._num_train)], self._numbers[index]


class _KeptShingles:
    """Shingles of chosen rows in a file, written in the order of the rows."""

    def __init__(self, file: IO[bytes], chosen: Indices) -> None:
        """chosen: sorted."""
        self._file, self._chosen, self._ends = file, chosen, np.zeros(len(chosen) + 1, np.int64)

    def write(self, index: np.int64, hashes: Hashes) -> None:
        """Does nothing for a row that is not chosen."""
        place = np.searchsorted(self._chosen, index)
        if place < len(self._chosen) and self._chosen[place] == index:
            self._file.seek(self._ends[place])
            self._ends[place + 1] = self._ends[place] + self._file.write(hashes.tobytes())

    def read(self, index: np.int64) -> Hashes:
        place = np.searchsorted(self._chosen, index)
        start, end = self._ends[place : place + 2]
        self._file.seek(start)
        return np.frombuffer(self._file.read(end - start), np.uint64)


def candidates(bands: npt.NDArray[np.uint32], chosen: Indices) -> Indices:
    """Pairs of `chosen` rows that agree in a band: [pairs, 2] of row and earlier row, sorted.

    bands: [rows, BANDS]. Of many rows that agree, each is paired with the first and with the one before it, so that
    n equal rows give no more than 2 n pairs, and not n * n.
    """
    codes = np.empty(0, np.int64)  # row * 2^32 + earlier row
    for band in range(BANDS):
        values = bands[chosen, band]
        order = np.argsort(values, kind="stable")  # rows of one value stay in their order
        values, rows = values[order], chosen[order]
        agrees = np.flatnonzero(values[1:] == values[:-1]) + 1
        begins = np.ones(len(values), dtype=bool)
        begins[agrees] = False
        first = np.maximum.accumulate(np.where(begins, np.arange(len(values)), 0))
        pairs = [rows[agrees] << 32 | rows[earlier] for earlier in (first[agrees], agrees - 1)]
        codes = np.unique(np.concatenate([codes, *pairs]))
    return np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1)


def jaccard(one: Hashes, other: Hashes) -> float:
    """Size of the intersection over that of the union; of sets without duplicates. 0.0 where both are empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)


def shingles(row: Any) -> Hashes:
    """Sorted 64-bit hashes of the different runs of three words in what users, assistants and tools say.

    Words are compared without case and punctuation. System texts are left out, since whole sets share them. Fewer than
    three words are one shingle; a row without a word has none.
    """
    words = [zlib.crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(_spoken(row).lower())]
    ids = np.array(words, dtype=np.uint64)
    if 0 < len(ids) < 3:
        ids = np.concatenate([ids, np.zeros(3 - len(ids), np.uint64)])
    if not len(ids):
        return ids
    hashes = _mixed(_mixed(_mixed(ids[:-2]) ^ ids[1:-1]) ^ ids[2:])
    return np.unique(hashes)


def band_hashes(hashes: Hashes) -> npt.NDArray[np.uint32]:
    """[BANDS]: a hash of the minima of each band."""
    if not len(hashes):  # of nothing there is no minimum; such rows agree only with each other
        return np.zeros(BANDS, np.uint32)
    minima = np.full(BANDS * MINIMA, np.iinfo(np.uint64).max)
    for start in range(0, len(hashes), _AT_ONCE):
        scattered = hashes[start : start + _AT_ONCE] * _FACTORS[:, None] + _SUMMANDS[:, None]
        minima = np.minimum(minima, scattered.min(axis=1))
    folded = np.zeros(BANDS, np.uint64)
    for column in minima.reshape(BANDS, MINIMA).T:
        folded = _mixed(folded ^ column)
    return (folded >> np.uint64(32)).astype(np.uint32)


def _mixed(values: Hashes) -> Hashes:
    """A one-to-one scrambling of 64 bits: the finaliser of SplitMix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


_STREAM: Final = _mixed(np.arange(2 * BANDS * MINIMA, dtype=np.uint64))
_FACTORS: Final = _STREAM[: BANDS * MINIMA] | np.uint64(1)
_SUMMANDS: Final = _STREAM[BANDS * MINIMA :]


def _spoken(row: Any) -> str:
    """Everything that is said in a row, as text. Takes any form: what cannot be read has been counted elsewhere."""
    if isinstance(row, Mapping):
        row = row["text"] if "text" in row else row.get("messages")
    if isinstance(row, str):
        return row
    texts = []
    for message in row if isinstance(row, list | tuple) else ():
        if isinstance(message, Mapping) and message.get("role") not in _SYSTEM_ROLES:
            texts += [message.get(key) for key in ("reasoning_content", "content", "tool_calls")]
    return "\n".join(text if isinstance(text, str) else json.dumps(text, default=str) for text in texts if text)
