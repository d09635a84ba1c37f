"""Loading a model for a command, and reporting on it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bitllm.cli.answer import status_line
from bitllm.cli.options import chosen
from bitllm.cli.terminal import note, progress

if TYPE_CHECKING:
    from bitllm.engine.llm import LLM
    from bitllm.engine.outputs import Usage

__all__ = ["ENGINE_OPTIONS", "load_model", "print_status", "resident_bytes", "split_options"]

ENGINE_OPTIONS = (
    "device",
    "threads",
    "context",
    "kv_dtype",
    "packing",
    "head",
    "isa",
    "kv_tokens",
    "max_batch_tokens",
    "prefix_cache",
    "memory_limit",
    "speculation",
    "draft_model",
    "draft_tokens",
)
"""The options of a command that say how a model is loaded; the others say how it answers."""


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that were given, as those of `load_model` and those of `generate`.

    `adapter`, a path, belongs to both: `load_model` loads it under its path for a name.
    """
    given = chosen(**options)
    engine = {name: given.pop(name) for name in ENGINE_OPTIONS if name in given}
    return engine | ({"adapter": given["adapter"]} if "adapter" in given else {}), given


def load_model(
    ref: str | None, options: Mapping[str, Any], *, check: Callable[[], None] = lambda: None
) -> LLM:
    """Load a model, with a progress bar if that takes long and a terminal shows it.

    Args:
        ref: as of `bitllm.load`.
        options: keywords of `bitllm.load`; and `adapter`, the path of an adapter to be loaded under
            that name.
        check: called again and again while the weights are read; what it raises ends that.
    """
    from bitllm.engine.loading import load

    settings = dict(options)
    adapter = settings.pop("adapter", None)
    with progress("loading") as advance:

        def step(done: int, total: int) -> None:
            check()
            advance(done, total)

        llm = load(ref, progress=step, **settings)
    if adapter is not None:
        llm.load_adapter(adapter, name=adapter)
    return llm


def resident_bytes() -> int | None:
    """Return the memory this process holds, None where the native module is missing."""
    try:
        from bitllm.backends.cpu import resident_bytes as measure
    except ImportError:
        return None
    return measure() or None


def print_status(llm: LLM, usage: Usage) -> None:
    """Print tokens, speed, memory, kernel and threads of an answer to stderr."""
    note(status_line(usage, llm.info, resident_bytes()))
