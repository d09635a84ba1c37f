"""A connection that waits neither for a request nor for its reader for ever."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["HEAD_LIMIT", "Connection"]

HEAD_LIMIT = 64 * 1024
"""Bytes of the request line and the headers."""


class Connection(H11Protocol):
    """uvicorn's protocol, with an end to what it waits for without one.

    The connection is cut when the headers of a request take longer than `head_seconds`, and when a
    client leaves what was sent to it unread for `patience` seconds.
    """

    head_seconds = 15.0
    patience = 60.0
    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    @classmethod
    def with_patience(cls, seconds: float) -> type[Connection]:
        """Return a class of connections with another `patience`."""
        return type(cls.__name__, (cls,), {"patience": seconds})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Note whether the headers are complete."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop(self._head)
            self._head = None
        elif self._head is None:
            self._await_head()

    def pause_writing(self) -> None:
        """Begin to wait for the reader."""
        super().pause_writing()
        self._reader = self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop to wait for the reader."""
        self._stop(self._reader)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait for anything."""
        self._stop(self._head)
        self._stop(self._reader)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self._give_up)

    def _give_up(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE:
            self.transport.abort()

    def _stop(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()
