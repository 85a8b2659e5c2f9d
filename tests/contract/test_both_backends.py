"""What every Backend promises, asked of MinT's own decoder and of transformers; and that the two agree on one model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mint
from mint import types
from mint.engine.backend import Backend
from mint.engine.decoder_backend import DecoderBackend
from mint.engine.hf.backend import HfBackend
from tests.support.clients import (
    GUARD,
    LEARNING,
    VOCAB_SIZE,
    Embedded,
    batch,
    datum,
    embedded,
    logprobs,
    prompt,
    same_weights,
    tokens,
    train,
)
from tests.support.engine import (
    FP32_GRADIENT,
    FP32_LOGPROB,
    add_random_run,
    drain,
    flatten,
    forward,
    forward_backward,
    generate,
    gradient,
    largest_difference,
    open_backend,
    open_hf,
    parameters,
    part,
    policy_datums,
    relative_error,
    request,
    set_tensors,
    weighted_datums,
    write_variant,
)
from tests.support.tiny_models import write_tiny_model

KINDS = ("decoder", "hf")
OPEN = {"decoder": open_backend, "hf": open_hf}
FREE = types.SamplingParams(seed=7, max_tokens=12, stop=[])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(mint_home: Path, kind: str) -> Iterator[Embedded]:
    with embedded(mint_home, backend=kind) as made:
        yield made


@pytest.fixture
def backend(kind: str, tiny_model: str) -> Backend:
    return OPEN[kind](Path(tiny_model))


# training


def test_the_setting_decides_and_the_answer_says_so(
    world: Embedded, run: mint.TrainingClient, kind: str, tiny_model: str
) -> None:
    loaded = world.backends[0]()
    assert isinstance(loaded, {"decoder": DecoderBackend, "hf": HfBackend}[kind])
    info = run.get_info()
    assert info.backend == loaded.limits.backend == {"decoder": "decoder", "hf": "transformers"}[kind]
    assert (info.model_data.arch, info.device, info.dtype) == ("Qwen3ForCausalLM", "cpu", "float32")
    assert len(info.lora_modules) == 15 and info.lora_modules[-1] == "lm_head"
    assert info.num_parameters == flatten(world.state(run).tensors).numel()
    models = {model.model_name: model for model in world.client().get_server_capabilities().supported_models}
    assert (models[tiny_model].backend, models[tiny_model].max_context_length) == (info.backend, 512)
    assert (models["SmolLM2-135M-Instruct"].backend, models["SmolLM2-135M-Instruct"].trainable) == (None, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_has_the_bits_of_forward_backward(kind: str, tiny_model: str, dtype: str) -> None:
    backend = OPEN[kind](Path(tiny_model), dtype)
    add_random_run(backend, "run", types.LoraConfig(rank=4))
    data = weighted_datums(np.random.default_rng(0), (5, 70, 1))
    before = parameters(backend, "run")
    scored, trained = forward(backend, "run", data), forward_backward(backend, "run", data)
    assert all(np.array_equal(a, b) for a, b in zip(scored.logprobs, trained.logprobs, strict=True))
    assert scored.metrics == trained.metrics
    assert gradient(backend, "run").any() and torch.equal(parameters(backend, "run"), before)


def test_gradients_add_up_until_the_step(backend: Backend) -> None:
    add_random_run(backend, "run", types.LoraConfig(rank=4))
    data = weighted_datums(np.random.default_rng(1), (9, 40, 3))
    forward_backward(backend, "run", data)
    whole = gradient(backend, "run")
    backend.discard_gradient("run")
    assert not gradient(backend, "run").any()
    for one in data:
        forward_backward(backend, "run", [one])
        forward(backend, "run", data)  # adds nothing
    assert relative_error(gradient(backend, "run"), whole) <= FP32_GRADIENT
    backend.optim_step("run", LEARNING)
    assert not gradient(backend, "run").any()
    assert backend.optim_step("run", LEARNING)["no_gradient"] == 1.0


def test_optim_step_is_torchs_adamw(backend: Backend) -> None:
    hyper = types.AdamParams(learning_rate=3e-3, beta1=0.8, beta2=0.99, eps=1e-3, weight_decay=0.3, grad_clip_norm=20.0)
    add_random_run(backend, "run", types.LoraConfig(rank=4))
    theirs = parameters(backend, "run").requires_grad_()
    options = {"lr": hyper.learning_rate, "eps": hyper.eps, "weight_decay": hyper.weight_decay}
    adamw = torch.optim.AdamW([theirs], betas=(hyper.beta1, hyper.beta2), **options)
    for step in range(4):
        forward_backward(backend, "run", weighted_datums(np.random.default_rng(step), (20, 6)))
        theirs.grad = gradient(backend, "run")
        norm = torch.nn.utils.clip_grad_norm_([theirs], hyper.grad_clip_norm)
        metrics = backend.optim_step("run", hyper)
        adamw.step()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    # float32 against float64: four roundings of 6e-8 of weights up to 1
    torch.testing.assert_close(parameters(backend, "run"), theirs.detach(), rtol=0, atol=1e-6)


def test_a_loss_of_the_callers_own_has_the_gradient_of_the_built_in_one(backend: Backend) -> None:
    add_random_run(backend, "run", types.LoraConfig(rank=4))
    data = weighted_datums(np.random.default_rng(2), (9, 30))
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in data]
    built_in = forward_backward(backend, "run", data)
    expected = gradient(backend, "run")
    backend.discard_gradient("run")

    def loss(logprobs: Any) -> tuple[Any, dict[str, float]]:
        return -sum((w * p).sum() for w, p in zip(weights, logprobs, strict=True)), {"mine": 3.0}

    result = drain(backend.forward_backward_custom(part("run", data), loss))
    assert result.error is None
    assert largest_difference(result.logprobs, built_in.logprobs) <= FP32_LOGPROB
    assert relative_error(gradient(backend, "run"), expected) <= FP32_GRADIENT
    assert result.metrics["mine"] == 3.0
    assert result.metrics["loss:sum"] == pytest.approx(built_in.metrics["loss:sum"], rel=1e-5)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(mint_home: Path, kind: str, tiny_model: str) -> None:
    with embedded(mint_home, backend=kind) as world:
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        train(run, 2)
        path = run.save_state("middle").result(GUARD).path
        seen, final = train(run, 2, first=2), world.state(run)
    with embedded(mint_home, backend=kind) as world:
        resumed = world.client().create_training_client_from_state_with_optimizer(path)
        assert np.array_equal(train(resumed, 2, first=2), seen)
        assert same_weights(world.state(resumed), final)


def test_runs_on_one_base_do_not_touch_each_other(world: Embedded, tiny_model: str) -> None:
    client = world.client()
    idle = client.create_lora_training_client(tiny_model, rank=4, seed=0)
    busy = client.create_lora_training_client(tiny_model, rank=2, seed=1, train_attn=False)
    train(idle, 1)
    idle.forward_backward(batch(5)).result(GUARD)
    before, scored = world.state(idle), logprobs(idle.forward(batch(6)).result(GUARD))
    with world.held():
        joined = idle.forward(batch(6)), busy.forward(batch(6))  # one pass
    together = [logprobs(future.result(GUARD)) for future in joined]
    train(busy, 2)
    assert same_weights(world.state(idle), before)
    assert np.array_equal(logprobs(idle.forward(batch(6)).result(GUARD)), scored)
    np.testing.assert_allclose(together[0], scored, atol=FP32_LOGPROB)
    assert abs(together[1] - scored).max() > 0.01
    assert idle.optim_step(LEARNING).result(GUARD).metrics["grad_norm"] > 0  # its gradient waited for it


def test_errors_leave_the_run_usable(world: Embedded, run: mint.TrainingClient) -> None:
    train(run, 1)
    before = world.state(run)
    ids = [1, 2, VOCAB_SIZE]
    outside = types.Datum(
        model_input=types.ModelInput.from_ints(ids), loss_fn_inputs={"target_tokens": [1, 2, 3], "weights": [1.0] * 3}
    )
    with pytest.raises(mint.InputError, match=r"data\[0\]: token id 384 is outside the model's vocabulary of 384"):
        run.forward([outside]).result(GUARD)
    with pytest.raises(mint.InputError, match=r"data\[1\]: 513 tokens; the context allows 512\. Shorten or drop it"):
        run.forward_backward([datum(), datum(1, 513)]).result(GUARD)
    with pytest.raises(mint.OperationError, match="optim_step refused"):
        run.optim_step(LEARNING).result(GUARD)
    huge = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"target_tokens": [2, 3], "logprobs": [-1e30, -1.0], "advantages": [1.0, 1.0]},
    )
    with pytest.raises(mint.NumericsError, match=r"importance_sampling: the loss is .* not a finite number"):
        run.forward_backward([huge], "importance_sampling").result(GUARD)
    with pytest.raises(ZeroDivisionError):
        run.forward_backward_custom(batch(), lambda data, p: 1 / 0).result(GUARD)
    with pytest.raises(mint.OperationError, match="optim_step refused"):
        run.optim_step(LEARNING).result(GUARD)
    assert same_weights(world.state(run), before)
    train(run, 1)
    assert not same_weights(world.state(run), before)


# sampling


@pytest.fixture
def sampler(run: mint.TrainingClient) -> mint.SamplingClient:
    train(run, 2)
    return run.save_weights_and_get_sampling_client()


def test_sampled_logprobs_are_those_of_forward(run: mint.TrainingClient, sampler: mint.SamplingClient) -> None:
    given = prompt()
    answer = sampler.sample(given, 2, FREE, True, 3, 2).result(GUARD)
    for sequence in answer.sequences:
        ids = [*given.to_ints(), *sequence.tokens]
        whole = types.Datum(
            model_input=types.ModelInput.from_ints(ids[:-1]),
            loss_fn_inputs={"target_tokens": ids[1:], "weights": [0.0] * (len(ids) - 1)},
        )
        scored = logprobs(run.forward([whole]).result(GUARD))
        prompt_part, new_part = np.split(scored, [given.length - 1])
        np.testing.assert_allclose(np.array(answer.prompt_logprobs[1:], float), prompt_part, atol=FP32_LOGPROB)
        np.testing.assert_allclose(np.array(sequence.logprobs, float), new_part, atol=FP32_LOGPROB)
        for token, value, likeliest in zip(sequence.tokens, new_part, sequence.topk_logprobs or [], strict=True):
            assert likeliest is not None and len(likeliest) == 2 and likeliest[0][1] >= likeliest[1][1]
            assert dict(likeliest).get(token, value) == pytest.approx(value, abs=FP32_LOGPROB)
    rows = answer.topk_prompt_logprobs or []
    assert rows[0] is None and [len(row) for row in rows[1:] if row] == [3] * (given.length - 1)


def test_sample_i_of_a_seed_depends_on_nothing_else(sampler: mint.SamplingClient) -> None:
    three = sampler.sample(prompt(), 3, FREE).result(GUARD).sequences
    neighbours = [sampler.sample(prompt(seed), 2, FREE) for seed in (1, 2)]
    (one,) = sampler.sample(prompt(), 1, FREE).result(GUARD).sequences
    other = sampler.sample(prompt(), 1, FREE.model_copy(update={"seed": 8})).result(GUARD).sequences[0]
    assert all(len(future.result(GUARD).sequences) == 2 for future in neighbours)
    assert one.tokens == three[0].tokens != other.tokens
    np.testing.assert_allclose(np.array(one.logprobs), np.array(three[0].logprobs), atol=FP32_LOGPROB)
    assert len({tuple(sequence.tokens) for sequence in three}) == 3


def test_stop_tokens_and_strings_end_a_sequence(sampler: mint.SamplingClient) -> None:
    (free,) = sampler.sample(prompt(), 1, FREE).result(GUARD).sequences
    assert (free.stop_reason, len(free.tokens)) == ("length", 12)
    last = next(i for i, token in enumerate(free.tokens) if i >= 3 and token not in free.tokens[:i])
    stopping = FREE.model_copy(update={"stop": [free.tokens[last]]})
    (stopped,) = sampler.sample(prompt(), 1, stopping).result(GUARD).sequences
    assert (stopped.stop_reason, stopped.tokens) == ("stop", free.tokens[: last + 1])
    text = sampler.get_tokenizer().decode(free.tokens[: last + 1])
    (stopped,) = sampler.sample(prompt(), 1, FREE.model_copy(update={"stop": text})).result(GUARD).sequences
    assert (stopped.stop_reason, stopped.tokens) == ("stop", free.tokens[: last + 1])


def test_a_snapshot_stays_while_training_goes_on(run: mint.TrainingClient, sampler: mint.SamplingClient) -> None:
    before = sampler.compute_logprobs(prompt()).result(GUARD)
    train(run, 1)
    assert sampler.compute_logprobs(prompt()).result(GUARD) == before
    after = run.save_weights_and_get_sampling_client().compute_logprobs(prompt()).result(GUARD)
    assert abs(np.array(after[1:], float) - np.array(before[1:], float)).max() > 0.01


def test_a_cancelled_request_is_gone_and_the_others_end(backend: Backend) -> None:
    given = [request(tokens(seed, 5), max_new=6, seed=seed) for seed in range(3)]
    expected = generate(backend, given[0])[0].sequences
    numbers = [backend.add_request(one) for one in given]
    backend.step()
    backend.cancel(numbers[1])
    backend.cancel(numbers[1])  # twice is allowed
    done = []
    while backend.num_requests:
        done += backend.step()
    assert [generation.request for generation in done] == [numbers[0], numbers[2]]
    assert done[0].sequences[0].tokens == expected[0].tokens


def test_a_closed_backend_and_a_dropped_adapter_take_no_requests(backend: Backend) -> None:
    backend.add_run("run", types.LoraConfig(rank=1), 0)
    handle = backend.snapshot("run")
    backend.add_request(request([1, 2], adapter=handle, max_new=2))
    backend.drop_snapshot(handle)  # in use: the request keeps it
    with pytest.raises(mint.ClosedError, match="the sampling session was closed before this sample began"):
        backend.add_request(request([1, 2], adapter=handle))
    assert len(generate(backend)) == 0 and backend.num_requests == 0
    backend.close()
    with pytest.raises(mint.ClosedError, match="the base model was unloaded"):
        backend.add_request(request([1, 2]))


# agreement


@pytest.mark.parametrize("family", ["qwen3", "llama"], ids=["tied", "untied"])
def test_the_two_agree_on_logprobs_and_gradients(tmp_path: Path, family: Any) -> None:
    folder = write_tiny_model(tmp_path / family, family, tokenizer=False)
    decoder, hf = open_backend(folder), open_hf(folder)
    assert decoder.limits.eos_token_ids == hf.limits.eos_token_ids
    assert (decoder.limits.vocab_size, decoder.limits.max_context) == (hf.limits.vocab_size, hf.limits.max_context)
    tensors = add_random_run(decoder, "run", types.LoraConfig(rank=4))
    hf.add_run("run", types.LoraConfig(rank=4), seed=1)
    set_tensors(hf, "run", tensors)
    data = weighted_datums(np.random.default_rng(3), (5, 60, 17))
    rewarded = policy_datums(np.random.default_rng(4), data, forward(decoder, "run", data).logprobs)
    for given, loss_fn in ((data, "cross_entropy"), (rewarded, "importance_sampling"), (rewarded, "ppo")):
        one, other = (forward_backward(backend, "run", given, loss_fn) for backend in (decoder, hf))
        assert largest_difference(one.logprobs, other.logprobs) <= FP32_LOGPROB
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)
        assert relative_error(gradient(hf, "run"), gradient(decoder, "run")) <= FP32_GRADIENT


def test_several_targets_per_position_agree(tiny_model: str) -> None:
    generator = np.random.default_rng(5)
    ids, targets = generator.integers(0, VOCAB_SIZE, 9), generator.integers(0, VOCAB_SIZE, (9, 3))
    targets[2, 1] = targets[2, 0]  # the same token twice in a row
    given = types.Datum(
        model_input=types.ModelInput.from_ints(ids),
        loss_fn_inputs={"target_tokens": targets, "weights": generator.standard_normal((9, 3))},
    )
    results = []
    for backend in (open_backend(Path(tiny_model)), open_hf(Path(tiny_model))):
        add_random_run(backend, "run", types.LoraConfig(rank=4))
        results.append((forward_backward(backend, "run", [given]).logprobs, gradient(backend, "run")))
    assert results[0][0][0].shape == (9, 3)
    assert largest_difference(results[1][0], results[0][0]) <= FP32_LOGPROB
    assert relative_error(results[1][1], results[0][1]) <= FP32_GRADIENT


def test_a_seed_makes_the_same_adapter(tiny_model: str) -> None:
    lora = types.LoraConfig(rank=4)
    decoder, hf = open_backend(Path(tiny_model)), open_hf(Path(tiny_model))
    reports = [backend.add_run("run", lora, seed=9) for backend in (decoder, hf)]
    assert reports[0].modules == reports[1].modules and reports[0].num_parameters == reports[1].num_parameters
    assert same_weights(decoder.export_state("run"), hf.export_state("run"))


@pytest.mark.parametrize("first", KINDS)
def test_a_checkpoint_of_one_goes_on_in_the_other(mint_home: Path, tiny_model: str, first: str) -> None:
    (second,) = set(KINDS) - {first}
    with embedded(mint_home, backend=first) as world:
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        train(run, 2)
        path, saved = run.save_state("a").result(GUARD).path, world.state(run)
        scored = logprobs(run.forward(batch(9)).result(GUARD))
    with embedded(mint_home, backend=second) as world:
        resumed = world.client().create_training_client_from_state_with_optimizer(path)
        assert same_weights(world.state(resumed), saved)
        np.testing.assert_allclose(logprobs(resumed.forward(batch(9)).result(GUARD)), scored, atol=FP32_LOGPROB)
        sampler = world.client().create_sampling_client(path)
        assert len(sampler.sample(prompt(), 1, FREE).result(GUARD).sequences[0].tokens) == 12
        train(resumed, 1)


# which of the two


def test_what_the_decoder_does_not_cover_runs_through_transformers(
    mint_home: Path, tiny_model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gelu = write_variant(tmp_path / "gelu", "llama", hidden_act="gelu")
    caplog.set_level(logging.INFO, "mint")
    with embedded(mint_home) as world:
        client = world.client()
        assert client.create_lora_training_client(tiny_model, rank=1).get_info().backend == "decoder"
        assert "through transformers" not in caplog.text
        assert client.create_lora_training_client(str(gelu), rank=1).get_info().backend == "transformers"
    said = (
        "LlamaForCausalLM: run through transformers (no speed claimed): MinT's own decoder does not cover hidden_act "
    )
    assert f"{said}'gelu'; covered: silu" in caplog.messages
    caplog.clear()
    with embedded(mint_home, backend="hf") as world:
        world.client().create_lora_training_client(tiny_model, rank=1)
    assert "Qwen3ForCausalLM: run through transformers (no speed claimed): MINT_BACKEND=hf" in caplog.messages
    refused = pytest.raises(mint.UnsupportedError, match="MinT's own decoder does not cover hidden_act 'gelu'")
    with embedded(mint_home, backend="decoder") as world, refused:
        world.client().create_lora_training_client(str(gelu), rank=1)
