"""What users can write: public names, parameter names and defaults, and a twin for every call that waits."""

from __future__ import annotations

import asyncio
import inspect
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

import mint
from mint import types
from tests.support.clients import LEARNING, Embedded, batch, prompt

# Parameter names and defaults are what users' code depends on: a change here breaks it.
SIGNATURES = {
    "ServiceClient.__init__": "user_metadata=None, project_id=None, *, display_name=None, base_url=None, api_key=None, "
    "default_headers_overrides=None",
    "ServiceClient.create_lora_training_client": "base_model, rank=32, seed=None, train_mlp=True, train_attn=True, "
    "train_unembed=True, user_metadata=None, optimizer=None",
    "ServiceClient.create_training_client_from_state": "path, base_model=None, user_metadata=None, "
    "weights_access_token=None, optimizer=None",
    "ServiceClient.create_training_client_from_state_with_optimizer": "path, base_model=None, user_metadata=None, "
    "weights_access_token=None",
    "ServiceClient.create_sampling_client": "model_path=None, base_model=None, retry_config=None, "
    "record_stability_info=False",
    "ServiceClient.create_custom_loss": "fn, input_ranks",
    "ServiceClient.copy_weights": "path, *, ttl_seconds=None, weights_access_token=None",
    "ServiceClient.get_console_url": "",
    "ServiceClient.create_rest_client": "",
    "ServiceClient.get_server_capabilities": "",
    "ServiceClient.close": "status=None, detail=None",
    "TrainingClient.forward": "data, loss_fn='cross_entropy', loss_fn_config=None",
    "TrainingClient.forward_backward": "data, loss_fn='cross_entropy', loss_fn_config=None",
    "TrainingClient.forward_backward_custom": "data, loss_fn, *, loss_type_input='logprobs'",
    "TrainingClient.optim_step": "optim_params=None, *, adam_params=None",
    "TrainingClient.save_state": "name, ttl_seconds=None, overwrite=False, user_metadata=None",
    "TrainingClient.load_state": "path, weights_access_token=None",
    "TrainingClient.load_state_with_optimizer": "path, weights_access_token=None",
    "TrainingClient.save_weights_for_sampler": "name, ttl_seconds=None, user_metadata=None, *, overwrite=False",
    "TrainingClient.save_weights_and_get_sampling_client": "name=None, retry_config=None, "
    "record_stability_info=False, kind='snapshot'",
    "TrainingClient.save_weights_external": "name, ttl_seconds=None, age_encryption_recipients=None",
    "TrainingClient.create_sampling_client": "model_path, retry_config=None, record_stability_info=False",
    "TrainingClient.get_console_url": "",
    "TrainingClient.get_info": "",
    "TrainingClient.get_tokenizer": "",
    "TrainingClient.result": "timeout=None",
    "TrainingClient.result_async": "timeout=None",
    "SamplingClient.sample": "prompt, num_samples=1, sampling_params=None, include_prompt_logprobs=False, "
    "topk_prompt_logprobs=0, topk_sample_logprobs=0, target_prompt_logprobs=None, prompt_alt_tokens_k=0, "
    "prompt_logprobs_last_n=None",
    "SamplingClient.stream": "prompt, sampling_params=None",
    "SamplingClient.compute_logprobs": "prompt, prompt_logprobs_last_n=None",
    "SamplingClient.get_tokenizer": "",
    "SamplingClient.get_base_model": "",
    "SamplingClient.get_sampler_handle": "",
    "SamplingClient.result": "timeout=None",
    "SamplingClient.result_async": "timeout=None",
    "RestClient.__init__": "*, base_url=None, api_key=None, service=None",
    "RestClient.get_server_capabilities": "",
    "RestClient.get_training_run": "training_run_id, access_scope='owned'",
    "RestClient.get_training_run_by_tinker_path": "tinker_path, access_scope='owned'",
    "RestClient.get_weights_info_by_tinker_path": "tinker_path",
    "RestClient.list_training_runs": "limit=20, offset=0, access_scope='owned', project_id=None",
    "RestClient.list_checkpoints": "training_run_id",
    "RestClient.list_user_checkpoints": "limit=100, offset=0",
    "RestClient.delete_checkpoint": "training_run_id, checkpoint_id",
    "RestClient.delete_checkpoint_from_tinker_path": "tinker_path",
    "RestClient.set_checkpoint_ttl_from_tinker_path": "tinker_path, ttl_seconds",
    "RestClient.get_session": "session_id, access_scope='owned'",
    "RestClient.list_sessions": "limit=20, offset=0, access_scope='owned'",
    "RestClient.get_sampler": "sampler_id",
    "RestClient.publish_checkpoint_from_tinker_path": "tinker_path",
    "RestClient.unpublish_checkpoint_from_tinker_path": "tinker_path",
    "RestClient.copy_weights": "path, destination_project_id=None, *, ttl_seconds=None, weights_access_token=None",
    "RestClient.get_external_weights_urls": "tinker_path",
    "RestClient.assign_session_project": "session_id, project_id",
    "RestClient.export_session_trace": "session_id",
    "RestClient.search_sessions": "**query",
    "RestClient.whoami": "",
    "APIFuture.result": "timeout=None",
    "APIFuture.result_async": "timeout=None",
    "APIFuture.done": "",
    "APIFuture.future": "",
    "APIFuture.coroutine": "",
}
CLASSES = (mint.ServiceClient, mint.TrainingClient, mint.SamplingClient, mint.RestClient, mint.APIFuture)
INTERNAL = {"TrainingClient.__init__", "SamplingClient.__init__", "APIFuture.__init__"}
# calls of the SDK's surface that need a server
SERVER_ONLY = {
    "ServiceClient.create_custom_loss": (None, None),
    "ServiceClient.copy_weights": ("tinker://a/weights/b",),
    "ServiceClient.get_console_url": (),
    "TrainingClient.save_weights_external": ("a",),
    "TrainingClient.get_console_url": (),
    "SamplingClient.get_sampler_handle": (),
    "RestClient.publish_checkpoint_from_tinker_path": ("tinker://a/weights/b",),
    "RestClient.unpublish_checkpoint_from_tinker_path": ("tinker://a/weights/b",),
    "RestClient.copy_weights": ("tinker://a/weights/b",),
    "RestClient.get_external_weights_urls": ("tinker://a/weights/b",),
    "RestClient.assign_session_project": ("a", "b"),
    "RestClient.export_session_trace": ("a",),
    "RestClient.search_sessions": (),
    "RestClient.whoami": (),
}
# answered from what the client knows, or not to be waited for
WITHOUT_TWIN = {
    "ServiceClient.create_rest_client",
    "ServiceClient.close",
    "TrainingClient.get_tokenizer",
    "SamplingClient.stream",
    "SamplingClient.get_tokenizer",
    "SamplingClient.get_base_model",
    *SERVER_ONLY,
}


def methods(kind: type) -> dict[str, Any]:
    return {
        f"{kind.__name__}.{name}": value
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and (not name.startswith("_") or name == "__init__")
    }


def written(function: Any) -> str:
    """Parameters as in a `def`, without self and annotations."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))[1:-1]


def twins() -> set[str]:
    found = {name for kind in CLASSES for name in methods(kind) if name.endswith("_async")}
    return {name for name in found if not name.endswith(".result_async")}


@pytest.mark.parametrize(("module", "besides"), [(mint, {"__version__", "errors", "types"}), (types, set())])
def test_all_is_sorted_and_complete(module: ModuleType, besides: set[str]) -> None:
    named = {n for n, value in vars(module).items() if not n.startswith("_") and not inspect.ismodule(value)}
    assert set(module.__all__) == named | besides
    assert module.__all__ == sorted(module.__all__)


def test_every_exception_is_public_and_knows_its_standard_relative() -> None:
    from mint import errors

    ours = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert ours <= set(mint.__all__)
    relatives = {
        "InputError": ValueError,
        "HubUnreachableError": ConnectionError,
        "MissingExtraError": ImportError,
        "NumericsError": ArithmeticError,
        "OperationError": RuntimeError,
        "ResultTimeoutError": TimeoutError,
        "StorageError": OSError,
    }
    for name in ours:
        assert issubclass(getattr(mint, name), mint.MintError)
        if name in relatives:
            assert issubclass(getattr(mint, name), relatives[name])
    assert issubclass(mint.ClosedError, mint.OperationError)
    assert issubclass(mint.CheckpointNotFoundError, mint.InputError)


def test_every_exception_survives_pickling() -> None:
    import pickle

    for name in mint.__all__:
        value = getattr(mint, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            again = pickle.loads(pickle.dumps(value("what was given, what is allowed")))
            assert type(again) is value and str(again) == "what was given, what is allowed"


def test_parameter_names_and_defaults_are_frozen() -> None:
    found = {name: written(f) for kind in CLASSES for name, f in methods(kind).items()}
    found = {name: text for name, text in found.items() if name not in INTERNAL and name not in twins()}
    assert found == SIGNATURES


def test_every_call_that_waits_has_a_twin() -> None:
    waiting = {
        name
        for kind in (mint.ServiceClient, mint.TrainingClient, mint.SamplingClient, mint.RestClient)
        for name in methods(kind)
        if not name.endswith(("_async", ".__init__", ".result"))
    }
    assert twins() == {f"{name}_async" for name in waiting - WITHOUT_TWIN}


def test_twins_are_coroutine_functions_that_pass_their_arguments_on() -> None:
    for kind in CLASSES:
        for name, function in methods(kind).items():
            if name in twins():
                assert inspect.iscoroutinefunction(function), name
                own = written(function)
                assert own in ("*args, **kwargs", SIGNATURES[name.removesuffix("_async")]), name


@pytest.mark.parametrize("name", SERVER_ONLY)
def test_calls_that_need_a_server_say_so_and_what_to_do(
    client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str, name: str
) -> None:
    owner, _, method = name.partition(".")
    objects = {
        "ServiceClient": client,
        "TrainingClient": run,
        "SamplingClient": client.create_sampling_client(base_model=tiny_model),
        "RestClient": client.create_rest_client(),
    }
    with pytest.raises(
        mint.UnsupportedError, match=rf"^{method} needs a server, and MinT runs inside this process; \w"
    ):
        getattr(objects[owner], method)(*SERVER_ONLY[name])


def test_options_of_a_server_are_refused_by_name(
    client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str
) -> None:
    with pytest.raises(mint.UnsupportedError, match=r"^record_stability_info=True is not supported; leave it out$"):
        client.create_sampling_client(base_model=tiny_model, record_stability_info=True)
    with pytest.raises(mint.UnsupportedError, match="record_stability_info=True"):
        run.save_weights_and_get_sampling_client(record_stability_info=True)
    with pytest.raises(mint.UnsupportedError, match="record_stability_info=True"):
        run.create_sampling_client("tinker://a/weights/b", record_stability_info=True)
    with pytest.raises(mint.UnsupportedError, match="project_id='p' is not supported"):
        mint.ServiceClient(project_id="p")
    with pytest.raises(mint.UnsupportedError, match="default_headers_overrides"):
        mint.ServiceClient(default_headers_overrides={"a": "b"})


def test_a_sampling_client_is_not_pickled(client: mint.ServiceClient, tiny_model: str) -> None:
    import pickle

    with pytest.raises(mint.UnsupportedError, match=r"pickled SamplingClient needs a server.*make a ServiceClient in"):
        pickle.dumps(client.create_sampling_client(base_model=tiny_model))


def test_sessions_and_samplers_are_listed(
    world: Embedded, client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str
) -> None:
    with mock.patch("mint.client.service_client.connect", lambda base_url, api_key: world.service()):
        labelled = mint.ServiceClient({"team": "a"}, display_name="sweep")
    rest = world.rest()
    newest, first = rest.list_sessions().result().sessions
    assert rest.list_sessions(limit=1).result().sessions == [newest]
    assert rest.list_sessions(limit=5, offset=1).result().sessions == [first]
    session = rest.get_session(newest).result()
    assert session.user_metadata == {"team": "a"} and session.display_name == "sweep"
    assert session.training_run_ids == session.sampler_ids == []
    path = run.save_weights_for_sampler("a").result().path
    samplers = [
        client.create_sampling_client(base_model=tiny_model),
        run.save_weights_and_get_sampling_client(),
        client.create_sampling_client(path),
    ]
    assert rest.get_session(first).result().training_run_ids == [run.model_id]
    known = [rest.get_sampler(name).result() for name in rest.get_session(first).result().sampler_ids]
    assert [(sampler.base_model, sampler.model_path) for sampler in known] == [
        (tiny_model, None), (tiny_model, None), (tiny_model, path)
    ]  # fmt: skip
    del samplers
    labelled.close()
    assert rest.list_sessions().result().sessions == [first]
    with pytest.raises(mint.ClosedError, match=f"session {newest} is closed"):
        rest.get_session(newest).result()


def test_the_twins_of_a_training_client_work(run: mint.TrainingClient) -> None:
    async def go() -> tuple[Any, ...]:
        gradient = await run.forward_backward_async(batch(), loss_fn="cross_entropy")
        step = await run.optim_step_async(LEARNING)
        custom = await run.forward_backward_custom_async(batch(), lambda data, p: (p[0].sum(), {"seen:sum": 1.0}))
        dropped = await run.optim_step_async(adam_params=LEARNING)
        saved = await (await run.save_state_async("a"))
        loaded = await (await run.load_state_async(saved.path))
        again = await (await run.load_state_with_optimizer_async(path=saved.path))
        named = await (await run.save_weights_for_sampler_async("b"))
        sampler = await run.save_weights_and_get_sampling_client_async()
        other = await run.create_sampling_client_async(named.path)
        info = await run.get_info_async()
        outputs = [await gradient, await step, await custom, await dropped, await (await run.forward_async(batch()))]
        return outputs, [saved.path, loaded.path, again.path], sampler, other, info

    outputs, paths, sampler, other, info = asyncio.run(go())
    assert len(outputs[0].loss_fn_outputs) == len(batch()) == len(outputs[4].loss_fn_outputs)
    assert outputs[1].metrics["step"] == 1.0 and outputs[3].metrics["step"] == 2.0
    assert outputs[2].metrics["seen:sum"] == 1.0
    assert paths == [f"tinker://{run.model_id}/weights/a"] * 3
    assert isinstance(sampler, mint.SamplingClient) and isinstance(other, mint.SamplingClient)
    assert info == run.get_info()


def test_the_twins_of_the_other_clients_work(
    client: mint.ServiceClient, run: mint.TrainingClient, tiny_model: str
) -> None:
    rest = client.create_rest_client()

    async def go() -> tuple[Any, ...]:
        path = (await run.save_state("a")).path
        copies = [
            await client.create_lora_training_client_async(base_model=tiny_model, rank=2),
            await client.create_training_client_from_state_async(path),
            await client.create_training_client_from_state_with_optimizer_async(path),
        ]
        sampler = await client.create_sampling_client_async(base_model=tiny_model)
        sampled = await sampler.sample_async(prompt(), 2, types.SamplingParams(max_tokens=3))
        scored = await sampler.compute_logprobs_async(prompt())
        listed = [
            await rest.list_training_runs_async(limit=1),
            await rest.list_checkpoints_async(run.model_id),
            await rest.list_user_checkpoints_async(),
        ]
        known = [
            await rest.get_training_run_async(run.model_id),
            await rest.get_training_run_by_tinker_path_async(path),
            await rest.get_weights_info_by_tinker_path_async(path),
            await rest.get_server_capabilities_async(),
            await client.get_server_capabilities_async(),
        ]
        sessions = (await rest.list_sessions_async()).sessions
        ids = (await rest.get_session_async(sessions[0])).sampler_ids
        assert (await rest.get_sampler_async(ids[0])).base_model == tiny_model
        await rest.set_checkpoint_ttl_from_tinker_path_async(path, ttl_seconds=3600)
        assert (await rest.list_checkpoints_async(run.model_id)).checkpoints[0].expires_at is not None
        await rest.delete_checkpoint_async(run.model_id, "weights/a")
        await run.save_state("a")
        await rest.delete_checkpoint_from_tinker_path_async(path)
        return copies, sampled, scored, listed, known

    copies, sampled, scored, listed, known = asyncio.run(go())
    assert all(isinstance(copy, mint.TrainingClient) for copy in copies)
    assert len(sampled.sequences) == 2 and len(scored) == prompt().length
    assert listed[0].cursor.total_count == 4 and len(listed[1].checkpoints) == len(listed[2].checkpoints) == 1
    assert known[0] == known[1] and known[2].lora_rank == 4 and known[3] == known[4]
    assert rest.list_user_checkpoints().result().checkpoints == []


def test_creation_calls_answer_result_and_await_with_the_client_itself(
    client: mint.ServiceClient, tiny_model: str
) -> None:
    run = client.create_lora_training_client(tiny_model, rank=2)
    sampler = run.save_weights_and_get_sampling_client(name="any")

    async def go() -> tuple[Any, ...]:
        return await run, await sampler, await run.result_async(), await sampler.result_async()

    assert run.result() is run and run.result(timeout=1) is run
    assert sampler.result() is sampler
    assert asyncio.run(go()) == (run, sampler, run, sampler)


@pytest.mark.parametrize("name", ["future", "coroutine"])
def test_an_api_future_hands_out_its_future_and_a_coroutine(run: mint.TrainingClient, name: str) -> None:
    getattr(run.forward(batch()), name)
