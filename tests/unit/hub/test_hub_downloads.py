"""Files from the web and compressed ones: once, whole or not at all, bounded, nothing but http."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest

from mint.errors import DataError, HubUnreachableError, InputError
from mint.hub import fetched_url, open_compressed, unpacked
from mint.settings import Settings

CONTENT = b'{"text": "once upon a time"}\n' * 500


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.partition("?")[0]
        if name == "/gone.jsonl":
            self.send_error(404)
        elif name == "/elsewhere.jsonl":
            self._send(302, {"Location": "/a.jsonl"}, b"")
        elif name == "/passwords.jsonl":
            self._send(302, {"Location": "file:///etc/passwd"}, b"")
        elif name == "/short.jsonl":
            self._send(200, {"Content-Length": str(len(CONTENT) + 1)}, CONTENT)
        else:
            self._send(200, {"Content-Length": str(len(CONTENT))}, CONTENT)

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def left(settings: Settings) -> list[Path]:
    return [path for path in settings.home.rglob("*") if path.is_file()]


def test_a_file_is_downloaded_once_and_keeps_its_name(server: Server, settings: Settings) -> None:
    url = f"{server.url}/some/a.jsonl?x=1"
    path = fetched_url(url, settings)
    assert path.read_bytes() == CONTENT and path.name.endswith("-a.jsonl")
    assert fetched_url(url, settings) == path and server.asked == ["/some/a.jsonl?x=1"]
    assert fetched_url(f"{server.url}/some/a.jsonl?x=2", settings) != path


def test_redirections_are_followed_within_http_only(server: Server, settings: Settings) -> None:
    assert fetched_url(f"{server.url}/elsewhere.jsonl", settings).read_bytes() == CONTENT
    with pytest.raises(DataError, match="the server answers HTTP 302"):
        fetched_url(f"{server.url}/passwords.jsonl", settings)
    assert len(left(settings)) == 1


def test_the_content_can_be_demanded(server: Server, settings: Settings) -> None:
    good, bad = hashlib.sha256(CONTENT).hexdigest(), "0" * 64
    assert fetched_url(f"{server.url}/a.jsonl#sha256={good}", settings).read_bytes() == CONTENT
    with pytest.raises(DataError, match=f"/a.jsonl has sha256 {good}, expected {bad}; delete .* to download it again"):
        fetched_url(f"{server.url}/a.jsonl#sha256={bad}", settings)
    with pytest.raises(InputError, match=r"after # only sha256=HEX \(64 digits\) may stand"):
        fetched_url(f"{server.url}/a.jsonl#part", settings)
    assert server.asked == ["/a.jsonl"]


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("gone.jsonl", DataError, "gone.jsonl: the server answers HTTP 404"),
        ("short.jsonl", HubUnreachableError, "the connection ended after 14,500 of 14501 bytes; try again"),
    ],
)
def test_a_failed_download_leaves_nothing(
    name: str, kind: type[Exception], error: str, server: Server, settings: Settings
) -> None:
    with pytest.raises(kind, match=error):
        fetched_url(f"{server.url}/{name}", settings)
    assert left(settings) == []


def test_a_server_that_is_not_there_is_named(server: Server, settings: Settings) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(HubUnreachableError, match=rf"{server.url}/a\.jsonl cannot be downloaded .*give the file"):
        fetched_url(f"{server.url}/a.jsonl", settings)
    assert left(settings) == []


def test_a_file_that_is_too_large_is_given_up(server: Server, settings: Settings) -> None:
    with pytest.raises(DataError, match="holds more than 1,000 bytes, the most that is fetched or unpacked"):
        fetched_url(f"{server.url}/a.jsonl", settings, max_bytes=1000)
    assert left(settings) == []


def packed(path: Path, content: bytes) -> Path:
    """Two members (gzip) or frames (zstd), as parallel compressors write them."""
    parts = content[:5000], content[5000:]
    codec = pa.Codec("zstd")
    path.write_bytes(b"".join(
        gzip.compress(part) if path.suffix == ".gz" else codec.compress(part, asbytes=True) for part in parts
    ))  # fmt: skip
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_unpacked_once_and_again_when_they_change(
    suffix: str, tmp_path: Path, settings: Settings
) -> None:
    path = packed(tmp_path / f"a.jsonl{suffix}", CONTENT)
    target = unpacked(path, settings)
    assert target.read_bytes() == CONTENT and target.name.endswith("-a.jsonl")
    made = target.stat().st_mtime_ns
    assert unpacked(path, settings) == target and target.stat().st_mtime_ns == made
    assert unpacked(packed(path, CONTENT * 2), settings).read_bytes() == CONTENT * 2
    with open_compressed(path) as stream:
        assert stream.read() == CONTENT * 2


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_or_huge_one_is_refused_and_leaves_nothing(suffix: str, tmp_path: Path, settings: Settings) -> None:
    path = packed(tmp_path / f"a.jsonl{suffix}", CONTENT)
    with pytest.raises(DataError, match="holds more than 999 bytes"):
        unpacked(path, settings, max_bytes=999)
    whole = path.read_bytes()
    for damaged in (b"not compressed at all", whole[:-3]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: cannot be unpacked, the file is damaged"):
            unpacked(path, settings)
    assert left(settings) == []
