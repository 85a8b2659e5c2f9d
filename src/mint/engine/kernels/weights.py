"""`PackedWeights`: a frozen decoder's matrices as compiled kernels multiply with them, one layout each way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mint.engine.kernels.products import pack
from mint.engine.kernels.simd import WIDTH
from mint.engine.kernels.tables import NUM_SITES, WEIGHTS_WIDTH
from mint.engine.models.config import DecoderConfig
from mint.engine.models.linear import Linear
from mint.engine.models.weights import DecoderWeights


class PackedWeights:
    """forward_table: a row for each layer, see tables.py; back_table: the four matrices for backward."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        """Empties `weights.layers`: two copies of a matrix are enough."""
        self._held: list[Tensor] = []
        forward, back = [], []
        while weights.layers:
            layer = weights.layers.pop(0)
            row = [
                self.hold(layer.input_norm_D),
                *self._linear(layer.qkv),
                self.hold(layer.q_norm),
                self.hold(layer.k_norm),
            ]
            row += [*self._linear(layer.o), self.hold(layer.mlp_norm_D)]
            forward.append([*row, *self._linear(layer.gate_up), *self._linear(layer.down)])
            back.append([self.hold(pack(linear.weight_OI.t())) for linear in layer.linears()])
        self.forward_table, self.back_table = np.array(forward, np.int64), np.array(back, np.int64)
        assert self.forward_table.shape[1:] == (WEIGHTS_WIDTH,) and self.back_table.shape[1:] == (NUM_SITES,)
        self.final_norm_D = weights.final_norm_D
        self.hold(weights.final_norm_D)
        self.unembed, _ = self._linear(weights.unembed)
        self.vocab_blocks = -(-config.vocab_size // WIDTH)
        self.unembed_site = NUM_SITES * config.num_layers  # its number among the sites of adapters
        # inputs of the backward product are filled up as the logits' gradient is
        unembed_VD = pad(weights.unembed.weight_OI, (0, 0, 0, -config.vocab_size % WIDTH))
        self.unembed_back = self.hold(pack(unembed_VD.t()))
        self.eps = self.hold(torch.tensor(config.rms_norm_eps, dtype=torch.float32))

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held)

    def hold(self, tensor: Tensor | None) -> int:
        """Its address; 0: there is none."""
        if tensor is None:
            return 0
        assert tensor.is_contiguous()
        self._held.append(tensor)
        return tensor.data_ptr()

    def _linear(self, linear: Linear) -> tuple[int, int]:
        return self.hold(pack(linear.weight_OI)), self.hold(
            linear.bias_O.float() if linear.bias_O is not None else None
        )
