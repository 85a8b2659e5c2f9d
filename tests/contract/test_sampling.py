"""What `sample` and `compute_logprobs` answer: lengths, stops, seeds, logprobs; and stop strings by themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mint
from mint import types
from mint.local.stop import new_stop_check
from tests.support.clients import CONTEXT, GUARD, VOCAB_SIZE, Embedded, embedded, logprobs, prompt, tokens, train

FREE = {"seed": 7, "max_tokens": 24, "stop": []}
END_OF_TEXT = VOCAB_SIZE - 3  # of the tiny model


@pytest.fixture
def sampler(run: mint.TrainingClient) -> mint.SamplingClient:
    train(run, 2)
    return run.save_weights_and_get_sampling_client()


def sampled(sampler: mint.SamplingClient, num_samples: int = 1, **params: object) -> list[types.SampledSequence]:
    return sampler.sample(prompt(), num_samples, types.SamplingParams(**params)).result(GUARD).sequences  # type: ignore[arg-type]


def test_every_sequence_has_a_logprob_for_every_token(sampler: mint.SamplingClient) -> None:
    sequences = sampled(sampler, 3, **FREE)
    assert len(sequences) == 3
    for sequence in sequences:
        assert len(sequence.tokens) == 24 == len(sequence.logprobs or []) and sequence.stop_reason == "length"
        assert all(0 <= token < VOCAB_SIZE for token in sequence.tokens)
        assert all(value <= 0 for value in sequence.logprobs or [])
        assert sequence.topk_logprobs is None
    assert len({tuple(sequence.tokens) for sequence in sequences}) == 3


def test_a_seed_repeats_its_samples_and_none_does_not(sampler: mint.SamplingClient) -> None:
    assert sampled(sampler, 2, **FREE) == sampled(sampler, 2, **FREE)
    assert sampled(sampler, 1, **FREE) != sampled(sampler, 1, **FREE | {"seed": 8})
    assert sampled(sampler, 1, **FREE | {"seed": None}) != sampled(sampler, 1, **FREE | {"seed": None})
    assert sampled(sampler, 1, **FREE | {"seed": -(2**63)}) == sampled(sampler, 1, **FREE | {"seed": -(2**63)})


def test_temperature_zero_is_greedy_and_its_logprobs_are_at_temperature_one(sampler: mint.SamplingClient) -> None:
    greedy, other = (sampled(sampler, 1, **FREE | {"seed": s, "temperature": 0.0}) for s in (1, 2))
    assert greedy == other
    text = types.ModelInput.from_ints([*prompt().to_ints(), *greedy[0].tokens])
    scored = sampler.compute_logprobs(text).result(GUARD)[prompt().length :]
    np.testing.assert_allclose(np.array(scored, float), greedy[0].logprobs, atol=1e-4)


def test_logprobs_of_a_prompt_are_those_of_forward(run: mint.TrainingClient, sampler: mint.SamplingClient) -> None:
    ids = tokens(3, 21)
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result(GUARD)
    assert scored[0] is None
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]),
        loss_fn_inputs={"target_tokens": ids[1:], "weights": [1.0] * 20},
    )
    np.testing.assert_allclose(np.array(scored[1:], float), logprobs(run.forward([datum]).result(GUARD)), atol=1e-4)


def test_prompt_logprobs_and_likeliest_tokens_come_when_asked_for(sampler: mint.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=3, seed=0, stop=[])
    plain = sampler.sample(prompt(), 1, params).result(GUARD)
    assert plain.prompt_logprobs is None and plain.topk_prompt_logprobs is None and plain.prompt_cache_hit_tokens == 0
    full = sampler.sample(prompt(), 1, params, True, 4, 2).result(GUARD)
    assert full.sequences[0].tokens == plain.sequences[0].tokens
    assert full.prompt_logprobs == sampler.compute_logprobs(prompt()).result(GUARD)
    rows = full.topk_prompt_logprobs or []
    assert len(rows) == prompt().length and rows[0] is None
    for token, value, row in zip(prompt().to_ints()[1:], full.prompt_logprobs[1:], rows[1:], strict=True):
        assert row is not None and len(row) == 4
        assert [v for _, v in row] == sorted((v for _, v in row), reverse=True)
        assert value is not None and value <= row[0][1] + 1e-6
        assert dict(row).get(token, value) == pytest.approx(value, abs=1e-5)
    chosen = full.sequences[0].topk_logprobs or []
    assert [len(row or []) for row in chosen] == [2, 2, 2]
    only = sampler.sample(prompt(), 1, params, topk_prompt_logprobs=1).result(GUARD)
    assert only.prompt_logprobs is None and [len(row or []) for row in only.topk_prompt_logprobs or []] == [
        0,
        1,
        1,
        1,
        1,
        1,
    ]


def test_a_stop_token_ends_the_sequence_and_is_included_once(sampler: mint.SamplingClient) -> None:
    (free,) = sampled(sampler, **FREE)
    at = next(i for i in range(3, 24) if free.tokens[i] not in free.tokens[:i])
    for given_stop in ({"stop": [free.tokens[at]]}, {"stop_token_ids": [free.tokens[at]]}):
        (stopped,) = sampled(sampler, **FREE | given_stop)
        assert (stopped.tokens, stopped.stop_reason) == (free.tokens[: at + 1], "stop")
        assert len(stopped.logprobs or []) == at + 1


def test_end_of_text_stops_unless_nothing_may(sampler: mint.SamplingClient) -> None:
    params = {"max_tokens": 100, "stop": []}
    seed, free = next(
        (s, q) for s in range(200) for q in sampled(sampler, **params, seed=s) if END_OF_TEXT in q.tokens[:-1]
    )
    assert free.stop_reason == "length" and len(free.tokens) == 100
    end = free.tokens.index(END_OF_TEXT) + 1
    for stop in (None, [VOCAB_SIZE - 1], "never in the text"):
        (stopped,) = sampled(sampler, max_tokens=100, seed=seed, stop=stop)
        assert stopped.tokens[:end] == free.tokens[: min(end, len(stopped.tokens))]
        assert stopped.stop_reason == "stop" and len(stopped.tokens) <= end


def test_a_stop_string_ends_the_sequence_with_the_token_that_completes_it(sampler: mint.SamplingClient) -> None:
    (free,) = sampled(sampler, **FREE)
    tokenizer = sampler.get_tokenizer()
    texts = [tokenizer.decode(free.tokens[: i + 1]) for i in range(24)]
    wanted = texts[9][len(texts[5]) - 1 :]  # begins inside one token and ends with another
    first = next(i for i, text in enumerate(texts) if wanted in text)
    for stop in (wanted, ["not this", wanted]):
        (stopped,) = sampled(sampler, **FREE | {"stop": stop})
        assert (stopped.tokens, stopped.stop_reason) == (free.tokens[: first + 1], "stop")


def test_without_max_tokens_the_context_is_filled(sampler: mint.SamplingClient) -> None:
    params = types.SamplingParams(stop=[], seed=0)
    (sequence,) = sampler.sample(prompt(length=CONTEXT - 5), 1, params).result(GUARD).sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (5, "length")
    assert len(sampled(sampler, **FREE | {"max_tokens": 1})[0].tokens) == 1


def test_common_prompts_are_found_in_the_cache_and_change_nothing(
    world: Embedded, sampler: mint.SamplingClient
) -> None:
    params = types.SamplingParams(**FREE)  # type: ignore[arg-type]
    first, again = (sampler.sample(prompt(length=400), 2, params).result(GUARD) for _ in range(2))
    assert first.prompt_cache_hit_tokens == 0 < again.prompt_cache_hit_tokens < 400
    assert again.sequences == first.sequences


def test_samples_of_the_base_model_are_those_of_an_untrained_run(client: mint.ServiceClient, tiny_model: str) -> None:
    fresh = client.create_lora_training_client(tiny_model, rank=4).save_weights_and_get_sampling_client()
    base = client.create_sampling_client(base_model=tiny_model)
    assert sampled(base, 2, **FREE) == sampled(fresh, 2, **FREE)
    assert base.get_base_model() == tiny_model == fresh.get_base_model()


def test_a_thousand_samples_asked_for_at_once_are_all_answered(mint_home: Path, tiny_model: str) -> None:
    """While the run trains and is sampled anew; in bf16, where company changes no bit."""
    with embedded(mint_home, dtype="bfloat16") as world:
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        train(run, 1)
        sampler = run.save_weights_and_get_sampling_client()
        params = types.SamplingParams(max_tokens=4, seed=0, stop=[])
        asked = [(prompt(i, 5 + 7 * i % 60), 1 + i % 2, params) for i in range(1000)]
        alone = {i: sampler.sample(*asked[i]).result(GUARD).sequences for i in range(0, 1000, 100)}
        futures = [sampler.sample(*one) for one in asked]
        train(run, 2)
        late = run.save_weights_and_get_sampling_client().sample(*asked[0]).result(GUARD).sequences
        answers = [future.result(GUARD).sequences for future in futures]
        assert [[len(s.tokens) for s in sequences] for sequences in answers] == [[4] * n for _, n, _ in asked]
        assert {i: answers[i] for i in alone} == alone
        assert late != alone[0]


PIECES = st.lists(st.sampled_from(["a", "b", "ab", "ba", " ", "é", "\n", "aab"]), max_size=25)


@settings(deadline=None, max_examples=100)
@given(PIECES, st.lists(st.text("ab \n", min_size=1, max_size=6), min_size=1, max_size=3))
def test_a_stop_string_is_seen_at_the_first_token_that_completes_it(pieces: list[str], stops: list[str]) -> None:
    check = new_stop_check(tuple(stops), lambda ids: "".join(pieces[i] for i in ids))
    for end in range(len(pieces)):
        text = "".join(pieces[: end + 1])
        found = any(stop in text for stop in stops)
        assert check(end) == found
        if found:
            break


def test_each_sequence_has_a_check_of_its_own() -> None:
    one, other = (new_stop_check(("ab",), lambda ids: "".join("ab"[i] for i in ids)) for _ in range(2))
    assert [one(0), other(1), one(1), other(0), other(1)] == [False, False, True, False, True]
