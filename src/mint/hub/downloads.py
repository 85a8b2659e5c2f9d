"""Files from the web, and compressed ones unpacked: made once below MINT_HOME/datasets, whole or not at all."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit

from mint.errors import DataError, HubUnreachableError, InputError, MintError
from mint.hub.package_files import sha256_of
from mint.settings import Settings

logger = logging.getLogger("mint")

MAX_BYTES = 50 * 10**9  # of a file from the web, and of what a compressed one unpacks to
CONNECT_SECONDS = 30.0  # for connecting, and for every read
_CHUNK = 1 << 20


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def url_file_name(url: str) -> str:
    return unquote(urlsplit(url).path).rpartition("/")[2]


def fetched_url(url: str, settings: Settings, *, max_bytes: int = MAX_BYTES) -> Path:
    """The file at an http or https address, downloaded on first use; the server is not asked again afterwards.

    `#sha256=HEX` at the end of the address demands that content. Raises DataError where it is another, where the file
    is larger than `max_bytes` or the server does not hand it out, HubUnreachableError where it does not answer.
    """
    address, _, fragment = url.partition("#")
    wanted = re.fullmatch(r"sha256=([0-9a-f]{64})", fragment)
    if fragment and not wanted:
        raise InputError(f"{url}: after # only sha256=HEX (64 digits) may stand, the content that is expected")
    name = re.sub(r"[^\w.-]", "_", url_file_name(address))[-100:]
    path = settings.datasets_dir / "web" / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}-{name}"
    if not path.is_file():
        logger.info("downloading %s", address)
        with settings.writing(f"downloading {address}", path), replacing(path) as file:
            _download(address, file, max_bytes)
    if wanted:
        found = sha256_of(path)
        if found != wanted[1]:
            raise DataError(
                f"{address} has sha256 {found}, expected {wanted[1]}; delete {path} to download it again, or mend the #"
            )
    return path


def unpacked(path: Path, settings: Settings, *, max_bytes: int = MAX_BYTES) -> Path:
    """The content of a .gz or .zst file as a file, unpacked on first use and again when the file has changed.

    Raises DataError where it is damaged or holds more than `max_bytes`.
    """
    state = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()[:24]
    target = settings.datasets_dir / "unpacked" / f"{key}-{path.stem}"
    if not target.is_file():
        logger.info("unpacking %s into %s", path, target)
        with settings.writing(f"unpacking {path}", target), replacing(target) as file, open_compressed(path) as source:
            _copy(lambda: _read_packed(source, path), file, max_bytes, str(path))
    return target


@contextlib.contextmanager
def open_compressed(path: Path) -> Iterator[BinaryIO]:
    """The content of a .gz or .zst file as a stream."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as source:
            yield cast(BinaryIO, source)
        return
    from pyarrow import input_stream

    with input_stream(str(path), compression="zstd") as source:
        yield source


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name `path` when the block has ended well; else nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _read_packed(source: BinaryIO, path: Path) -> bytes:
    try:
        return source.read(_CHUNK)
    except (OSError, EOFError, ValueError) as error:  # what gzip, zlib and arrow raise for damaged content
        raise DataError(
            f"{path}: cannot be unpacked, the file is damaged or not what its name says ({error})"
        ) from None


def _download(address: str, file: BinaryIO, max_bytes: int) -> None:
    # a build of handlers without file: and ftp:, to which a server could redirect otherwise
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(), urllib.request.UnknownHandler(),
    ):  # fmt: skip
        opener.add_handler(handler)
    request = urllib.request.Request(address, headers={"User-Agent": "mint-toolkit", "Accept-Encoding": "identity"})
    try:
        with opener.open(request, timeout=CONNECT_SECONDS) as answer:
            length = answer.headers.get("Content-Length")
            received = _copy(lambda: answer.read(_CHUNK), file, max_bytes, address)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"{address}: the server answers HTTP {error.code} ({error.reason}); check the address"
        ) from None
    except MintError:
        raise
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise HubUnreachableError(
            f"{address} cannot be downloaded ({reason}); check the network and proxy settings, or download it yourself "
            "and give the file"
        ) from error
    if length is not None and received != int(length):
        raise HubUnreachableError(f"{address}: the connection ended after {received:,} of {length} bytes; try again")


def _copy(read: Callable[[], bytes], file: BinaryIO, max_bytes: int, name: str) -> int:
    received = 0
    while chunk := read():
        received += len(chunk)
        if received > max_bytes:
            raise DataError(
                f"{name} holds more than {max_bytes:,} bytes, the most that is fetched or unpacked; "
                "bring it here by hand, uncompressed, or split it"
            )
        file.write(chunk)
    return received
