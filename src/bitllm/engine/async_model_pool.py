"""`AsyncModelPool`: several models in one server, loaded beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from os import PathLike
from types import TracebackType
from typing import Self

from bitllm.config import EngineOptions, as_integer
from bitllm.engine.async_llm import AsyncLLM
from bitllm.engine.model_pool import PoolOfModels, open_model
from bitllm.engine.residency import Admit, LoadInterrupted, ModelKind, ModelSource

__all__ = ["AsyncModelPool"]

_LOADS = 8  # at once; more of them wait


class AsyncModelPool(PoolOfModels[AsyncLLM]):
    """Several models for many concurrent readers; what `ModelPool` is, for asyncio.

        async with bitllm.AsyncModelPool({"a": "org/a", "b": "org/b"}, known_only=True) as models:
            async with models.lease("a") as llm:
                async for chunk in llm.stream("Once upon a time"):
                    print(chunk, end="", flush=True)

    The event loop never waits for a load, nor for an unloading. A task that is cancelled while it
    waits for a load leaves the load to go on, for others and for later.

    Args:
        models: as in `PoolOfModels`, and so all others but `max_unread`.
        memory_limit: as in `PoolOfModels`.
        keep_alive: as in `PoolOfModels`.
        wait: as in `PoolOfModels`.
        known_only: as in `PoolOfModels`.
        options: as in `PoolOfModels`.
        max_unread: as in `AsyncLLM`, for each model.
    """

    def __init__(
        self,
        models: Mapping[str, str | PathLike[str] | None] | None = None,
        *,
        memory_limit: int | str | None = None,
        keep_alive: float | None = None,
        wait: float = 0.0,
        known_only: bool = False,
        options: EngineOptions | None = None,
        max_unread: int = 64,
    ) -> None:
        self._max_unread = as_integer("max_unread", max_unread, low=1)
        self._loaders = ThreadPoolExecutor(_LOADS, thread_name_prefix="bitllm load")
        super().__init__(
            models,
            memory_limit=memory_limit,
            keep_alive=keep_alive,
            wait=wait,
            known_only=known_only,
            options=options,
        )

    def _kind(self) -> ModelKind[AsyncLLM]:
        max_unread = self._max_unread

        def load(source: ModelSource, admit: Admit) -> AsyncLLM:
            return AsyncLLM(open_model(source, admit), max_unread=max_unread)

        return ModelKind(load, AsyncLLM.close, lambda llm: llm.llm.engine)

    @asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[AsyncLLM]:
        """Keep a model in memory for the time of an `async with` block; loaded if it is not.

        Arguments and errors as in `ModelPool.lease`.
        """
        while True:
            claim = self._claim(name)
            try:
                if claim.must_load:
                    self._loaders.submit(self._residency.load, claim.resident)
                llm = await asyncio.wrap_future(claim.resident.loaded)
                break
            except LoadInterrupted:
                claim.release()
            except BaseException:
                claim.release()
                raise
        try:
            yield llm
        finally:
            claim.release()

    async def unload(self, name: str) -> bool:
        """Unload a model now; return False if it is in use, or is not loaded."""
        return await asyncio.to_thread(self._unload, name)

    async def aclose(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Unload all models, and load nothing more; twice is harmless.

        Args:
            drain: complete what is under way first, as `AsyncLLM.aclose` does.
            timeout: seconds after which what is still under way is dropped after all.
        """
        if drain:
            loaded = self._residency.refuse()
            await asyncio.gather(*(each.aclose(drain=True, timeout=timeout) for each in loaded))
        await asyncio.to_thread(self._residency.close)
        self._loaders.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
