"""Attention within the sequences of a packed row, forward and backward, against float64 attention by its formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mint.engine.models.attention import QUERY_BLOCK
from mint.engine.models.packed_attention import STEP, PackedAttention
from mint.engine.workspace import Workspace

HEADS, HEAD_DIM = (6, 2), 8
LENGTHS = [
    [1],
    [STEP, STEP + 1, STEP - 1, 2],
    [QUERY_BLOCK, 3, QUERY_BLOCK + 1],
    [3 * QUERY_BLOCK - 7, 40],
]
# of the largest entry: float32 sums, and bf16 with its eight bits of probabilities and of every product
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _borders(lengths: list[int]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(lengths))
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def _expected(qkv_NTE: Tensor, grad_TH: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Output [T, H] and the gradient by the heads, in float64 by torch's autograd."""
    heads = qkv_NTE.double().requires_grad_()
    q, k, v = heads.split([HEADS[0], HEADS[1], HEADS[1]])
    k, v = (t.repeat_interleave(HEADS[0] // HEADS[1], 0) for t in (k, v))
    outs = []
    for start, end in _borders(lengths):
        scores = q[:, start:end] @ k[:, start:end].transpose(1, 2) / HEAD_DIM**0.5
        hidden = torch.ones(end - start, end - start).triu(1).bool()
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, start:end])
    out_TH = torch.cat(outs, 1).transpose(0, 1).reshape(grad_TH.shape)
    return out_TH.detach(), torch.autograd.grad(out_TH, heads, grad_TH.double())[0]


def _computed(qkv_NTE: Tensor, grad_TH: Tensor, lengths: list[int], ws: Workspace) -> tuple[Tensor, Tensor]:
    attention = PackedAttention(ws, _borders(lengths), HEADS, HEAD_DIM)
    out_TH, grad_NTE = torch.full_like(grad_TH, torch.nan), torch.full_like(qkv_NTE, torch.nan)
    with torch.inference_mode():
        attention(0, qkv_NTE, out_TH)
        attention.backward(grad_TH, qkv_NTE, grad_NTE)
    return out_TH, grad_NTE


def _random(lengths: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    qkv = torch.randn(HEADS[0] + 2 * HEADS[1], total, HEAD_DIM, generator=generator)
    return qkv.to(dtype), torch.randn(total, HEADS[0] * HEAD_DIM, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_output_and_gradient_are_those_of_the_formula(lengths: list[int], dtype: torch.dtype) -> None:
    """In a workspace that a longer row has used, so that leftovers would show."""
    ws = Workspace(torch.device("cpu"))
    _computed(*_random([700], dtype), [700], ws)
    with torch.inference_mode():
        for storage in ws._storage.values():
            storage.fill_(torch.nan)
    qkv_NTE, grad_TH = _random(lengths, dtype)
    for found, expected in zip(
        _computed(qkv_NTE, grad_TH, lengths, ws), _expected(qkv_NTE, grad_TH, lengths), strict=True
    ):
        assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sequence_has_its_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    def of(lengths: list[int], which: int) -> tuple[Any, Any]:
        start, end = _borders(lengths)[which]
        qkv_NTE, grad_TH = _random(lengths, dtype)
        qkv_NTE[:, start:end], grad_TH[start:end] = own
        out_TH, grad_NTE = _computed(qkv_NTE, grad_TH, lengths, Workspace(torch.device("cpu")))
        return out_TH[start:end], grad_NTE[:, start:end]

    own = _random([300], dtype)
    alone = of([300], 0)
    for lengths, which in (([40, 300], 1), ([300, 40], 0), ([7, 300, 513], 1)):
        assert all(torch.equal(a, b) for a, b in zip(of(lengths, which), alone, strict=True))


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    """A run that has diverged shares passes with others."""
    lengths = [20, 50, 30]
    qkv_NTE, grad_TH = _random(lengths, torch.float32)
    clean = _computed(qkv_NTE, grad_TH, lengths, Workspace(torch.device("cpu")))
    qkv_NTE[:, 20:70] = torch.nan
    out_TH, grad_NTE = _computed(qkv_NTE, grad_TH, lengths, Workspace(torch.device("cpu")))
    for rows in (slice(0, 20), slice(70, 100)):
        assert torch.equal(out_TH[rows], clean[0][rows]) and torch.equal(grad_NTE[:, rows], clean[1][:, rows])
    assert out_TH[20:70].isnan().all()
