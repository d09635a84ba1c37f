"""The chat page: the files of the folder `chat_page`, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["page_routes"]

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}
_HEADERS = {
    # Nothing is loaded from elsewhere, and nothing that is written into the page can run.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again, answered 304 by the ETag
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    kind: str
    etag: str


def page_routes() -> list[Route]:
    """Return a route for each file of the page, `index.html` at `/`; none where there is no page.

    The files are read once: names from the network never reach the file system.
    """
    folder = files("bitllm.server") / "chat_page"
    if not folder.is_dir():
        return []
    routes = []
    for path, file in _find(folder, ""):
        places = ["/", "/index.html"] if path == "/index.html" else [path, f"/chat_page{path}"]
        routes += [Route(place, _serve(file), methods=["GET"]) for place in places]
    return routes


def _find(folder: Traversable, prefix: str) -> list[tuple[str, _File]]:
    found: list[tuple[str, _File]] = []
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        path = f"{prefix}/{entry.name}"
        kind = next((kind for end, kind in _TYPES.items() if entry.name.endswith(end)), None)
        if entry.is_dir():
            found += _find(entry, path)
        elif kind is not None:
            content = entry.read_bytes()
            found.append((path, _File(content, kind, f'"{hashlib.sha256(content).hexdigest()}"')))
    return found


def _serve(file: _File) -> Callable[[Request], Awaitable[Response]]:
    async def serve(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": file.etag}
        known = request.headers.get("if-none-match", "")
        if file.etag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers={**headers, "Content-Type": file.kind})

    return serve
