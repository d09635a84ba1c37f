"""A thread that makes the steps of an engine by itself, and hands out what they bring."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ordered
from queue import Empty, SimpleQueue

from bitllm.engine.engine import Engine
from bitllm.engine.outputs import Chunk
from bitllm.engine.request import Request
from bitllm.engine.sequence import Sequence
from bitllm.errors import BitllmError, ConfigError

__all__ = ["EngineThread", "Feed"]


class Feed:
    """One request on its way through the engine thread to its reader.

    The engine thread writes, the reader reads; neither waits for the other, and no lock is shared.

    Attributes:
        request: what is asked for.
        since: from when its timeout counts.
        chunks: what was written and not yet read; stays empty where only the end is of interest.
        ended: nothing more will come. Written last: a reader looks at it before `chunks`.
        error: why it ended without a result, or None.
        sequences: one for each choice of the request, once the engine has them.
        paused: it waits outside of the engine until its reader has caught up.
    """

    def __init__(
        self, request: Request, notify: Callable[[], object], *, chunks: bool, since: float
    ) -> None:
        self.request = request
        self.since = since
        self.notify = notify
        self.wants_chunks = chunks
        self.chunks: deque[Chunk] = deque()
        self.ended = False
        self.error: BaseException | None = None
        self.sequences: Ordered[Sequence] = ()
        self.paused = False

    def result(self) -> Ordered[Sequence]:
        """Return the finished sequences, one for each choice.

        Raises:
            BitllmError: what went wrong instead.
        """
        if self.error is not None:
            raise self.error
        if not self.ended:
            raise RuntimeError("the request has not ended")
        return self.sequences


class EngineThread:
    """Makes steps while there is somebody to make them for, and sleeps otherwise.

    All methods return at once and may be called from any thread, also by the garbage collector:
    what they ask for is done between two steps.

    Args:
        engine: closed when the thread ends.
        max_unread: chunks that a reader may be behind. Then its sequence leaves the engine, with
            its KV blocks, and comes back when half of them are read.
    """

    def __init__(self, engine: Engine, *, max_unread: int) -> None:
        self._engine = engine
        self._max_unread = max_unread
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._feeds: dict[int, Feed] = {}
        self._refusing = False  # no more requests are taken
        self._draining = False  # those under way are completed, whoever reads
        self._stopped = False  # the loop ends
        self._finished = False  # nobody reads the inbox any more
        self._thread = threading.Thread(target=self._run, name="bitllm engine", daemon=True)
        self._thread.start()

    def check_open(self) -> None:
        """Refuse to go on where nobody would answer.

        Raises:
            ConfigError: the thread was told to end, or was left behind by a fork.
        """
        if self._refusing or not self._thread.is_alive():
            raise _closed()

    def now(self) -> float:
        """Return the time (seconds) by the clock of timeouts."""
        return self._engine.now()

    def submit(
        self,
        request: Request,
        notify: Callable[[], object],
        *,
        chunks: bool,
        since: float | None = None,
    ) -> Feed:
        """Hand a request over.

        Args:
            request: what to compute.
            notify: called by the engine thread when the first unread chunk, or the end, is there.
            chunks: whether the reader wants the text piece by piece.
            since: from when its timeout counts, by `now`; None = from now on.

        Raises:
            ConfigError: as `check_open`.
        """
        self.check_open()
        asked = self.now() if since is None else since
        feed = Feed(request, notify, chunks=chunks, since=asked)
        self._inbox.put(lambda: self._add(feed))
        if self._finished:
            self._read_inbox()
        return feed

    def cancel(self, feed: Feed) -> None:
        """Drop a request and free what it holds, after the step under way."""
        self._inbox.put(lambda: self._end(feed, _cancelled()))

    def caught_up(self, feed: Feed) -> None:
        """Tell that the reader of a paused request has read on."""
        if feed.paused and len(feed.chunks) <= self._max_unread // 2:
            self._inbox.put(lambda: self._resume(feed))

    def close(self, *, drain: bool) -> None:
        """Take no more requests and end; `drain` = only after those under way are complete.

        May be called again without `drain` when that takes too long.
        """
        self._refusing = True
        self._inbox.put(self._drain if drain else self._abort_all)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end of the thread; return whether it has come."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopped:
                if not self._has_work():
                    self._inbox.get()()
                self._read_inbox()
                if self._has_work():
                    self._step()
                self._hand_out()
                if self._draining and not self._feeds:
                    self._stopped = True
        finally:
            self._refusing = self._finished = True
            self._abort_all()
            self._read_inbox()
            self._engine.close()

    def _has_work(self) -> bool:
        for feed in self._feeds.values():  # noqa: SIM110 - in each step, mostly ended by the first
            if not feed.paused:
                return True
        return False

    def _read_inbox(self) -> None:
        while not self._inbox.empty():  # cheaper than an exception in every step
            try:
                act = self._inbox.get_nowait()
            except Empty:
                return
            act()

    def _step(self) -> None:
        try:
            self._engine.advance()
        except Exception as error:  # nobody knows whose fault it is: all of them hear of it
            for feed in list(self._feeds.values()):
                self._end(feed, error)

    def _hand_out(self) -> None:
        for feed in list(self._feeds.values()):
            failures = [each.failure for each in feed.sequences if each.failure is not None]
            for sequence in feed.sequences if feed.wants_chunks and not failures else ():
                if (chunk := sequence.take_chunk()) is not None:
                    self._hand(feed, chunk)
            if failures or all(each.finished for each in feed.sequences):
                self._end(feed, failures[0] if failures else None)

    def _hand(self, feed: Feed, chunk: Chunk) -> None:
        feed.chunks.append(chunk)
        if len(feed.chunks) == 1:
            self._notify(feed)
        if len(feed.chunks) >= self._max_unread and not (feed.paused or self._draining):
            self._pause(feed)

    def _notify(self, feed: Feed) -> None:
        try:
            feed.notify()
        except RuntimeError:  # the event loop of the reader is closed
            self._forget(feed)

    def _add(self, feed: Feed) -> None:
        if self._stopped or self._finished:
            self._end(feed, _closed())
            return
        try:
            feed.sequences = self._engine.add_choices(feed.request, feed.since)
        except BitllmError as error:
            self._end(feed, error)
            return
        self._feeds[id(feed)] = feed

    def _pause(self, feed: Feed) -> None:
        if all(sequence.finished for sequence in feed.sequences):
            return
        for sequence in feed.sequences:
            self._engine.pause(sequence)
        feed.paused = True
        # The reader may have read everything before it could see that it has to ask.
        self.caught_up(feed)

    def _resume(self, feed: Feed) -> None:
        if feed.paused and id(feed) in self._feeds:
            feed.paused = False
            for sequence in feed.sequences:
                self._engine.resume(sequence)

    def _end(self, feed: Feed, error: BaseException | None) -> None:
        if feed.ended:
            return
        self._forget(feed)
        feed.error = error
        feed.ended = True
        self._notify(feed)

    def _forget(self, feed: Feed) -> None:
        self._feeds.pop(id(feed), None)
        for sequence in feed.sequences:
            self._engine.abort(sequence)

    def _drain(self) -> None:
        self._draining = True  # a reader who has gone away must not hold up the end
        for feed in list(self._feeds.values()):
            self._resume(feed)

    def _abort_all(self) -> None:
        self._stopped = True
        for feed in list(self._feeds.values()):
            self._end(feed, _closed())


def _closed() -> ConfigError:
    return ConfigError("this model is closed", hint="load it again, or close it after its last use")


def _cancelled() -> ConfigError:
    return ConfigError("the request was cancelled")
