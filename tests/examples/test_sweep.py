"""Eight adapters at once: each as if it were alone, and none waited for before all are under way."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mint
from mint.data import Batches
from tests.examples.load import example
from tests.support.clients import Embedded, batch

sweep = example("sweep")

STEPS = 4
CONFIGURATIONS = [(rank, rate, seed) for rank in (2, 8) for rate in (1e-3, 1e-2) for seed in (0, 1)]


def trained(model: str, configurations: list[tuple[int, float, int]]) -> list[Any]:
    service = mint.ServiceClient()
    runs = [
        sweep.Run(rank, rate, seed, service.create_lora_training_client(model, rank=rank, seed=seed))
        for rank, rate, seed in configurations
    ]
    sweep.train(runs, Batches(batch(0, 8), 3), STEPS)
    sweep.evaluate(runs, batch(1, 4))
    return runs


def test_each_adapter_has_the_losses_that_it_has_alone(world: Embedded, tiny_model: str) -> None:
    together = trained(tiny_model, CONFIGURATIONS)
    alone = [trained(tiny_model, [configuration])[0] for configuration in CONFIGURATIONS]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, atol=1e-4)
        assert one.test_nll == pytest.approx(other.test_nll, abs=1e-4)
    # the eight differ from one another, so nobody got somebody else's adapter
    assert len({round(run.test_nll, 3) for run in together}) == len(CONFIGURATIONS)
    assert all(len(run.losses) == STEPS for run in together)


def test_all_work_of_a_step_is_sent_before_any_is_waited_for(
    world: Embedded, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def watched(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, call)

    service = mint.ServiceClient()
    runs = [sweep.Run(2, 1e-3, i, service.create_lora_training_client(tiny_model, rank=2, seed=i)) for i in range(3)]
    watched(mint.TrainingClient, "forward_backward")
    watched(mint.TrainingClient, "optim_step")
    watched(mint.TrainingClient, "forward")
    watched(mint.APIFuture, "result")
    sweep.train(runs, Batches(batch(0, 3), 3), 2)
    sweep.evaluate(runs, batch(1, 2))
    one_step = ["forward_backward"] * 3 + ["optim_step"] * 3 + ["result"] * 6
    assert events == one_step * 2 + ["forward"] * 3 + ["result"] * 3


def test_the_best_is_named_and_saved(
    world: Embedded, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    options = ["--ranks", "2", "8", "--learning-rates", "1e-3", "1e-2", "--seeds", "0", "1", "--steps", "2"]
    runs = sweep.main(["--model", tiny_model, *options, "--max-length", "300", "--out", str(out)])
    assert [(run.rank, run.learning_rate, run.seed) for run in runs] == CONFIGURATIONS
    text = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +([\d.]+) +(\d) +(\d+\.\d{4}) +(\d+\.\d{4})$", text, re.MULTILINE)
    best = min(runs, key=lambda run: run.test_nll)
    assert len(rows) == 8 and sorted(float(row[4]) for row in rows) == [float(row[4]) for row in rows]
    for run in runs:
        values = (f"{run.rank}", f"{run.learning_rate:g}", f"{run.seed}", f"{run.losses[-1]:.4f}")
        assert (*values, f"{run.test_nll:.4f}") in rows
    named = re.search(r"^best: rank (\d+), learning rate ([\d.]+), seed (\d); saved (\S+)$", text, re.MULTILINE)
    assert named is not None
    assert named.groups()[:3] == (f"{best.rank}", f"{best.learning_rate:g}", f"{best.seed}")
    assert world.rest().get_weights_info_by_tinker_path(named[4]).result().lora_rank == best.rank
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
