"""`bitllm pull`: fetch a model from the Hugging Face Hub into the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.options import complete_model, json_option, option, verbose_option
from bitllm.cli.terminal import emit, emit_json, note, paint, waiting

if TYPE_CHECKING:
    from bitllm.formats import ModelFiles

__all__ = ["pull"]


@click.command()
@click.argument("ref", shell_complete=complete_model)
@option("--revision", metavar="NAME", help="Branch, tag or commit; the same as REF@NAME.")
@option("--check", is_flag=True, help="Compare every file with its checksum, old ones too.")
@json_option
@verbose_option
def pull(ref: str, revision: str | None, check: bool, as_json: bool) -> None:
    """Fetch a model from the Hugging Face Hub.

    REF is a short name (`bitllm list --known`), org/name, org/name/file.gguf, or org/name:I2_S for
    the GGUF file with that in its name; each with @revision behind it. Only what bitllm reads, and
    what is not there yet, is fetched. A download that ends early is kept, and the same command goes
    on from there.

    \b
    bitllm pull 2b
    bitllm pull microsoft/bitnet-b1.58-2B-4T-gguf:i2_s
    """  # noqa: D301
    from bitllm.errors import ConfigError
    from bitllm.formats import resolve_model
    from bitllm.formats.hub.references import parse_reference

    if parse_reference(ref) is None:
        resolve_model(ref, revision=revision)  # the error that says what was meant
        raise ConfigError(f"{ref} is on this machine: there is nothing to fetch")
    try:
        files = resolve_model(f"hf:{ref.removeprefix('hf:')}", revision=revision)
    except KeyboardInterrupt:
        from bitllm.formats.hub.failures import KEPT

        note(f"stopped: {KEPT}")
        raise
    checked = _check(files) if check else None
    facts = _describe(files, checked)
    if as_json:
        emit_json(facts)
    else:
        from bitllm.engine.memory_plan import format_bytes

        emit(f"{files.name}  {format_bytes(facts['bytes'])}  {files.path}")
        if facts["problem"]:
            note(f"{paint('warning:', 'yellow')} bitllm cannot run it: {facts['problem']}")


def _describe(files: ModelFiles, checked: int | None) -> dict[str, Any]:
    from bitllm.errors import BitllmError
    from bitllm.formats import open_checkpoint

    problem = None
    try:
        open_checkpoint(files.path)
    except BitllmError as error:
        problem = error.message
    return {
        "name": files.name,
        "path": str(files.path),
        "origin": files.origin,
        "bytes": sum(path.stat().st_size for path in _paths(files)),
        "checked": checked,
        "problem": problem,
    }


def _paths(files: ModelFiles) -> list[Any]:
    """Return the files of the snapshot; of a GGUF file with others beside it, its parts only."""
    from bitllm.formats.gguf.file_names import gguf_parts

    if files.path.is_dir():
        return [path for path in files.path.rglob("*") if path.is_file()]
    return [files.path.with_name(name) for name in gguf_parts(files.path.name)]


def _check(files: ModelFiles) -> int:
    """Compare each file with its checksum; return how many there were.

    Raises:
        CheckpointError: some are damaged; they are removed, so that they are fetched again.
    """
    from bitllm.errors import CheckpointError
    from bitllm.formats.hub.download import check_file

    with waiting("checking"):
        results = {path: check_file(path) for path in _paths(files)}
    damaged = [path for path, result in results.items() if result is False]
    for path in damaged:
        path.resolve().unlink()
        path.unlink()
    if damaged:
        raise CheckpointError(
            f"{files.name}: damaged in the cache: {', '.join(path.name for path in damaged)}",
            hint="they were removed; run the same command again to fetch them",
        )
    return sum(result is True for result in results.values())
