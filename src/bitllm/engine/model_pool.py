"""`ModelPool`: several models in one process, loaded when they are asked for, under one budget."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Generic, Self, TypeVar, Unpack

from bitllm.config import EngineOptions, as_integer, as_number, parse_size
from bitllm.engine.llm import LLM
from bitllm.engine.loading import EngineKeywords, load_model
from bitllm.engine.memory_plan import available_memory
from bitllm.engine.residency import (
    Admit,
    Claim,
    LoadInterrupted,
    ModelKind,
    ModelSource,
    Residency,
    Resident,
)
from bitllm.errors import ConfigError, ModelNotFoundError

__all__ = ["LoadedModel", "ModelPool", "PoolOfModels", "open_model"]

Handle = TypeVar("Handle")


def open_model(source: ModelSource, admit: Admit) -> LLM:
    """Load a model, asking `admit` before its weights; arguments as of `ModelKind.load`."""
    return load_model(source.ref, source.options, revision=source.revision, admit=admit)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model of a pool that is in memory, or on its way there.

    Attributes:
        name: the name by which it was asked for.
        aliases: the other names it has in the pool.
        loading: it cannot be used yet.
        bytes: what it may come to take by its memory plan; 0 while that is not known.
        context: most tokens of a sequence; 0 while that is not known.
        requests: sequences that are under way.
        leases: how many have leased it.
        idle_seconds: how long nobody has used it; 0 = in use, or being loaded.
        unload_seconds: in how long it will be unloaded for that; None = not by time.
    """

    name: str
    aliases: tuple[str, ...]
    loading: bool
    bytes: int
    context: int
    requests: int
    leases: int
    idle_seconds: float
    unload_seconds: float | None


class PoolOfModels(Generic[Handle]):
    """What `ModelPool` and `AsyncModelPool` have in common: names, budget, and what is loaded.

    Args:
        models: name -> reference, as by `add`.
        memory_limit: bytes for all models and the process together, or a text such as "8GB";
            None = what the machine had free when the pool was made.
        keep_alive: seconds after its last use that a model is unloaded; None = when its room is
            needed.
        wait: seconds that a model which finds no room waits for others to end what they do.
        known_only: refuse names that were not added, instead of taking them for references.
        options: how models are loaded that were added without options of their own.

    Raises:
        ConfigError: an argument out of range, or a name that is none.
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
    ) -> None:
        if options is not None and not isinstance(options, EngineOptions):
            raise ConfigError(f"options must be EngineOptions, got {options!r:.80}")
        if isinstance(memory_limit, str):
            memory_limit = parse_size(memory_limit)
        if memory_limit is not None:
            memory_limit = as_integer("memory_limit", memory_limit, low=1)
        if keep_alive is not None:
            keep_alive = as_number("keep_alive", keep_alive, low=0.0)
        self.memory_limit = available_memory() if memory_limit is None else memory_limit
        self.keep_alive = keep_alive
        self._known_only = known_only
        self._options = EngineOptions() if options is None else options
        self._sources: dict[str, ModelSource] = {}
        self._naming = threading.Lock()
        self._residency: Residency[Handle] = Residency(
            limit=self.memory_limit,
            keep_alive=keep_alive,
            patience=as_number("wait", wait, low=0.0),
            kind=self._kind(),
        )
        # A pool that is forgotten must not leave threads and models behind.
        self._finalizer = weakref.finalize(self, self._residency.close)
        for name, ref in (models or {}).items():
            self.add(name, ref)

    def _kind(self) -> ModelKind[Handle]:
        raise NotImplementedError

    def add(
        self,
        name: str,
        ref: str | PathLike[str] | None,
        *,
        revision: str | None = None,
        **options: Unpack[EngineKeywords],
    ) -> None:
        """Give a name to a model and to the way it is loaded; nothing is loaded yet.

        Names of the same model with the same options share what is loaded. To give a name a second
        time is an error, unless it says the same.

        Args:
            name: how the pool is asked for it.
            ref: as in `bitllm.load`; None = the embedded demo model.
            revision: as in `bitllm.load`.
            **options: fields of `EngineOptions`, over those of the pool.

        Raises:
            ConfigError: no name, a name that is taken, or options that cannot be meant.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"a model's name must be a text, got {name!r:.80}")
        if ref is not None and not isinstance(ref, str | PathLike):
            raise ConfigError(f"a model's reference must be a text or a path, got {ref!r:.80}")
        source = ModelSource(
            None if ref is None else os.fspath(ref),
            revision,
            EngineOptions.from_options(options, self._options),
        )
        with self._naming:
            if self._sources.setdefault(name, source) != source:
                raise ConfigError(
                    f"the pool has another model, or other options, under the name {name!r:.80}",
                    hint="add it under another name",
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names that were added, loaded or not."""
        return tuple(self._sources)

    def loaded(self) -> list[LoadedModel]:
        """Return the models in memory and on their way, the most recently used first."""
        return [self._describe(resident) for resident in self._residency.residents()]

    def handles(self) -> dict[str, Handle]:
        """Return the models in memory by the names that were added; to look at, not to use.

        Any of them may be unloaded as soon as this returns, unless it is leased.
        """
        loaded = {
            resident.source: resident.loaded.result()
            for resident in self._residency.residents()
            if resident.engine is not None
        }
        names = tuple(self._sources.items())
        return {name: loaded[source] for name, source in names if source in loaded}

    @property
    def planned_bytes(self) -> int:
        """Bytes that all loaded models and the process may come to take."""
        return self._residency.planned_bytes()

    def _source(self, name: str) -> ModelSource:
        source = self._sources.get(name)
        if source is not None:
            return source
        if self._known_only or not isinstance(name, str):
            known = ", ".join(self._sources) or "none"
            raise ModelNotFoundError(f"there is no model {name!r:.200}", hint=f"there are: {known}")
        return ModelSource(name, None, self._options)

    def _claim(self, name: str) -> Claim[Handle]:
        return self._residency.claim(self._source(name), name)

    def _unload(self, name: str) -> bool:
        return self._residency.unload(self._source(name))

    def _describe(self, resident: Resident[Handle]) -> LoadedModel:
        idle = max(0.0, time.perf_counter() - resident.last_used) if resident.idle else 0.0
        unload = None
        if resident.idle and self.keep_alive is not None:
            unload = max(0.0, self.keep_alive - idle)
        same = (name for name, source in tuple(self._sources.items()) if source == resident.source)
        return LoadedModel(
            name=resident.name,
            aliases=tuple(name for name in same if name != resident.name),
            loading=resident.engine is None,
            bytes=resident.nbytes,
            context=0 if resident.plan is None else resident.plan.context,
            requests=resident.requests,
            leases=resident.claims,
            idle_seconds=idle,
            unload_seconds=unload,
        )

    def __repr__(self) -> str:
        loaded = ", ".join(repr(each.name) for each in self.loaded()) or "none"
        return f"<{type(self).__name__}, loaded: {loaded}>"


class ModelPool(PoolOfModels[LLM]):
    """Several models in one process, loaded when they are asked for, under one budget of memory.

        with bitllm.ModelPool(memory_limit="8GB") as models:
            print(models["org/a"].generate("The list", max_tokens=20))
            with models.lease("org/b") as llm:  # stays in memory until the end of the block
                print(llm.chat("What is a list?"))

    A model that finds no room has others unloaded, the least recently used first; never one that is
    leased or has requests under way. Several threads may use a pool: those that ask for the same
    model wait for one load of it, and nobody else waits. Models are counted by their memory plans,
    so what is loaded can fill its KV cache without running out of memory. A load that is refused
    or fails leaves the others as they were, unless it failed over the weights themselves: then room
    had been made for it.

    Arguments and attributes are those of `PoolOfModels`.
    """

    def _kind(self) -> ModelKind[LLM]:
        return ModelKind(open_model, LLM.close, lambda llm: llm.engine)

    def __getitem__(self, name: str) -> LLM:
        """Return a model, loaded if it is not; the next load may unload it while it is idle.

        So ask for it again each time, or take a `lease`. Errors as of `lease`.
        """
        with self.lease(name) as llm:
            return llm

    def get(self, name: str, **options: Unpack[EngineKeywords]) -> LLM:
        """Return a model as `pool[name]` does, after `add(name, name, **options)` if there are any.

        Raises:
            ConfigError: the name was added with other options; and errors as of `lease`.
        """
        if options:
            self.add(name, name, **options)
        return self[name]

    @contextmanager
    def lease(self, name: str) -> Iterator[LLM]:
        """Keep a model in memory for the time of a `with` block; loaded if it is not.

        Args:
            name: a name that was added, or else a reference as in `bitllm.load`.

        Raises:
            InsufficientMemoryError: there is no room beside the models in use.
            ConfigError: the pool is closed.
            ModelNotFoundError, CheckpointError, BackendUnavailableError: as in `bitllm.load`.
        """
        while True:
            claim = self._claim(name)
            try:
                if claim.must_load:
                    self._residency.load(claim.resident)
                llm = claim.resident.loaded.result()
                break
            except LoadInterrupted:  # not here: then it would be what interrupted
                claim.release()
            except BaseException:
                claim.release()
                raise
        try:
            yield llm
        finally:
            claim.release()

    def unload(self, name: str) -> bool:
        """Unload a model now; return False if it is in use, or is not loaded.

        Raises:
            ModelNotFoundError: no such name was added, in a pool of known names only.
        """
        return self._unload(name)

    def close(self) -> None:
        """Unload all models, in use or not; the pool loads nothing more. Twice is harmless.

        Waits for steps that are under way; whoever still reads gets a `ConfigError`.
        """
        self._residency.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
