"""MinT in processes as users have them: leaving with work in flight, forking, importing, odd environments."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest

import mint
from mint import types
from mint.client import connect
from tests.support.clients import GUARD, child

# Leaves while a long sample, a training queue and a background load are under way and nobody waits for them.
LEAVE = """
    import atexit, sys, threading
    import mint
    from mint import types
    from tests.support.clients import batch, prompt

    model = sys.argv[1]
    service = mint.ServiceClient()
    run = service.create_lora_training_client(model, rank=4, seed=0)
    sampler = service.create_sampling_client(base_model=model)
    endless = types.SamplingParams(max_tokens=500, stop=[])
    kept = [sampler.sample(prompt(i), 8, endless) for i in range(8)]
    kept += [run.forward_backward(batch(i)) for i in range(200)]
    kept.append(run.save_state("never-waited-for"))
    service._service.create_sampling_session(service._session.id, model, None)
    assert not kept[-1].done()
    print("left")
"""

# The child of a fork must hear from MinT, for calls and for what it had begun to wait for; the parent works on.
FORK = """
    import json, os, sys, threading, warnings
    import mint
    from mint import types
    from tests.support.clients import GUARD, batch, embedded, prompt, train

    service = mint.ServiceClient()
    model = sys.argv[1]
    run = service.create_lora_training_client(model, rank=4, seed=0)
    sampler = service.create_sampling_client(base_model=model)
    done = run.forward(batch())
    done.result(GUARD)

    let_go, inside = threading.Event(), threading.Event()
    service._service._core.call(lambda: (inside.set(), let_go.wait(GUARD)))
    inside.wait(GUARD)
    pending = run.forward_backward(batch())
    warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        import asyncio

        calls = {
            "forward": lambda: run.forward(batch()),
            "optim_step": lambda: run.optim_step(),
            "sample": lambda: sampler.sample(prompt()),
            "get_info": lambda: run.get_info(),
            "create": lambda: service.create_lora_training_client(model),
            "capabilities": lambda: service.get_server_capabilities(),
            "close": lambda: service.close(),
            "pending": lambda: pending.result(),
            "awaited": lambda: asyncio.run(pending.result_async()),
            "done": lambda: done.result(),
        }
        heard = {}
        for name, call in calls.items():
            try:
                call()
                heard[name] = "answered"
            except BaseException as error:
                heard[name] = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(heard).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        heard = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    let_go.set()
    pending.result(GUARD)
    train(run, 1)
    print(heard)
"""

HEAVY = [
    "torch",
    "transformers",
    "datasets",
    "httpx",
    "sqlalchemy",
    "fastapi",
    "huggingface_hub",
    "peft",
    "rich",
    "matplotlib",
]
IMPORT = f"""
    import json, sys
    import mint
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    mint.types.Datum(model_input=mint.ModelInput.from_ints([1]), loss_fn_inputs={{"weights": [1.0]}})
    told = []
    for use in (mint.ServiceClient, mint.RestClient):
        try:
            use()
        except mint.InputError as error:
            told.append(str(error))
    print(json.dumps([loaded, told]))
"""


def test_leaving_with_work_in_flight_is_quiet(tiny_model: str) -> None:
    done = child(LEAVE, tiny_model, MINT_DTYPE="float32")
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_a_forked_child_is_told_and_the_parent_works_on(tiny_model: str) -> None:
    done = child(FORK, tiny_model, MINT_DTYPE="float32")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    heard = json.loads(done.stdout)
    calls = ("forward", "optim_step", "sample", "get_info", "create", "capabilities", "close")
    told = (
        "ClosedError: this process is a fork of the one that opened MinT, and the engine did not come along; "
        "use MinT in the parent, or start workers with the 'spawn' method and a ServiceClient of their own"
    )
    assert {name: heard[name] for name in calls} == dict.fromkeys(calls, told)
    waiting = "ClosedError: this process is a fork of the one that started the operation; its result arrives there"
    assert heard["pending"] == heard["awaited"] == waiting
    assert heard["done"] == "answered"


def test_importing_loads_nothing_heavy_and_a_bad_variable_is_told_when_it_is_used() -> None:
    done = child(IMPORT, MINT_DTYPE="int3")
    assert (done.returncode, done.stderr) == (0, "")
    loaded, told = json.loads(done.stdout)
    assert loaded == []
    assert told == ["MINT_DTYPE='int3' is not supported; allowed: bfloat16, float32, or unset to let MinT choose"] * 2


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        (
            "MINT_THREADS",
            "0",
            "MINT_THREADS='0' is not a positive whole number; unset it or give one, e.g. MINT_THREADS=2",
        ),
        (
            "MINT_BACKEND",
            "torch",
            "MINT_BACKEND='torch' is not supported; allowed: decoder, hf, or unset to let MinT choose",
        ),
        ("MINT_MAX_TOKENS_PER_PASS", "many", "MINT_MAX_TOKENS_PER_PASS='many' is not a positive whole number"),
    ],
)
def test_other_bad_variables_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, text: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(mint.InputError, match=text):
        mint.ServiceClient()


@pytest.mark.parametrize("name", ["MINT_BASE_URL", "TINKER_BASE_URL", ""])
def test_a_server_is_refused_as_long_as_there_is_no_remote_client(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name:
        monkeypatch.setenv(name, "http://localhost:1")
    where = "MINT_BASE_URL or TINKER_BASE_URL" if name else "base_url"
    with pytest.raises(
        mint.UnsupportedError, match=f"^{where}='http://localhost:1': this version of MinT has no remote"
    ):
        mint.ServiceClient(base_url=None if name else "http://localhost:1")


def test_changed_settings_are_refused_while_something_is_loaded_and_used_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: str
) -> None:
    monkeypatch.setattr(connect, "_core", None)
    before = mint.ServiceClient()
    core_before = weakref.ref(before._service._core)  # type: ignore[attr-defined]
    sampler = before.create_sampling_client(base_model=tiny_model)
    monkeypatch.setenv("MINT_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(mint.InputError, match=r"settings changed while runs or sampling clients are open .*close the"):
        mint.ServiceClient()
    assert len(sampler.compute_logprobs(types.ModelInput.from_ints([1, 2])).result(GUARD)) == 2
    before.close()
    with mint.ServiceClient() as client:
        core = client._service._core  # type: ignore[attr-defined]
        assert core.settings.home == tmp_path / "elsewhere"
    core.close()
    del before, sampler
    gc.collect()
    assert core_before() is None


def test_all_embedded_clients_of_a_process_share_one_core_and_say_where_it_keeps_things(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mint_home: Path
) -> None:
    monkeypatch.setattr(connect, "_core", None)
    monkeypatch.setenv("MINT_API_KEY", "sk-secret")
    caplog.set_level("INFO", "mint")
    with mint.ServiceClient() as one, mint.ServiceClient() as other:
        assert one._service._core is other._service._core  # type: ignore[attr-defined]
        core = one._service._core  # type: ignore[attr-defined]
    core.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"MinT runs inside this process; runs and checkpoints are kept in {mint_home}",
        "an API key is set and not used: there is no server in between",
    ]
