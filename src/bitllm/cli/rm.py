"""`bitllm rm`: take models out of the cache."""

from __future__ import annotations

import sys
from typing import Any

import click

from bitllm.cli.options import complete_model, json_option, option, verbose_option
from bitllm.cli.terminal import emit, emit_json

__all__ = ["rm"]


@click.command()
@click.argument("refs", metavar="REF...", nargs=-1, required=True, shell_complete=complete_model)
@option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@verbose_option
def rm(refs: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Remove models from the cache.

    REF is a name as `bitllm list` shows it, or a short one: org/name for all its revisions,
    org/name@revision for one of them, org/name/file.gguf for a file. Model directories elsewhere
    are never touched. Other programs that share the cache fetch what they need again.

    \b
    bitllm rm tiiuae/Falcon-E-1B-Instruct
    bitllm rm 2b --yes
    """  # noqa: D301
    from bitllm.engine.memory_plan import format_bytes
    from bitllm.errors import ConfigError
    from bitllm.formats.hub.cache import plan_removal

    removals = [plan_removal(ref) for ref in dict.fromkeys(refs)]  # all are there, or none goes
    if not yes and not _somebody_is_there():
        raise ConfigError("nobody is there to ask", hint="give --yes to remove without a question")
    removed: list[dict[str, Any]] = []
    for removal in removals:
        question = f"remove {removal.name} ({format_bytes(removal.bytes)})?"
        if yes or click.confirm(question, err=True):
            removal.run()
            removed.append({"name": removal.name, "bytes": removal.bytes})
            if not as_json:
                emit(f"removed {removal.name}")
    if as_json:
        emit_json(removed)


def _somebody_is_there() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
