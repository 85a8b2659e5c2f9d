"""One dense decoder (Llama, Mistral, Qwen2, Qwen3), forward and hand-written backward through a packed row of tokens.

The base is frozen: no gradient of its weights exists, none is computed below the first adapted layer. Of a layer backward
needs what `LayerActivations` lists, kept or computed once more from the layer's input, by the same calls and so with the
same bits; norms, SwiGLU and attention probabilities are always recomputed. The trainer and the sampler run the same layer;
they differ in the `attention` they pass in. Both passes are generators that yield between layers, so
that the engine can share time. Shape letters: T tokens of the row, D hidden, F MLP width, O width of q, k, v together,
H heads x head_dim, N heads (q, then k, then v), E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mint.engine.lora import DOWN, GATE_UP, QKV, O, Segment, lora_backward, lora_forward
from mint.engine.models.config import DecoderConfig
from mint.engine.models.ops import (
    RopeTable,
    halves,
    rms_norm,
    rms_norm_again,
    rms_norm_backward,
    rope_table,
    rotate,
    rotate_backward,
    swiglu_backward,
)
from mint.engine.models.packed_attention import PackedAttention, PackedSequence
from mint.engine.models.weights import DecoderWeights, LayerWeights
from mint.engine.workspace import Workspace

# (layer, rotated q k v [N, T, E], out [T, H]): writes the attention of every token of the row
Attention = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True, repr=False)
class PackedRow:
    """Sequences laid end to end, or what is their own of them (see `PackedSequence`). positions_T count from each sequence's
    start; segments are the rows of each run, in order."""

    tokens_T: Tensor
    positions_T: Tensor
    segments: list[Segment]

    def adapts(self, layer: int, *sites: str) -> bool:
        return any(segment.at((layer, site)) is not None for segment in self.segments for site in sites)


@dataclass(slots=True, repr=False)
class LayerActivations:
    """What a layer's backward needs. `raw_TO` only where q and k are normalised per head."""

    x_TD: Tensor
    qkv_NTE: Tensor
    attn_TH: Tensor
    mid_TD: Tensor
    gate_up: Tensor
    raw_TO: Tensor | None
    x_rstd: Tensor | None = None
    mid_rstd: Tensor | None = None
    qk_rstd: tuple[Tensor, Tensor] | None = None


class Decoder:
    """A frozen base model in one dtype on one device, with its scratch memory."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, workspace: Workspace) -> None:
        self.config = config
        self.weights = weights
        self.ws = workspace
        self.dtype = weights.embed_VD.dtype
        self.device = weights.embed_VD.device

    def _buffer(self, name: str, *shape: int) -> Tensor:
        return self.ws.get(name, shape, self.dtype)

    def _activations(self, num_tokens: int, x_TD: Tensor, slot: str) -> LayerActivations:
        c = self.config
        heads = c.num_heads + 2 * c.num_kv_heads
        return LayerActivations(
            x_TD=x_TD,
            qkv_NTE=self._buffer(f"qkv.{slot}", heads, num_tokens, c.head_dim),
            attn_TH=self._buffer(f"attn.{slot}", num_tokens, c.q_size),
            mid_TD=self._buffer(f"mid.{slot}", num_tokens, c.hidden_size),
            gate_up=self._buffer(f"gate_up.{slot}", num_tokens, 2 * c.intermediate_size),
            raw_TO=self._buffer(f"raw.{slot}", num_tokens, c.qkv_size) if c.qk_norm else None,
        )

    def forward(
        self, row: PackedRow, attention: Attention, *, keep: bool, recompute: int = 0
    ) -> Generator[None, None, tuple[Tensor, list[LayerActivations | Tensor]]]:
        """The residual stream after the last layer [T, D] and, with `keep`, what backward needs of every layer: its
        activations or, of the first `recompute` layers, its input alone. Without `keep`, `attention` gets the same
        tensors in every layer."""
        num_tokens, layers = len(row.tokens_T), self.config.num_layers
        self.ws.begin(num_tokens)
        rope = rope_table(self.config.rope, row.positions_T, self.dtype)
        kept: list[LayerActivations | Tensor] = []
        x_TD = self._input(num_tokens, 0, keep=keep)
        torch.index_select(self.weights.embed_VD, 0, row.tokens_T, out=x_TD)
        num_shared = recompute if keep else layers  # layers whose activations the next one overwrites
        shared = self._activations(num_tokens, x_TD, "shared") if num_shared else None
        for index in range(layers):
            if shared is not None and index < num_shared:
                act, act.x_TD = shared, x_TD
            else:
                act = self._activations(num_tokens, x_TD, str(index))
            if keep:
                kept.append(x_TD if index < recompute else act)
            self._forward_to_mlp(index, act, row, rope, attention)
            x_TD = self._forward_mlp(index, act, row, self._input(num_tokens, index + 1, keep=keep))
            yield
        return x_TD, kept

    def _input(self, num_tokens: int, index: int, *, keep: bool) -> Tensor:
        """Where a layer's input goes. Without backward two take turns: a layer reads one and writes the other."""
        return self._buffer(f"x.{index if keep else index % 2}", num_tokens, self.config.hidden_size)

    def _forward_to_mlp(
        self, index: int, act: LayerActivations, row: PackedRow, rope: RopeTable, attention: Attention
    ) -> None:
        """Everything of the layer that backward needs, from its input."""
        c, w, num_tokens = self.config, self.weights.layers[index], len(act.x_TD)
        normed_TD = self._buffer("normed", num_tokens, c.hidden_size)
        act.x_rstd = rms_norm(self.ws, act.x_TD, w.input_norm_D, c.rms_norm_eps, normed_TD)
        raw_TO = act.raw_TO if act.raw_TO is not None else self._buffer("raw", num_tokens, c.qkv_size)
        raw_TO = w.qkv.forward(normed_TD, raw_TO)
        lora_forward(normed_TD, raw_TO, row.segments, (index, QKV))
        if act.raw_TO is not None:
            act.raw_TO = raw_TO
        self._rotate_heads(raw_TO, act, w, rope)
        attention(index, act.qkv_NTE, act.attn_TH)
        act.mid_TD = w.o.forward(act.attn_TH, act.mid_TD, act.x_TD)
        lora_forward(act.attn_TH, act.mid_TD, row.segments, (index, O))
        act.mid_rstd = rms_norm(self.ws, act.mid_TD, w.mlp_norm_D, c.rms_norm_eps, normed_TD)
        act.gate_up = w.gate_up.forward(normed_TD, act.gate_up)
        lora_forward(normed_TD, act.gate_up, row.segments, (index, GATE_UP))

    def _forward_mlp(self, index: int, act: LayerActivations, row: PackedRow, out_TD: Tensor) -> Tensor:
        """The next layer's input, in `out_TD` where the kernel allows."""
        w = self.weights.layers[index]
        gate, up = halves(act.gate_up)
        hidden_TF = self._silu("mlp", gate).mul_(up)
        out_TD = w.down.forward(hidden_TF, out_TD, act.mid_TD)
        lora_forward(hidden_TF, out_TD, row.segments, (index, DOWN))
        return out_TD

    def _silu(self, name: str, gate: Tensor) -> Tensor:
        out = self._buffer(name, *gate.shape)
        torch.ops.aten.silu.out(gate, out=out)
        return out

    def _rotate_heads(self, raw_TO: Tensor, act: LayerActivations, w: LayerWeights, rope: RopeTable) -> None:
        """Split the projection into heads, normalise q and k where the model does, rotate q and k."""
        c = self.config
        rotated = c.num_heads + c.num_kv_heads
        raw_TNE = raw_TO.view(len(raw_TO), -1, c.head_dim)
        source_TNE = raw_TNE
        if w.q_norm is not None and w.k_norm is not None:
            source_TNE = self._buffer("qk_normed", len(raw_TO), rotated, c.head_dim)
            parts = [(0, c.num_heads, w.q_norm), (c.num_heads, rotated, w.k_norm)]
            q_rstd, k_rstd = (
                rms_norm(self.ws, raw_TNE[:, a:b], norm, c.rms_norm_eps, source_TNE[:, a:b]) for a, b, norm in parts
            )
            act.qk_rstd = (q_rstd, k_rstd)
        rotate(source_TNE[:, :rotated].transpose(0, 1), rope, act.qkv_NTE[:rotated])
        act.qkv_NTE[rotated:].copy_(raw_TNE[:, rotated:].transpose(0, 1))

    def split_heads(self, qkv_NTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [K, G, T, E], k and v [K, T, E]; G query heads share a key/value head."""
        c = self.config
        q, k, v = torch.split(qkv_NTE, [c.num_heads, c.num_kv_heads, c.num_kv_heads])
        return q.view(c.num_kv_heads, c.num_heads // c.num_kv_heads, *q.shape[1:]), k, v

    def keys_values(self, qkv_NTE: Tensor) -> Tensor:
        """View [2, K, T, E] of the keys and values."""
        c = self.config
        return qkv_NTE[c.num_heads :].view(2, c.num_kv_heads, *qkv_NTE.shape[1:])

    def grouped(self, flat_TH: Tensor) -> Tensor:
        """[T, H] seen as [T, K, G, E]."""
        c = self.config
        return flat_TH.view(len(flat_TH), c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim)

    def packed_attention(self, sequences: Sequence[PackedSequence]) -> PackedAttention:
        """Within each of these sequences."""
        c = self.config
        return PackedAttention(self.ws, sequences, (c.num_heads, c.num_kv_heads), c.head_dim)

    def backward(
        self, row: PackedRow, attention: PackedAttention, grad_TD: Tensor, kept: list[LayerActivations | Tensor]
    ) -> Generator[None, None, None]:
        """Adapter gradients of every layer. grad_TD: float32 gradient by the last layer's output, overwritten."""
        rope = rope_table(self.config.rope, row.positions_T, self.dtype)
        for index in range(self.config.num_layers - 1, -1, -1):
            more, act = index > 0 or row.adapts(0, QKV, O), kept[index]
            if isinstance(act, Tensor):
                act = self._activations(len(grad_TD), act, "shared")
                self._forward_to_mlp(index, act, row, rope, attention)
                yield
            if more or row.adapts(0, GATE_UP, DOWN):
                self._backward_mlp(index, act, grad_TD, row, needs_input_grad=more)
            if more:
                self._backward_attention(index, act, grad_TD, row, rope, attention)
            yield

    def _backward_mlp(
        self, index: int, act: LayerActivations, grad_TD: Tensor, row: PackedRow, *, needs_input_grad: bool
    ) -> None:
        c, w = self.config, self.weights.layers[index]
        num_tokens = len(grad_TD)
        grad_out = self._buffer("grad_out", num_tokens, c.hidden_size).copy_(grad_TD)
        gate, up = halves(act.gate_up)
        silu_TF = self._silu("silu", gate)
        hidden_TF = self._buffer("mlp", num_tokens, c.intermediate_size)
        torch.mul(silu_TF, up, out=hidden_TF)
        grad_hidden_TF = self._buffer("grad_mlp", num_tokens, c.intermediate_size)
        w.down.backward(grad_out, grad_hidden_TF)
        lora_backward(grad_out, hidden_TF, grad_hidden_TF, row.segments, (index, DOWN))
        grad_gate_up = self._buffer("grad_gate_up", num_tokens, 2 * c.intermediate_size)
        swiglu_backward(grad_hidden_TF, act.gate_up, silu_TF, grad_gate_up)
        assert act.mid_rstd is not None
        normed_TD = self._buffer("normed", num_tokens, c.hidden_size)
        rms_norm_again(self.ws, act.mid_TD, w.mlp_norm_D, act.mid_rstd, normed_TD)
        if not needs_input_grad:
            lora_backward(grad_gate_up, normed_TD, None, row.segments, (index, GATE_UP))
            return
        grad_normed_TD = self._buffer("grad_normed", num_tokens, c.hidden_size)
        w.gate_up.backward(grad_gate_up, grad_normed_TD)
        lora_backward(grad_gate_up, normed_TD, grad_normed_TD, row.segments, (index, GATE_UP))
        grad_TD.add_(rms_norm_backward(self.ws, grad_normed_TD, act.mid_TD, w.mlp_norm_D, act.mid_rstd))

    def _backward_attention(
        self,
        index: int,
        act: LayerActivations,
        grad_TD: Tensor,
        row: PackedRow,
        rope: RopeTable,
        attention: PackedAttention,
    ) -> None:
        c, w = self.config, self.weights.layers[index]
        num_tokens = len(grad_TD)
        grad_out = self._buffer("grad_out", num_tokens, c.hidden_size).copy_(grad_TD)
        grad_attn_TH = self._buffer("grad_attn", num_tokens, c.q_size)
        w.o.backward(grad_out, grad_attn_TH)
        lora_backward(grad_out, act.attn_TH, grad_attn_TH, row.segments, (index, O))
        grad_qkv_NTE = self._buffer("grad_qkv", *act.qkv_NTE.shape)
        attention.backward(grad_attn_TH, act.qkv_NTE, grad_qkv_NTE)
        grad_raw_TO = self._rotate_heads_backward(grad_qkv_NTE, act, w, rope)
        assert act.x_rstd is not None
        normed_TD = self._buffer("normed", num_tokens, c.hidden_size)
        rms_norm_again(self.ws, act.x_TD, w.input_norm_D, act.x_rstd, normed_TD)
        if index == 0:  # nothing below is trained
            lora_backward(grad_raw_TO, normed_TD, None, row.segments, (index, QKV))
            return
        grad_normed_TD = self._buffer("grad_normed", num_tokens, c.hidden_size)
        w.qkv.backward(grad_raw_TO, grad_normed_TD)
        lora_backward(grad_raw_TO, normed_TD, grad_normed_TD, row.segments, (index, QKV))
        grad_TD.add_(rms_norm_backward(self.ws, grad_normed_TD, act.x_TD, w.input_norm_D, act.x_rstd))

    def _rotate_heads_backward(
        self, grad_qkv_NTE: Tensor, act: LayerActivations, w: LayerWeights, rope: RopeTable
    ) -> Tensor:
        c = self.config
        rotated, num_tokens = c.num_heads + c.num_kv_heads, grad_qkv_NTE.shape[1]
        grad_raw_TO = self._buffer("grad_raw", num_tokens, c.qkv_size)
        grad_TNE = grad_raw_TO.view(num_tokens, -1, c.head_dim)
        rotate_backward(grad_qkv_NTE[:rotated], rope, grad_TNE[:, :rotated].transpose(0, 1))
        grad_TNE[:, rotated:].copy_(grad_qkv_NTE[rotated:].transpose(0, 1))
        if w.q_norm is not None and w.k_norm is not None:
            assert act.raw_TO is not None and act.qk_rstd is not None
            raw_TNE = act.raw_TO.view(num_tokens, -1, c.head_dim)
            parts = [(0, c.num_heads, w.q_norm), (c.num_heads, rotated, w.k_norm)]
            for (a, b, norm), rstd in zip(parts, act.qk_rstd, strict=True):
                grad_TNE[:, a:b] = rms_norm_backward(self.ws, grad_TNE[:, a:b], raw_TNE[:, a:b], norm, rstd)
        return grad_raw_TO
