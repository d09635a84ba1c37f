"""The models of `bitllm serve`: found and named at once, loaded at the start or when asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitllm.cli.model import load_model
from bitllm.config import EngineOptions
from bitllm.engine.async_llm import AsyncLLM
from bitllm.engine.async_model_pool import AsyncModelPool
from bitllm.engine.memory_plan import roomy_kv_tokens
from bitllm.errors import ConfigError
from bitllm.formats import open_checkpoint, resolve_model
from bitllm.server import AdapterFiles, ServedModels

__all__ = ["Wanted", "open_models"]

_KV_SHARE = 0.5  # of the memory beside the models, for more sequences than one each


class _StoppedError(Exception):
    """The server ends before the model is loaded."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be served.

    Attributes:
        models: references by name, the default first; None = the demo model.
        options: keywords of `bitllm.load` by name.
        adapters: by name.
        memory_limit: bytes for all models together, None = what is free.
        keep_alive: seconds after which a model that nobody uses is unloaded, None = not by time.
    """

    models: Mapping[str, str | None]
    options: Mapping[str, dict[str, Any]]
    adapters: Mapping[str, AdapterFiles]
    memory_limit: int | None
    keep_alive: float | None

    @classmethod
    def of(
        cls,
        references: Sequence[str],
        adapters: Sequence[str],
        engine: Mapping[str, Any],
        keep_alive: float | None,
    ) -> Wanted:
        """Return what a command line asks for; models of the Hub are downloaded.

        Args:
            references: each a reference or NAME=REF; none = the demo model.
            adapters: each [MODEL:][NAME=]PATH.
            engine: keywords of `bitllm.load`.
            keep_alive: as the attribute.

        Raises:
            BitllmError: something is not there, or two things have one name.
        """
        models: dict[str, str | None] = {}
        options: dict[str, dict[str, Any]] = {}
        given: list[str | None] = [*references] or [None]
        for each in given:
            name, ref = _named(each)
            files = resolve_model(ref)
            name = files.name if name is None else name
            if name in models:
                raise ConfigError(f"two models have the name {name!r}", hint="write NAME=REF")
            models[name] = ref
            options[name] = _with_room(files.path, engine, _KV_SHARE / len(given))
        return cls(
            models, options, _adapters(adapters, next(iter(models))),
            engine.get("memory_limit"), keep_alive,
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        """All names, the default first."""
        return [*self.models, *self.adapters]

    @property
    def pooled(self) -> bool:
        """Whether models are loaded when they are asked for, instead of at the start."""
        return len(self.models) > 1 or self.keep_alive is not None


def _named(given: str | None) -> tuple[str | None, str | None]:
    """Return name and reference of NAME=REF; a path that exists is a reference as a whole."""
    if given is None or "=" not in given or Path(given).exists():
        return None, given
    name, _, ref = given.partition("=")
    if not name or not ref:
        raise ConfigError(f"{given!r} should be a model, or NAME=REF")
    return name, ref


def _with_room(path: Path, engine: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return the options of a model, with room for several sequences unless the user says."""
    if "kv_tokens" in engine:
        return dict(engine)
    options = EngineOptions.from_options(engine)
    return {**engine, "kv_tokens": roomy_kv_tokens(open_checkpoint(path), options, share=share)}


def _adapters(given: Sequence[str], default: str) -> dict[str, AdapterFiles]:
    adapters: dict[str, AdapterFiles] = {}
    for each in given:
        label, _, path = ("", "", each) if Path(each).exists() else each.rpartition("=")
        model, _, name = label.rpartition(":")
        name = name or Path(path).name
        if not path or not name:
            raise ConfigError(f"{each!r} should be an adapter, as [MODEL:][NAME=]PATH")
        if name in adapters:
            raise ConfigError(f"two adapters have the name {name!r}", hint="write NAME=PATH")
        adapters[name] = AdapterFiles(model or default, path)
    return adapters


async def open_models(wanted: Wanted, *, strict: bool) -> ServedModels:
    """Return the models, loaded beside the event loop unless they are loaded when asked for.

    Args:
        wanted: which.
        strict: as of `ServedModels`.

    Raises:
        BitllmError: a model or an adapter cannot be loaded.
    """
    if wanted.pooled:
        return ServedModels(_pool(wanted), wanted.adapters, strict)
    ((name, ref),) = wanted.models.items()
    llm = AsyncLLM(await _load(ref, wanted.options[name]))
    try:
        served = ServedModels({name: llm}, wanted.adapters, strict)
        await served.load_adapters()
    except BaseException:
        await llm.aclose()
        raise
    return served


def _pool(wanted: Wanted) -> AsyncModelPool:
    pool = AsyncModelPool(
        memory_limit=wanted.memory_limit, keep_alive=wanted.keep_alive, known_only=True
    )
    for name, ref in wanted.models.items():
        options = {k: v for k, v in wanted.options[name].items() if k != "memory_limit"}
        pool.add(name, ref, **options)
    return pool


async def _load(ref: str | None, options: Mapping[str, Any]) -> Any:
    """Load a model on a thread, which ends soon where nobody waits for it any more."""
    stopped = threading.Event()

    def check() -> None:
        if stopped.is_set():
            raise _StoppedError

    try:
        return await asyncio.to_thread(load_model, ref, options, check=check)
    finally:
        stopped.set()
