"""How much one pass may hold and which layers are recomputed: pure functions of sizes and the machine's memory.

The split of a batch decides its bits, so its numbers go into every checkpoint and are reused on resume. Recomputing does
not change bits and is decided anew for every pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from mint.engine.models.attention import QUERY_BLOCK
from mint.engine.models.config import DecoderConfig
from mint.engine.models.head import SOFTMAX_ROWS, rows_per_chunk
from mint.errors import InputError

BEST_TOKENS_PER_PASS = 2048  # larger passes gain no speed on the processors measured, and hold the engine longer
GOOD_TOKENS_PER_PASS = 1024  # smaller ones lose more than recomputing does
MIN_TOKENS_PER_PASS = 256
ONE_DATUM_PER_PASS = 1
# A bf16 product on a processor is compiled for each shape that occurs, and takes so much; seen in resident memory.
KERNEL_BYTES = 600_000
KERNELS_OF_PASS = 36  # for products of all its rows
KERNELS_OF_BLOCK = 7  # for attention's, of a block of query rows


@dataclass(frozen=True, slots=True)
class Plan:
    """max_tokens_per_pass: datums are packed up to it, as packing.py counts them. max_tokens: what memory allows; a longer
    datum is refused.

    A datum longer than a pass goes alone. So passes of 1 token have every datum go alone, and its numbers, shapes of products
    included, depend on no other: the batch-invariant mode.
    """

    max_tokens_per_pass: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PassMemory:
    """What a training pass of a model takes beside the base weights and the runs' adapters, in bytes."""

    config: DecoderConfig
    element_size: int

    @property
    def kept_per_layer(self) -> int:
        """For each token, what backward needs of a layer that is not recomputed, but its input."""
        c = self.config
        raw = c.qkv_size if c.qk_norm else 0
        return (c.hidden_size + c.qkv_size + raw + c.q_size + 2 * c.intermediate_size) * self.element_size

    @property
    def per_token(self) -> int:
        """For each token with every layer recomputed: the layers' inputs, one layer's work, float32 residuals and norms."""
        c, element = self.config, self.element_size
        inputs = (c.num_layers + 1) * c.hidden_size * element
        heads = c.qkv_size + (c.q_size + c.kv_size if c.qk_norm else c.qkv_size)  # raw or normalised, and its gradient
        gathered = 2 * c.qkv_size + c.q_size  # attention's operands and results
        work = (5 * c.intermediate_size + c.q_size + c.qkv_size + heads + gathered + 5 * c.hidden_size) * element
        normed = max(c.hidden_size, c.q_size if c.qk_norm else 0)
        return inputs + work + (2 * c.hidden_size + 2 * normed) * 4

    @property
    def per_key(self) -> int:
        """For each token of the longest datum: attention's scores of one block of query rows, in forward and backward."""
        scores = 3 * self.config.num_heads * QUERY_BLOCK * self.element_size
        return scores + self._kernels(KERNELS_OF_BLOCK) // QUERY_BLOCK

    def _kernels(self, count: int) -> int:
        return count * KERNEL_BYTES if self.element_size == 2 else 0

    @property
    def fixed(self) -> int:
        """Whatever the length: the logits of a chunk, the float32 softmax of some rows, kernels."""
        c, rows = self.config, rows_per_chunk(self.config.vocab_size)
        chunk = rows * (c.vocab_size * self.element_size + 3 * c.hidden_size * 4)
        return chunk + SOFTMAX_ROWS * c.vocab_size * 4 + self._kernels(KERNELS_OF_PASS)

    def of_pass(self, num_tokens: int, recomputed: int, longest: int | None = None) -> int:
        """Of a pass of so many tokens with the activations of `recomputed` layers computed twice. `longest`: tokens of its
        longest datum, by default of its only one."""
        # one layer's activations exist at a time where none of the recomputed ones is kept
        kept = self.config.num_layers - recomputed + (recomputed > 0)
        keys = self.per_key * (num_tokens if longest is None else longest)
        return self.fixed + num_tokens * (self.per_token + kept * self.kept_per_layer) + keys

    def most_tokens(self, budget: int, recomputed: int) -> int:
        """The longest pass that stays within `budget` bytes."""
        return max((budget - self.fixed) // (self.of_pass(1, recomputed) - self.fixed), 0)

    def recomputed_layers(self, num_tokens: int, budget: int) -> int:
        """The fewest with which the pass stays within `budget` bytes; all where none would do."""
        layers = self.config.num_layers
        return next((n for n in range(layers) if self.of_pass(num_tokens, n) <= budget), layers)


def pass_budget(free_bytes: int) -> int:
    """Of the machine's (or cgroup's) memory less the base model, what one pass may take; a quarter is left to the caller."""
    return free_bytes * 3 // 4


def make_plan(memory: PassMemory, free_bytes: int, asked: int | None = None) -> Plan:
    """`free_bytes`: the machine's (or cgroup's) memory limit less the base. `asked` overrides the tokens per pass.

    Where memory is short passes are made smaller first, down to GOOD_TOKENS_PER_PASS, then layers are recomputed. Raises
    InputError where not even a small pass fits.
    """
    budget, layers = pass_budget(free_bytes), memory.config.num_layers
    most = min(memory.most_tokens(budget, layers), memory.config.max_context)
    refuse_small(most, free_bytes, memory.config.max_context)
    cheap = memory.most_tokens(budget, recomputed=0)
    per_pass = asked or min(max(cheap, GOOD_TOKENS_PER_PASS), BEST_TOKENS_PER_PASS)
    return Plan(min(per_pass, max(memory.most_tokens(budget, layers), 1)), most)


def refuse_small(most: int, free_bytes: int, max_context: int) -> None:
    """Raises InputError where `most` tokens in a pass are too few to train with."""
    if most < min(MIN_TOKENS_PER_PASS, max_context):
        raise InputError(
            f"memory: {free_bytes / 2**30:.1f} GiB beside the base model hold a training pass of {max(most, 0)} tokens; "
            f"at least {MIN_TOKENS_PER_PASS} are needed. Take a smaller base model or a machine with more memory"
        )
