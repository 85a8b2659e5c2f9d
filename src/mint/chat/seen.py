"""What was seen before, in a few bytes a row: a set of a million rows must not cost a gigabyte to count."""

from __future__ import annotations

from array import array


class SeenNumbers:
    """A set of row numbers, one bit each up to the highest."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> bool:
        """Whether the number is new."""
        byte, bit = number >> 3, 1 << (number & 7)
        if byte >= len(self._bits):
            self._bits += bytes(max(byte + 1 - len(self._bits), len(self._bits) // 2))
        is_new = not self._bits[byte] & bit
        self._bits[byte] |= bit
        return is_new


class SeenDigests:
    """A set of digests by their first 8 bytes: an open-addressed table, at most half full, 16 to 32 bytes a digest.

    Among a million different rows, two are taken for equal with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._table, self._count = _table(1024), 0

    def add(self, digest: bytes) -> bool:
        """Whether the digest is new."""
        value = int.from_bytes(digest[:8], "little") or 1  # 0 marks a free place
        place = _place(self._table, value)
        if self._table[place]:
            return False
        self._table[place] = value
        self._count += 1
        if 2 * self._count > len(self._table):
            larger = _table(2 * len(self._table))
            for known in self._table:
                if known:
                    larger[_place(larger, known)] = known
            self._table = larger
        return True


def _table(size: int) -> array[int]:
    return array("Q", bytes(8 * size))


def _place(table: array[int], value: int) -> int:
    """Where `value` stands, or the free place where it belongs. The table's length is a power of two."""
    last = len(table) - 1
    place = value & last
    while table[place] not in (0, value):
        place = (place + 1) & last
    return place
