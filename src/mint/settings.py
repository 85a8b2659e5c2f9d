"""MINT_* environment variables and MinT's folders, read here and nowhere else. Imports only `errors`."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from mint.errors import InputError, MintError, StorageError

DTYPES = ("bfloat16", "float32")
BACKENDS = ("decoder", "hf")
KERNELS = ("compiled", "torch")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks for; `None` means "MinT decides".

    home: folder of runs, checkpoints, converted models and caches (MINT_HOME, default ~/.mint).
    device: torch device string (MINT_DEVICE).
    dtype: "bfloat16" or "float32" for the base weights (MINT_DTYPE).
    num_threads: compute threads (MINT_THREADS).
    max_tokens_per_pass: tokens of one training pass (MINT_MAX_TOKENS_PER_PASS).
    recompute_layers: layers whose activations are computed again in backward instead of kept (MINT_RECOMPUTE_LAYERS).
    batch_invariant: a datum's and a sequence's numbers depend on no neighbour, in float32 too (MINT_BATCH_INVARIANT=1).
    memory_gb: memory to plan with, in GB of 1e9 bytes, instead of the machine's (MINT_MEMORY_GB).
    backend: "decoder" (MinT's own) or "hf" (transformers) for every model (MINT_BACKEND).
    kernels: "compiled" or "torch" for the decoder (MINT_KERNELS).
    cache_gb: how large the cache of conversions may grow, in GB of 1e9 bytes (MINT_CACHE_GB, default 2).
    base_url: a remote server (MINT_BASE_URL, then TINKER_BASE_URL).
    api_key: its key (MINT_API_KEY, then TINKER_API_KEY); never printed.
    """

    home: Path
    device: str | None = None
    dtype: str | None = None
    num_threads: int | None = None
    max_tokens_per_pass: int | None = None
    backend: str | None = None
    cache_gb: int = 2
    recompute_layers: int | None = None
    memory_gb: int | None = None
    batch_invariant: bool = False
    kernels: str | None = None
    base_url: str | None = None
    api_key: str | None = None

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown |= {"home": str(self.home), "api_key": "set" if self.api_key else "not set"}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def runs_dir(self) -> Path:
        return self.home / "runs"

    @property
    def models_dir(self) -> Path:
        """Packaged models after their one conversion."""
        return self.home / "models"

    @property
    def downloads_dir(self) -> Path:
        return self.home / "downloads"

    @property
    def datasets_dir(self) -> Path:
        """Data files from elsewhere, unpacked ones, and data sets made of packages."""
        return self.home / "datasets"

    @property
    def cache_dir(self) -> Path:
        """What can be made again."""
        return self.home / "cache"

    @property
    def cache_bytes(self) -> int:
        return self.cache_gb * 10**9

    @contextlib.contextmanager
    def writing(self, what: str, place: Path, num_bytes: int = 0) -> Iterator[None]:
        """Around what writes below `home`: the system's refusal becomes StorageError. `num_bytes`: how much it takes."""
        try:
            yield
        except MintError:  # some are OSErrors, too
            raise
        except OSError as error:
            # os.path, because it says no where Path raises: below a folder that may not be looked into
            where = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
            takes = f"{num_bytes / 1e6:.1f} MB are needed, " if num_bytes else ""
            raise StorageError(
                f"{what} failed, and what was saved before is kept: {error.strerror or error} "
                f"({error.filename or place}; {takes}{shutil.disk_usage(where).free / 1e6:.1f} MB are free there). "
                f"Make room in MINT_HOME ({self.home}) or make it writable, then try again; "
                "or start again with MINT_HOME set to another folder"
            ) from error


def _whole(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        allowed = "a positive whole number" if least else "a whole number"
        raise InputError(f"{name}={text!r} is not {allowed}; unset it or give one, e.g. {name}=2")
    return int(text)


def _one_of(name: str, allowed: tuple[str, ...]) -> str | None:
    text = os.environ.get(name) or None
    if text is not None and text not in allowed:
        raise InputError(
            f"{name}={text!r} is not supported; allowed: {', '.join(allowed)}, or unset to let MinT choose"
        )
    return text


def load() -> Settings:
    """Read the environment now. Raises InputError on a value that cannot be used."""
    env = os.environ
    return Settings(
        home=Path(env.get("MINT_HOME") or Path.home() / ".mint").expanduser().resolve(),
        device=env.get("MINT_DEVICE") or None,
        dtype=_one_of("MINT_DTYPE", DTYPES),
        num_threads=_whole("MINT_THREADS", 1),
        max_tokens_per_pass=_whole("MINT_MAX_TOKENS_PER_PASS", 1),
        backend=_one_of("MINT_BACKEND", BACKENDS),
        cache_gb=_whole("MINT_CACHE_GB", 1) or 2,
        recompute_layers=_whole("MINT_RECOMPUTE_LAYERS", 0),
        memory_gb=_whole("MINT_MEMORY_GB", 1),
        batch_invariant=_one_of("MINT_BATCH_INVARIANT", ("0", "1")) == "1",
        kernels=_one_of("MINT_KERNELS", KERNELS),
        base_url=env.get("MINT_BASE_URL") or env.get("TINKER_BASE_URL") or None,
        api_key=env.get("MINT_API_KEY") or env.get("TINKER_API_KEY") or None,
    )
