"""How much one pass may hold, and which datums share one: pure functions of lengths, sizes and the machine's memory.

The numbers chosen here go into every checkpoint and are reused on resume, because the split of a batch decides its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mint.engine.models.attention import QUERY_BLOCK
from mint.engine.models.config import DecoderConfig
from mint.engine.models.decoder import activation_width
from mint.engine.models.head import CHUNK_VALUES, SOFTMAX_ROWS, rows_per_chunk
from mint.errors import InputError

BEST_TOKENS_PER_PASS = 2048  # larger passes gain no speed on the processors measured, and hold the engine longer
MIN_TOKENS_PER_PASS = 256
KERNEL_CACHE_BYTES = 64 * 2**20  # compiled kernels, one for each shape that occurs


@dataclass(frozen=True, slots=True)
class Plan:
    """max_tokens_per_pass: datums are packed up to it. max_tokens: what memory allows; a longer datum is refused."""

    max_tokens_per_pass: int
    max_tokens: int


def bytes_per_token(config: DecoderConfig, element_size: int) -> int:
    """What grows with a pass: activations per layer, one layer's gradients, float32 residual work, attention scratch."""
    kept = config.num_layers * activation_width(config) * element_size
    scratch = (4 * config.intermediate_size + 3 * config.qkv_size + 8 * config.hidden_size) * element_size
    float32_work = 24 * config.hidden_size + 8 * config.intermediate_size
    attention = 3 * config.num_heads * QUERY_BLOCK * element_size  # of one block of query rows, per key
    return kept + scratch + float32_work + attention


def fixed_bytes(config: DecoderConfig, element_size: int) -> int:
    """What one pass needs whatever its length: the logits of a chunk, its float32 softmax, the unembedding gradient."""
    chunk = max(CHUNK_VALUES, rows_per_chunk(config.vocab_size) * config.vocab_size) * element_size
    return chunk + SOFTMAX_ROWS * config.vocab_size * 4 * 3 + KERNEL_CACHE_BYTES


def make_plan(config: DecoderConfig, element_size: int, free_bytes: int, asked: int | None = None) -> Plan:
    """`free_bytes`: the machine's (or cgroup's) memory limit less the base; a quarter is left to the caller.

    `asked` overrides the tokens per pass. Raises InputError where not even a small pass fits.
    """
    usable = free_bytes * 3 // 4 - fixed_bytes(config, element_size)
    most = min(usable // bytes_per_token(config, element_size), config.max_context)
    refuse_small(most, free_bytes, config.max_context)
    per_pass = asked or BEST_TOKENS_PER_PASS
    return Plan(min(per_pass, max(usable // bytes_per_token(config, element_size), 1)), most)


def refuse_small(most: int, free_bytes: int, max_context: int) -> None:
    """Raises InputError where `most` tokens in a pass are too few to train with."""
    if most < min(MIN_TOKENS_PER_PASS, max_context):
        raise InputError(
            f"memory: {free_bytes / 2**30:.1f} GiB beside the base model hold a training pass of {max(most, 0)} tokens; "
            f"at least {MIN_TOKENS_PER_PASS} are needed. Take a smaller base model or a machine with more memory"
        )


def split_into_passes(lengths: Sequence[int], max_tokens: int) -> list[range]:
    """Consecutive datums per pass, at most `max_tokens` each; a longer datum goes alone.

    The number of passes is the fewest that filling in order allows; then, unless some datum is longer than a pass, the
    cap is lowered while that number holds, so that passes are filled evenly.
    """

    def fill(cap: int) -> list[range]:
        passes, start, total = [], 0, 0
        for i, length in enumerate(lengths):
            if i > start and total + length > cap:
                passes.append(range(start, i))
                start, total = i, 0
            total += length
        passes.append(range(start, len(lengths)))
        return passes

    best = fill(max_tokens)
    low, high = max(max(lengths), -(-sum(lengths) // len(best))), max_tokens
    while low < high:  # the smallest cap with the same number of passes
        middle = (low + high) // 2
        if len(fill(middle)) == len(best):
            high = middle
        else:
            low = middle + 1
    return fill(high)
