"""Forward and hand-written backward of the small operations of a decoder layer: RMSNorm, SwiGLU, rotary embedding.

Rounding: sums of squares and gradients of the residual stream are float32; products are rounded to the base dtype once
where transformers rounds twice. Shape letters: T tokens of the packed row, D hidden, F MLP width, N heads, E head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mint.engine.models.config import RopeConfig
from mint.engine.workspace import Workspace


def rms_norm(ws: Workspace, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Normalise the last axis of `x` into `out`; returns 1 / rms, float32, of shape [..., 1]. `weight`: float32."""
    x_hat = _as_float(ws, "norm.x", x)
    norm = torch.linalg.vector_norm(x_hat, dim=-1, keepdim=True)
    rstd = torch.addcmul(ws.scalar(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    out.copy_(x_hat.mul_(rstd).mul_(weight))
    return rstd


def rms_norm_again(ws: Workspace, x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor) -> None:
    """What `rms_norm` wrote, from the 1 / rms that it returned."""
    out.copy_(_as_float(ws, "norm.x", x).mul_(rstd).mul_(weight))


def rms_norm_backward(ws: Workspace, grad_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Gradient by `x` in float32: rstd (g w - x^ mean(g w x^)) with x^ = x rstd. In scratch that the next call reuses."""
    grad = _as_float(ws, "norm.grad", grad_out).mul_(weight)
    x_hat = _as_float(ws, "norm.x", x).mul_(rstd)
    product = torch.mul(grad, x_hat, out=ws.get("norm.product", tuple(x.shape), torch.float32))
    mean = product.sum(-1, keepdim=True).div_(x.shape[-1])
    return grad.addcmul_(x_hat, mean, value=-1).mul_(rstd)


def _as_float(ws: Workspace, name: str, x: Tensor) -> Tensor:
    """A float32 copy: one operation on two types is slower than a conversion and an operation on one."""
    return ws.get(name, tuple(x.shape), torch.float32).copy_(x)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the last axis' halves; `chunk` takes twice as long."""
    half = x.shape[-1] // 2
    return x.narrow(-1, 0, half), x.narrow(-1, half, half)


def swiglu_backward(grad_TF: Tensor, gate_up: Tensor, silu_TF: Tensor, out: Tensor) -> None:
    """Gradient of silu(gate) * up by the fused `gate_up` [T, 2 F], into `out`; silu_TF = silu(gate).

    Overwrites `grad_TF`, the gradient of the product.
    """
    (gate, up), (out_gate, out_up) = halves(gate_up), halves(out)
    torch.mul(grad_TF, silu_TF, out=out_up)
    grad_TF.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_TF, gate, grad_input=out_gate)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin of every token's angles, [1, T, E / 2], in the base dtype."""

    cos: Tensor
    sin: Tensor


def rope_table(rope: RopeConfig, positions_T: Tensor, dtype: torch.dtype) -> RopeTable:
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=positions_T.device)
    angles = positions_T.to(torch.float32)[:, None] * inv_freq
    cos, sin = (f(angles).mul_(rope.attention_factor).to(dtype)[None] for f in (torch.cos, torch.sin))
    return RopeTable(cos, sin)


def rotate(x_NTE: Tensor, table: RopeTable, out_NTE: Tensor) -> None:
    """Rotate the halves of every head: (a, b) -> (a cos - b sin, b cos + a sin)."""
    (a, b), (out_a, out_b) = halves(x_NTE), halves(out_NTE)
    torch.mul(a, table.cos, out=out_a)
    out_a.addcmul_(b, table.sin, value=-1)
    torch.mul(b, table.cos, out=out_b)
    out_b.addcmul_(a, table.sin)


def rotate_backward(grad_NTE: Tensor, table: RopeTable, out_NTE: Tensor) -> None:
    """The inverse rotation, which is the transpose."""
    rotate(grad_NTE, RopeTable(table.cos, -table.sin), out_NTE)
