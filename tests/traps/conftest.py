from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import mint
from tests.unit.chat.tiny_tokenizers import tokenizer_of

FAMILY_NAMES = ("smollm2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2")


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str) -> Any:
    return tokenizer_of(family)


@pytest.fixture
def qwen3() -> Any:
    return tokenizer_of("qwen3")


@pytest.fixture
def smollm2() -> Any:
    return tokenizer_of("smollm2")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[mint.ServiceClient]:
    monkeypatch.setenv("MINT_DTYPE", "float32")
    with mint.ServiceClient() as made:
        yield made


@pytest.fixture
def run(service: mint.ServiceClient, tiny_model: str) -> mint.TrainingClient:
    return service.create_lora_training_client(tiny_model, rank=4, seed=0)
