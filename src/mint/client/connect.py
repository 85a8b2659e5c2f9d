"""Which Service a client talks to. The one place of the SDK that knows implementations."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from pathlib import Path

from mint import settings as settings_module
from mint.engine.backend import Backend
from mint.errors import InputError, UnsupportedError
from mint.local.core import Core
from mint.local.service import LocalService
from mint.service import Service
from mint.settings import Settings

logger = logging.getLogger("mint")

EMBEDDED_TENANT = "local"

_lock = threading.Lock()
_core: Core | None = None
_core_pid: int | None = None


def make_backend(folder: Path, name: str, settings: Settings) -> Backend:
    """MinT's own decoder where it covers the model, else transformers; MINT_BACKEND decides for both."""
    # loads torch, and transformers longer still, so only when something is computed
    from mint.engine.models.config import uncovered
    from mint.engine.models.weights import read_json

    config = read_json(folder / "config.json")
    gap = uncovered(config)
    if settings.backend == "decoder" or (settings.backend is None and gap is None):
        from mint.engine.decoder_backend import DecoderBackend

        return DecoderBackend(folder, name, settings)
    from mint.engine.hf.backend import HfBackend

    reason = "MINT_BACKEND=hf" if settings.backend else f"MinT's own decoder does not cover {gap}"
    architecture = ", ".join(config.get("architectures") or [str(config.get("model_type"))])
    logger.info("%s: run through transformers (no speed claimed): %s", architecture, reason)
    return HfBackend(folder, name, settings)


def connect(base_url: str | None, api_key: str | None) -> Service:
    """The embedded service of this process. Raises UnsupportedError for a URL: there is no remote client yet."""
    global _core, _core_pid
    settings = settings_module.load()
    url = base_url or settings.base_url
    if url:
        source = "base_url" if base_url else "MINT_BASE_URL or TINKER_BASE_URL"
        raise UnsupportedError(
            f"{source}={url!r}: this version of MinT has no remote client. Leave the URL out (and unset the "
            "environment variable) to train inside this process"
        )
    with _lock:
        if _core is not None and _core_pid == os.getpid() and _core.settings != settings:
            if _core.runs or _core.samplers:
                raise InputError(
                    f"the MINT_* settings changed while runs or sampling clients are open ({_core.settings} -> "
                    f"{settings}): close the ServiceClients that made them first"
                )
            _core.close()
            atexit.unregister(_core.close)  # it would be held to the end of the process
            _core = None
        if _core is None or _core_pid != os.getpid():  # a forked child may build a service of its own
            _core, _core_pid = Core(settings, make_backend), os.getpid()
            atexit.register(_core.close)
            logger.info("MinT runs inside this process; runs and checkpoints are kept in %s", settings.home)
            if api_key or settings.api_key:
                logger.info("an API key is set and not used: there is no server in between")
        return LocalService(_core, EMBEDDED_TENANT)
