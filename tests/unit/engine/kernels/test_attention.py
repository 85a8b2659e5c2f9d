"""Attention over packed sequences, forward and backward, against explicit float64 softmax and its autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.unit.engine.kernels.calling import UNIT, assert_within, half, native
from torch import Tensor

from mint.engine.kernels import attention as k
from mint.engine.kernels.decoder import AttentionTables
from mint.engine.models.packed_attention import PackedSequence

HEADS, KV_HEADS, SIZE = 6, 2, 32


@dataclass(frozen=True)
class Given:
    """Heads of a pass, and the gradient by its result. Shape letters as in the kernels."""

    q_HTE: Tensor
    k_KTE: Tensor
    v_KTE: Tensor
    grad_THE: Tensor

    @property
    def rows(self) -> int:
        return self.q_HTE.shape[1]


def random_heads(
    rows: int, generator: torch.Generator, size: int = SIZE, heads: tuple[int, int] = (HEADS, KV_HEADS)
) -> Given:
    num_q, num_kv = heads
    q, keys, values = (half(generator, n, rows, size, scale=1.5) for n in (num_q, num_kv, num_kv))
    return Given(q, keys, values, half(generator, rows, num_q, size))


def followed_by(first: Given, second: Given) -> Given:
    """The rows of both."""
    q, keys, values = (
        torch.cat(pair, 1)
        for pair in ((first.q_HTE, second.q_HTE), (first.k_KTE, second.k_KTE), (first.v_KTE, second.v_KTE))
    )
    return Given(q, keys, values, torch.cat([first.grad_THE, second.grad_THE]))


def sequences_of(*parts: tuple[int, int, int]) -> list[PackedSequence]:
    """(own rows, number of the sequence whose first rows it takes, how many)."""
    made: list[PackedSequence] = []
    start = 0
    for own, source, shared in parts:
        rows = np.arange(start, start + own)
        made.append(PackedSequence(np.concatenate([made[source].rows_N[:shared], rows]) if shared else rows, shared))
        start += own
    return made


ALONE = {
    "one token": sequences_of((1, 0, 0)),
    "one block": sequences_of((32, 0, 0)),
    "ragged": sequences_of((1, 0, 0), (5, 0, 0), (33, 0, 0), (16, 0, 0), (47, 0, 0), (2, 0, 0), (100, 0, 0)),
}
SHARING = {
    "one beginning": sequences_of((40, 0, 0), (7, 0, 20), (1, 0, 33), (70, 0, 32), (9, 0, 0)),
    "of one that shares": sequences_of((50, 0, 0), (30, 0, 17), (12, 1, 40), (3, 1, 46)),
}
ALL = ALONE | SHARING


class Kernels:
    """One pass's kernels on scratch that holds no number until something is written."""

    def __init__(self, sequences: Sequence[PackedSequence], given: Given) -> None:
        self.given, self.tables = given, AttentionTables(sequences)
        (self.heads, _, self.size), self.kv_heads = given.q_HTE.shape, len(given.k_KTE)
        self.room, self.positions = self.tables.longest, self.tables.positions
        self.block = k.scratch_bytes(self.room, self.size)

    def _packed(self) -> Tensor:
        return torch.full((self.kv_heads, self.positions, self.size), math.nan, dtype=torch.bfloat16)

    def _pack(self, parts: int, key_in: Tensor | None, value_out: Tensor | None, value_in: Tensor | None) -> Tensor:
        """Packed keys with positions as outputs; the other layouts where they are asked for."""
        key_out, gathered = self._packed(), torch.empty(parts, 16, self.size, dtype=torch.bfloat16)
        others = [x.data_ptr() if x is not None else 0 for x in (key_in, value_out, value_in)]
        for part in range(parts):
            native(k.pack_heads)(
                part, parts, self.tables.table.ctypes.data, len(self.tables.table), self.positions, self.kv_heads,
                self.size, self.given.rows, self.given.k_KTE.data_ptr(), self.given.v_KTE.data_ptr(),
                gathered.data_ptr(), key_out.data_ptr(), *others,
            )  # fmt: skip
        return key_out

    def _common(self, part: int, parts: int) -> list[int]:
        return [
            part, parts, self.tables.table.ctypes.data, len(self.tables.table), self.positions, self.heads,
            self.kv_heads, self.size, self.given.rows, self.given.q_HTE.data_ptr(),
        ]  # fmt: skip

    def _scratch(self, parts: int) -> Tensor:
        return torch.full((parts, self.block // 4), math.nan)

    def forward(self, parts: int = 1) -> Tensor:
        """[T, H, E]."""
        value_in = self._packed()
        key_out, scratch = self._pack(parts, None, None, value_in), self._scratch(parts)
        out = torch.full((self.given.rows, self.heads, self.size), math.nan, dtype=torch.bfloat16)
        for part in range(parts):
            native(k.attention_forward)(
                *self._common(part, parts), key_out.data_ptr(), value_in.data_ptr(), scratch.data_ptr(), self.block,
                self.room, out.data_ptr(),
            )  # fmt: skip
        return out

    def backward(self, parts: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """By q [H, T, E], and what every query head gives to keys and values, [H, P, E]."""
        key_in, value_out = self._packed(), self._packed()
        key_out, scratch = self._pack(parts, key_in, value_out, None), self._scratch(parts)
        grad_q = torch.full(tuple(self.given.q_HTE.shape), math.nan)
        grad_k, grad_v = (torch.zeros(self.heads, self.positions, self.size, dtype=torch.bfloat16) for _ in range(2))
        for part in range(parts):
            native(k.attention_back)(
                *self._common(part, parts), self.given.grad_THE.data_ptr(), key_out.data_ptr(), key_in.data_ptr(),
                value_out.data_ptr(), scratch.data_ptr(), self.block, self.room, grad_q.data_ptr(), grad_k.data_ptr(),
                grad_v.data_ptr(),
            )  # fmt: skip
        return grad_q, grad_k, grad_v


def probabilities(given: Given, sequence: PackedSequence, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one head and the sequence's own rows [own, n], float64, with the leaves q, k, v that they come from."""
    rows, shared = torch.from_numpy(sequence.rows_N), sequence.num_shared
    kv_head = head * len(given.k_KTE) // len(given.q_HTE)
    q = given.q_HTE[head, rows[shared:]].double().requires_grad_()
    keys, values = (x[kv_head, rows].double().requires_grad_() for x in (given.k_KTE, given.v_KTE))
    scores = q @ keys.t() / math.sqrt(q.shape[1])
    hidden = torch.arange(len(rows)) > torch.arange(shared, len(rows))[:, None]
    return scores.masked_fill(hidden, -math.inf).softmax(-1), q, keys, values


@pytest.mark.parametrize("name", ALL)
def test_every_row_attends_to_its_sequence_up_to_itself(name: str, generator: torch.Generator) -> None:
    """Off by the rounding of probabilities and of the result."""
    sequences = ALL[name]
    given = random_heads(1 + max(int(s.rows_N[-1]) for s in sequences), generator)
    out = Kernels(sequences, given).forward()
    for sequence in sequences:
        for head in range(HEADS):
            probs, _, _, values = probabilities(given, sequence, head)
            exact, size = (probs @ values).detach(), (probs @ values.abs()).detach()
            assert_within(out[sequence.rows_N[sequence.num_shared :], head], exact, 2 * UNIT * size + 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_queries_keys_and_values(name: str, generator: torch.Generator) -> None:
    """Of every query head; off by the rounding of probabilities, of their gradients, and of what is added up."""
    sequences = ALL[name]
    given = random_heads(1 + max(int(s.rows_N[-1]) for s in sequences), generator)
    kernels = Kernels(sequences, given)
    grad_q, grad_k, grad_v = kernels.backward()
    for sequence, at in zip(sequences, kernels.tables.table[:, k.AT].tolist(), strict=True):
        own, seen = sequence.rows_N[sequence.num_shared :], slice(at, at + len(sequence.rows_N))
        for head in range(HEADS):
            probs, q, keys, values = probabilities(given, sequence, head)
            grad = given.grad_THE[own, head].double()
            exact_q, exact_k, exact_v = torch.autograd.grad(probs @ values, (q, keys, values), grad)
            with torch.no_grad():
                by_probs = grad @ values.t()
                by_scores = probs * (by_probs - (probs * by_probs).sum(-1, keepdim=True)) / math.sqrt(SIZE)
                size_q, size_k = by_scores.abs() @ keys.abs(), by_scores.abs().t() @ q.abs()
                size_v = probs.t() @ grad.abs()
            assert_within(grad_q[head, own], exact_q, 1.1 * UNIT * size_q + 1e-5)
            assert_within(grad_k[head, seen], exact_k, 2.1 * UNIT * size_k + 1e-5)
            assert_within(grad_v[head, seen], exact_v, 2.1 * UNIT * size_v + 1e-5)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (2, 2)], ids=str)
def test_query_heads_read_their_groups_keys(heads: tuple[int, int], generator: torch.Generator) -> None:
    """With values that say whose they are: every probability falls on the same number."""
    given = random_heads(40, generator, heads=heads)
    for kv_head in range(heads[1]):
        given.v_KTE[kv_head] = kv_head + 1
    out = Kernels(sequences_of((40, 0, 0)), given).forward()
    for head in range(heads[0]):
        exact = torch.full((40, SIZE), head // (heads[0] // heads[1]) + 1.0, dtype=torch.float64)
        assert_within(out[:, head], exact, 2 * UNIT * exact)


@pytest.mark.parametrize("size", [64, 128])
def test_other_sizes_of_heads(size: int, generator: torch.Generator) -> None:
    sequences = sequences_of((37, 0, 0), (18, 0, 17))
    given = random_heads(55, generator, size=size)
    out = Kernels(sequences, given).forward()
    for sequence in sequences:
        probs, _, _, values = probabilities(given, sequence, 3)
        exact, scale = (probs @ values).detach(), (probs @ values.abs()).detach()
        assert_within(out[sequence.rows_N[sequence.num_shared :], 3], exact, 2 * UNIT * scale + 1e-5)


@pytest.mark.parametrize("parts", [2, 3, 7, 50])
def test_bits_do_not_depend_on_how_many_share_the_work(parts: int, generator: torch.Generator) -> None:
    sequences = [*SHARING["one beginning"]]
    given = random_heads(1 + max(int(s.rows_N[-1]) for s in sequences), generator)
    kernels = Kernels(sequences, given)
    assert torch.equal(kernels.forward(parts), kernels.forward())
    for found, expected in zip(kernels.backward(parts), kernels.backward(), strict=True):
        assert torch.equal(found, expected)


def test_a_sequences_bits_depend_neither_on_others_nor_on_what_it_shares(generator: torch.Generator) -> None:
    """Alone, behind others, and with its first rows taken from another."""
    own, before, shared = 60, 21, 37
    given = random_heads(own, generator)
    alone = Kernels(sequences_of((own, 0, 0)), given).forward()
    moved = followed_by(random_heads(before, generator), given)
    assert torch.equal(Kernels(sequences_of((before, 0, 0), (own, 0, 0)), moved).forward()[before:], alone)
    split = Kernels(sequences_of((shared, 0, 0), (own - shared, 0, shared)), given).forward()
    assert torch.equal(split, alone)


def test_tables_say_where_each_row_is_used() -> None:
    """Positions begin at multiples of 16; a shared row is used by every sequence that has it."""
    sequences = SHARING["of one that shares"]
    tables = AttentionTables(sequences)
    starts = [0, 64, 112, 176]
    assert tables.table[:, k.LENGTH].tolist() == [50, 47, 52, 49] and tables.table[:, k.SHARED].tolist() == [
        0,
        17,
        40,
        46,
    ]
    assert tables.table[:, k.AT].tolist() == starts
    assert (tables.positions, tables.longest) == (240, 64)
    for row in range(95):
        expected = [
            at + position
            for s, at in zip(sequences, starts, strict=True)
            for position in np.flatnonzero(s.rows_N == row)
        ]
        assert sorted(tables.used[tables.uses[row] : tables.uses[row + 1]].tolist()) == expected
