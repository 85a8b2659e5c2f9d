from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import Embedded, embedded


@pytest.fixture
def world(mint_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embedded]:
    """An embedded service of the test's own (float32, one thread), which every ServiceClient() of the test gets."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    with embedded(mint_home) as made:
        monkeypatch.setattr("mint.client.service_client.connect", lambda base_url, api_key: made.service())
        yield made
