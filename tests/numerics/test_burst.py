"""Many requests at once: each is answered as if it were alone, what is held stays bounded, and nobody waits for long."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mint import types
from mint.engine import decoder_backend
from mint.engine.backend import GenerateRequest, Generation
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.device import memory_limit
from mint.engine.hf.backend import HfBackend
from mint.engine.sampling import sampler
from mint.engine.sampling.cache import position_bytes, prompt_capacity
from mint.engine.sampling.grouping import PREFILL_CHUNK
from mint.engine.sampling.sampler import MAX_SEQUENCES, PREFILLS_PER_STEP
from mint.engine.sampling.slabs import STEP, slab_capacity
from mint.engine.sampling.torch_passes import TorchPasses
from tests.support.engine import add_random_run, generate, open_backend, open_hf, random_prompt, request

LORAS = (types.LoraConfig(rank=4), types.LoraConfig(rank=7, train_attn=False))
FREE_SLOTS = 4  # a slab has fewer than so many slots for each that is taken


@pytest.fixture
def bounded(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., DecoderBackend]:
    """A tiny model in bf16 whose sequences may use so many positions, and known prefixes so many chunks."""

    def make(positions: int, chunks: int = 0, **shape: int) -> DecoderBackend:
        limit = memory_limit(torch.device("cpu"))
        each = 256  # bytes of a position: 2 layers, keys and values of 2 heads of 16 numbers in bf16
        monkeypatch.setattr(decoder_backend, "SEQUENCES_SHARE", (positions * each + 0.5) / limit)
        monkeypatch.setattr(decoder_backend, "PREFIX_CACHE_SHARE", (chunks * PREFILL_CHUNK * each + 0.5) / limit)
        backend = open_backend(tiny("llama", **shape), "bfloat16")
        assert position_bytes(backend._trainer.decoder.config, torch.bfloat16) == each
        return backend

    return make


def used_positions(backend: DecoderBackend) -> int:
    """By growing sequences and by the prompt that has begun."""
    sampler = backend._sampler
    prompt = sampler._prefilling.cache.num_bytes() if sampler._prefilling is not None else 0
    assert (prompt + sampler._caches.used_bytes()) % 256 == 0
    return (prompt + sampler._caches.used_bytes()) // 256


def tensor_bytes() -> int:
    """Of all tensors that are alive, packed weights aside."""
    gc.collect()
    found = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    return sum(tensor.nbytes for tensor in found if tensor.layout == torch.strided)


def burst(adapters: list[int | None], count: int) -> list[GenerateRequest]:
    """Prompts of 5 to 300 tokens, every fifth with one of two beginnings that fill a chunk; 1 to 3 samples."""
    chance = random.Random(0)
    requests = []
    for i in range(count):
        shared = random_prompt(PREFILL_CHUNK, seed=chance.randrange(2)) if i % 5 == 0 else []
        prompt = [*shared, *random_prompt(chance.randint(5, 300 - len(shared)), seed=i)]
        options: dict[str, Any] = {"max_new": chance.randint(1, 12), "num_samples": chance.randint(1, 3), "seed": i}
        requests.append(request(prompt, adapter=chance.choice(adapters), **options))
    return requests


def largest(given: GenerateRequest) -> int:
    """Positions that a request takes at most: its prompt's and its sequences'."""
    length = len(given.prompt)
    return prompt_capacity(length) + given.num_samples * slab_capacity(length + given.max_new - 2)


def test_a_thousand_requests_are_answered_within_bounds_as_if_each_were_alone(
    bounded: Callable[..., DecoderBackend],
) -> None:
    positions, chunks = 20 * 3 * STEP, 24
    backend = bounded(positions, chunks)
    for name, lora in zip("ab", LORAS, strict=True):
        add_random_run(backend, name, lora)
    requests = burst([None, backend.snapshot("a"), backend.snapshot("b")], 1000)
    generate(backend, request(random_prompt(5)))  # so that weights are packed and kernels examined
    before = tensor_bytes()
    numbers = {backend.add_request(given): given for given in requests}
    assert tensor_bytes() == before  # who waits holds its tokens only
    chance = random.Random(1)
    cancelled = set(chance.sample(sorted(numbers), 20))
    for number in cancelled:
        backend.cancel(number)
    assert backend.num_requests == 980
    one = max(map(largest, requests))
    done: dict[int, Generation] = {}
    peak = most = 0
    while backend.num_requests:
        for generation in backend.step():
            assert generation.request not in done
            done[generation.request] = generation
        if len(cancelled) < 40 and (running := [*backend._sampler._growing, *_begun(backend)]):
            cancelled.add(gone := chance.choice(running))
            backend.cancel(gone)
        used = used_positions(backend)
        peak, most = max(peak, used), max(most, _num_growing(backend))
        assert used <= positions + one
        held = backend._sampler.num_bytes()
        assert held <= 256 * (FREE_SLOTS * (positions + one) + chunks * PREFILL_CHUNK)
    assert positions // 2 < peak
    assert 10 < most < MAX_SEQUENCES  # it was the bytes that bounded them
    assert done.keys() | cancelled == numbers.keys() and not done.keys() & cancelled
    for number, generation in done.items():
        assert [len(s.tokens) for s in generation.sequences] == [numbers[number].max_new] * numbers[number].num_samples
    assert sum(generation.cached_tokens for generation in done.values()) > 100 * PREFILL_CHUNK
    assert backend._sampler.num_bytes() == backend._sampler._prefixes.num_bytes() == 256 * chunks * PREFILL_CHUNK
    for number in chance.sample(sorted(done), 25):
        (alone,) = generate(backend, numbers[number])
        assert alone.sequences == done[number].sequences  # floats: equal means every bit


def _begun(backend: DecoderBackend) -> list[int]:
    begun = backend._sampler._prefilling
    return [begun.request.number] if begun is not None else []


def _num_growing(backend: DecoderBackend) -> int:
    return sum(len(growing.unfinished()) for growing in backend._sampler._growing.values())


def test_nothing_is_held_when_every_request_was_cancelled(bounded: Callable[..., DecoderBackend]) -> None:
    """Some wait, one prompt has begun, others grow."""
    backend = bounded(1000 * STEP)
    numbers = [backend.add_request(request(random_prompt(300, seed=i), num_samples=2)) for i in range(40)]
    while not (_begun(backend) and _num_growing(backend)):
        backend.step()
    assert backend._sampler._waiting and backend._sampler.num_bytes() > 0
    for number in numbers:
        backend.cancel(number)
    assert backend.num_requests == backend._sampler.num_bytes() == 0
    assert backend.step() == []


def test_sequences_pause_where_there_is_no_room_and_lose_nothing(bounded: Callable[..., DecoderBackend]) -> None:
    """Eight begin where there is room for the first slabs of eight; each in the end needs that of three."""
    requests = [request(random_prompt(10 + i), max_new=2 * STEP + 20, seed=i) for i in range(12)]
    expected = [generation.sequences for generation in generate(bounded(1000 * STEP), *requests)]
    backend = bounded(9 * STEP)
    numbers = [backend.add_request(given) for given in requests]
    found: dict[int, Any] = {}
    paused = 0
    while backend.num_requests:
        growing = {g.request.number: len(g.sequences[0].tokens) for g in backend._sampler._growing.values()}
        places = [g.sequences[0].cache for g in backend._sampler._growing.values()]
        num_full = sum(place.length == place.slab.capacity for place in places)
        waiting = len(backend._sampler._waiting)
        done = backend.step()
        if len(backend._sampler._waiting) < waiting:  # nobody begins in room that those who grow need
            assert used_positions(backend) + num_full * STEP <= 9 * STEP
        found |= {generation.request: generation.sequences for generation in done}
        after = {g.request.number: len(g.sequences[0].tokens) for g in backend._sampler._growing.values()}
        if growing and growing.keys() == after.keys() and growing != after:
            assert after[min(after)] == growing[min(after)] + 1  # the oldest never pauses
            paused += sum(after[number] == growing[number] for number in growing)
        assert used_positions(backend) <= (9 + 2) * STEP  # two more for the oldest
    assert paused > 100
    assert [found[number] for number in numbers] == expected


def test_newcomers_take_only_room_that_nobody_growing_needs(bounded: Callable[..., DecoderBackend]) -> None:
    """Four sequences need a slab's step each; there is room for three, or for a newcomer, who waits until they have ended."""
    backend = bounded(7 * STEP)
    old = [backend.add_request(request(random_prompt(STEP - 1, seed=i), max_new=6, seed=i)) for i in range(4)]
    while _num_tokens(backend) != [2, 2, 2, 2]:
        backend.step()
    new = backend.add_request(request(random_prompt(STEP - 1), max_new=1))
    assert backend.step() == []
    assert _num_tokens(backend) == [3, 3, 3, 2]
    order = [generation.request for generation in _answers(backend, 5)]
    assert order == [*old[:3], new, old[3]]


def test_a_prompt_that_has_begun_keeps_the_room_for_its_sequences(bounded: Callable[..., DecoderBackend]) -> None:
    """Four sequences fill their slabs while a prompt of ten passes begins: three of them pause until its sequence ends."""
    short = [request(random_prompt(STEP - 1, seed=i), max_new=9, seed=i) for i in range(4)]
    long = request(random_prompt(20 * STEP - 10), max_new=2)
    expected = [g.sequences for g in generate(bounded(1000 * STEP, context=4096), *short, long)]
    backend = bounded((4 + 2 * 20) * STEP, context=4096)
    numbers = [backend.add_request(given) for given in short]
    while _num_tokens(backend) != [1, 1, 1, 1]:
        backend.step()
    numbers.append(backend.add_request(long))
    found: dict[int, Any] = {}
    seen = []
    while backend.num_requests:
        found |= {generation.request: generation.sequences for generation in backend.step()}
        if _begun(backend):
            seen.append([s.cache.slab.capacity for g in backend._sampler._growing.values() for s in g.sequences])
    assert seen[0] == [STEP] * 4
    assert seen[-1] == [2 * STEP, STEP, STEP, STEP]
    assert [found[number] for number in numbers] == expected


def test_one_request_that_is_larger_than_the_bound_runs_alone(bounded: Callable[..., DecoderBackend]) -> None:
    given = request(random_prompt(300), num_samples=80, max_new=3)
    (expected,) = generate(bounded(1000 * STEP), given)
    backend = bounded(1)
    first, large, last = (backend.add_request(g) for g in (request(random_prompt(9)), given, request(random_prompt(8))))
    order, together = [], set()
    while backend.num_requests:
        for generation in backend.step():
            order.append(generation.request)
            if generation.request == large:
                assert generation.sequences == expected.sequences
        together.add(len(backend._sampler._growing) + len(_begun(backend)))
    assert order == [first, large, last]
    assert together == {0, 1}


def test_running_sequences_go_on_while_long_prompts_wait(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend(tiny("llama"), "bfloat16")
    given = request(random_prompt(20), max_new=60)
    (alone,) = generate(backend, given)
    running = backend.add_request(given)
    backend.step()
    passes = []
    prefill = backend._sampler._prefill
    monkeypatch.setattr(backend._sampler, "_prefill", lambda chunks: (passes.append(len(chunks)), prefill(chunks)))
    (sequence,) = backend._sampler._growing[running].sequences
    for i in range(50):
        backend.add_request(request(random_prompt(450, seed=i), max_new=2))
    waits, done = [0], []
    while running not in (generation.request for generation in done):
        had, made = len(sequence.tokens), len(passes)
        done += backend.step()
        assert (len(sequence.tokens) - had, len(passes) - made) in ((1, 0), (0, 1))
        if len(sequence.tokens) > had:
            waits.append(0)
        else:
            waits[-1] += 1
    assert max(waits) == waits[0] == PREFILLS_PER_STEP
    assert sum(waits) == -(-50 * 450 // PREFILL_CHUNK)  # all the prompts, and every pass is full
    assert done[-1].sequences == alone.sequences


@pytest.mark.parametrize("opened", [open_backend, open_hf], ids=["decoder", "hf"])
def test_a_request_waits_for_one_of_each_other_tenant_at_most(
    tiny: Callable[..., Path], opened: Callable[[Path], DecoderBackend | HfBackend]
) -> None:
    """Requests that can only run one by one, of a tenant with twenty and of two with one each."""
    backend = opened(tiny("llama"))
    given = request(random_prompt(9), num_samples=MAX_SEQUENCES, max_new=2)
    many = [backend.add_request(replace(given, tenant="many")) for _ in range(20)]
    begun = backend.step()
    one, other = (backend.add_request(replace(given, tenant=tenant)) for tenant in ("one", "other"))
    done = [generation.request for generation in [*begun, *_answers(backend, 22 - len(begun))]]
    assert done == [many[0], many[1], one, other, *many[2:]]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_requests_that_wait_make_no_step_longer(tiny: Callable[..., Path], kind: str) -> None:
    """Counted in bytecodes of the sampler's own modules, which do not depend on the machine."""
    assert len({_bytecodes(open_backend(tiny("llama")), num_waiting, kind) for num_waiting in (60, 600)}) == 1


def _bytecodes(backend: DecoderBackend, num_waiting: int, kind: str) -> int:
    """Of two decode steps, or of two prefill passes, beside so many waiting requests."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(sampling):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sampling = str(Path(sampler.__file__).parent)
    backend.add_request(request(random_prompt(20), num_samples=MAX_SEQUENCES // 2, max_new=50))
    for i in range(num_waiting):
        samples = MAX_SEQUENCES if kind == "decode" else 1
        backend.add_request(request(random_prompt(PREFILL_CHUNK + 100 + i % 7, seed=i), num_samples=samples))
    backend.step()
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        backend.step()
        backend.step()
    finally:
        sys.settrace(before)
    assert (backend._sampler._prefills > 0) == (kind == "prefill")
    assert len(backend._sampler._waiting) == num_waiting - (kind == "prefill")
    return count


def test_a_new_snapshot_is_used_at_once_and_changes_nothing_for_others(tiny: Callable[..., Path]) -> None:
    backend = open_backend(tiny("qwen3"), "bfloat16")
    add_random_run(backend, "old", LORAS[0])
    old = backend.snapshot("old")
    others = [request(random_prompt(30 + i), adapter=old if i % 2 else None, seed=i) for i in range(6)]
    expected = [generation.sequences for generation in generate(backend, *others)]
    again = [backend.add_request(given) for given in others]
    while min(_num_tokens(backend), default=0) < 5 or len(_num_tokens(backend)) < 6:
        assert backend.step() == []
    before = _num_tokens(backend)
    add_random_run(backend, "new", LORAS[1], seed=5)
    new = backend.add_request(request(random_prompt(40), adapter=backend.snapshot("new"), max_new=1, num_topk=20))
    assert _num_tokens(backend) == before
    (first,) = backend.step()  # the very next one
    assert first.request == new
    answers = {g.request: g.sequences for g in _answers(backend, 6)}
    assert [answers[number] for number in again] == expected
    fresh = open_backend(tiny("qwen3"), "bfloat16")
    add_random_run(fresh, "new", LORAS[1], seed=5)
    (alone,) = generate(fresh, request(random_prompt(40), adapter=fresh.snapshot("new"), max_new=1, num_topk=20))
    assert first.sequences == alone.sequences
    (base,) = generate(fresh, request(random_prompt(40), max_new=1, num_topk=20))
    assert base.sequences != alone.sequences


def _num_tokens(backend: DecoderBackend) -> list[int]:
    return [len(s.tokens) for growing in backend._sampler._growing.values() for s in growing.sequences]


def _answers(backend: DecoderBackend | HfBackend, count: int) -> list[Generation]:
    """As they come."""
    done: list[Generation] = []
    while len(done) < count:
        done += backend.step()
    return done


def test_no_pass_has_more_rows_than_were_examined(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts of many adapters: each adapter's rows are filled up by themselves."""
    backend = open_backend(tiny("llama"), "bfloat16", kernels="torch")
    add_random_run(backend, "run", LORAS[0])
    adapters = [None, *(backend.snapshot("run") for _ in range(19))]
    requests = [request(random_prompt(5, seed=i), adapter=adapters[i % 20], max_new=2, seed=i) for i in range(60)]
    alone = [generate(backend, given)[0].sequences for given in requests]
    rows = []
    passes = backend._sampler._passes
    assert isinstance(passes, TorchPasses)
    decoder = passes._decoder
    forward = decoder.forward
    monkeypatch.setattr(
        decoder, "forward", lambda row, *a, **k: (rows.append(len(row.tokens_T)), forward(row, *a, **k))[1]
    )
    assert [generation.sequences for generation in generate(backend, *requests)] == alone
    assert max(rows) == PREFILL_CHUNK
