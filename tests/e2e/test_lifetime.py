"""Long sessions: what hundreds of runs, samplers and clients leave in memory, and what a close gives back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.clients import ROOT, child
from tests.support.tiny_models import write_tiny_model

WARM, LAST = 50, 130  # cycles with one client, and as many with a client each
LOOKS = 5  # memory swings by 2 MB between cycles, as the allocators please; what is kept lifts the least as well
# Measured: 0.3 MB; before cycle 50 the allocators may still take 2 MB once. A snapshot of this run that is never freed takes
# 50 kB, a run 200 kB, the model 500 kB, at every cycle; allowed are 25 kB, for the allocators and for safetensors, which
# keeps 70 bytes of every tensor it reads.
MAX_GROWTH_MB = 2.0

GIVES_BACK = """
    import gc, json, sys
    import psutil
    import mint
    from tests.support.clients import train

    def rss():
        gc.collect()
        return psutil.Process().memory_info().rss / 1e6

    def use(model):
        with mint.ServiceClient() as client:
            run = client.create_lora_training_client(model, rank=4, seed=0)
            train(run, 1)
            return rss()

    large = sys.argv[1]
    for _ in range(3):
        use(large)  # the libraries are loaded, the allocators have the arenas they want
    before = rss()
    during, after = zip(*((use(large), rss()) for _ in range(5)))
    print(json.dumps([before, min(during), min(after)]))  # what is kept for good is kept every time
"""


def test_two_hundred_cycles_leave_nothing(tiny_model: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "lifetime.py")]
    warm_marks, last_marks = ([str(mark - i) for i in reversed(range(LOOKS))] for mark in (WARM, LAST))
    command += ["--model", tiny_model, "--at", ",".join(warm_marks + last_marks)]
    environment = os.environ | {"MINT_DTYPE": "float32"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for clients in ("one_client", "a_client_each"):
        warm, last = ([result[clients][mark] for mark in marks] for marks in (warm_marks, last_marks))
        for key in ("open_files", "threads", "python_threads"):
            assert last[-1][key] == warm[-1][key]
        assert last[-1]["python_objects"] - warm[-1]["python_objects"] < LAST - WARM  # less than one a cycle
        assert min(look["rss_mb"] for look in last) - min(look["rss_mb"] for look in warm) < MAX_GROWTH_MB


def test_close_gives_the_model_back_to_the_system(tmp_path: Path) -> None:
    large = write_tiny_model(tmp_path / "large", hidden=512, layers=4, heads=8, kv_heads=4, intermediate=2048)
    size = (large / "model.safetensors").stat().st_size / 1e6
    done = child(GIVES_BACK, str(large), MINT_DTYPE="float32")
    assert done.returncode == 0, done.stderr
    before, during, after = json.loads(done.stdout)
    assert during - before > size > 50
    assert after - before < 0.1 * size
