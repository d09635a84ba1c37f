"""`AsyncLLM`: a loaded model for servers, written for asyncio."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from collections.abc import Sequence as Ordered
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

import numpy as np
import numpy.typing as npt

from bitllm.config import SamplingParams, as_integer
from bitllm.engine.adapters import LoadedAdapter
from bitllm.engine.engine_thread import EngineThread, Feed
from bitllm.engine.llm import (
    AT_ONCE,
    LLM,
    SamplingOptions,
    check_streams,
    completion_of,
    sampling_of,
)
from bitllm.engine.loading import EngineKeywords, load
from bitllm.engine.outputs import Chunk, Completion, Score, TextScore
from bitllm.engine.prompt import Message, Prompt, is_one
from bitllm.engine.request import Request
from bitllm.engine.scoring import Pooling
from bitllm.engine.sequence import Sequence
from bitllm.engine.token_access import TokenAccess
from bitllm.engine.tools import ToolChoice
from bitllm.errors import ConfigError

__all__ = ["AsyncLLM", "ChunkStream"]

_Result = TypeVar("_Result")


class _Bell:
    """Sets events of an event loop from other threads.

    The loop is woken once for all events that are set before it gets to them, such as those of all
    readers of a step: to wake it is a system call.

    Args:
        loop: whose events they are.

    Attributes:
        loop: as given.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._rung: deque[asyncio.Event] = deque()
        self._woken = False

    def ring(self, event: asyncio.Event) -> None:
        """Set an event, soon; may be called in any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._rung.append(event)
        if not self._woken or self.loop.is_closed():
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._answer)
            except RuntimeError:
                self._woken = False
                self._rung.clear()
                raise

    def _answer(self) -> None:
        self._woken = False  # before looking: what is appended later wakes the loop again
        while self._rung:
            self._rung.popleft().set()


class _Bells:
    """The bell of the loop that runs: a model may be used in one loop after another."""

    def __init__(self) -> None:
        self._last: _Bell | None = None

    def here(self) -> _Bell:
        """Return the bell of the running loop."""
        loop = asyncio.get_running_loop()
        bell = self._last
        if bell is None or bell.loop is not loop:
            bell = self._last = _Bell(loop)
        return bell


class AsyncLLM:
    """A model for many concurrent readers, whose steps a thread of its own makes.

        async with await AsyncLLM.load("microsoft/bitnet-b1.58-2B-4T") as llm:
            async for chunk in llm.stream("Once upon a time", max_tokens=100):
                print(chunk, end="", flush=True)

    The same words as `LLM`, with the same results. What a reader leaves (by `break`, by a cancelled
    task, by a timeout) frees its KV blocks after the step under way. A reader that is slow holds up
    nobody: when it is `max_unread` chunks behind, its sequence leaves the engine until it has read
    half of them.

    Args:
        llm: the model; from now on this object's, and closed with it.
        max_unread: chunks of a stream that may wait for its reader.

    Attributes:
        llm: as given; for its tokenizer, name, context and defaults.
    """

    def __init__(self, llm: LLM, *, max_unread: int = 64) -> None:
        as_integer("max_unread", max_unread, low=1)
        self.llm = llm
        # Threads that wait for reads: those of asyncio would all be taken by a few long reads, and
        # no prompt could be encoded meanwhile.
        self._readers = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bitllm read")
        self._thread = EngineThread(llm.engine, max_unread=max_unread)
        self._bells = _Bells()
        # Neither an object that was forgotten nor the end of the interpreter may leave a thread
        # in the middle of a step.
        self._finalizer = weakref.finalize(self, _stop, self._thread)

    @classmethod
    async def load(
        cls,
        ref: str | PathLike[str] | None = None,
        *,
        revision: str | None = None,
        max_unread: int = 64,
        **options: Unpack[EngineKeywords],
    ) -> Self:
        """Load a model in the background; arguments and errors as of `bitllm.load`."""
        as_integer("max_unread", max_unread, low=1)
        llm = await asyncio.to_thread(load, ref, revision=revision, **options)
        return cls(llm, max_unread=max_unread)

    @overload
    async def generate(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion: ...

    @overload
    async def generate(
        self,
        prompt: list[str] | list[list[int]],
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]: ...

    async def generate(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once; as `LLM.generate`."""
        sampling = sampling_of(params, options)
        self._thread.check_open()
        one = is_one(prompt)
        prompts = [prompt] if is_one(prompt) else cast("list[Prompt]", prompt)
        requests = await asyncio.to_thread(
            lambda: [self.llm.prepare(each, sampling) for each in prompts]
        )
        completions = await self._finish(requests, sampling)
        return completions[0] if one else completions

    def stream(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ChunkStream:
        """Continue a prompt, to be read by `async for`; as `LLM.stream`.

        Errors of the prompt are raised when the first chunk is asked for.
        """
        if not is_one(prompt):
            raise ConfigError("stream takes one prompt", hint="use generate for a list of prompts")
        sampling = sampling_of(params, options)
        check_streams(sampling)
        return ChunkStream(self._thread, lambda: self.llm.prepare(prompt, sampling), self._bells)

    @overload
    def chat(
        self,
        messages: str | Ordered[Message],
        *,
        stream: Literal[False] = False,
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def chat(
        self,
        messages: str | Ordered[Message],
        *,
        stream: Literal[True],
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> ChunkStream: ...

    def chat(
        self,
        messages: str | Ordered[Message],
        *,
        stream: bool = False,
        tools: Ordered[Mapping[str, Any]] = (),
        tool_choice: ToolChoice = "auto",
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Coroutine[Any, Any, Completion] | ChunkStream:
        """Answer a chat: `await` it, or with `stream=True` read it by `async for`.

        Arguments and errors as in `LLM.chat`.
        """
        sampling = sampling_of(params, options)

        def prepare() -> Request:
            return self.llm.prepare_chat(messages, sampling, tools, tool_choice)

        if not stream:
            return self._answer(prepare, sampling)
        check_streams(sampling)
        return ChunkStream(self._thread, prepare, self._bells)

    @overload
    async def score(
        self, prompt: Prompt, continuation: Prompt, *, top: int = 0, adapter: str | None = None
    ) -> Score: ...

    @overload
    async def score(
        self,
        prompt: Prompt | list[str] | list[list[int]],
        continuation: list[str] | list[list[int]],
        *,
        top: int = 0,
        adapter: str | None = None,
    ) -> list[Score]: ...

    async def score(
        self, prompt: Any, continuation: Any, *, top: int = 0, adapter: str | None = None
    ) -> Any:
        """Return how likely a continuation is after a prompt; as `LLM.score`."""
        return await self._read(
            lambda access: access.score(prompt, continuation, top=top, adapter=adapter)
        )

    async def perplexity(
        self,
        text: Prompt,
        *,
        context: int | None = None,
        stride: int | None = None,
        adapter: str | None = None,
    ) -> float:
        """Return the perplexity of a text; as `LLM.perplexity`."""
        return await self._read(
            lambda access: access.perplexity(text, context=context, stride=stride, adapter=adapter)
        )

    async def score_text(
        self,
        text: Prompt,
        *,
        context: int | None = None,
        stride: int | None = None,
        adapter: str | None = None,
    ) -> TextScore:
        """Return how well the model foresees a text; as `LLM.score_text`."""
        return await self._read(
            lambda access: access.score_text(text, context=context, stride=stride, adapter=adapter)
        )

    async def forward(
        self, token_ids: Prompt, *, start: int = 0, adapter: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the logits after each token, float32 [tokens - start, vocab]; as `LLM.forward`."""
        return await self._read(
            lambda access: access.forward(token_ids, start=start, adapter=adapter)
        )

    async def embed(
        self,
        texts: Prompt | list[str] | list[list[int]],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        adapter: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the embedding of a text, or of several; as `LLM.embed`."""
        return await self._read(
            lambda access: access.embed(
                texts, pooling=pooling, normalize=normalize, adapter=adapter
            )
        )

    async def load_adapter(self, path: str | PathLike[str], name: str | None = None) -> str:
        """Load a low-rank adapter in the background; as `LLM.load_adapter`."""
        self._thread.check_open()
        return await asyncio.to_thread(self.llm.load_adapter, path, name)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; as `LLM.unload_adapter`."""
        self._thread.check_open()
        await asyncio.to_thread(self.llm.unload_adapter, name)

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name, as of now."""
        return self.llm.adapters

    async def aclose(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Take no more requests, end and free the model. Closing twice is harmless.

        Args:
            drain: complete what is under way first; else its readers get a `ConfigError`.
            timeout: seconds after which what is still under way is dropped after all.
        """
        self._thread.close(drain=drain)
        try:
            if not await asyncio.to_thread(self._thread.join, timeout):
                self._thread.close(drain=False)
                await asyncio.to_thread(self._thread.join)
        except asyncio.CancelledError:
            self._thread.close(drain=False)
            raise
        self._readers.shutdown(wait=False)
        self._finalizer.detach()

    def close(self) -> None:
        """Do what `aclose` does, for code without an event loop; waits for the step under way."""
        self._finalizer()
        self._readers.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return repr(self.llm).replace("<LLM", "<AsyncLLM", 1)

    async def _answer(self, prepare: Callable[[], Request], sampling: SamplingParams) -> Completion:
        self._thread.check_open()
        (completion,) = await self._finish([await asyncio.to_thread(prepare)], sampling)
        return completion

    async def _finish(self, requests: list[Request], sampling: SamplingParams) -> list[Completion]:
        bell = self._bells.here()
        under_way: list[tuple[Feed, asyncio.Event]] = []
        try:
            for request in requests:
                news = asyncio.Event()
                notify = functools.partial(bell.ring, news)
                under_way.append((self._thread.submit(request, notify, chunks=False), news))
            for _, news in under_way:
                await news.wait()
            return [completion_of(feed.result(), sampling) for feed, _ in under_way]
        finally:
            for feed, _ in under_way:
                self._thread.cancel(feed)

    async def _read(self, read: Callable[[TokenAccess], _Result]) -> _Result:
        self._thread.check_open()
        access = _ThreadAccess(self.llm, self._thread)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, read, access)
        except asyncio.CancelledError:
            access.cancel()
            raise


class ChunkStream:
    """The chunks of one generation, for `async for`; made by `AsyncLLM.stream`.

    Leaving the loop, a cancelled task and `aclose` all end the generation; so does forgetting this
    object. One task at a time may read it: another one gets a `ConfigError`.
    """

    def __init__(self, thread: EngineThread, prepare: Callable[[], Request], bells: _Bells) -> None:
        self._thread = thread
        self._bells = bells
        self._prepare = prepare
        self._called = thread.now()
        self._news = asyncio.Event()
        self._feed: Feed | None = None
        self._reading = False
        self._left = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._reading:
            raise ConfigError(
                "this stream is already being read by another task",
                hint="read a stream in one task only, or make one for each",
            )
        if self._left:
            raise StopAsyncIteration
        self._reading = True
        try:
            return await self._next()
        except BaseException:
            self._leave()
            raise
        finally:
            self._reading = False

    async def aclose(self) -> None:
        """End the generation and free what it holds."""
        self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    async def start(self) -> None:
        """Have the prompt read now; else that is done when the first chunk is asked for.

        Raises:
            BitllmError: what is wrong with the prompt or its parameters.
        """
        if self._feed is None and not self._left:
            try:
                await self._submit()
            except BaseException:
                self._leave()
                raise

    async def _submit(self) -> Feed:
        self._thread.check_open()
        request = await asyncio.to_thread(self._prepare)
        notify = functools.partial(self._bells.here().ring, self._news)
        self._feed = self._thread.submit(request, notify, chunks=True, since=self._called)
        return self._feed

    async def _next(self) -> Chunk:
        feed = await self._submit() if self._feed is None else self._feed
        while True:
            self._news.clear()
            ended = feed.ended
            if feed.chunks:
                chunk = feed.chunks.popleft()
                self._thread.caught_up(feed)
                return chunk
            if ended:
                feed.result()
                raise StopAsyncIteration
            await self._news.wait()

    def _leave(self) -> None:
        self._left = True
        if self._feed is not None and not self._feed.ended:
            self._thread.cancel(self._feed)


class _ThreadAccess(TokenAccess):
    """Token access through the engine thread, by a thread that may wait."""

    def __init__(self, llm: LLM, thread: EngineThread) -> None:
        self.tokenizer, self.spec, self.context = llm.tokenizer, llm.spec, llm.context
        self._llm = llm
        self._thread = thread
        self._feeds: deque[Feed] = deque()
        self._cancelled = False

    def cancel(self) -> None:
        """Give up what is under way; the waiting thread then ends with an error."""
        self._cancelled = True
        for feed in list(self._feeds):
            self._thread.cancel(feed)

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The loaded adapters by name, as of now."""
        return self._llm.adapters

    def _run(self, requests: Iterable[Request]) -> Generator[Sequence, None, None]:
        coming = iter(requests)
        ends: deque[threading.Event] = deque()
        try:
            while True:
                for request in itertools.islice(coming, AT_ONCE - len(ends)):
                    ends.append(threading.Event())
                    self._feeds.append(self._thread.submit(request, ends[-1].set, chunks=False))
                if self._cancelled:
                    self.cancel()
                if not ends:
                    return
                ends.popleft().wait()
                yield self._feeds.popleft().result()[0]
        finally:
            for feed in self._feeds:
                self._thread.cancel(feed)


def _stop(thread: EngineThread) -> None:
    thread.close(drain=False)
    thread.join()
