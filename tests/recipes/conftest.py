"""Child processes with the packaged model, which is fetched once and kept where the user's MINT_HOME is."""

import os

import pytest

from mint import settings
from mint.hub import resolve_model


@pytest.fixture(scope="session")
def packaged_home(tmp_path_factory):
    """Environment of a child: a MINT_HOME of its own that shares the converted model, all cores, no hub."""
    own = settings.load()
    resolve_model("SmolLM2-135M-Instruct", settings=own)
    home = tmp_path_factory.mktemp("home")
    (home / "models").symlink_to(own.models_dir)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINT_", "TINKER_", "OMP_"))}
    return {**kept, "MINT_HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
