from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mint
from tests.support.clients import Embedded, embedded


@pytest.fixture
def world(mint_home: Path) -> Iterator[Embedded]:
    """An embedded service of this test's own."""
    with embedded(mint_home) as made:
        yield made


@pytest.fixture
def client(world: Embedded) -> mint.ServiceClient:
    return world.client()


@pytest.fixture
def run(client: mint.ServiceClient, tiny_model: str) -> mint.TrainingClient:
    return client.create_lora_training_client(tiny_model, rank=4, seed=0)
