"""Traps between datums and weights: company in a pass, sums and means, order of the data, the optimizer, sampling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import mint
from mint import types
from mint.chat import conversation_to_datums, get_renderer
from mint.data import Batches, Cursor
from tests.support.clients import batch, checkpoint_folder, embedded, logprobs
from tests.traps.reading import plain_ids, reference_logprobs
from tests.unit.chat.conversations import HELLO, THREE_TURNS, TWO_TURNS, chat

MAX = 500
CHATS = [HELLO, TWO_TURNS, chat("a?", "Yes."), THREE_TURNS, chat("Count.", "1 2 3 4 5 6 7 8 9"), chat("b", "No, " * 20)]


@pytest.fixture
def chats(run: mint.TrainingClient) -> list[types.Datum]:
    """Ten datums or so of very different lengths."""
    renderer = get_renderer(run.get_tokenizer())
    return [datum for messages in CHATS for datum in conversation_to_datums(messages, renderer, MAX)]


def gradient_norm(run: mint.TrainingClient, *calls: list[types.Datum]) -> float:
    """Of the sum of the calls' gradients; the weights stay as they are."""
    for data in calls:
        run.forward_backward(data)
    metrics = run.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics
    assert metrics is not None
    return metrics["grad_norm"]


def weighted(datum: types.Datum, factor: float) -> types.Datum:
    weights = factor * datum.loss_fn_inputs["weights"].to_numpy()
    return types.Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "weights": weights})


def test_trap_09_packed_conversations_do_not_see_each_other(
    run: mint.TrainingClient, tiny_model: str, chats: list[types.Datum]
) -> None:
    """Every logprob of one pass is that of its conversation alone: no padding, no neighbour, positions from zero."""
    output = run.forward(chats).result()
    for datum, scored in zip(chats, output.loss_fn_outputs, strict=True):
        targets = np.array(datum.loss_fn_inputs["target_tokens"])
        alone = reference_logprobs(tiny_model, datum.model_input.to_ints())[np.arange(len(targets)), targets]
        np.testing.assert_allclose(scored["logprobs"].to_numpy(), alone, atol=1e-4)


def test_trap_10_losses_are_sums(run: mint.TrainingClient, chats: list[types.Datum]) -> None:
    """Nothing is divided by a number of tokens, rows or weights, so weights may have any sum, a negative one too."""
    one, two = chats[0], chats[1]
    output = run.forward([one, two]).result()
    weights = np.concatenate([np.array(datum.loss_fn_inputs["weights"]) for datum in (one, two)])
    assert output.metrics["loss:sum"] == pytest.approx(-float(weights @ logprobs(output)), rel=1e-5)
    negative = run.forward([weighted(one, -1.0)]).result().metrics["loss:sum"]
    assert negative == pytest.approx(-run.forward([one]).result().metrics["loss:sum"], rel=1e-6)
    norm = gradient_norm(run, [one])
    assert gradient_norm(run, [one, one]) == pytest.approx(2 * norm, rel=1e-4)
    for factor in (0.25, -3.0):
        assert gradient_norm(run, [weighted(one, factor)]) == pytest.approx(abs(factor) * norm, rel=1e-4)
    assert gradient_norm(run, [one, weighted(one, -1.0)]) <= 1e-4 * norm


@pytest.mark.parametrize("calls", [1, 2, 4, 7])
def test_trap_12_micro_batches_change_nothing(run: mint.TrainingClient, chats: list[types.Datum], calls: int) -> None:
    """However a batch is cut into calls, the gradient is that of the whole."""
    parts = [chats[first::calls] for first in range(calls)]
    assert sum(map(len, parts)) == len(chats) and all(parts)
    whole, split = gradient_norm(run, chats), gradient_norm(run, *parts)
    assert split == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("cap", [16, 4096])
def test_trap_12_the_size_of_a_pass_changes_nothing(
    tiny_model: str, mint_home: Path, chats: list[types.Datum], run: mint.TrainingClient, cap: int
) -> None:
    with embedded(mint_home, max_tokens_per_pass=cap) as world:
        other = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        assert gradient_norm(other, chats) == pytest.approx(gradient_norm(run, chats), rel=1e-5)
        np.testing.assert_allclose(
            logprobs(other.forward(chats).result()), logprobs(run.forward(chats).result()), atol=1e-4
        )


def test_trap_13_order_wraparound_and_resume() -> None:
    """No row twice in a batch or an epoch, another order each epoch, and a resumed stream is the uninterrupted one."""
    rows = list(range(10))
    batches: Batches[int] = Batches(rows, 4, seed=3)
    taken, cursors = [], []
    for _ in range(12):
        cursors.append(batches.cursor.to_json())
        taken.append(next(batches))
    assert all(len(set(found)) == 4 for found in taken)
    epochs = [taken[i] + taken[i + 1] for i in range(0, 12, 2)]  # two of four rows sit an epoch out
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert set().union(*epochs) == set(rows)
    for step, cursor in enumerate(cursors):
        resumed: Batches[int] = Batches(rows, 4, seed=3, cursor=Cursor.from_json(cursor))
        assert [next(resumed) for _ in range(12 - step)] == taken[step:]


def test_trap_23_the_sampler_stops_where_training_ends_a_turn(service: mint.ServiceClient, tiny_model: str) -> None:
    """A base model that hardly ever ends a turn learns to; the sampler stops there, and the answer is parsed clean."""
    run = service.create_lora_training_client(tiny_model, rank=8, seed=0)
    renderer = get_renderer(run.get_tokenizer())
    messages = chat("Say hi.", "Hi there!")
    data = conversation_to_datums(messages, renderer, MAX)
    prompt = types.ModelInput.from_ints(renderer.prompt(messages[:1]))
    params = types.SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=renderer.stop_token_ids)

    def sampled() -> types.SampledSequence:
        return run.save_weights_and_get_sampling_client().sample(prompt, 1, params).result().sequences[0]

    before = sampled()
    assert before.stop_reason == "length" and len(before.tokens) == 12
    assert (renderer.parse(before.tokens).finished, renderer.parse(before.tokens).ended) == (False, "cut_off")
    for _ in range(30):
        run.forward_backward(data)
        run.optim_step(types.AdamParams(learning_rate=1e-2))
    after = sampled()
    assert after.stop_reason == "stop"
    assert after.tokens == [*plain_ids(run.get_tokenizer(), "Hi there!"), renderer.stop_token_ids[0]]
    answer = renderer.parse(after.tokens)
    assert (answer.content, answer.finished, answer.ended) == ("Hi there!", True, "end_of_turn")
    assert answer.message == messages[1]


def test_trap_23_end_of_text_ends_an_answer_too(run: mint.TrainingClient) -> None:
    tokenizer = run.get_tokenizer()
    renderer = get_renderer(tokenizer)
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end_of_text in renderer.stop_token_ids
    answer = renderer.parse([*plain_ids(tokenizer, "Yes."), end_of_text])
    assert (answer.content, answer.finished, answer.ended) == ("Yes.", True, "end_of_text")


def test_trap_24_one_sample_at_temperature_one_is_no_greedy_one(run: mint.TrainingClient, tiny_model: str) -> None:
    """Single samples follow the softmax, and their logprobs are the model's own at whatever temperature."""
    prompt = get_renderer(run.get_tokenizer()).prompt(HELLO[:1])
    logprobs_V = reference_logprobs(tiny_model, prompt)[-1]
    client = run.save_weights_and_get_sampling_client()

    def drawn(count: int, temperature: float) -> list[types.SampledSequence]:
        futures = [
            client.sample(
                types.ModelInput.from_ints(prompt),
                1,
                types.SamplingParams(max_tokens=1, temperature=temperature, seed=seed),
            )
            for seed in range(count)
        ]
        return [future.result().sequences[0] for future in futures]

    for temperature in (1.0, 0.5):
        sequences = drawn(200, temperature)
        tokens = np.array([sequence.tokens[0] for sequence in sequences])
        scaled = np.exp(logprobs_V / temperature)
        p = scaled / scaled.sum()
        likeliest = int(p.argmax())
        share, expected = (tokens == likeliest).mean(), p[likeliest]
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / len(tokens))
        assert len(set(tokens.tolist())) > 1 and expected < 0.9
        given = np.array([sequence.logprobs[0] for sequence in sequences if sequence.logprobs])
        np.testing.assert_allclose(given, logprobs_V[tokens], atol=1e-4)
    assert {sequence.tokens[0] for sequence in drawn(5, 0.0)} == {int(logprobs_V.argmax())}


def test_trap_25_a_tied_unembedding_is_trained_beside_the_embedding(
    service: mint.ServiceClient, tiny_model: str, mint_home: Path
) -> None:
    """The adapter sits on lm_head's output: what it learns is saved under lm_head, and the shared matrix keeps its bits."""
    run = service.create_lora_training_client(tiny_model, rank=4, seed=0, train_mlp=False, train_attn=False)
    base = service.create_sampling_client(base_model=tiny_model)
    prompt = types.ModelInput.from_ints(list(range(40, 60)))
    base_before = base.compute_logprobs(prompt).result()
    own_before = logprobs(run.forward(batch(9)).result())
    for step in range(3):
        run.forward_backward(batch(step))
        run.optim_step(types.AdamParams(learning_rate=1e-2))
    assert np.abs(logprobs(run.forward(batch(9)).result()) - own_before).max() > 0.05
    assert base.compute_logprobs(prompt).result() == base_before
    assert run.get_info().lora_modules == ["lm_head"]
    saved = load_file(checkpoint_folder(mint_home, run.save_state("tied").result().path) / "adapter_model.safetensors")
    assert {name.split("lora_")[0] for name in saved} == {"base_model.model.lm_head."}
    assert all(np.any(tensor) for tensor in saved.values())


def test_trap_26_no_dropout(run: mint.TrainingClient, chats: list[types.Datum]) -> None:
    """Forward passes are bit-equal, before and after training has begun, and to the one that training makes."""
    run.forward_backward(chats)
    run.optim_step(types.AdamParams(learning_rate=1e-2))
    outputs = [run.forward(chats).result(), run.forward_backward(chats).result(), run.forward(chats).result()]
    first = logprobs(outputs[0])
    assert all(np.array_equal(logprobs(output), first) for output in outputs)


def test_trap_27_adam_has_the_protocol_s_defaults_and_float32_moments(tiny_model: str, mint_home: Path) -> None:
    """Seen from outside, and against torch.optim.AdamW with those values.

    A second step without a gradient moves every value by the same share of the first one, which only the betas decide; with
    a gradient as small as here, an eps of 1e-8 would make the first step far smaller than the learning rate.
    """
    with embedded(mint_home) as world:
        run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
        (datum,) = batch(0, 1)
        first = world.state(run).tensors
        norms = []
        for factor in (1e-6, 0.0):
            run.forward_backward([weighted(datum, factor)])
            metrics = run.optim_step().result().metrics
            assert metrics is not None
            norms.append(metrics["update_norm"])
        last = world.state(run).tensors
        moments = [*world.state(run).exp_avg.values(), *world.state(run).exp_avg_sq.values()]
    assert {np.asarray(moment).dtype for moment in moments} == {np.dtype("float32")}
    decayed = [name for name in first if "lora_A" in name and not np.array_equal(first[name], last[name])]
    assert decayed == []  # as long as B is zero A has no gradient, so only weight decay could move it
    count = sum(int(np.count_nonzero(last[name])) for name in last if "lora_B" in name)
    parameter = torch.nn.Parameter(torch.zeros(count, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    expected = []
    for gradient in (1e-6, 0.0):
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        expected.append(float((parameter.detach() - before).norm()))
    assert norms == pytest.approx(expected, rel=1e-3)
    assert norms[1] / norms[0] == pytest.approx((0.9 / 1.9) / math.sqrt(0.95 / 1.95), rel=1e-3)


def test_packed_gradients_are_the_sum_of_single_ones(tiny_model: str, mint_home: Path) -> None:
    """One pass of several conversations and a pass each: the same step, so no conversation pulls on another."""
    states: list[dict[str, Any]] = []
    for cap in (4096, 8):  # 8: every datum is longer, so each has a pass of its own
        with embedded(mint_home / str(cap), max_tokens_per_pass=cap) as world:
            run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
            for step in range(2):
                run.forward_backward(batch(step, 4))
                run.optim_step(types.AdamParams(learning_rate=1e-2, eps=1e-3))
            states.append(dict(world.state(run).exp_avg))
    for name, packed in states[0].items():
        scale = max(float(np.abs(packed).max()), 1e-6)
        np.testing.assert_allclose(np.asarray(packed) / scale, np.asarray(states[1][name]) / scale, atol=1e-3)
