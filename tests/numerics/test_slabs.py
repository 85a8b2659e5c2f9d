"""Caches of growing sequences: whatever starts, grows, moves and ends, each keeps its own keys and values, and a step's
attention over a slab is the formula's."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mint.engine.models.config import DecoderConfig
from mint.engine.models.weights import read_config
from mint.engine.sampling.cache import SequenceCache
from mint.engine.sampling.slabs import STEP, GrowingCaches, Place, SlabAttention

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny: Callable[..., Path]) -> DecoderConfig:
    return read_config(tiny("llama"))


def prompt_of(config: DecoderConfig, length: int) -> SequenceCache:
    cache = SequenceCache(config, length, torch.float32, CPU)
    cache.extend(torch.randn(config.num_layers, 2, config.num_kv_heads, length, config.head_dim))
    return cache


def attended(q_KGE: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.einsum("kge,kne->kgn", q_KGE.double(), keys.double()) * q_KGE.shape[-1] ** -0.5
    return torch.einsum("kgn,kne->kge", scores.softmax(-1), values.double())


@pytest.mark.parametrize("seed", range(3))
def test_sequences_keep_their_own_whatever_the_others_do(config: DecoderConfig, seed: int) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    caches = GrowingCaches(config, torch.float32, CPU)
    expected: dict[int, tuple[Place, Tensor]] = {}  # number -> its place, and [L, 2, K, length, E]
    num_kv, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    for number in range(150):
        if len(expected) < 12 and chance.random() < 0.5:
            prompt = prompt_of(config, chance.choice([1, STEP - 2, STEP - 1, STEP, 2 * STEP - 1]))
            for i in range(chance.randint(1, 3)):
                expected[10 * number + i] = (caches.start(prompt), prompt.kv[:, :, :, : prompt.length].clone())
        if expected and chance.random() < 0.3:
            caches.remove(expected.pop(chance.choice(list(expected)))[0])
        # some of them take a step, in any order of rows, with rows of padding between
        stepping = chance.sample(list(expected), chance.randint(0, len(expected)))
        if not stepping:
            continue
        rows = chance.sample(range(len(stepping) + 2), len(stepping)) if chance.random() < 0.5 else range(len(stepping))
        count = max(rows) + 1
        by_slab: dict[int, list[tuple[int, Place]]] = {}
        for row, key in zip(rows, stepping, strict=True):
            place = expected[key][0]
            caches.make_room(place)
            by_slab.setdefault(place.slab.capacity, []).append((row, place))
        new = torch.randn(config.num_layers, 2, num_kv, count, config.head_dim)
        q, out = (torch.zeros(count, num_kv, group, config.head_dim) for _ in range(2))
        new_of_layer = torch.empty_like(new[0])
        parts = [SlabAttention(members, q, new_of_layer, out) for members in by_slab.values()]
        for layer in range(config.num_layers):
            q.normal_()
            new_of_layer.copy_(new[layer])
            for part in parts:
                part(layer)
            for row, key in zip(rows, stepping, strict=True):
                whole = torch.cat([expected[key][1][layer], new[layer][:, :, row, None]], 2)
                torch.testing.assert_close(out[row].double(), attended(q[row], *whole), rtol=1e-5, atol=1e-5)
        for row, key in zip(rows, stepping, strict=True):
            place, kept = expected[key]
            place.length += 1
            expected[key] = (place, torch.cat([kept, new[:, :, :, row, None]], 3))
        places = [place for place, _ in expected.values()]
        assert caches.used_bytes() == sum(place.slab.kv[:, :, place.slot].nbytes for place in places)
        assert caches.num_bytes() == sum(slab.kv.nbytes for slab in {id(p.slab): p.slab for p in places}.values())
        assert caches.used_bytes() <= caches.num_bytes() <= 4 * caches.used_bytes()
        for place, kept in expected.values():
            assert place.slab.places[place.slot] is place
            assert torch.equal(place.slab.kv[:, :, place.slot, :, : place.length], kept)
    for place, _ in expected.values():
        caches.remove(place)
    assert caches.num_bytes() == caches.used_bytes() == 0
    assert not any(place.slab.kv.nbytes for place, _ in expected.values())  # memory went with them


def test_slots_follow_the_number_of_sequences(config: DecoderConfig) -> None:
    caches = GrowingCaches(config, torch.float32, CPU)
    prompt = prompt_of(config, 5)
    places = [caches.start(prompt) for _ in range(64)]
    (slab,) = caches._slabs.values()
    assert slab.kv.shape[2] == 64
    for place in places[:-1]:
        caches.remove(place)
        assert slab.kv.shape[2] < 4 * max(1, len(slab.places)) + 1
    assert torch.equal(slab.kv[:, :, 0, :, :5], prompt.kv[:, :, :, :5])


def test_a_sequence_that_overflowed_leaves_nothing_to_the_next(config: DecoderConfig) -> None:
    caches = GrowingCaches(config, torch.float32, CPU)
    broken, sound = prompt_of(config, 100), prompt_of(config, 5)
    broken.kv.fill_(float("nan"))
    kept = caches.start(sound)  # so that the slab stays
    caches.remove(caches.start(broken))
    place = caches.start(sound)
    assert place.slab is kept.slab
    assert place.slab.kv[:, :, place.slot].isfinite().all()
