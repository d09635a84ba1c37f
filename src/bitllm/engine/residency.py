"""Which models are in memory: one budget, claims on those in use, the least recently used go first.

A model is *claimed* before it is loaded, and nobody unloads what is claimed. So whoever waits for a
load and whoever carries it out need no word with each other afterwards, and a waiter that gives up
just drops its claim. Nothing slow happens under the lock: files are read, weights loaded and models
closed outside of it, so a model that is being loaded holds up only those who want that one.

Bytes are those of the memory plan: what a model may come to take, not what it has taken so far.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from bitllm.config import EngineOptions
from bitllm.engine.engine import Engine
from bitllm.engine.memory_plan import (
    PROCESS_BYTES,
    MemoryPlan,
    available_memory,
    format_bytes,
)
from bitllm.errors import ConfigError, InsufficientMemoryError

__all__ = ["Admit", "Claim", "LoadInterrupted", "ModelKind", "ModelSource", "Residency", "Resident"]

Handle = TypeVar("Handle")
Admit = Callable[[str, MemoryPlan], None]

_LOOK_AGAIN = 0.05  # seconds; the end of a request does not tell anybody


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What is loaded: a reference as in `bitllm.load`, and how."""

    ref: str | None
    revision: str | None
    options: EngineOptions


@dataclass(frozen=True, slots=True)
class ModelKind(Generic[Handle]):
    """What a loaded model is: an `LLM`, an `AsyncLLM`.

    Attributes:
        load: loads a source. Calls the function it is given with the model's name and plan before
            it reads weights, and passes on its errors.
        close: frees a loaded model.
        engine_of: returns the engine of a loaded model.
    """

    load: Callable[[ModelSource, Admit], Handle]
    close: Callable[[Handle], None]
    engine_of: Callable[[Handle], Engine]


class LoadInterrupted(Exception):
    """Whoever loaded the model was interrupted; somebody else may try again."""


class Resident(Generic[Handle]):
    """A model in memory, or on its way there.

    Attributes:
        name: the name by which it was first asked for.
        source: what is loaded.
        loaded: comes to hold the loaded model, or why there is none.
        claims: how many have it in use.
        plan: its memory, from the moment on when room was made for it.
        engine: once it is loaded, what runs its requests.
        used: when it was last claimed or given back, by `time.perf_counter`.
    """

    def __init__(self, name: str, source: ModelSource) -> None:
        self.name = name
        self.source = source
        self.loaded: Future[Handle] = Future()
        self.loaded.set_running_or_notify_cancel()  # nobody who waits may cancel it
        self.begun = False
        self.claims = 0
        self.plan: MemoryPlan | None = None
        self.engine: Engine | None = None
        self.used = time.perf_counter()

    @property
    def nbytes(self) -> int:
        """Bytes planned for it, without what the process takes anyway."""
        return 0 if self.plan is None else self.plan.total - PROCESS_BYTES

    @property
    def requests(self) -> int:
        """Sequences that somebody has in its engine."""
        return 0 if self.engine is None else self.engine.held

    @property
    def idle(self) -> bool:
        """Whether it is loaded and nobody uses it."""
        return self.engine is not None and self.claims == 0 and self.requests == 0

    @property
    def last_used(self) -> float:
        """When somebody used it last, by `time.perf_counter`."""
        return self.used if self.engine is None else max(self.used, self.engine.last_used)


class Claim(Generic[Handle]):
    """The right to a model until `release`, also while it is still to be loaded.

    Attributes:
        resident: the model.
        must_load: whoever made this claim has to call `Residency.load` with it.
    """

    def __init__(
        self, residency: Residency[Handle], resident: Resident[Handle], must_load: bool
    ) -> None:
        self.resident = resident
        self.must_load = must_load
        self._residency = residency
        self._held = True

    def release(self) -> None:
        """Give the model back; a second time is harmless."""
        if self._held:
            self._held = False
            self._residency.give_back(self)

    def __del__(self) -> None:
        self.release()


class Residency(Generic[Handle]):
    """The models in memory under one budget; safe to use from many threads.

    Args:
        limit: bytes that all models and the process may take, None = no limit.
        keep_alive: seconds that a model stays without being used, None = until its room is needed.
        patience: seconds that a model to be loaded waits for others to end what they do.
        kind: what a loaded model is here.
    """

    def __init__(
        self,
        *,
        limit: int | None,
        keep_alive: float | None,
        patience: float,
        kind: ModelKind[Handle],
    ) -> None:
        self._limit = limit
        self._keep_alive = keep_alive
        self._patience = patience
        self._kind = kind
        self._residents: dict[ModelSource, Resident[Handle]] = {}
        self._leaving: list[Resident[Handle]] = []  # being closed; their bytes still count
        self._closed = False
        # Reentrant, because the garbage collector may release a claim anywhere.
        self._changed = threading.Condition(threading.RLock())
        _residencies.add(self)
        self._start_sweeping()

    def claim(self, source: ModelSource, name: str) -> Claim[Handle]:
        """Claim a model, loaded or not; returns at once.

        Raises:
            ConfigError: `close` was called.
        """
        with self._changed:
            self._check_open()
            resident = self._residents.get(source)
            must_load = resident is None
            if resident is None:
                resident = self._residents[source] = Resident(name, source)
            resident.claims += 1
            resident.used = time.perf_counter()
            return Claim(self, resident, must_load)

    def give_back(self, claim: Claim[Handle]) -> None:
        """Take back a claim; `Claim.release` is the way to it."""
        resident = claim.resident
        with self._changed:
            resident.claims -= 1
            resident.used = time.perf_counter()
            if claim.must_load and not resident.begun:  # nobody else would begin
                self._fail(resident, LoadInterrupted())
            self._changed.notify_all()

    def load(self, resident: Resident[Handle]) -> None:
        """Load a claimed model in this thread; what happened is in its `loaded` afterwards.

        An interrupt (Ctrl-C) is raised here, and is `LoadInterrupted` for everybody else.
        """
        with self._changed:
            if resident.begun or resident.loaded.done():
                return
            resident.begun = True
        try:
            handle = self._kind.load(
                resident.source, lambda name, plan: self._admit(resident, name, plan)
            )
        except Exception as error:
            self._fail(resident, error)
        except BaseException:
            self._fail(resident, LoadInterrupted())
            raise
        else:
            self._keep(resident, handle)

    def residents(self) -> list[Resident[Handle]]:
        """Return the models in memory and on their way, the most recently used first."""
        with self._changed:
            return sorted(self._residents.values(), key=lambda each: -each.last_used)

    def planned_bytes(self) -> int:
        """Return the bytes that all models and the process may come to take."""
        with self._changed:
            return PROCESS_BYTES + sum(each.nbytes for each in self._counted())

    def unload(self, source: ModelSource) -> bool:
        """Unload a model; return whether that was done: it was loaded, and nobody uses it."""
        with self._changed:
            resident = self._residents.get(source)
            if resident is None or not self._retire(resident):
                return False
        self._let_go(resident)
        return True

    def refuse(self) -> list[Handle]:
        """Load nothing more; return the models that are loaded, which `close` has to follow."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            loaded = [each for each in self._residents.values() if each.engine is not None]
            return [each.loaded.result() for each in loaded]

    def close(self) -> None:
        """Unload everything, in use or not, and load nothing more; twice is harmless."""
        with self._changed:
            self._closed = True
            loaded = [each for each in self._residents.values() if each.engine is not None]
            for resident in loaded:
                del self._residents[resident.source]
            self._leaving += loaded
            self._changed.notify_all()
        for resident in loaded:
            self._let_go(resident)

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _counted(self) -> Iterator[Resident[Handle]]:
        yield from self._residents.values()
        yield from self._leaving

    def _keep(self, resident: Resident[Handle], handle: Handle) -> None:
        with self._changed:
            if not self._closed and not resident.loaded.done():
                resident.engine = self._kind.engine_of(handle)
                resident.used = time.perf_counter()
                resident.loaded.set_result(handle)
                self._changed.notify_all()
                return
        self._fail(resident, _closed())
        self._kind.close(handle)

    def _fail(self, resident: Resident[Handle], error: Exception) -> None:
        with self._changed:
            if self._residents.get(resident.source) is resident:
                del self._residents[resident.source]
            if not resident.loaded.done():
                resident.loaded.set_exception(error)
            self._changed.notify_all()

    def _admit(self, resident: Resident[Handle], name: str, plan: MemoryPlan) -> None:
        """Make room for a model and count it as there.

        Raises:
            InsufficientMemoryError: there is no room, and none was made in time.
            ConfigError: `close` was called meanwhile.
        """
        replace(plan, available=None).check(name)
        deadline = time.perf_counter() + self._patience
        while True:
            with self._changed:
                self._check_open()
                if self._fits(plan):
                    resident.plan = plan
                    return
                leaver = self._retire_one(plan)
                if leaver is None:
                    left = deadline - time.perf_counter()
                    if left <= 0 and not self._leaving:
                        raise self._no_room(name, plan)
                    self._changed.wait(_LOOK_AGAIN)
                    continue
            self._let_go(leaver)

    def _fits(self, plan: MemoryPlan, *, without: int = 0) -> bool:
        """Whether there is room for a plan once `without` bytes of others have been freed."""
        needed = plan.total - PROCESS_BYTES
        planned = self.planned_bytes() - without + needed
        available = available_memory()
        return (self._limit is None or planned <= self._limit) and (
            available is None or needed <= available + without
        )

    def _retire_one(self, plan: MemoryPlan) -> Resident[Handle] | None:
        """Take out the idle model that was used longest ago; None where no unloading would help."""
        idle = [each for each in self._residents.values() if each.idle]
        coming = sum(each.nbytes for each in (*idle, *self._leaving))
        if not self._fits(plan, without=coming):
            return None
        for resident in sorted(idle, key=lambda each: each.last_used):
            if self._retire(resident):
                return resident
        return None

    def _retire(self, resident: Resident[Handle]) -> bool:
        """Take a model out if nobody uses it; from then on its engine takes no requests."""
        if not resident.idle or resident.engine is None or not resident.engine.retire():
            return False
        del self._residents[resident.source]
        self._leaving.append(resident)
        return True

    def _let_go(self, resident: Resident[Handle]) -> None:
        try:
            self._kind.close(resident.loaded.result())
        finally:
            with self._changed:
                if resident in self._leaving:
                    self._leaving.remove(resident)
                self._changed.notify_all()

    def _no_room(self, name: str, plan: MemoryPlan) -> InsufficientMemoryError:
        needed = plan.total - PROCESS_BYTES
        if self._limit is not None and self.planned_bytes() + needed > self._limit:
            bound = f"the memory_limit of all models, {format_bytes(self._limit)}"
        else:
            bound = "the memory available"
        lines = [
            f"  {each.name}  {format_bytes(each.nbytes)}, {_state(each)}"
            for each in self._residents.values()
            if each.plan is not None
        ]
        others = ", where there are:" if lines else ""
        return InsufficientMemoryError(
            "\n".join(
                [f"{name} needs {format_bytes(needed)} and has no room in {bound}{others}", *lines]
            ),
            hint="try again when they are idle, raise memory_limit, or load with a smaller context"
            if lines
            else "raise memory_limit, or load with a smaller context",
        )

    def _start_sweeping(self) -> None:
        if self._keep_alive is not None:
            threading.Thread(target=self._sweep, name="bitllm keep_alive", daemon=True).start()

    def _sweep(self) -> None:
        """Unload what nobody has used for `keep_alive` seconds, until `close`."""
        keep_alive = self._keep_alive
        while keep_alive is not None:
            with self._changed:
                if self._closed:
                    return
                now = time.perf_counter()
                idle = sorted(
                    (each for each in self._residents.values() if each.idle),
                    key=lambda each: each.last_used,
                )
                over = [each for each in idle if each.last_used + keep_alive <= now]
                leaver = next((each for each in over if self._retire(each)), None)
                if leaver is None:
                    until_next = idle[0].last_used + keep_alive - now if idle else keep_alive
                    self._changed.wait(max(_LOOK_AGAIN, until_next))
                    continue
            self._let_go(leaver)

    def hold(self) -> None:
        """Let nobody change anything until `let_go`; before a fork."""
        self._changed.acquire()

    def let_go(self) -> None:
        """Undo `hold`, in the same thread of the parent process."""
        self._changed.release()

    def let_go_in_child(self) -> None:
        """Undo `hold` in the child process, which has none of the threads that loaded or closed."""
        for resident in list(self._residents.values()):
            if resident.engine is None:
                self._fail(resident, LoadInterrupted())
        self._leaving.clear()
        self._changed.release()
        if not self._closed:
            self._start_sweeping()


def _state(resident: Resident[Any]) -> str:
    if resident.engine is None:
        return "being loaded"
    what = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((resident.requests, "request"), (resident.claims, "lease"))
        if count
    ]
    return ", ".join(what) or "idle"


def _closed() -> ConfigError:
    return ConfigError("these models are closed", hint="make another pool")


_residencies: weakref.WeakSet[Residency[Any]] = weakref.WeakSet()
_held = threading.local()


def _hold_all() -> None:
    _held.residencies = sorted(_residencies, key=id)  # in one order, whoever forks
    for residency in _held.residencies:
        residency.hold()


def _let_go_all() -> None:
    for residency in _held.__dict__.pop("residencies", ()):
        residency.let_go()


def _let_go_all_in_child() -> None:
    for residency in _held.__dict__.pop("residencies", ()):
        residency.let_go_in_child()


# The engines' own handlers were registered before these, so they hold their locks after them: the
# order in which `Residency` takes the two.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_all, after_in_parent=_let_go_all, after_in_child=_let_go_all_in_child
    )
