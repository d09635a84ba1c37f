"""An OpenAI server that says what a test tells it to, with the chat page in front."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import bitllm

PAGE = Path(bitllm.__file__).parent / "server" / "chat_page"
POLICY = "default-src 'self'; img-src 'self' data:"


def refusal(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    """Return an error in OpenAI's shape."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)


@dataclass
class ChatServer:
    """What the server says next, and what it was asked.

    Attributes:
        pieces: the deltas of an answer.
        pause: seconds before each.
        allowed: so many deltas may be sent by now.
        endless: repeat the last piece until the client leaves.
        breaks: hang up after the pieces, without an end.
        fails: send an error event after the pieces.
        refusals: answers to the next requests, instead of a stream.
        models: their names.
        requests: bodies of the chat requests.
        keys: their Authorization headers.
        left: set when a client hangs up in the middle of an answer.
    """

    url: str = ""
    pieces: list[str] = field(default_factory=lambda: ["Hello", " there", "."])
    pause: float = 0.0
    allowed: float = math.inf
    endless: bool = False
    breaks: bool = False
    fails: str | None = None
    refusals: list[Response] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["tiny"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    async def chat(self, request: Request) -> Response:
        """Answer `v1/chat/completions`."""
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        if self.refusals:
            return self.refusals.pop(0)
        return StreamingResponse(self.events(), media_type="text/event-stream")

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of an answer."""
        try:
            yield chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            for index, piece in enumerate(self.pieces):
                await asyncio.sleep(self.pause)
                while index >= self.allowed:
                    await asyncio.sleep(0.01)
                yield delta(piece)
            while self.endless:
                await asyncio.sleep(max(self.pause, 0.01))
                yield delta(self.pieces[-1])
            if self.breaks:
                return
            if self.fails:
                yield chunk(error={"message": self.fails, "type": "server_error", "code": None})
                return
            yield ": ping\n\n"
            yield chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield chunk(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 41})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise

    def app(self) -> Starlette:
        """Return the application."""

        async def page(_: Request) -> Response:
            return FileResponse(PAGE / "index.html")

        async def health(_: Request) -> Response:
            return JSONResponse({"status": "ok"})

        async def models(_: Request) -> Response:
            return JSONResponse({"data": [{"id": name} for name in self.models]})

        return Starlette(
            routes=[
                Route("/", page),
                Route("/health", health),
                Route("/v1/models", models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Mount("/chat_page", StaticFiles(directory=PAGE)),
            ]
        )


def delta(text: str) -> str:
    """Return the event of a piece of text."""
    return chunk(choices=[{"index": 0, "delta": {"content": text}}])


def chunk(**content: Any) -> str:
    """Return an event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def with_policy(app: Any) -> Any:
    """Return the application with the content security policy under which the page is served."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message["headers"], policy]
            await send(message)

        await app(scope, receive, sending if scope["type"] == "http" else send)

    return wrapped


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """Run an application in a thread; the value is its address."""
    config = uvicorn.Config(
        app, port=port, log_level="error", lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds; fail if it never does."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if holds():
            return
        pause.wait(0.02)
    raise AssertionError(f"did not hold within {seconds} s")
