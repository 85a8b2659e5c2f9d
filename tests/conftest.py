"""For every test: one thread, no network, no folder of the user's. Read by the libraries when they are imported."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True)
def mint_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh MINT_HOME, and nothing else of MinT's in the environment but one thread."""
    for name in [name for name in os.environ if name.startswith(("MINT_", "TINKER_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "mint_home"
    monkeypatch.setenv("MINT_HOME", str(home))
    monkeypatch.setenv("MINT_THREADS", "1")
    return home


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """SIGINT as in a terminal, also where the tests were started in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """For tests that call commands in this process: they set up logging, which is everybody's here."""
    loggers = [logging.getLogger(), logging.getLogger("mint")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny tied Qwen3 with its tokenizer: 384 tokens, context 512."""
    from tests.support.tiny_models import write_tiny_model

    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3"))
