"""How many requests are taken on, and none when the server is about to end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from bitllm.server.api_error import ApiError, closed

__all__ = ["Admission"]


class Admission:
    """Counts requests under way.

    Args:
        limit: how many may be under way, those that wait for the engine included.

    Attributes:
        limit: as given.
        under_way: how many there are.
        draining: no more are taken.
        cut: those that had not ended in time were given up.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.under_way = 0
        self.draining = False
        self.cut = False
        self._idle = asyncio.Event()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Count a request for the time of the block.

        Raises:
            ApiError: 503, the server is about to end; 429, there are too many.
        """
        if self.draining:
            raise closed()
        if self.under_way >= self.limit:
            raise ApiError(
                429,
                f"{self.under_way} requests are under way, which is the limit of this server",
                code="too_many_requests",
                headers={"Retry-After": "1"},
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._note_idle()

    def _note_idle(self) -> None:
        if self.draining and not self.under_way:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Take no more requests, wait for those under way, and return whether all have ended.

        Args:
            seconds: how long to wait at most.
        """
        self.draining = True
        self._note_idle()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
