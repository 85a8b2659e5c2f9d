"""A loopback stand-in for the Hugging Face hub, read side only, from folders on disk; standard library alone.

    root/models/OWNER/NAME/...   root/datasets/OWNER/NAME/...

    with FakeHub(root) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path / "hf_home"), cwd=tmp_path / "empty")

    python -m tests.support.fakehub ROOT [PORT]     # by hand; prints the address

The hub's clients read HF_ENDPOINT and HF_HOME once, when they are imported, and cache by commit: hence child processes,
and a commit that is derived from the content of the folder. Run children in an empty folder: a folder `OWNER/NAME` in
the current one wins over the hub in `datasets` and `transformers`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = r"[^/]+(?:/pr/\d+)?"
FILE_ROUTE = re.compile(
    rf"(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/(?:resolve|raw)/(?P<revision>{REVISION})/(?P<file>.+)"
)
API_ROUTE = re.compile(
    r"api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
    rf"(?:/(?P<verb>revision|tree|paths-info)/(?P<revision>{REVISION})(?:/(?P<folder>.*))?)?"
)


class FakeHub:
    """Serves `root` on 127.0.0.1 while the `with` block lasts.

    gated: names of repositories that everybody sees but whose files need `token`.
    requests: (method, path, Range header) of every request so far.
    """

    def __init__(self, root: Path, *, token: str = "hf_test", gated: Collection[str] = (), port: int = 0) -> None:
        self.root = Path(root).resolve()
        self.token = token
        self.gated = frozenset(gated)
        self.requests: list[tuple[str, str, str | None]] = []
        self.stalled = threading.Event()
        self._stalling = ""
        self._let_go = threading.Event()
        self._server = _Server(self, port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def env(self, hf_home: Path, **more: str) -> dict[str, str]:
        """Environment for a child process that uses this hub with the cache `hf_home`, without token or proxies."""
        return child_env(self.url, hf_home, **more)

    def stall(self, file_name: str) -> None:
        """From now on send only half of files of that name, set `stalled`, and wait until `let_go`."""
        self.stalled.clear()
        self._let_go.clear()
        self._stalling = file_name

    def let_go(self) -> None:
        self._stalling = ""
        self._let_go.set()

    def is_stalling(self, file_name: str) -> bool:
        return file_name == self._stalling

    def wait_until_let_go(self) -> None:
        self.stalled.set()
        self._let_go.wait(timeout=60)

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()
        self._server.shutdown()
        self._server.server_close()


def child_env(endpoint: str, hf_home: Path, **more: str) -> dict[str, str]:
    """This process's environment, with the given hub endpoint and cache and nothing else of Hugging Face's."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        and key.lower() not in ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    }
    return env | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(hf_home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        **more,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: FakeHub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed has closed its connection: no traceback in the test's output."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.hub.requests.append((self.command, self.path, self.headers.get("Range")))
        if match := FILE_ROUTE.fullmatch(path):
            self._serve_file(match)
        elif match := API_ROUTE.fullmatch(path):
            self._serve_api(match, parse_qs(url.query))
        else:
            self._error(404, "NotHere", "no such route")

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _serve_file(self, match: re.Match[str]) -> None:
        hub = self.server.hub
        repo = self._repo("datasets" if match["kind"] else "models", match["name"], match["revision"])
        if repo is None:
            return
        if match["name"] in hub.gated and not self._authorised():
            self._error(401, "GatedRepo", f"Access to model {match['name']} is restricted.")
            return
        file = (repo / match["file"]).resolve()
        if not file.is_file() or repo not in file.parents:
            self._error(404, "EntryNotFound", "Entry not found", commit_of(repo))
            return
        data = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": commit_of(repo),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and int(wanted[1]) < len(data):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._reply(206, data[first : last + 1], headers)
        else:
            self._reply(200, data, headers, stall_as=file.name)

    def _serve_api(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        repo = self._repo(match["kind"], match["name"], match["revision"] or "main")
        if repo is None:
            return
        headers = {"X-Repo-Commit": commit_of(repo)}
        if match["verb"] == "paths-info":
            as_json = self.body.startswith("{")
            paths = json.loads(self.body)["paths"] if as_json else parse_qs(self.body).get("paths", [])
            self._reply(200, [_entry(repo, repo / path) for path in paths if (repo / path).exists()], headers)
        elif match["verb"] == "tree":
            top = repo / (match["folder"] or "")
            if not top.is_dir():
                self._error(404, "EntryNotFound", "no such folder", commit_of(repo))
                return
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            found = sorted(top.rglob("*") if deep else top.iterdir())
            self._reply(200, [_entry(repo, path) for path in found], headers)
        else:
            self._reply(200, self._info(match["kind"], match["name"], repo), headers)

    def _info(self, kind: str, name: str, repo: Path) -> dict[str, Any]:
        files = sorted(path for path in repo.rglob("*") if path.is_file())
        info = {
            "_id": "0" * 24,
            "id": name,
            "author": name.split("/")[0],
            "sha": commit_of(repo),
            "private": False,
            "gated": "auto" if name in self.server.hub.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2025-01-01T00:00:00.000Z",
            "createdAt": "2025-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": f.relative_to(repo).as_posix(), "size": f.stat().st_size} for f in files],
        }
        return info | ({"modelId": name} if kind == "models" else {})

    def _repo(self, kind: str, name: str, revision: str) -> Path | None:
        """The repository's folder, or None after an error has been sent.

        As the real one, the hub tells strangers 401 for a repository that does not exist.
        """
        root = self.server.hub.root
        repo = (root / kind / name).resolve()
        if not repo.is_dir() or root not in repo.parents:
            self._error(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
            return None
        if revision not in ("main", commit_of(repo)):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.hub.token}"

    def _error(self, status: int, code: str, message: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self._reply(status, {"error": message}, headers | ({"X-Repo-Commit": commit} if commit else {}))

    def _reply(self, status: int, body: Any, headers: dict[str, str], *, stall_as: str = "") -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if stall_as and self.server.hub.is_stalling(stall_as):
            half = len(body) // 2
            self.wfile.write(body[:half])
            self.wfile.flush()
            self.server.hub.wait_until_let_go()
            body = body[half:]
        self.wfile.write(body)


def commit_of(repo: Path) -> str:
    """40 hex digits that change when the folder's content does."""
    files = sorted(path for path in repo.rglob("*") if path.is_file())
    stamps = [(str(f), f.relative_to(repo).as_posix(), f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    return _commit(tuple(stamps))


@functools.lru_cache(maxsize=64)
def _commit(stamps: tuple[tuple[str, str, int, int], ...]) -> str:
    digest = hashlib.sha1()
    for path, relative, *_ in stamps:
        digest.update(relative.encode() + b"\0" + hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def _entry(repo: Path, path: Path) -> dict[str, Any]:
    relative = path.relative_to(repo).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(relative.encode()).hexdigest(), "size": 0, "path": relative}
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "oid": blob, "size": len(data), "path": relative}


if __name__ == "__main__":
    with FakeHub(Path(sys.argv[1]), port=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as served:
        print(served.url, flush=True)
        threading.Event().wait()
