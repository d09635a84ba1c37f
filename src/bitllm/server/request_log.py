"""The outermost layer: request ids and the access log."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitllm.server.metrics import Metrics

__all__ = ["LogEntry", "RequestLog"]

access = logging.getLogger("bitllm.access")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
_CLIENT_WENT_AWAY = 499  # as nginx notes it


@dataclass(slots=True)
class LogEntry:
    """What is known of a request when it has been answered; never text of a prompt or an answer.

    Attributes:
        id: of the request; the client's own where it gave one.
        method: of HTTP.
        path: without the query.
        client: its address.
        status: that was sent; 499 = the client went away before anything could be.
        route: the path by which it is counted, "" where there is no such path.
        model: that answered.
        prompt_tokens: read.
        completion_tokens: written.
        body: the request itself, where the operator asked for that.
        disconnected: the client went away before the end.
    """

    id: str
    method: str
    path: str
    client: str
    status: int = _CLIENT_WENT_AWAY
    route: str = ""
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    body: str | None = None
    disconnected: bool = False
    started: float = field(default_factory=time.perf_counter)

    def line(self) -> str:
        """Return the entry as a line of JSON."""
        seconds = time.perf_counter() - self.started
        known: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": self.id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(seconds, 4),
            "model": self.model,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "disconnected": self.disconnected or None,
            "body": self.body,
        }
        return json.dumps({name: value for name, value in known.items() if value is not None})


class RequestLog:
    """ASGI layer that gives each request an id and a line in the log, and counts it.

    Args:
        app: what answers.
        metrics: where requests are counted.
        write: whether there is a log.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, write: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = _entry(scope)
        scope["bitllm.entry"] = entry
        try:
            await self._app(scope, receive, _noting(entry, send))
        finally:
            self._close(entry)

    def _close(self, entry: LogEntry) -> None:
        # What clients make up must not become names of figures.
        method = entry.method if entry.method in _METHODS else "other"
        route = entry.route or "other"
        self._metrics.requests.add(route=route, method=method, status=str(entry.status))
        if entry.disconnected:
            self._metrics.hung_up.add(route=route)
        if self._write:
            access.info(entry.line())


def _entry(scope: Scope) -> LogEntry:
    wanted = Headers(scope=scope).get("x-request-id", "")
    client = scope.get("client")
    return LogEntry(
        id=wanted if _ID.fullmatch(wanted) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"],
        client=client[0] if client else "",
    )


def _noting(entry: LogEntry, send: Send) -> Callable[[Message], Any]:
    async def note(message: Message) -> None:
        if message["type"] == "http.response.start":
            entry.status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = entry.id
        await send(message)

    return note
