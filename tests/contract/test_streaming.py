"""Tokens as they come: the same as all at once, and whoever leaves ends the generation."""

from __future__ import annotations

import pytest

import mint
from mint import types
from tests.support.clients import GUARD, Embedded, prompt


def test_a_stream_gives_the_tokens_that_sample_gives(client: mint.ServiceClient, tiny_model: str) -> None:
    sampler = client.create_sampling_client(base_model=tiny_model)
    for params in (
        types.SamplingParams(max_tokens=20, seed=5),
        types.SamplingParams(max_tokens=20, seed=6, stop=["e"]),
        types.SamplingParams(max_tokens=1, temperature=0.0),
    ):
        expected = sampler.sample(prompt(), 1, params).result(GUARD).sequences[0].tokens
        assert list(sampler.stream(prompt(), params)) == expected


def test_leaving_a_stream_ends_its_generation(world: Embedded, client: mint.ServiceClient, tiny_model: str) -> None:
    sampler = client.create_sampling_client(base_model=tiny_model)
    stream = sampler.stream(prompt(), types.SamplingParams(max_tokens=400, seed=1, stop=[]))
    first = [next(stream) for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]  # a generator
    session = world.core.samplers[sampler._sampling_session_id]
    world.settle()
    after = sampler.sample(prompt(), 1, types.SamplingParams(max_tokens=3, seed=1, stop=[])).result(GUARD)
    assert after.sequences[0].tokens == first
    assert session.backend.num_requests == 0  # 400 tokens would still be under way


def test_what_a_stream_cannot_take_is_raised_at_once_or_when_it_is_read(
    client: mint.ServiceClient, tiny_model: str
) -> None:
    sampler = client.create_sampling_client(base_model=tiny_model)
    with pytest.raises(mint.InputError, match="prompt: it is empty"):
        sampler.stream(types.ModelInput.empty())
    with pytest.raises(mint.InputError, match="outside the model's vocabulary of 384"):
        list(sampler.stream(types.ModelInput.from_ints([9999])))
