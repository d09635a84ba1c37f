"""`bitllm list`: the models in the cache that bitllm can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.options import json_option, option, verbose_option
from bitllm.cli.terminal import emit, emit_json, note

if TYPE_CHECKING:
    from bitllm.formats.hub.cache import CachedModel

__all__ = ["list"]


@click.command("list")
@option("--all", "everything", is_flag=True, help="Also those that bitllm cannot run, and why.")
@option("--known", is_flag=True, help="Well-known models and their short names, instead.")
@json_option
@verbose_option
def list(everything: bool, known: bool, as_json: bool) -> None:
    """List the models in the cache that bitllm can run.

    Nothing is asked of the Hub. The cache is that of every program that uses huggingface_hub;
    HF_HOME or HF_HUB_CACHE say where it is.
    """
    if known:
        _list_known(as_json)
        return
    models = [model for model in _described() if everything or _is_worth_showing(model)]
    if as_json:
        emit_json(models)
    elif models:
        emit("\n".join(_table([_row(model) for model in models])))
    else:
        note("no models in the cache; `bitllm pull 2b` fetches one")


def _described() -> Iterator[dict[str, Any]]:
    from bitllm.formats.hub.cache import cached_models

    for model in cached_models():
        facts = dataclasses.asdict(model)
        yield {**facts, "path": str(model.path), "problem": _problem(model)}


def _problem(model: CachedModel) -> str | None:
    """Say why bitllm cannot run a model; None if its headers are in order."""
    from bitllm.errors import BitllmError
    from bitllm.formats import open_checkpoint
    from bitllm.formats.hub.cache import keep_times

    if not model.complete:
        return "not complete; `bitllm pull` goes on" if _was_begun(model) else "no weights"
    try:
        with keep_times(model.path):
            open_checkpoint(model.path)
    except BitllmError as error:
        return error.message
    return None


def _was_begun(model: CachedModel) -> bool:
    """Whether weights of it are there or on their way, not just a tokenizer."""
    blobs = next((p for p in model.path.parents if p.name == "snapshots"), model.path).parent
    return bool(model.format) or any((blobs / "blobs").glob("*.incomplete"))


def _is_worth_showing(model: dict[str, Any]) -> bool:
    return model["problem"] is None or model["problem"].startswith("not complete")


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    from bitllm.engine.memory_plan import format_bytes

    used = datetime.fromtimestamp(model["last_used"], UTC).strftime("%Y-%m-%d")
    note_text = model["problem"] or ""
    return (model["name"], format_bytes(model["bytes"]), model["format"] or "-", used, note_text)


def _list_known(as_json: bool) -> None:
    from bitllm.formats.hub.known_models import KNOWN_MODELS

    if as_json:
        emit_json([dataclasses.asdict(model) for model in KNOWN_MODELS])
    else:
        rows = [(model.alias, model.reference, model.what) for model in KNOWN_MODELS]
        emit("\n".join(_table(rows)))


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the rows with their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
