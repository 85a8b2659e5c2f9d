"""When a sequence ends, why, and that its ending token is there exactly once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mint.engine.decoder_backend import DecoderBackend
from mint.errors import ClosedError
from mint.types.results import SampledSequence
from tests.support.engine import generate, open_backend, random_prompt, request

PROMPT = random_prompt(12)
LONG = 30


@pytest.fixture(scope="module")
def backend(tiny: Callable[..., Path]) -> DecoderBackend:
    return open_backend(tiny("llama"))


@pytest.fixture(scope="module")
def unstopped(backend: DecoderBackend) -> SampledSequence:
    return _sample(backend)


def _sample(backend: DecoderBackend, **options: Any) -> SampledSequence:
    (generation,) = generate(backend, request(PROMPT, **{"max_new": LONG, "seed": 1, **options}))
    (sequence,) = generation.sequences
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == len(sequence.tokens) > 0
    return sequence


def _assert_cut(found: SampledSequence, whole: SampledSequence, end: int, reason: str) -> None:
    """The same tokens and bits as without a stop, up to and including the one that ended it."""
    assert found.stop_reason == reason
    assert found.tokens == whole.tokens[:end]
    assert found.logprobs == whole.logprobs[:end]


def test_nothing_stops_a_sequence_but_its_length(backend: DecoderBackend, unstopped: SampledSequence) -> None:
    assert unstopped.stop_reason == "length"
    assert len(unstopped.tokens) == LONG
    for max_new in (1, 2, 7):
        _assert_cut(_sample(backend, max_new=max_new), unstopped, max_new, "length")


@pytest.mark.parametrize("position", [0, 1, 11, LONG - 1])
def test_a_stop_token_ends_it_and_is_kept_once(
    backend: DecoderBackend, unstopped: SampledSequence, position: int
) -> None:
    """A first and a last token too; at the last one "stop" wins over "length". Another stop token does nothing."""
    token = unstopped.tokens[position]
    end = unstopped.tokens.index(token) + 1
    never = next(t for t in range(384) if t not in unstopped.tokens)
    found = _sample(backend, stop_tokens=frozenset({token, never}))
    _assert_cut(found, unstopped, end, "stop")
    assert found.tokens.count(token) == 1
    _assert_cut(_sample(backend, stop_tokens=frozenset({never})), unstopped, LONG, "length")


def test_the_models_end_of_text_is_a_stop_token_like_any_other(
    tiny: Callable[..., Path], unstopped: SampledSequence
) -> None:
    """The limits name it; whether it stops is the request's affair."""
    backend = open_backend(tiny("llama"))
    assert backend.limits.eos_token_ids == (381,)
    eos = backend.limits.eos_token_ids[0]
    seeds = (s for s in range(500) if eos in _sample(backend, seed=s, temperature=2.0).tokens)
    seed = next(seeds)
    whole = _sample(backend, seed=seed, temperature=2.0)
    found = _sample(backend, seed=seed, temperature=2.0, stop_tokens=frozenset(backend.limits.eos_token_ids))
    _assert_cut(found, whole, whole.tokens.index(eos) + 1, "stop")
    assert len(whole.tokens) == LONG  # not asked for, it did not stop


class _StopAfter:
    """A stop check that sees every token once, in order, and is satisfied by the `count`-th."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, []

    def __call__(self, token: int) -> bool:
        self.seen.append(token)
        return len(self.seen) == self.count


def test_a_stop_check_sees_every_token_and_ends_its_sequence(
    backend: DecoderBackend, unstopped: SampledSequence
) -> None:
    made: list[_StopAfter] = []

    def new_check() -> _StopAfter:
        made.append(_StopAfter(5 + len(made)))
        return made[-1]

    options = {"max_new": LONG, "seed": 1, "new_stop_check": new_check, "num_samples": 3}
    (generation,) = generate(backend, request(PROMPT, **options))
    assert len(made) == 3
    for i, (sequence, check) in enumerate(zip(generation.sequences, made, strict=True)):
        assert sequence.stop_reason == "stop"
        assert sequence.tokens == check.seen
        assert len(sequence.tokens) == 5 + i
    # fp32: three in a batch may differ from one alone in the last bits of the logprobs, not in the tokens
    assert generation.sequences[0].tokens == unstopped.tokens[:5]


def test_sequences_of_a_request_end_each_for_itself(backend: DecoderBackend) -> None:
    """The request is answered when the last one has ended."""
    given = request(PROMPT, max_new=LONG, num_samples=8, seed=3, stop_tokens=frozenset(range(0, 384, 12)))
    (generation,) = generate(backend, given)
    lengths = {len(sequence.tokens) for sequence in generation.sequences}
    assert len(lengths) > 3
    for sequence in generation.sequences:
        stops = [token for token in sequence.tokens if token % 12 == 0]
        if sequence.stop_reason == "stop":
            assert stops == [sequence.tokens[-1]]
        else:
            assert stops == []
            assert len(sequence.tokens) == LONG


def test_more_sequences_than_fit_at_once_all_get_their_turn(backend: DecoderBackend) -> None:
    requests = [request(PROMPT, max_new=4, num_samples=30, seed=i) for i in range(5)]
    for given, generation in zip(requests, generate(backend, *requests), strict=True):
        assert len(generation.sequences) == 30
        (alone,) = generate(backend, given)
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in generation.sequences]
    assert backend.num_requests == 0


@pytest.mark.parametrize("after", [0, 1, 4])
def test_cancelling_leaves_the_others_as_they_were(
    backend: DecoderBackend, unstopped: SampledSequence, after: int
) -> None:
    """While it waits, right after its prefill, and in the middle; nothing of it is ever answered."""
    kept = backend.add_request(request(PROMPT, max_new=LONG, seed=1))
    gone = backend.add_request(request(random_prompt(20), max_new=LONG, num_samples=2, seed=9))
    for _ in range(after):
        assert backend.step() == []
    backend.cancel(gone)
    assert backend.num_requests == 1
    done = []
    while backend.num_requests:
        done += backend.step()
    assert [generation.request for generation in done] == [kept]
    assert done[0].sequences[0].tokens == unstopped.tokens
    assert done[0].sequences[0].logprobs == pytest.approx(unstopped.logprobs, abs=1e-4)
    backend.cancel(gone)  # twice does no harm


def test_a_closed_backend_takes_no_request(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("llama"))
    backend.close()
    with pytest.raises(ClosedError, match="the base model was unloaded"):
        backend.add_request(request(PROMPT))
