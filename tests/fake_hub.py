"""A Hugging Face Hub on this machine: the few addresses that huggingface_hub asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """What the Hub holds, and what it was asked for.

    Attributes:
        repos: files of each repository, by their path in it.
        gated: repositories that need the token.
        broken: answer everything with status 500.
        downloads: (repository, file) of every file sent.
    """

    repos: dict[str, dict[str, bytes]]
    gated: frozenset[str] = frozenset()
    token: str = "secret"
    broken: bool = False
    downloads: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()


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
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in self.hub.repos[repo].items()
        ]

    def _send_file(self, repo: str, path: str) -> None:
        data = self.hub.repos[repo].get(path)
        if data is None:
            self._fail(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.hub.downloads.append((repo, path))
        self._send(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, repo)

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, "")

    def _send(self, data: bytes, headers: dict[str, str], repo: str) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused by the fake Hub")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Stay quiet."""
