"""Server-sent events: what the HTML standard calls an event stream, as OpenAI's clients read it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bitllm.server.api_error import ApiError

__all__ = ["DONE", "EventStream", "event", "until_gone"]

DONE = b"data: [DONE]\n\n"
"""The last event of a stream that has come to its end."""

_PING = b": ping\n\n"


def event(data: bytes) -> bytes:
    """Return one event that carries a JSON text of one line."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """An answer whose events are sent as they come.

    The generator is closed in any case, also when the client goes away. An error in the middle
    becomes the last event; `DONE` then does not come.

    Args:
        events: encoded events.
        explain: says what an error in the middle is to the client.
        keep_alive: seconds of silence after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        explain: Callable[[Exception], ApiError],
        *,
        keep_alive: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._explain = explain
        self._keep_alive = keep_alive
        self._sending = True
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer.

        Raises:
            ClientDisconnect: the client has gone away.
        """
        watchers = [
            asyncio.create_task(_wait_for_disconnect(receive)),
            asyncio.create_task(self._keep_open(send)),
        ]
        sender = asyncio.create_task(self._send_all(send))
        try:
            await asyncio.wait([sender, *watchers], return_when=asyncio.FIRST_COMPLETED)
            if not sender.done():
                raise ClientDisconnect
            sender.result()
        finally:
            for task in (sender, *watchers):
                task.cancel()
            await asyncio.gather(sender, *watchers, return_exceptions=True)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._note_sent()
        try:
            async for data in self._events:
                await self._send(send, data)
        except Exception as error:
            await self._send(send, event(self._explain(error).body()))
        self._sending = True
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending = True
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._note_sent()

    def _note_sent(self) -> None:
        self._sending = False
        self._sent_at = asyncio.get_running_loop().time()

    async def _keep_open(self, send: Send) -> None:
        """Break a silence by comments."""
        loop = asyncio.get_running_loop()
        while True:
            silence = loop.time() - self._sent_at
            if self._sending or silence < self._keep_alive:
                await asyncio.sleep(self._keep_alive - (0 if self._sending else silence))
            else:
                await self._send(send, _PING)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(receive: Receive, work: asyncio.Task[Response]) -> Response:
    """Return the result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """
    gone = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
