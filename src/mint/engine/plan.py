"""How much one pass may hold and which layers are recomputed: pure functions of sizes and the machine's memory.

The split of a batch decides its bits, so its numbers go into every checkpoint and are reused on resume. Recomputing does
not change bits and is decided anew for every pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from mint.engine.models.attention import QUERY_BLOCK
from mint.engine.models.config import DecoderConfig
from mint.engine.models.head import SOFTMAX_ROWS, rows_per_chunk
from mint.engine.packing import COPIES_PER_TOKEN
from mint.errors import InputError

BEST_TOKENS_PER_PASS = 2048  # larger passes gain no speed on the processors measured, and hold the engine longer
GOOD_TOKENS_PER_PASS = 1024  # smaller ones lose more than recomputing does
MIN_TOKENS_PER_PASS = 256
ONE_DATUM_PER_PASS = 1
# A bf16 product on a processor is compiled for each shape that occurs, and takes so much; seen in resident memory.
KERNEL_BYTES = 600_000
KERNELS_OF_PASS = 36  # for products of all its rows
KERNELS_OF_BLOCK = 7  # for attention's, of a block of query rows
# of the compiled decoder
LEAST_ROWS, MOST_ROWS, CHUNK_VALUES = 32, 256, 2**23  # rows of a chunk of logits, and values
COMPILED_COPIES_PER_TOKEN = 12  # 11 to 19 take as much, by the model's shape
USUAL_RANKS = 48  # of a site, three modules of 16: adapters are not known to the plan
PANEL_BYTES = 192  # for each token and thread, what lies between a product and its rounding
ATTENTION_BYTES_PER_KEY = (
    384  # for each key and thread, the probabilities of 32 query rows and their gradients; and sums
)


def compiled_rows_per_chunk(vocab_size: int) -> int:
    """Rows whose logits the compiled head makes at once."""
    return max(LEAST_ROWS, min(MOST_ROWS, CHUNK_VALUES // vocab_size // 8 * 8))


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
    """What a training pass of a model takes beside the base weights and the runs' adapters, in bytes.

    kept_per_layer: for each token, what backward needs of a layer that is not recomputed, but its input. per_token: for each
    token with every layer recomputed: the layers' inputs, one layer's work, float32 residuals and norms. per_key: for each
    token of the longest datum: attention's scores of one block of query rows, in forward and backward. fixed: whatever the
    length: the logits of a chunk, the softmax of some rows, kernels. per_copy: see `packing.num_copies`;
    copies_per_token: how many count as one, a constant, for it decides how batches are split.
    """

    config: DecoderConfig
    kept_per_layer: int
    per_token: int
    per_key: int
    fixed: int
    per_copy: int
    copies_per_token: int

    def of_pass(self, num_tokens: int, recomputed: int, longest: int | None = None, copies: int = 0) -> int:
        """Of a pass of so many tokens with the activations of `recomputed` layers computed twice. `longest`: tokens of its
        longest datum, by default of its only one; `copies`: beside the tokens, where those that are shared count once."""
        # one layer's activations exist at a time where none of the recomputed ones is kept
        kept = self.config.num_layers - recomputed + (recomputed > 0)
        keys = self.per_key * (num_tokens if longest is None else longest)
        return self.fixed + num_tokens * (self.per_token + kept * self.kept_per_layer) + keys + copies * self.per_copy

    def most_tokens(self, budget: int, recomputed: int) -> int:
        """The longest pass that stays within `budget` bytes."""
        return max((budget - self.fixed) // (self.of_pass(1, recomputed) - self.fixed), 0)

    def recomputed_layers(self, num_tokens: int, budget: int) -> int:
        """The fewest with which the pass stays within `budget` bytes; all where none would do."""
        layers = self.config.num_layers
        return next((n for n in range(layers) if self.of_pass(num_tokens, n) <= budget), layers)


def torch_pass_memory(config: DecoderConfig, element_size: int) -> PassMemory:
    """Of torch's decoder; element_size: bytes of a weight."""
    c, element = config, element_size
    kernel_bytes = KERNEL_BYTES if element == 2 else 0
    raw = c.qkv_size if c.qk_norm else 0
    inputs = (c.num_layers + 1) * c.hidden_size * element
    heads = c.qkv_size + (c.q_size + c.kv_size if c.qk_norm else c.qkv_size)  # raw or normalised, and its gradient
    gathered = 2 * c.qkv_size + c.q_size  # attention's operands and results
    work = (5 * c.intermediate_size + c.q_size + c.qkv_size + heads + gathered + 5 * c.hidden_size) * element
    normed = max(c.hidden_size, c.q_size if c.qk_norm else 0)
    scores = 3 * c.num_heads * QUERY_BLOCK * element
    rows = rows_per_chunk(c.vocab_size)
    chunk = rows * (c.vocab_size * element + 3 * c.hidden_size * 4)
    kept_per_layer = (c.hidden_size + c.qkv_size + raw + c.q_size + 2 * c.intermediate_size) * element
    per_token = inputs + work + (2 * c.hidden_size + 2 * normed) * 4
    return PassMemory(
        config,
        kept_per_layer=kept_per_layer,
        per_token=per_token,
        per_key=scores + KERNELS_OF_BLOCK * kernel_bytes // QUERY_BLOCK,
        fixed=chunk + SOFTMAX_ROWS * c.vocab_size * 4 + KERNELS_OF_PASS * kernel_bytes,
        per_copy=(per_token + kept_per_layer) // COPIES_PER_TOKEN,
        copies_per_token=COPIES_PER_TOKEN,
    )


def compiled_pass_memory(config: DecoderConfig, num_threads: int) -> PassMemory:
    """Of the compiled decoder (kernels/decoder.py, kernels/head.py): bf16 activations, float32 where sums are held."""
    c = config
    inputs = (c.num_layers + 1) * c.hidden_size * 2
    raw = 0 if c.qk_norm else c.qkv_size * 2
    forward = raw + c.hidden_size * 2 + 2 * c.kv_size * 2 + c.intermediate_size * 2
    grads = (
        (2 * c.intermediate_size + c.hidden_size + c.q_size + c.qkv_size + c.kv_size) * 2
        + c.q_size * 4
        + 2 * c.q_size * 2
    )
    residuals = (
        2 * c.hidden_size * 2 + 5 * c.hidden_size * 4
    )  # normed rows and their gradient; float32 norms and gradients
    low_rank = 16 * USUAL_RANKS
    panels = num_threads * PANEL_BYTES
    per_token = inputs + forward + grads + residuals + low_rank + panels
    rows = compiled_rows_per_chunk(c.vocab_size)
    return PassMemory(
        config,
        kept_per_layer=(
            c.hidden_size + c.qkv_size + (c.qkv_size if c.qk_norm else 0) + c.q_size + 2 * c.intermediate_size
        )
        * 2,
        per_token=per_token,
        per_key=num_threads * (ATTENTION_BYTES_PER_KEY + 8 * c.head_dim),
        fixed=rows * (c.vocab_size * 6 + c.hidden_size * 6),
        per_copy=2 * c.q_size * 2 + 3 * c.kv_size * 2,  # what heads add to a position, and its packed keys and values
        copies_per_token=COMPILED_COPIES_PER_TOKEN,
    )


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
