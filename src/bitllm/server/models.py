"""Which model answers to which name: the one place that knows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from bitllm.engine.async_llm import AsyncLLM
from bitllm.errors import ConfigError
from bitllm.server.api_error import not_served

__all__ = ["ServedModel", "ServedModels"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model under the name by which clients ask for it.

    Attributes:
        name: the `id` that clients see.
        llm: what answers.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    llm: AsyncLLM
    created: int = field(default_factory=lambda: int(time.time()))


class ServedModels:
    """The models of a server.

    Args:
        models: by the names that clients use; the first is the one for requests without a name.
        strict: refuse an unknown name also where there is one model only. Otherwise such a server
            answers to every name, since many programs have a fixed one.
    """

    def __init__(self, models: Mapping[str, AsyncLLM], *, strict: bool = False) -> None:
        if not models:
            raise ConfigError("a server needs at least one model")
        self._models = {name: ServedModel(name, llm) for name, llm in models.items()}
        self._strict = strict or len(self._models) > 1

    def names(self) -> list[str]:
        """Return the names of all models, the default first."""
        return list(self._models)

    def listed(self) -> list[ServedModel]:
        """Return the models that are loaded."""
        return list(self._models.values())

    def get(self, name: str) -> ServedModel:
        """Return the model of exactly this name.

        Raises:
            ApiError: 404, there is none.
        """
        if name not in self._models:
            raise not_served(name, self.names())
        return self._models[name]

    @asynccontextmanager
    async def lease(self, name: str | None) -> AsyncIterator[ServedModel]:
        """Keep the model that answers to `name` loaded for the time of the block.

        Args:
            name: what the request says; None or "" = the default model.

        Raises:
            ApiError: 404, no model answers to that name.
        """
        if not name or (not self._strict and name not in self._models):
            name = self.names()[0]
        yield self.get(name)

    async def aclose(self, *, drain: bool = False) -> None:
        """Close all models; `drain` = only after what is under way is complete."""
        await asyncio.gather(*(each.llm.aclose(drain=drain) for each in self.listed()))
