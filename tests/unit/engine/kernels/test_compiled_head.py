"""`CompiledHead`: logits, logprobs and gradients of targets against float64, with and without an adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.support.engine import drain
from tests.unit.engine.kernels.calling import UNIT, assert_within, half, rounded, threads
from torch import Tensor

from mint.engine.kernels import softmax as k
from mint.engine.kernels.adapter import pack_adapter
from mint.engine.kernels.available import unfit
from mint.engine.kernels.head import CompiledHead
from mint.engine.kernels.weights import PackedWeights
from mint.engine.lora import UNEMBED_SITE, AdapterGradient, AdapterLayout, Segment, lay_out, module_views
from mint.engine.models.config import DecoderConfig, decoder_config
from mint.engine.models.head import Targets
from mint.engine.models.linear import Linear
from mint.engine.models.weights import DecoderWeights, LayerWeights
from mint.engine.workspace import Workspace
from mint.types.params import LoraConfig

HIDDEN, MLP, ROWS, LAYERS = 64, 96, 21, 3
VOCABULARIES = [48, 55, 385]
CHUNK = 8  # rows of a chunk: several, the last of them shorter


def config_of(vocab_size: int, **fields: int) -> DecoderConfig:
    raw = {
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return decoder_config({**raw, **fields})


def weights_of(unembed_VD: Tensor, generator: torch.Generator) -> DecoderWeights:
    """With one layer, of two heads and as many of keys."""
    qkv, o, gate_up, down = (
        Linear(half(generator, *shape))
        for shape in ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * MLP, HIDDEN), (HIDDEN, MLP))
    )
    norm_D, mlp_norm_D, final_norm_D = torch.rand(3, HIDDEN, generator=generator)
    layer = LayerWeights(norm_D, qkv, None, None, o, mlp_norm_D, gate_up, down)
    return DecoderWeights(unembed_VD, [layer], final_norm_D, Linear(unembed_VD))


@dataclass(frozen=True)
class Given:
    """A head with its matrix, normed rows, an adapter of the unembedding, and pairs: some rows have many, some none."""

    head: CompiledHead
    unembed_VD: Tensor
    normed_TD: Tensor
    layout: AdapterLayout
    flat_P: Tensor
    targets: Targets
    gradient_p: Tensor  # of a loss by the pairs' logprobs

    def segment(self, adapted: bool) -> Segment:
        if not adapted:
            return Segment(0, ROWS)
        adapter = pack_adapter(self.layout, self.flat_P, LAYERS, back=True)
        return Segment(0, ROWS, adapter, AdapterGradient(self.layout, torch.device("cpu")))

    def exact_logits(self, x_TD: Tensor, flat_P: Tensor, adapted: bool) -> Tensor:
        logits_TV = x_TD @ self.unembed_VD.double().t()
        if not adapted:
            return logits_TV
        (module,) = self.layout.modules
        a, b = module_views(self.layout, flat_P, module)
        return logits_TV + rounded(x_TD @ rounded(a).t(), back=True) @ rounded(b * self.layout.scale).t()

    def exact_logprobs(self, logits_TV: Tensor) -> Tensor:
        return logits_TV.log_softmax(-1)[self.targets.rows_R[self.targets.row_P], self.targets.token_P]


def given_for(vocab_size: int, generator: torch.Generator) -> Given:
    config = config_of(vocab_size)
    unembed_VD = half(generator, vocab_size, HIDDEN, scale=0.3)
    packed = PackedWeights(config, weights_of(unembed_VD, generator))
    head = CompiledHead(config, packed, Workspace(torch.device("cpu")))
    head.rows_per_chunk = CHUNK
    layout = lay_out(LoraConfig(rank=4), [(UNEMBED_SITE, HIDDEN, {"lm_head": vocab_size})])
    flat_P = 0.1 * torch.randn(layout.size, generator=generator)
    rows_R = torch.arange(0, ROWS, 1)[torch.arange(ROWS) % 5 != 3]
    row_P = torch.arange(len(rows_R)).repeat_interleave(torch.tensor([1, 3, 1, 2]).repeat(5)[: len(rows_R)])
    token_P = torch.randint(0, vocab_size, (len(row_P),), generator=generator)
    token_P[1], token_P[2:4] = vocab_size - 1, token_P[1]  # the last token, and one that a row has twice
    gradient_p = torch.randn(len(row_P), generator=generator)
    return Given(
        head, unembed_VD, half(generator, ROWS, HIDDEN), layout, flat_P, Targets(rows_R, row_P, token_P), gradient_p
    )


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_logits(vocab_size: int, adapted: bool, generator: torch.Generator) -> None:
    """Float32, of the vocabulary alone."""
    given = given_for(vocab_size, generator)
    found = given.head.logits_for(given.normed_TD, given.segment(adapted))
    exact = given.exact_logits(given.normed_TD.double(), given.flat_P.double(), adapted)
    assert found.dtype == torch.float32
    assert_within(found, exact, 1e-4 if not adapted else 5e-3)
    assert float((found - exact).norm()) <= 2e-4 * float(exact.norm())


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_logprobs_and_gradients(vocab_size: int, adapted: bool, generator: torch.Generator) -> None:
    """By the rows and by the adapter; the gradient by the logits is bf16."""
    given = given_for(vocab_size, generator)
    segment, grad_TD = given.segment(adapted), torch.zeros(ROWS, HIDDEN)
    scored = given.head.score(
        given.normed_TD, given.targets, segment, lambda logprob_p, where: given.gradient_p[where], grad_TD
    )
    logprob_P = drain(scored)
    x_TD, flat_P = given.normed_TD.double().requires_grad_(), given.flat_P.double().requires_grad_()
    logits_TV = given.exact_logits(x_TD, flat_P, adapted)
    exact_P = given.exact_logprobs(logits_TV)
    by_logits, exact_TD = torch.autograd.grad(exact_P @ given.gradient_p.double(), (logits_TV, x_TD), retain_graph=True)
    assert_within(logprob_P, exact_P.detach(), 2e-5 if not adapted else 1e-2)
    size_TD = by_logits.abs() @ given.unembed_VD.double().abs()
    assert_within(grad_TD, exact_TD, UNIT * size_TD + (1e-5 if not adapted else 2e-2 * exact_TD.abs().max()))
    if segment.gradient is not None:
        (exact_grad_P,) = torch.autograd.grad(exact_P @ given.gradient_p.double(), flat_P)
        found = segment.gradient.flat_P.double()
        assert float((found - exact_grad_P).norm()) <= 4e-3 * float(exact_grad_P.norm())


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_bits_depend_neither_on_threads_nor_on_chunks(adapted: bool, generator: torch.Generator) -> None:
    """A row's logprobs and gradient are its own; with a gradient and without."""
    given = given_for(55, generator)
    found = []
    for count, chunk in ((1, CHUNK), (2, CHUNK), (1, 1), (2, ROWS)):
        given.head.rows_per_chunk, grad_TD = chunk, torch.zeros(ROWS, HIDDEN)
        with threads(count):
            scores = [
                drain(given.head.score(given.normed_TD, given.targets, given.segment(adapted), *more))
                for more in ((), (lambda _, where: given.gradient_p[where], grad_TD))
            ]
        found.append((*scores, grad_TD))
    for logprob_P, trained_P, grad_TD in found:
        assert torch.equal(logprob_P, found[0][0]) and torch.equal(trained_P, found[0][0])
        assert torch.equal(grad_TD, found[0][2])


def test_the_adapters_gradient_has_the_same_bits_for_any_threads(generator: torch.Generator) -> None:
    given = given_for(385, generator)
    found = []
    for count in (1, 2, 3):
        segment = given.segment(True)
        with threads(count):
            drain(given.head.score(given.normed_TD, given.targets, segment, lambda _, where: given.gradient_p[where]))
        assert segment.gradient is not None
        found.append(segment.gradient.flat_P)
    assert found[0].any() and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_all_tokens_logprobs_make_one(generator: torch.Generator) -> None:
    given = given_for(55, generator)
    targets = Targets(torch.tensor([4]), torch.zeros(55, dtype=torch.int64), torch.arange(55))
    logprob_P = drain(given.head.score(given.normed_TD, targets, given.segment(False)))
    assert logprob_P.double().exp().sum().item() == pytest.approx(1, abs=1e-6) and (logprob_P < 0).all()


def test_statistics_of_rows_see_the_vocabulary_alone(generator: torch.Generator) -> None:
    """Large and small rows; whatever lies beyond the vocabulary becomes -inf."""
    size, step = 150, 160
    logits = 5 * torch.randn(6, step, generator=generator)
    logits[:, size:] = torch.tensor([1e9, float("nan"), float("inf"), -1.0, 0.0] * 2)
    logits[1, :size] += 1e4
    logits[2, :size] -= 1e4
    logits[3, 1:size] = -float("inf")
    exact = logits[:, :size].double()
    most, sums = torch.empty(6), torch.empty(6)
    with threads(2):
        k.statistics_kernel(logits.data_ptr(), 6, size, step, most.data_ptr(), sums.data_ptr())
    assert torch.equal(most, exact.amax(-1).float()) and (logits[:, size:] == -float("inf")).all()
    expected = (exact - exact.amax(-1, keepdim=True)).exp().sum(-1)
    assert_within(sums, expected, 1e-6 * expected)


def test_the_gradient_by_logits_adds_what_its_pairs_give(generator: torch.Generator) -> None:
    logits = torch.randn(3, 32, generator=generator)
    most, factors = logits.amax(-1), torch.tensor([-0.5, 0.25, 2.0])
    borders, tokens = np.array([0, 2, 2, 5]), torch.tensor([4, 4, 0, 31, 7])
    added, out = torch.tensor([1.0, 2.0, -1.0, 0.5, 8.0]), torch.full((3, 32), float("nan")).bfloat16()
    exact = (logits.double() - most[:, None]).exp() * factors[:, None]
    exact.index_put_((torch.tensor([0, 0, 2, 2, 2]), tokens), added.double(), accumulate=True)
    k.gradient_kernel(
        logits.data_ptr(), 3, 32, most.data_ptr(), factors.data_ptr(), borders.ctypes.data, tokens.data_ptr(),
        added.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    assert_within(out, exact, UNIT * exact.abs() + 1e-6)


def test_every_matrix_is_kept_both_ways_and_counts(generator: torch.Generator) -> None:
    """The unembedding filled up to whole blocks; norms and epsilon in float32. The originals of layers are let go."""
    weights = weights_of(half(generator, 55, HIDDEN), generator)
    packed = PackedWeights(config_of(55), weights)
    assert weights.layers == [] and (packed.vocab_blocks, packed.unembed_site) == (4, 4 * LAYERS)
    matrices = HIDDEN * (3 * HIDDEN + HIDDEN + 2 * MLP + MLP) + 64 * HIDDEN
    assert packed.num_bytes() == 2 * 2 * matrices + 4 * (3 * HIDDEN + 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"head_dim": 48}, "they compute in steps of 32, the model has head_dim 48"),
        (
            {"hidden_size": 72, "intermediate_size": 100, "num_attention_heads": 6},
            "they compute in steps of 32, the model has hidden_size 72, intermediate_size 100, head_dim 12",
        ),
    ],
)
def test_sizes_that_registers_do_not_divide_are_named(fields: dict[str, int], reason: str | None) -> None:
    """The vocabulary may be any."""
    assert unfit(config_of(55, **fields)) == reason
