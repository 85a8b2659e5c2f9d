from __future__ import annotations

from typing import Any

import pytest
from tests.unit.chat.tiny_tokenizers import FAMILIES, tokenizer_of


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(family: str) -> Any:
    return tokenizer_of(family)


@pytest.fixture
def smollm2() -> Any:
    return tokenizer_of("smollm2")


@pytest.fixture
def qwen3() -> Any:
    return tokenizer_of("qwen3")
