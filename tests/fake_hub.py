"""A Hugging Face Hub on this machine: the few addresses that huggingface_hub asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class FakeHub:
    """What the Hub holds, and what it was asked for.

    Attributes:
        repos: files of each repository, by their path in it.
        gated: repositories that need the token.
        broken: answer everything with status 500.
        downloads: (repository, file) of every file sent.
        requests: path of every request.
        starts: the first byte of every weight file that was asked for.
        cuts: the next connections for weight files are closed after so many bytes.
        spoiled: weight files arrive with one bit turned over.
        without_ranges: range requests are answered with the whole file.
    """

    repos: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    token: str = "secret"
    broken: bool = False
    downloads: list[tuple[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    spoiled: bool = False
    without_ranges: bool = False
    endpoint: str = ""

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()


def git_sha1(data: bytes) -> str:
    """The name that Git, and so the cache of the Hub, has for a small file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_weights(path: str) -> bool:
    """Whether the Hub keeps such a file in its large file storage."""
    return path.endswith((".safetensors", ".gguf", ".bin"))


def _lfs(data: bytes) -> dict[str, object]:
    return {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}


def use(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let huggingface_hub, in this process, ask `hub` and keep what comes in `cache`."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@contextlib.contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port of the loopback interface."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(self.path)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        org, name, verb, revision, *rest = (parts[2:] if api else parts) + [""] * 4
        repo = f"{org}/{name}"
        if self.hub.broken:
            self._fail(500, "")
        elif repo not in self.hub.repos:
            self._fail(401, "RepoNotFound")
        elif repo in self.hub.gated and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            self._fail(403, "GatedRepo")
        elif revision not in ("main", "v1", self.hub.commit(repo)):
            self._fail(404, "RevisionNotFound")
        elif verb == "resolve":
            self._send_file(repo, "/".join(filter(None, rest)))
        else:
            self._send_json(self._info(repo) if verb == "revision" else self._tree(repo))

    def _info(self, repo: str) -> object:
        siblings = [{"rfilename": path} for path in self.hub.repos[repo]]
        return {"id": repo, "sha": self.hub.commit(repo), "siblings": siblings, "private": False}

    def _tree(self, repo: str) -> object:
        return [
            {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
            | ({"lfs": _lfs(data)} if is_weights(path) else {})
            for path, data in self.hub.repos[repo].items()
        ]

    def _send_file(self, repo: str, path: str) -> None:
        data = self.hub.repos[repo].get(path)
        if data is None:
            self._fail(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.hub.downloads.append((repo, path))
        if is_weights(path):
            self._send_weights(data, repo)
        else:
            self._send(data, {"ETag": f'"{git_sha1(data)}"'}, repo)

    def _send_weights(self, data: bytes, repo: str) -> None:
        headers = {
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
        }
        asked = self.headers["Range"]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if self.hub.spoiled:
            data = bytes([data[0] ^ 1]) + data[1:]
        if self.command == "GET":
            self.hub.starts.append(start)
        ranged = bool(asked) and not self.hub.without_ranges
        self._send(data[start:] if ranged else data, headers, repo, 206 if ranged else 200)

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, "")

    def _send(self, data: bytes, headers: dict[str, str], repo: str, status: int = 200) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.end_headers()
        if self.command != "GET":
            return
        if self.hub.cuts and "X-Linked-Size" in headers:
            self.wfile.write(data[: self.hub.cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused by the fake Hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Stay quiet."""
