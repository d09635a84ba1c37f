"""What a conversion will write and what it loses, known before a byte is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from bitllm.checkpoint import Checkpoint, ScaleConvention
from bitllm.convert.merge import MergeLoss, merge_adapter, merge_losses
from bitllm.convert.source import directory_texts, gguf_tokenizer
from bitllm.errors import CheckpointError, ConfigError
from bitllm.formats import (
    ModelFiles,
    find_gguf,
    open_adapter,
    open_checkpoint,
    resolve_model,
)
from bitllm.formats.gguf.file_names import gguf_parts
from bitllm.formats.writers import WritePlan, check_target
from bitllm.formats.writers.gguf import GgufType, plan_gguf
from bitllm.formats.writers.huggingface import plan_huggingface
from bitllm.formats.writers.mlx import plan_mlx

__all__ = ["FORMATS", "Conversion", "Format", "guess_format", "plan_conversion"]

Format = Literal["huggingface", "gguf", "mlx"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""What can be written."""

_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that may be run.

    Attributes:
        files: where the source is.
        checkpoint: the source, opened.
        target: the file or directory to be written.
        replace: whether it may replace one of that name.
        plan: what will be written.
        losses: what merging an adapter loses, by the name of the matrix; empty without one.
    """

    files: ModelFiles
    checkpoint: Checkpoint
    target: Path
    replace: bool
    plan: WritePlan
    losses: Mapping[str, MergeLoss] = field(default_factory=dict)


def guess_format(target: Path) -> Format:
    """Return the format that a target's name says: GGUF for `.gguf`, else a Hugging Face folder."""
    return "gguf" if target.suffix.lower() == _SUFFIX else "huggingface"


def plan_conversion(
    ref: str | PathLike[str] | None,
    target: str | PathLike[str],
    *,
    to: Format | None = None,
    kind: GgufType | None = None,
    convention: ScaleConvention | None = None,
    replace: bool = False,
    adapter: str | PathLike[str] | None = None,
) -> Conversion:
    """Plan a conversion.

    Args:
        ref: the source, as `bitllm.load` takes it.
        target: the file or directory to be written.
        to: its format, None = what its name says.
        kind: type of the ternary matrices of a GGUF file, None = I2_S.
        convention: how weight scales of a Hugging Face folder are stored, None = as in the source.
        replace: whether a file or model folder of that name may be replaced.
        adapter: directory of a PEFT adapter to merge into the weights (`merge_adapter`).

    Raises:
        ConfigError: options that contradict each other.
        CheckpointError: one of its kinds: the target is in the way, or the source cannot be read,
            or not be held by the format.
        ModelNotFoundError: the source names nothing that can be reached.
        TokenizerError: the source's tokenizer is broken, or GGUF has no metadata for its kind.
    """
    goal = Path(target).expanduser()
    chosen = to or guess_format(goal)
    _check_options(goal, chosen, kind, convention)
    files = resolve_model(ref)
    _check_target(files.path, goal, chosen, replace)
    checkpoint, losses = open_checkpoint(files.path), {}
    if adapter is not None:
        opened = open_adapter(adapter)
        merged = merge_adapter(checkpoint, opened)
        losses, checkpoint = merge_losses(checkpoint, opened), merged
    if chosen == "gguf":
        # Names of files may hold bytes that are no text, as strings in GGUF files may not.
        name = os.fsencode(goal.name[: -len(_SUFFIX)]).decode("utf-8", "replace")
        tokens, notes = gguf_tokenizer(files.path, checkpoint.spec.vocab_size)
        plan = plan_gguf(checkpoint, name, kind or "i2_s", tokenizer=tokens, notes=notes)
    elif chosen == "mlx":
        plan = plan_mlx(checkpoint, directory_texts(files.path))
    else:
        plan = plan_huggingface(checkpoint, directory_texts(files.path), convention=convention)
    return Conversion(files, checkpoint, goal, replace, plan, losses)


def _check_options(
    target: Path, chosen: Format, kind: GgufType | None, convention: ScaleConvention | None
) -> None:
    if (guess_format(target) == "gguf") != (chosen == "gguf"):
        raise ConfigError(
            f"{target}: the name does not go with the format {chosen}",
            hint=f"names of GGUF files end in {_SUFFIX}, and only those",
        )
    if kind is not None and chosen != "gguf":
        raise ConfigError(f"a type ({kind}) is chosen for GGUF files, not for {chosen}")
    if convention is not None and chosen != "huggingface":
        raise ConfigError(f"a convention ({convention}) is chosen for huggingface, not {chosen}")


def _check_target(source: Path, target: Path, chosen: Format, replace: bool) -> None:
    """Refuse to write over the source, or over anything that is no model."""
    place = _real(target)
    if any(place == file or place in file.parents for file in map(_real, _files(source))):
        raise CheckpointError(
            f"{target} holds the model that is to be converted", hint="choose another name"
        )
    check_target(target, replace)
    if not target.exists():
        return
    if chosen == "gguf":
        replaceable = target.is_file()
    else:
        replaceable = target.is_dir() and (
            (target / "config.json").is_file() or not any(target.iterdir())
        )
    if target.is_symlink() or not replaceable:
        what = "file" if chosen == "gguf" else "model directory"
        raise CheckpointError(
            f"{target} is no {what}, so it is not replaced", hint="choose another name"
        )


def _files(source: Path) -> list[Path]:
    """Return a model's path and its files; GGUF files beside safetensors are none of them."""
    first = find_gguf(source)
    if first is not None:
        return [source, *(first.with_name(name) for name in gguf_parts(first.name))]
    files = [path for path in source.glob("*") if path.is_file() and path.suffix != _SUFFIX]
    return [source, *files]


def _real(path: Path) -> Path:
    """Follow symbolic links; unlike `Path.resolve`, those that lead in a circle raise nothing."""
    return Path(os.path.realpath(path))
