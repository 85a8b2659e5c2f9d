"""Attention within the sequences of a packed row, forward and backward, against float64 attention by its formula."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mint.engine.models.attention import QUERY_BLOCK
from mint.engine.models.packed_attention import STEP, PackedAttention, PackedSequence
from mint.engine.workspace import Workspace

HEADS, HEAD_DIM = (6, 2), 8
LENGTHS = [
    [1],
    [STEP, STEP + 1, STEP - 1, 2],
    [QUERY_BLOCK, 3, QUERY_BLOCK + 1],
    [3 * QUERY_BLOCK - 7, 40],
]
# lengths, and of which earlier sequence each has how many tokens
SHARING: dict[str, list[tuple[int, int, int]]] = {
    "within a step": [(60, 0, 0), (70, 0, 20), (21, 0, 20)],
    "whole steps": [(2 * STEP, 0, 0), (3 * STEP, 0, 2 * STEP), (STEP + 1, 1, STEP)],
    "of one that shares itself": [(5, 0, 0), (90, 0, 0), (120, 1, 50), (100, 2, 99), (130, 2, 119)],
    "more than a block": [(QUERY_BLOCK + 50, 0, 0), (3 * QUERY_BLOCK, 0, QUERY_BLOCK + 40)],
    "by many": [(40, 0, 0), *[(45, 0, 33)] * 70],
}
# of the largest entry: float32 sums, and bf16 with its eight bits of probabilities and of every product
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _borders(lengths: list[int]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(lengths))
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _apart(lengths: list[int]) -> list[PackedSequence]:
    return [PackedSequence(np.arange(start, end)) for start, end in _borders(lengths)]


def _sharing(given: list[tuple[int, int, int]]) -> list[PackedSequence]:
    sequences: list[PackedSequence] = []
    row = 0
    for length, source, shared in given:
        begin = sequences[source].rows_N[:shared] if shared else np.arange(0)
        sequences.append(PackedSequence(np.concatenate([begin, np.arange(row, row + length - shared)]), shared))
        row += length - shared
    return sequences


def _expected(qkv_NTE: Tensor, grad_TH: Tensor, sequences: list[PackedSequence]) -> tuple[Tensor, Tensor]:
    """Output [T, H] and the gradient by the heads, in float64 by torch's autograd."""
    heads = qkv_NTE.double().requires_grad_()
    outs = []
    for sequence in sequences:
        own = heads[:, torch.from_numpy(sequence.rows_N)]
        q, k, v = own.split([HEADS[0], HEADS[1], HEADS[1]])
        k, v = (t.repeat_interleave(HEADS[0] // HEADS[1], 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / HEAD_DIM**0.5
        hidden = torch.ones(scores.shape[1:]).triu(1).bool()
        out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        outs.append(out[:, sequence.num_shared :])
    out_TH = torch.cat(outs, 1).transpose(0, 1).reshape(grad_TH.shape)
    return out_TH.detach(), torch.autograd.grad(out_TH, heads, grad_TH.double())[0]


def _computed(
    qkv_NTE: Tensor, grad_TH: Tensor, sequences: list[PackedSequence], ws: Workspace
) -> tuple[Tensor, Tensor]:
    attention = PackedAttention(ws, sequences, HEADS, HEAD_DIM)
    out_TH, grad_NTE = torch.full_like(grad_TH, torch.nan), torch.full_like(qkv_NTE, torch.nan)
    with torch.inference_mode():
        attention(0, qkv_NTE, out_TH)
        attention.backward(grad_TH, qkv_NTE, grad_NTE)
    return out_TH, grad_NTE


def _random(total: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(HEADS[0] + 2 * HEADS[1], total, HEAD_DIM, generator=generator)
    return qkv.to(dtype), torch.randn(total, HEADS[0] * HEAD_DIM, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sequences",
    [pytest.param(_apart(lengths), id=str(lengths)) for lengths in LENGTHS]
    + [pytest.param(_sharing(given), id=name) for name, given in SHARING.items()],
)
def test_output_and_gradient_are_those_of_the_formula(sequences: list[PackedSequence], dtype: torch.dtype) -> None:
    """In a workspace that a longer row has used, so that leftovers would show."""
    ws = Workspace(torch.device("cpu"))
    _computed(*_random(3000, dtype), _apart([3000]), ws)
    with torch.inference_mode():
        for storage in ws._storage.values():
            storage.fill_(torch.nan)
    qkv_NTE, grad_TH = _random(int(sequences[-1].rows_N[-1]) + 1, dtype)
    for found, expected in zip(
        _computed(qkv_NTE, grad_TH, sequences, ws), _expected(qkv_NTE, grad_TH, sequences), strict=True
    ):
        assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sequence_has_its_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    def of(lengths: list[int], which: int) -> tuple[Any, Any]:
        start, end = _borders(lengths)[which]
        qkv_NTE, grad_TH = _random(sum(lengths), dtype)
        qkv_NTE[:, start:end], grad_TH[start:end] = own
        out_TH, grad_NTE = _computed(qkv_NTE, grad_TH, _apart(lengths), Workspace(torch.device("cpu")))
        return out_TH[start:end], grad_NTE[:, start:end]

    own = _random(300, dtype)
    alone = of([300], 0)
    for lengths, which in (([40, 300], 1), ([300, 40], 0), ([7, 300, 513], 1)):
        assert all(torch.equal(a, b) for a, b in zip(of(lengths, which), alone, strict=True))


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    """A run that has diverged shares passes with others."""
    lengths = [20, 50, 30]
    qkv_NTE, grad_TH = _random(sum(lengths), torch.float32)
    clean = _computed(qkv_NTE, grad_TH, _apart(lengths), Workspace(torch.device("cpu")))
    qkv_NTE[:, 20:70] = torch.nan
    out_TH, grad_NTE = _computed(qkv_NTE, grad_TH, _apart(lengths), Workspace(torch.device("cpu")))
    for rows in (slice(0, 20), slice(70, 100)):
        assert torch.equal(out_TH[rows], clean[0][rows]) and torch.equal(grad_NTE[:, rows], clean[1][:, rows])
    assert out_TH[20:70].isnan().all()
