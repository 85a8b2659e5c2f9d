"""An embedded service made by hand, clients of it, and data for them: what the contract tests are written with.

with embedded(home) as world:
    run = world.client().create_lora_training_client(tiny_model, rank=4, seed=0)
    run.forward_backward(batch()).result(GUARD)
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from pydantic import ValidationError

from mint import types
from mint.client import connect
from mint.client.rest_client import RestClient
from mint.client.service_client import ServiceClient
from mint.client.training_client import TrainingClient
from mint.engine.backend import AdapterState, Backend
from mint.local import checkpoints
from mint.local.core import Core
from mint.local.service import LocalService
from mint.service import Service
from mint.settings import Settings

GUARD = 60.0  # seconds after which a test that hangs is given up
VOCAB_SIZE, CONTEXT = 384, 512  # of the tiny model
LEARNING = types.AdamParams(learning_rate=1e-2)
ROOT = Path(__file__).parents[2]


def service_client(service: Service) -> ServiceClient:
    """A ServiceClient that talks to `service` instead of the one of the process."""
    with mock.patch("mint.client.service_client.connect", lambda base_url, api_key: service):
        return ServiceClient()


@dataclass
class Embedded:
    """A Core of its own and the objects made on it. `backends`: weak references to what was loaded, in order."""

    core: Core
    backends: list[weakref.ref[Backend]] = field(default_factory=list)

    def service(self, tenant: str = "local") -> LocalService:
        return LocalService(self.core, tenant)

    def client(self, tenant: str = "local") -> ServiceClient:
        return service_client(self.service(tenant))

    def rest(self, tenant: str = "local") -> RestClient:
        return RestClient(service=self.service(tenant))

    def state(self, run: TrainingClient) -> AdapterState:
        """Weights, moments and step as they are when everything submitted so far is done."""
        export = self.core.runs[run.model_id].backend.export_state
        return self.core.call(lambda: export(run.model_id)).result(GUARD)

    def settle(self) -> None:
        """Wait until the engine has done what it was given, finalisers of dropped clients included."""
        gc.collect()
        self.core.call(lambda: None).result(GUARD)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The engine does nothing inside the block: what is submitted there waits, in order."""
        inside, let_go = threading.Event(), threading.Event()

        def hold() -> None:
            inside.set()
            let_go.wait(GUARD)

        held = self.core.call(hold)
        assert inside.wait(GUARD)
        try:
            yield
        finally:
            let_go.set()
            held.result(GUARD)


@contextlib.contextmanager
def embedded(home: Path, **settings: Any) -> Iterator[Embedded]:
    """`settings`: fields of Settings; the default is one CPU thread in float32."""
    chosen = {"device": "cpu", "dtype": "float32", "num_threads": 1} | settings
    world = Embedded(Core(Settings(home=home, **chosen), lambda *args: make_backend(world, *args)))
    try:
        yield world
    finally:
        world.core.close()


def make_backend(world: Embedded, folder: Path, name: str, settings: Settings) -> Backend:
    backend = connect.make_backend(folder, name, settings)
    world.backends.append(weakref.ref(backend))
    return backend


def tokens(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE - 10), k=length)


def datum(seed: int = 0, length: int = 12) -> types.Datum:
    """Random tokens; every third target has no weight."""
    ids = tokens(seed, length + 1)
    weights = [0.0 if i % 3 == 2 else 1.0 for i in range(length)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": ids[1:], "weights": weights}
    )


def batch(seed: int = 0, count: int = 3) -> list[types.Datum]:
    """Datums of different lengths."""
    return [datum(100 * seed + i, 8 + 5 * i) for i in range(count)]


def prompt(seed: int = 0, length: int = 6) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens(seed, length))


def logprobs(output: types.ForwardBackwardOutput) -> np.ndarray:
    """All logprobs of a pass in one vector."""
    return np.concatenate([np.ravel(out["logprobs"].to_numpy()) for out in output.loss_fn_outputs])


def train(run: TrainingClient, steps: int, first: int = 0) -> np.ndarray:
    """Steps number first, first + 1, ... on batches of the same numbers; all logprobs seen."""
    seen = []
    for step in range(first, first + steps):
        out = run.forward_backward(batch(step))
        run.optim_step(LEARNING)
        seen.append(logprobs(out.result(GUARD)))
    return np.concatenate(seen)


def same_weights(one: AdapterState, other: AdapterState) -> bool:
    """Bit for bit, moments and step included."""
    parts = ((one.tensors, other.tensors), (one.exp_avg, other.exp_avg), (one.exp_avg_sq, other.exp_avg_sq))
    return one.step == other.step and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a) for a, b in parts
    )


def checkpoint_folder(home: Path, path: str) -> Path:
    """Where the checkpoint `tinker://RUN/KIND/NAME` lies."""
    run_id, kind, name = path.removeprefix("tinker://").split("/")
    return home / "runs" / run_id.replace(":", "_") / kind / name


def child(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that finds `tests` and has this one's environment; warnings are errors."""
    process = start_child(code, *arguments, **env)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_child(code: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """The same, under way: with pipes to talk to it."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": paths} | env
    return subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def write_signed_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """As whoever could change a checkpoint's manifest would write it, digest included where the fields are ours."""
    text = json.dumps(manifest)
    try:
        parsed = checkpoints.Manifest.model_validate_json(text)
    except ValidationError:
        pass  # not a manifest of this version; no digest can be made of it
    else:
        text = parsed.model_copy(update={"digest": checkpoints._digest(parsed)}).model_dump_json()
    (folder / "manifest.json").write_text(text)
