"""Which model answers to which name: the one place that knows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from bitllm.engine.async_llm import AsyncLLM
from bitllm.engine.async_model_pool import AsyncModelPool
from bitllm.errors import ConfigError
from bitllm.server.api_error import not_served

__all__ = ["AdapterFiles", "ListedModel", "ModelState", "ServedModel", "ServedModels"]

ModelState = Literal["loaded", "loading", "unloaded"]


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that is served under a name of its own.

    Attributes:
        model: the name of the model that it belongs to.
        path: its directory, as of `LLM.load_adapter`.
    """

    model: str
    path: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model in memory, under the name by which clients ask for it.

    Attributes:
        name: the `id` that clients see.
        llm: what answers.
        adapter: the adapter that requests of this name have, None = the model as it is.
    """

    name: str
    llm: AsyncLLM
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class ListedModel:
    """What clients are told of a name.

    Attributes:
        name: the `id` that clients see.
        state: whether it is in memory.
        created: when the server began, in seconds since 1970.
        llm: the model, where it is loaded.
        parent: the name of the model that an adapter belongs to, None for a model.
    """

    name: str
    state: ModelState
    created: int
    llm: AsyncLLM | None
    parent: str | None


@dataclass
class ServedModels:
    """The models of a server: some that stay in memory, or a pool that loads them when asked.

    Args:
        models: by the names that clients use; the first is the one for requests without a name. Or
            the names of a pool.
        adapters: by names that no model has.
        strict: refuse an unknown name also where there is one name only. Otherwise such a server
            answers to every name, since many programs have a fixed one.

    Raises:
        ConfigError: no model, two things of one name, or an adapter of a model that is not there.
    """

    models: Mapping[str, AsyncLLM] | AsyncModelPool
    adapters: Mapping[str, AdapterFiles] = field(default_factory=dict)
    strict: bool = False
    _created: int = field(default_factory=lambda: int(time.time()), init=False)
    _adapting: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def __post_init__(self) -> None:
        models = self._model_names()
        if not models:
            raise ConfigError("a server needs at least one model")
        for name, adapter in self.adapters.items():
            if name in models:
                raise ConfigError(f"a model and an adapter have the name {name!r}")
            if adapter.model not in models:
                raise ConfigError(
                    f"the adapter {name!r} belongs to {adapter.model!r}, which is not served",
                    hint=f"there are: {', '.join(models)}",
                )
        self.strict = self.strict or len(self.names()) > 1

    @property
    def pool(self) -> AsyncModelPool | None:
        """The pool that loads the models, None where they stay in memory."""
        return self.models if isinstance(self.models, AsyncModelPool) else None

    def names(self) -> list[str]:
        """Return the names of all models and adapters, the default first."""
        return [*self._model_names(), *self.adapters]

    def _model_names(self) -> tuple[str, ...]:
        return self.models.names if isinstance(self.models, AsyncModelPool) else (*self.models,)

    def _in_memory(self) -> Mapping[str, AsyncLLM]:
        return self.models.handles() if isinstance(self.models, AsyncModelPool) else self.models

    def loaded(self) -> list[ServedModel]:
        """Return the models in memory, each under the first of its names."""
        first: dict[int, ServedModel] = {}
        for name, llm in self._in_memory().items():
            first.setdefault(id(llm), ServedModel(name, llm))
        return list(first.values())

    def listed(self) -> list[ListedModel]:
        """Return what there is, loaded or not."""
        in_memory = self._in_memory()
        loading = {
            name
            for each in (() if self.pool is None else self.pool.loaded())
            if each.loading
            for name in (each.name, *each.aliases)
        }

        def listed(name: str, model: str, parent: str | None) -> ListedModel:
            llm = in_memory.get(model)
            waiting: ModelState = "loading" if model in loading else "unloaded"
            state: ModelState = waiting if llm is None else "loaded"
            return ListedModel(name, state, self._created, llm, parent)

        models = [listed(name, name, None) for name in self._model_names()]
        return models + [listed(name, a.model, a.model) for name, a in self.adapters.items()]

    def get(self, name: str) -> ListedModel:
        """Return what is known of exactly this name.

        Raises:
            ApiError: 404, there is none.
        """
        found = next((each for each in self.listed() if each.name == name), None)
        if found is None:
            raise not_served(name, self.names())
        return found

    @asynccontextmanager
    async def lease(self, name: str | None) -> AsyncIterator[ServedModel]:
        """Keep the model that answers to `name` in memory for the time of the block.

        It is loaded if it is not, and so is its adapter.

        Args:
            name: what the request says; None or "" = the default model.

        Raises:
            ApiError: 404, no model answers to that name.
            InsufficientMemoryError: there is no room for it now.
            BitllmError: it cannot be loaded.
        """
        names = self.names()
        if not name or (not self.strict and name not in names):
            name = names[0]
        if name not in names:
            raise not_served(name, names)
        adapter = self.adapters.get(name)
        model = name if adapter is None else adapter.model
        if not isinstance(self.models, AsyncModelPool):
            yield await self._adapted(name, self.models[model])
            return
        async with self.models.lease(model) as llm:
            yield await self._adapted(name, llm)

    async def load_adapters(self) -> None:
        """Load the adapters of models that stay in memory.

        Raises:
            BitllmError: one cannot be loaded.
        """
        for name in self.adapters if self.pool is None else ():
            async with self.lease(name):
                pass

    async def _adapted(self, name: str, llm: AsyncLLM) -> ServedModel:
        files = self.adapters.get(name)
        if files is None:
            return ServedModel(name, llm)
        if name not in llm.adapters:
            # A client that goes away does not stop the load, which others may wait for.
            await asyncio.shield(self._load_adapter(name, files.path, llm))
        return ServedModel(name, llm, name)

    async def _load_adapter(self, name: str, path: str, llm: AsyncLLM) -> None:
        async with self._adapting:
            if name not in llm.adapters:
                await llm.load_adapter(path, name)

    async def aclose(self, *, drain: bool = False) -> None:
        """Close all models; `drain` = only after what is under way is complete."""
        if isinstance(self.models, AsyncModelPool):
            await self.models.aclose(drain=drain)
        else:
            await asyncio.gather(*(each.aclose(drain=drain) for each in self.models.values()))
