"""`Linear`: a frozen projection. Knows how to multiply quickly with few rows; a decode step has few.

Shape letters: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUT_ROWS = 32  # the layout that suits a decode step; packing for more rows is slower there and no faster elsewhere
PACKED_ROWS = 256  # up to here a weight in the kernel's own layout pays; its bits are those of the plain product


class Linear:
    """y = x W^T (+ bias). The weight is shared by everyone who holds the model."""

    __slots__ = ("_packed_OI", "bias_O", "weight_OI")

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.weight_OI = weight_OI
        self.bias_O = bias_O
        self._packed_OI: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.weight_OI, self.bias_O, self._packed_OI) if t is not None]

    def forward(self, x_TI: Tensor, out_TO: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """The product, in `out_TO` or, where the kernel makes its own tensor, there; so go on with what is returned. The
        residual is added before rounding where the kernel can."""
        if self._packed_OI is not None and len(x_TI) <= PACKED_ROWS:
            return self._packed_forward(x_TI, residual_TO)
        weight_IO = self.weight_OI.t()
        if residual_TO is not None:
            torch.addmm(residual_TO, x_TI, weight_IO, out=out_TO)
            return out_TO if self.bias_O is None else out_TO.add_(self.bias_O)
        if self.bias_O is not None:
            return torch.addmm(self.bias_O, x_TI, weight_IO, out=out_TO)
        return torch.mm(x_TI, weight_IO, out=out_TO)

    def backward(self, grad_TO: Tensor, out_TI: Tensor) -> Tensor:
        """The input's gradient, grad W, into `out_TI`."""
        return torch.mm(grad_TO, self.weight_OI, out=out_TI)

    def pack(self, exact_shapes: dict[tuple[int, int, bool], bool]) -> bool:
        """Keep a copy in the layout the processor's bf16 kernel multiplies with: no repacking at every call.

        The operators are not public API of torch, so they are used only where they exist and give the same bits; that is
        tried once for each shape, and `exact_shapes` remembers it for the other layers.
        """
        if self._packed_OI is None and self.weight_OI.dtype == torch.bfloat16 and self.weight_OI.device.type == "cpu":
            if (
                not hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
                or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
            ):
                return False
            self._packed_OI = torch.ops.mkldnn._reorder_linear_weight(self.weight_OI, LAYOUT_ROWS)
            num_out, num_in = self.weight_OI.shape
            shape = num_out, num_in, self.bias_O is not None
            if shape not in exact_shapes:
                exact_shapes[shape] = self._packed_is_exact()
            if not exact_shapes[shape]:
                self._packed_OI = None
        return self._packed_OI is not None

    def _packed_forward(self, x_TI: Tensor, residual_TO: Tensor | None) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        if residual_TO is None:
            y: Tensor = linear(x_TI, self._packed_OI, self.bias_O, "none", [], "")
            return y
        y = linear.binary(x_TI, residual_TO, self._packed_OI, self.bias_O, "add")
        return y

    def _packed_is_exact(self) -> bool:
        generator = torch.Generator().manual_seed(0)
        num_out, num_in = self.weight_OI.shape
        x = torch.randn(PACKED_ROWS, num_in, generator=generator).to(self.weight_OI.dtype)
        residual = torch.randn(PACKED_ROWS, num_out, generator=generator).to(self.weight_OI.dtype)
        plain = Linear(self.weight_OI, self.bias_O)
        for rows in (1, 2, 7, 32, 96, PACKED_ROWS):
            for added in (None, residual[:rows]):
                expected = plain.forward(x[:rows], torch.empty_like(residual[:rows]), added)
                if not torch.equal(self._packed_forward(x[:rows], added), expected):
                    return False
        return True
