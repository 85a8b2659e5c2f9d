"""Every bad input: where it raises, with which class and words, and that the run works on as if nothing had been asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import mint
from mint import (
    CheckpointNotFoundError,
    Datum,
    InputError,
    ModelInput,
    ModelNotFoundError,
    UnsupportedError,
    types,
)
from tests.support.clients import CONTEXT, GUARD, LEARNING, VOCAB_SIZE, Embedded, batch, datum, prompt, same_weights

Call = Callable[[mint.TrainingClient], Any]


def wrong(length: int = 3, **inputs: Any) -> list[Datum]:
    return [datum(), Datum(model_input=ModelInput.from_ints([1] * length), loss_fn_inputs=inputs)]


def weighted(*weights: float) -> list[Datum]:
    return wrong(len(weights), target_tokens=[1] * len(weights), weights=list(weights))


# raised by the call itself, before anything is sent
AT_THE_CALL: dict[str, tuple[Call, type[Exception], str]] = {
    "empty batch": (lambda r: r.forward_backward([]), InputError, "data: the list of datums is empty"),
    "one datum": (lambda r: r.forward_backward(datum()), InputError, "expected a list of types.Datum, got Datum"),
    "a dict": (lambda r: r.forward([{"model_input": 1}]), InputError, r"data\[0\]: expected types.Datum, got dict"),
    "lengths": (
        lambda r: r.forward_backward(wrong(3, target_tokens=[1, 2], weights=[1.0, 1.0])),
        InputError,
        r"data\[1\]: target_tokens has shape \[2\], but model_input has 3 tokens",
    ),
    "weights too short": (
        lambda r: r.forward_backward(wrong(3, target_tokens=[1] * 3, weights=[1.0])),
        InputError,
        r"data\[1\]: weights has shape \[1\], target_tokens \[3\]: they must agree",
    ),
    "no weights": (lambda r: r.forward(wrong(target_tokens=[1] * 3)), InputError, "cross_entropy needs .* 'weights'"),
    "masked by -100": (
        lambda r: r.forward_backward(wrong(target_tokens=[-100, 1, 1], weights=[1.0] * 3)),
        InputError,
        r"holds -100; token ids are not negative \(mask with weight 0, not with -100\)",
    ),
    "nan": (lambda r: r.forward_backward(weighted(1.0, float("nan"))), InputError, "weights holds NaN .* position 1"),
    "infinity": (lambda r: r.forward_backward(weighted(float("inf"))), InputError, "weights holds NaN or infinity"),
    "no tokens": (lambda r: r.forward_backward(wrong(0, target_tokens=[], weights=[])), InputError, "input is empty"),
    "unknown loss": (
        lambda r: r.forward_backward(batch(), "mse"),
        InputError,
        "unknown loss_fn 'mse'; supported: cross",
    ),
    "unknown config": (
        lambda r: r.forward_backward(batch(), "cross_entropy", {"smoothing": 0.1}),
        InputError,
        "cross_entropy knows no key 'smoothing'; allowed: none",
    ),
    "unknown keyword": (lambda r: r.forward_backward(batch(), loss="ppo"), TypeError, "keyword argument 'loss'"),
    "no loss function": (lambda r: r.forward_backward_custom(batch(), "ppo"), InputError, "got str"),
    "other loss input": (
        lambda r: r.forward_backward_custom(batch(), print, loss_type_input="hidden"),
        InputError,
        "loss_type_input='hidden': only 'logprobs' is supported",
    ),
    "a float as step": (lambda r: r.optim_step(1e-4), InputError, "optim_step: expected types.AdamParams, got float"),
    "name": (lambda r: r.save_state("../evil"), InputError, r"checkpoint name '../evil': use 1 to 240 letters"),
    "sampler name": (lambda r: r.save_weights_for_sampler("a/b"), InputError, "checkpoint name 'a/b'"),
    "snapshot name": (lambda r: r.save_weights_and_get_sampling_client("a b"), InputError, "checkpoint name 'a b'"),
    "kind": (
        lambda r: r.save_weights_and_get_sampling_client(kind="inflight"),
        InputError,
        "kind='inflight': only 'snapshot' is supported",
    ),
    "ttl": (lambda r: r.save_state("a", ttl_seconds=60), InputError, r"ttl_seconds=60: must be None \(keep\) or"),
    "metadata": (lambda r: r.save_state("a", user_metadata={"n": 1}), InputError, "a dict of strings to strings"),
    "token": (
        lambda r: r.load_state("x", weights_access_token="t"),
        UnsupportedError,
        "weights_access_token='t' is not",
    ),
    "not adam": (lambda r: types.AdamParams(lr=1e-4), InputError, "AdamParams: lr: Extra inputs are not permitted"),
}

# what only the service knows: the call returns, its result raises
FROM_THE_RESULT: dict[str, tuple[Call, type[Exception], str]] = {
    "token": (
        lambda r: r.forward_backward(
            [
                datum(),
                Datum(
                    model_input=ModelInput.from_ints([VOCAB_SIZE]),
                    loss_fn_inputs={"target_tokens": [1], "weights": [1.0]},
                ),
            ]
        ),
        InputError,
        f"data\\[1\\]: token id {VOCAB_SIZE} is outside the model's vocabulary of {VOCAB_SIZE}; was it tokenized for",
    ),
    "target": (
        lambda r: r.forward_backward(wrong(1, target_tokens=[VOCAB_SIZE], weights=[0.0])),
        InputError,
        f"data\\[1\\]: token id {VOCAB_SIZE} is outside the model's vocabulary of {VOCAB_SIZE}",
    ),
    "target of forward": (
        lambda r: r.forward(wrong(1, target_tokens=[[1, 2**31 - 1]], weights=[[1.0, 1.0]])),
        InputError,
        "is outside the model's vocabulary",
    ),
    "too long": (
        lambda r: r.forward_backward([datum(length=CONTEXT + 1)]),
        InputError,
        f"data\\[0\\]: {CONTEXT + 1} tokens; the context allows {CONTEXT}. Shorten or drop it",
    ),
    "too long for a custom loss": (
        lambda r: r.forward_backward_custom([datum(length=CONTEXT + 1)], lambda data, p: (p[0].sum(), {})),
        InputError,
        "the context allows",
    ),
    "path": (lambda r: r.load_state("final"), InputError, "checkpoint path 'final': a checkpoint path has the form"),
    "no such run": (
        lambda r: r.load_state("tinker://nobody:train:0/weights/a"),
        CheckpointNotFoundError,
        r"no run 'nobody:train:0'; list what there is with RestClient.list_training_runs\(\)",
    ),
    "no such checkpoint": (
        lambda r: r.load_state_with_optimizer(f"mint://{r.model_id}/weights/none"),
        CheckpointNotFoundError,
        r"no checkpoint tinker://.*/weights/none; list what there is with RestClient.list_user_checkpoints\(\)",
    ),
}

TRAINS = ("token", "target", "too long", "too long for a custom loss")


def assert_trains(world: Embedded, run: mint.TrainingClient) -> None:
    before = world.state(run)
    run.forward_backward(batch()).result(GUARD)
    assert run.optim_step(LEARNING).result(GUARD).metrics["step"] == before.step + 1
    assert not same_weights(world.state(run), before)


@pytest.mark.parametrize("name", AT_THE_CALL)
def test_what_the_client_can_see_raises_before_the_call_returns(
    world: Embedded, run: mint.TrainingClient, name: str
) -> None:
    call, error, text = AT_THE_CALL[name]
    run.forward_backward(batch()).result(GUARD)
    before = world.state(run)
    with pytest.raises(error, match=text):
        call(run)
    assert same_weights(world.state(run), before)
    assert run.optim_step(LEARNING).result(GUARD).metrics["grad_norm"] > 0  # the gradient is still there
    assert_trains(world, run)


@pytest.mark.parametrize("name", FROM_THE_RESULT)
def test_what_only_the_service_knows_arrives_from_the_result(
    world: Embedded, run: mint.TrainingClient, name: str
) -> None:
    call, error, text = FROM_THE_RESULT[name]
    before = world.state(run)
    future = call(run)
    with pytest.raises(error, match=text):
        future.result(GUARD)
    with pytest.raises(error, match=text):  # and again
        future.result(GUARD)
    assert same_weights(world.state(run), before)
    if name in TRAINS:
        with pytest.raises(mint.OperationError, match="optim_step refused"):
            run.optim_step(LEARNING).result(GUARD)
    assert_trains(world, run)


SAMPLING: dict[str, tuple[Callable[[mint.SamplingClient], Any], type[Exception], str]] = {
    "list": (lambda s: s.sample([1, 2], 1, types.SamplingParams()), InputError, "prompt: expected types.ModelInput"),
    "empty": (lambda s: s.sample(ModelInput.empty()), InputError, "prompt: it is empty"),
    "samples": (lambda s: s.sample(prompt(), 0), InputError, "num_samples=0"),
    "params": (
        lambda s: s.sample(prompt(), 1, {"max_tokens": 3}),
        InputError,
        "expected types.SamplingParams, got dict",
    ),
    "keyword": (lambda s: s.sample(prompt(), n=3), TypeError, "keyword argument 'n'"),
    "topk": (lambda s: s.sample(prompt(), topk_prompt_logprobs=101), InputError, "topk_prompt_logprobs=101"),
    "targets": (lambda s: s.sample(prompt(), target_prompt_logprobs=[1]), UnsupportedError, "target_prompt_logprobs="),
    "alternatives": (lambda s: s.sample(prompt(), prompt_alt_tokens_k=2), UnsupportedError, "prompt_alt_tokens_k=2 is"),
    "last": (lambda s: s.compute_logprobs(prompt(), 2), UnsupportedError, "prompt_logprobs_last_n=2 is not supported"),
    "vocabulary": (
        lambda s: s.sample(ModelInput.from_ints([VOCAB_SIZE])).result(GUARD),
        InputError,
        f"prompt: token id {VOCAB_SIZE} is outside the model's vocabulary of {VOCAB_SIZE}; was it tokenized",
    ),
    "context": (
        lambda s: s.sample(prompt(length=CONTEXT)).result(GUARD),
        InputError,
        f"prompt of {CONTEXT} tokens and max_tokens=None exceed the context of {CONTEXT}; at most 0 tokens can follow",
    ),
    "max_tokens": (
        lambda s: s.sample(prompt(length=500), 1, types.SamplingParams(max_tokens=13)).result(GUARD),
        InputError,
        "prompt of 500 tokens and max_tokens=13 exceed the context of 512; at most 12 tokens can follow",
    ),
    "scored": (
        lambda s: s.compute_logprobs(prompt(length=CONTEXT + 1)).result(GUARD),
        InputError,
        "exceed the context",
    ),
}


def test_a_sampling_client_is_usable_after_every_bad_input(client: mint.ServiceClient, tiny_model: str) -> None:
    sampler = client.create_sampling_client(base_model=tiny_model)
    params = types.SamplingParams(max_tokens=4, seed=3)
    expected = sampler.sample(prompt(), 1, params).result(GUARD)
    for name, (call, error, text) in SAMPLING.items():
        with pytest.raises(error, match=text):
            call(sampler)
        assert sampler.sample(prompt(), 1, params).result(GUARD) == expected, name
    assert len(sampler.compute_logprobs(prompt(length=CONTEXT)).result(GUARD)) == CONTEXT


CREATING: dict[str, tuple[Callable[[mint.ServiceClient, str], Any], type[Exception], str]] = {
    "rank 0": (
        lambda c, m: c.create_lora_training_client(m, rank=0),
        InputError,
        "^rank=0: a LoRA rank lies in 1..1024",
    ),
    "rank text": (
        lambda c, m: c.create_lora_training_client(m, rank="x"),
        InputError,
        "^rank='x': expected a whole number",
    ),
    "no modules": (
        lambda c, m: c.create_lora_training_client(m, train_mlp=False, train_attn=False, train_unembed=False),
        InputError,
        "^nothing to train: set at least one of train_mlp, train_attn, train_unembed to True",
    ),
    "seed": (lambda c, m: c.create_lora_training_client(m, seed=2**64), InputError, "a seed is a 64-bit whole number"),
    "keyword": (lambda c, m: c.create_lora_training_client(m, alpha=16), TypeError, "keyword argument 'alpha'"),
    "optimizer": (
        lambda c, m: c.create_lora_training_client(m, optimizer="sgd"),
        UnsupportedError,
        "optimizer='sgd' is not",
    ),
    "no model": (
        lambda c, m: c.create_lora_training_client(""),
        InputError,
        "base_model='': give a hub id such as 'Qwen/",
    ),
    "None": (lambda c, m: c.create_lora_training_client(None), InputError, "base_model=None: give a hub id"),
    "no folder": (
        lambda c, m: c.create_lora_training_client("./nowhere"),
        ModelNotFoundError,
        "there is no folder 'nowhere'",
    ),
    "metadata": (
        lambda c, m: c.create_lora_training_client(m, user_metadata={"a": 1}),
        InputError,
        "strings to strings",
    ),
    "sampler of nothing": (
        lambda c, m: c.create_sampling_client(),
        InputError,
        r"give model_path \(a checkpoint's path\) or",
    ),
    "sampler of no model": (
        lambda c, m: c.create_sampling_client(base_model="/nowhere"),
        ModelNotFoundError,
        "no folder",
    ),
    "sampler path": (
        lambda c, m: c.create_sampling_client("final"),
        InputError,
        "checkpoint path 'final': a checkpoint",
    ),
    "no run": (
        lambda c, m: c.create_training_client_from_state("tinker://x/weights/a"),
        CheckpointNotFoundError,
        "no run 'x'",
    ),
    "access token": (
        lambda c, m: c.create_training_client_from_state("tinker://x/weights/a", weights_access_token="t"),
        UnsupportedError,
        "weights_access_token='t' is not supported",
    ),
}


def test_a_service_client_is_usable_after_every_bad_input(
    world: Embedded, client: mint.ServiceClient, tiny_model: str
) -> None:
    for call, error, text in CREATING.values():
        with pytest.raises(error, match=text):
            call(client, tiny_model)
    assert world.core.runs == {} and world.core.samplers == {}
    assert client.create_rest_client().list_training_runs().result().training_runs == []
    assert_trains(world, client.create_lora_training_client(tiny_model, rank=2))


def test_bad_listings_are_refused(client: mint.ServiceClient) -> None:
    rest = client.create_rest_client()
    for call, text in [
        (lambda: rest.list_training_runs(limit=0), "limit=0, offset=0: limit is at least 1, offset at least 0"),
        (lambda: rest.list_user_checkpoints(offset=-1), "limit=100, offset=-1: limit is at least 1"),
        (
            lambda: rest.list_training_runs(access_scope="accessible"),
            "access_scope='accessible': embedded there is one owner",
        ),
        (
            lambda: rest.list_training_runs(project_id="p"),
            "project_id: embedded runs belong to no project; leave it out",
        ),
        (lambda: rest.get_training_run_by_tinker_path("x"), "checkpoint path 'x'"),
    ]:
        with pytest.raises(InputError, match=text):
            call()


@pytest.mark.parametrize("given", [0, {}, False])
def test_what_is_false_is_no_adam_params(run: mint.TrainingClient, given: Any) -> None:
    with pytest.raises(InputError, match=f"optim_step: expected types.AdamParams, got {type(given).__name__}"):
        run.optim_step(given)


def test_two_optimizer_arguments_are_refused(run: mint.TrainingClient) -> None:
    with pytest.raises(InputError, match="optim_step: give optim_params or adam_params, not both"):
        run.optim_step(LEARNING, adam_params=types.AdamParams(learning_rate=1.0))


@pytest.mark.parametrize("run_id", ["a\0b", "a" * 300, 5, "{run}/run.json"])
def test_an_impossible_run_id_is_a_run_that_is_not_found(
    run: mint.TrainingClient, client: mint.ServiceClient, run_id: Any
) -> None:
    if isinstance(run_id, str):
        run_id = run_id.format(run=run.model_id.replace(":", "_"))
    with pytest.raises(CheckpointNotFoundError, match="no run"):
        client.create_rest_client().get_training_run(run_id).result(GUARD)


def test_a_run_id_cannot_leave_the_folder_of_runs(
    run: mint.TrainingClient, client: mint.ServiceClient, mint_home: Any
) -> None:
    (record,) = (mint_home / "runs").glob("*/run.json")
    (mint_home / "outside").mkdir()
    text = record.read_text().replace(run.model_id, "../outside")
    (mint_home / "outside" / "run.json").write_text(text)
    with pytest.raises(CheckpointNotFoundError, match=r"no run '\.\./outside'"):
        client.create_rest_client().get_training_run("../outside").result(GUARD)


def test_the_longest_allowed_name_can_be_saved(run: mint.TrainingClient) -> None:
    for _ in range(2):
        path = run.save_state("n" * 240, overwrite=True).result(GUARD).path
    assert path == f"tinker://{run.model_id}/weights/{'n' * 240}"
