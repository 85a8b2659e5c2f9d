"""What a model will do on a host, from its shape and two figures of the host: tokens per second, and memory of a run.

Pure functions. The measured constants are those of docs/performance.md: SmolLM2-135M in bf16 on two cores with AVX-512 bf16. A
wider model spends a smaller part of its time beside the matrix products, so there they err on the slow side.
"""

from __future__ import annotations

from dataclasses import dataclass

from mint.engine.lora import adapter_layout
from mint.engine.models.attention import QUERY_BLOCK
from mint.engine.models.config import DecoderConfig
from mint.engine.plan import MIN_TOKENS_PER_PASS, compiled_pass_memory, make_plan, pass_budget, torch_pass_memory
from mint.errors import InputError
from mint.types.params import LoraConfig

CONVERSATION_TOKENS = 200
SEQUENCES = (1, 8, 32)
BYTES_PER_ADAPTER_PARAMETER = 16  # float32 weight, two moments, gradient


@dataclass(frozen=True, slots=True)
class Manner:
    """What of a forecast depends on what computes a model.

    products_share: of a training step, with products as fast as torch's: what was measured for the frozen matrices, and 0.04
    that attention's would take at that speed. decode_factor: a decode step as a multiple of reading every weight once, or of its
    products where those take longer. copies: of the projections, from the start, and more with the first sample.
    """

    products_share: float
    decode_factor: float
    copies: int
    more_copies: int


# compiled kernels: 0.88 of a step; 1.3 with 1 sequence, 1.7 with 8, 1.5 with 32
COMPILED = Manner(0.92, 1.5, copies=2, more_copies=0)
# torch's, which packs bf16 projections to decode: 0.61 of a step; 2.5 with 1 sequence, 3.1 with 8, 2.4 with 32
PACKING = Manner(0.65, 2.8, copies=1, more_copies=1)
PLAIN = Manner(0.65, 2.8, copies=1, more_copies=0)


@dataclass(frozen=True, slots=True)
class HostSpeed:
    """Of matrix products of the model's shapes, and of reading memory."""

    flop_per_second: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second: of training, and of sampling so many sequences at once (all of them together)."""

    training: float
    sampling: dict[int, float]


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen matrix [num_out, num_in] that the model has `count` times."""

    num_in: int
    num_out: int
    count: int

    @property
    def num_parameters(self) -> int:
        return self.num_in * self.num_out * self.count


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of a training run. `refusal`: why the planner would not take the model, None where it would.

    base_bytes: with all copies from the start; decoding_bytes: the one that the first sample makes. pass_tokens: of one
    pass.
    """

    base_bytes: int
    adapter_bytes: int
    decoding_bytes: int
    pass_bytes: int
    pass_tokens: int
    limit_bytes: int
    refusal: str | None

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.adapter_bytes + self.decoding_bytes + self.pass_bytes

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.total_bytes <= self.limit_bytes


def projections(config: DecoderConfig) -> list[Projection]:
    """Every frozen matrix that a token is multiplied with, the one with most parameters first."""
    hidden, width, layers = config.hidden_size, config.intermediate_size, config.num_layers
    found = [
        Projection(hidden, config.qkv_size, layers),
        Projection(config.q_size, hidden, layers),
        Projection(hidden, 2 * width, layers),
        Projection(width, hidden, layers),
        Projection(hidden, config.vocab_size, 1),
    ]
    return sorted(found, key=lambda projection: -projection.num_parameters)


def projection_parameters(config: DecoderConfig) -> int:
    return sum(projection.num_parameters for projection in projections(config))


def base_parameters(config: DecoderConfig) -> int:
    """All of the base model's; a tied matrix counts once."""
    hidden, width = config.hidden_size, config.intermediate_size
    norms = 2 * hidden + 2 * config.head_dim * config.qk_norm
    biases = config.qkv_size * config.qkv_bias + hidden * config.o_bias + (2 * width + hidden) * config.mlp_bias
    embedding = 0 if config.tied else config.vocab_size * hidden
    return projection_parameters(config) + config.num_layers * (norms + biases) + hidden + embedding


def training_flop_per_token(config: DecoderConfig, length: int) -> float:
    """Forward and the input's gradient through every frozen matrix, and attention in sequences of `length` tokens.

    Attention multiplies each query with the keys before the end of its block: two products forward, five backward.
    """
    keys = (length + min(length, QUERY_BLOCK)) / 2
    attention = 7 * 2 * keys * config.q_size * config.num_layers
    return 4 * projection_parameters(config) + attention


def expected_speed(config: DecoderConfig, element_size: int, host: HostSpeed, manner: Manner) -> Speed:
    """Conversations of about 200 tokens, rank 16, passes of 1,000 tokens and more; `element_size`: bytes of a weight."""
    seconds = training_flop_per_token(config, CONVERSATION_TOKENS) / host.flop_per_second / manner.products_share
    sampling = {n: n / decode_step_seconds(config, element_size, host, n, manner) for n in SEQUENCES}
    return Speed(1 / seconds, sampling)


def decode_step_seconds(
    config: DecoderConfig, element_size: int, host: HostSpeed, num_sequences: int, manner: Manner
) -> float:
    parameters = projection_parameters(config)
    reading = parameters * element_size / host.bytes_per_second
    products = 2 * parameters * num_sequences / host.flop_per_second
    return manner.decode_factor * max(reading, products)


def base_bytes(config: DecoderConfig, element_size: int, manner: Manner) -> int:
    """Of the weights in memory. Where the projections are copied into another layout, the embedding stays beside them."""
    projected, embedding = projection_parameters(config), config.vocab_size * config.hidden_size
    copied = (manner.copies - 1) * projected + (embedding if manner.copies > 1 and config.tied else 0)
    return (base_parameters(config) + copied) * element_size


def memory_need(
    config: DecoderConfig,
    element_size: int,
    limit_bytes: int,
    *,
    asked: int | None,
    manner: Manner,
    rank: int,
    threads: int,
) -> MemoryNeed:
    """Of a run on every module. `asked`: tokens per pass instead of the planner's choice; `threads`: that compute."""
    base, compiled = base_bytes(config, element_size, manner), manner is COMPILED
    memory = compiled_pass_memory(config, threads) if compiled else torch_pass_memory(config, element_size)
    refusal = None
    try:
        tokens = make_plan(memory, limit_bytes - base, asked).max_tokens_per_pass
    except InputError as error:
        tokens, refusal = MIN_TOKENS_PER_PASS, str(error)
    return MemoryNeed(
        base_bytes=base,
        adapter_bytes=adapter_layout(config, LoraConfig(rank=rank)).size * BYTES_PER_ADAPTER_PARAMETER,
        decoding_bytes=manner.more_copies * projection_parameters(config) * element_size,
        pass_bytes=memory.of_pass(tokens, memory.recomputed_layers(tokens, pass_budget(limit_bytes - base))),
        pass_tokens=tokens,
        limit_bytes=limit_bytes,
        refusal=refusal,
    )
