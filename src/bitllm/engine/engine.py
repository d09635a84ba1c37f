"""The step loop: what is scheduled becomes a batch, the batch tokens, the tokens text."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import cast

import numpy as np

from bitllm.adapter import Adapter
from bitllm.backends.base import KV_BLOCK_SIZE, Decoder, OutputKind, StepOutput
from bitllm.engine.adapters import AdapterTable, LoadedAdapter
from bitllm.engine.batch import BatchBuilder
from bitllm.engine.blocks import BlockPool
from bitllm.engine.outputs import Chunk, TokenLogprob
from bitllm.engine.readout import Rows
from bitllm.engine.request import Request
from bitllm.engine.scheduler import Run, Scheduler
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import Speculation
from bitllm.engine.stats import EngineStats, StepCounts, take_stats
from bitllm.engine.text import Detokenizer
from bitllm.errors import ConfigError, ContextOverflowError, QuantizationError

__all__ = ["Choices", "Engine"]

_decodes = attrgetter("decodes")


class Choices(list[Sequence]):
    """The choices of a request, for as long as somebody wants them."""

    __slots__ = ("__weakref__",)


class _Owner(weakref.ref[Choices]):
    """Notices that the `Choices` it refers to have gone.

    An interrupt may arrive between any two lines of Python, also where choices were queued and
    nobody knows of them yet, or where they are about to be aborted. The interpreter calls the
    callback of this reference without a line of Python. Whoever has a sequence in the engine holds
    it; this does not, so that what was read of a prompt is freed with the last who wants it.
    """

    sequences: Ordered[weakref.ref[Sequence]] = ()


class Engine:
    """Runs requests on a decoder, all of them together, from any number of threads.

    There is no thread of its own: whoever waits for a sequence takes the lock and makes a step,
    which moves the sequences of the others too. A step that breaks off (Ctrl-C, an error of the
    decoder) leaves the engine usable: the sequences still wanted are computed again.

    Args:
        decoder: a loaded model; the engine closes it.
        make_detokenizer: returns a fresh detokenizer for a new sequence.
        max_batch_tokens: most token rows of a step, as the decoder was loaded.
        prefix_cache: keep full KV blocks for prompts that begin alike; see `EngineOptions`.
        adapter_room: bytes that adapters may take together; None = what the machine has.
        speculation: decides which guesses at coming tokens are computed on trial; None = none.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        decoder: Decoder,
        make_detokenizer: Callable[[], Detokenizer],
        *,
        max_batch_tokens: int,
        prefix_cache: bool = True,
        adapter_room: int | None = None,
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoder = decoder
        self._make_detokenizer = make_detokenizer
        self._clock = clock
        self._pool = BlockPool(decoder.kv_capacity)
        self._scheduler = Scheduler(self._pool, max_batch_tokens, prefix_cache=prefix_cache)
        self._adapters = AdapterTable(decoder, adapter_room)
        self._speculation = Speculation((), 0, max_batch_tokens)
        if speculation is not None:
            self._speculation = speculation
        self._deadlines: dict[Sequence, float] = {}
        self._next_deadline = math.inf  # none is earlier
        self._counts = StepCounts()
        self._batches = BatchBuilder(decoder.spec.vocab_size)
        # Reentrant, because the garbage collector may close a stream, and so abort its sequence, in
        # the middle of a step of the same thread. Such aborts wait in `_aborted`.
        self._lock = threading.RLock()
        self._changing = False
        self._refusing = False  # no more requests are taken
        self._closed = False
        self._held: set[Sequence] = set()  # added, and not yet aborted
        self._last_used = time.perf_counter()
        self._aborted: deque[Sequence] = deque()
        self._owners: dict[int, _Owner] = {}  # by their ids: choices are a list, without a hash
        self._left: deque[weakref.ref[Choices]] = deque()  # owners of what nobody holds any more
        _engines.add(self)

    @property
    def free_blocks(self) -> int:
        """KV blocks that no sequence holds."""
        return self._pool.available

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def held(self) -> int:
        """Sequences that somebody has here: added and not yet aborted, finished or not."""
        return len(self._held)

    @property
    def last_used(self) -> float:
        """When the last of them was aborted, or the engine made, by `time.perf_counter`."""
        return self._last_used

    @property
    def adapters(self) -> dict[str, LoadedAdapter]:
        """The adapters that requests can ask for, by name."""
        return self._adapters.loaded

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Load an adapter under this name, between two steps.

        Raises:
            ConfigError: the name is in use, or the engine is closed.
            TensorShapeError: the adapter was made for another architecture.
            InsufficientMemoryError: it does not fit.
        """
        with self._lock:
            self._check_open()
            self._adapters.load(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter's name away; its memory is freed when nobody uses it any more.

        Raises:
            ConfigError: no adapter has this name, or the engine is closed.
        """
        with self._lock:
            self._check_open()
            self._adapters.unload(name)

    def add(self, request: Request) -> Sequence:
        """Queue a request of one choice; whoever adds it must `abort` it in the end.

        Raises:
            ConfigError: the engine is closed.
            ContextOverflowError: the request needs more KV blocks than there are.
        """
        (sequence,) = self._add(request)
        return sequence

    def now(self) -> float:
        """Return the time (seconds) by the clock of timeouts."""
        return self._clock()

    def add_choices(self, request: Request, since: float | None = None) -> Choices:
        """Queue a request and return its choices, each to be aborted in the end, finished or not.

        When the returned object is forgotten, so are they.

        Args:
            request: what is asked for.
            since: from when its timeout counts, by `now`; None = from now on.

        Raises:
            ConfigError: also where the request's adapter was unloaded meanwhile.
            ContextOverflowError: as in `add`.
        """
        choices = Choices()
        self._add(request, choices, since)
        return choices

    def _add(
        self, request: Request, owned: Choices | None = None, since: float | None = None
    ) -> list[Sequence]:
        # The last token is drawn, but never computed.
        longest = len(request.prompt_ids) + max(0, request.max_tokens - 1)
        if Sequence.blocks_for(longest) > self._pool.capacity:
            raise ContextOverflowError(
                f"prompt and max_tokens need {longest} positions of KV cache, "
                f"but it holds {self._pool.capacity * KV_BLOCK_SIZE}",
                hint="lower max_tokens, or load the model with more kv_tokens",
            )
        rows = None if request.readout is None else Rows(request.readout, self._decoder.spec)
        choices = [
            Sequence(request, self._make_detokenizer, index, rows)
            for index in range(request.choices)
        ]
        with self._lock:
            self._check_open()
            if owned is not None:
                owned += choices
                owner = _Owner(owned, self._left.append)
                owner.sequences = [weakref.ref(each) for each in choices]
                self._owners[id(owner)] = owner
            if request.adapter is not None:
                self._adapters.hold(request.adapter, choices)
            with self._change():
                self._held.update(choices)
                self._scheduler.add(*choices)
                self._set_deadlines(choices, self._clock() if since is None else since)
        return choices

    def finish(self, sequence: Sequence) -> None:
        """Make steps until the sequence has ended.

        Raises:
            ConfigError: the engine is closed, or the request allows no token at all.
            CheckpointError: the model computes no numbers.
        """
        while not sequence.finished:
            with self._lock:
                self._check_open()
                self._mend()
                if not sequence.finished:
                    self._step()
        if sequence.failure is not None:
            raise sequence.failure

    def next_chunk(self, *sequences: Sequence) -> Chunk | None:
        """Make steps until one of the sequences has a chunk, and return it; None after the last.

        Raises:
            ConfigError, CheckpointError: as in `finish`.
        """
        while True:
            with self._lock:
                self._check_open()
                self._mend()
                for sequence in sequences:
                    if sequence.failure is not None:
                        raise sequence.failure
                    if (chunk := sequence.take_chunk()) is not None:
                        return chunk
                if all(sequence.finished for sequence in sequences):
                    return None
                self._step()

    def advance(self) -> bool:
        """Make a step for whoever has sequences here; return whether there was anything to do.

        Raises:
            ConfigError: the engine is closed.
        """
        with self._lock:
            self._check_open()
            self._settle()  # else they would be counted, though there is no step to make
            if len(self._scheduler) == 0:
                return False
            self._step()
            return True

    def pause(self, sequence: Sequence) -> None:
        """Let a sequence make no steps and hold no blocks until `resume`."""
        with self._lock, self._change():
            self._scheduler.remove(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Queue a paused sequence again, at its rank; what is not kept of it is computed again."""
        with self._lock, self._change():
            if not sequence.finished:
                self._scheduler.put_back(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks at once."""
        self._aborted.append(sequence)
        with self._lock:
            if not self._changing:
                self._settle()

    def stats(self) -> EngineStats:
        """Return the figures of this moment, without waiting for a step that is under way."""
        if self._lock.acquire(blocking=False):
            try:
                if not self._changing:  # else a step of this very thread is under way
                    self._settle()
            finally:
                self._lock.release()
        return take_stats(self._pool, self._scheduler, self._counts)

    def hold(self) -> None:
        """Wait for the step under way and let no other begin until `let_go`; before a fork."""
        self._lock.acquire()

    def let_go(self) -> None:
        """Undo `hold`, in the same thread or in its copy in a child process."""
        self._lock.release()

    def retire(self) -> bool:
        """Take no more requests, unless somebody has one here; return whether so. Never waits."""
        if not self._lock.acquire(blocking=False):
            return False  # somebody makes a step
        try:
            self._settle()
            self._refusing = self._closed or not self._held
            return self._refusing
        finally:
            self._lock.release()

    def close(self) -> None:
        """Forget all sequences and close the decoder."""
        with self._lock:
            self._refusing = True
            if not self._closed:
                self._closed = True
                self._scheduler.restart()
                self._adapters.clear()
                self._decoder.close()
                self._speculation.close()

    def _check_open(self) -> None:
        if self._refusing:
            raise ConfigError(
                "this model is closed", hint="load it again, or close it after its last use"
            )

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Say that the scheduler is being changed, so that a change cut short is noticed."""
        self._settle()
        self._changing = True
        yield
        self._changing = False

    def _mend(self) -> None:
        """Compute everything again after a change that broke off.

        An interrupt may arrive before any line, here too; whoever comes next then finds `_changing`
        still set. It is not set by anybody else, for who changes something holds the lock.
        """
        if self._changing:
            self._scheduler.restart()
            self._speculation.restart()
            self._changing = False

    def _settle(self) -> None:
        """Mend what broke off, and remove what is not wanted any more.

        A sequence stays in its queue until it is gone.
        """
        self._mend()
        if self._left or self._aborted:
            self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        self._changing = True
        while self._left:
            owner = cast("_Owner", self._left[0])
            for reference in owner.sequences:
                if (sequence := reference()) is not None:
                    self._remove(sequence)
            self._owners.pop(id(owner), None)
            self._left.popleft()
        while self._aborted:
            self._remove(self._aborted[0])
            self._aborted.popleft()
        self._changing = False

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._speculation.forget(sequence)
        self._deadlines.pop(sequence, None)
        self._adapters.let_go(sequence)
        self._held.discard(sequence)
        self._last_used = time.perf_counter()

    def _set_deadlines(self, choices: list[Sequence], since: float) -> None:
        timeout = choices[0].request.timeout
        if timeout is not None:
            deadline = since + timeout
            self._next_deadline = min(deadline, self._next_deadline)
            self._deadlines.update(dict.fromkeys(choices, deadline))

    def _end_overdue(self) -> bool:
        """End the sequences whose time is up; return whether there were any."""
        if not self._deadlines or (now := self._clock()) < self._next_deadline:
            return False
        over = [each for each, deadline in self._deadlines.items() if deadline <= now]
        overdue = [each for each in over if not each.finished]
        for sequence in overdue:
            sequence.expire()
            self._scheduler.remove(sequence)
        for sequence in over:
            del self._deadlines[sequence]
        self._next_deadline = min(self._deadlines.values(), default=math.inf)
        return bool(overdue)

    def _step(self) -> None:
        try:
            self._settle()
            self._changing = True
            overdue = self._end_overdue()
            runs = self._scheduler.schedule()
            if runs:
                self._compute(runs)
            elif not overdue:
                raise RuntimeError("a sequence was waited for that is not in the engine")
            self._changing = False
        finally:
            self._settle()

    def _compute(self, runs: list[Run]) -> None:
        decoding = all(map(_decodes, runs))
        guessing = self._speculation.lengthen(runs, self._scheduler) if decoding else runs
        plain = decoding and guessing is runs  # as most steps are
        began = self._clock()
        for run in () if decoding else runs:
            run.sequence.started(began)
        copies = [run.copy for run in runs if run.copy is not None]
        if copies:
            self._decoder.copy_blocks(np.array(copies, np.int32))
        if plain:
            output = self._decoder.forward(self._batches.build_decoding(runs))
        else:
            runs, output = self._forward(guessing)
        now = self._clock()
        if decoding:
            self._speculation.observe(runs, now - began)
        if plain:
            self._apply_decoded(runs, output, now)
        else:
            self._apply(runs, output, now)

    def _forward(self, runs: list[Run]) -> tuple[list[Run], StepOutput]:
        """Return what these runs bring; without their guesses if those cannot be computed."""
        try:
            return runs, self._decoder.forward(self._batches.build(runs))
        except QuantizationError:
            if not any(run.draft for run in runs):
                raise
            # The text might never go where a wrong guess goes.
            for run in runs:
                self._scheduler.shorten(run.sequence)
            runs = [replace(run, draft=()) for run in runs]
            return runs, self._decoder.forward(self._batches.build(runs))

    def _apply_decoded(self, runs: list[Run], output: StepOutput, now: float) -> None:
        """Do what `_apply` does, sooner, for runs that decode and have no guesses."""
        self._counts.steps += 1
        self._counts.decoded += len(runs)
        for row, (run, token) in enumerate(zip(runs, output.sampled.tolist(), strict=True)):
            sequence = run.sequence
            self._scheduler.advance(run)
            self._take_token(sequence, token, output, row, now)
            if sequence.finished:
                self._scheduler.remove(sequence)

    def _apply(self, runs: list[Run], output: StepOutput, now: float) -> None:
        self._counts.count(runs)
        sampling = [(sequence, run.draft) for run in runs for sequence in run.drawers]
        self._read_rows(runs, output, len(output.sampled), now)
        for run in runs:
            self._scheduler.advance(run)
        for sequence in [run.sequence for run in runs if run.sequence.finished]:
            for each in [*sequence.followers, sequence]:
                self._scheduler.remove(each)
        for sequence, _ in sampling:
            if sequence.followers and sequence.failure is None:
                self._scheduler.fork(sequence)
        row = 0
        for sequence, draft in sampling:
            rows, row = range(row, row + 1 + len(draft)), row + 1 + len(draft)
            if sequence.failure is not None:  # the scores of its prompt were no numbers
                continue
            accepted = self._append(sequence, draft, output, rows, now)
            if draft:
                self._accept(sequence, len(draft), accepted)
            if sequence.finished:
                self._scheduler.remove(sequence)

    def _append(
        self, sequence: Sequence, draft: Ordered[int], output: StepOutput, rows: range, now: float
    ) -> int:
        """Take a token from the row of the last known one and of each right guess.

        Returns:
            How many guesses were right, and the text went on after them.
        """
        tokens = output.sampled[rows.start : rows.stop].tolist()
        for count, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            self._take_token(sequence, token, output, row, now)
            if sequence.finished or (count < len(draft) and token != draft[count]):
                return count
        return len(draft)

    def _take_token(
        self, sequence: Sequence, token: int, output: StepOutput, row: int, now: float
    ) -> None:
        if token < 0:
            sequence.fail()
            return
        logprob = None
        if sequence.request.top_logprobs >= 0:
            logprob = _logprob(output, row, token, sequence.request.top_logprobs)
        sequence.append(token, logprob, now)

    def _accept(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Note how many guesses were right: the rows of the others are as if never computed."""
        sequence.drafted_tokens += drafted
        sequence.accepted_tokens += accepted
        self._counts.accepted += accepted
        self._scheduler.advance(Run(sequence, accepted))
        self._scheduler.shorten(sequence)

    def _read_rows(self, runs: list[Run], output: StepOutput, scored: int, now: float) -> None:
        """Hand out what the rows of prompts have brought; `scored` SAMPLE rows are before them."""
        taken = {OutputKind.HIDDEN: 0, OutputKind.LOGITS: 0, OutputKind.SCORE: scored}
        for run in runs:
            sequence, rows, count = run.sequence, run.sequence.rows, len(run.read_rows)
            if rows is None:
                continue
            if count > 0:
                kind = rows.readout.kind
                part = slice(taken[kind], taken[kind] + count)
                taken[kind] = part.stop
                self._take_rows(sequence, rows, output, part)
            if run.length == sequence.pending:
                for each in [sequence, *sequence.followers]:
                    each.read(now)

    def _take_rows(self, sequence: Sequence, rows: Rows, output: StepOutput, part: slice) -> None:
        if rows.readout.kind != OutputKind.SCORE:
            of_kind = output.hidden if rows.readout.kind == OutputKind.HIDDEN else output.logits
            rows.take(of_kind[part])
            return
        if np.isnan(output.logprobs[part]).any():
            for each in [sequence, *sequence.followers]:
                each.fail()
        rows.take(output.logprobs[part], output.top_ids[part], output.top_logprobs[part])


def _logprob(output: StepOutput, index: int, token: int, top: int) -> TokenLogprob:
    ids = output.top_ids[index, :top].tolist()
    values = output.top_logprobs[index, :top].astype(np.float64).tolist()
    return TokenLogprob(token, float(output.logprobs[index]), tuple(zip(ids, values, strict=True)))


# A child process has only the thread that forked: a lock that another one held, in Python or in the
# decoder, would stay locked there for ever. So a fork waits until no step is under way.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_held = threading.local()


def _hold_all() -> None:
    _held.engines = sorted(_engines, key=id)  # in one order, whoever forks
    for engine in _held.engines:
        engine.hold()


def _let_go_all() -> None:
    for engine in _held.__dict__.pop("engines", ()):
        engine.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_all, after_in_parent=_let_go_all, after_in_child=_let_go_all)
