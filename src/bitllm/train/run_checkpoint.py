"""The checkpoint of a run: everything that the next step depends on, in one file.

It is written beside the old one, flushed to the disk, and takes its place in one move: whenever the
process or the machine stops, one whole checkpoint is there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitllm.errors import CheckpointError, ConfigError, FormatError

__all__ = ["CHECKPOINT_NAME", "read_state", "write_state"]

CHECKPOINT_NAME = "checkpoint.pt"


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the checkpoint of a run.

    Raises:
        CheckpointError: the disk is full, or the system refuses to write; the old one is left.
    """
    path = folder / CHECKPOINT_NAME
    temporary = folder / f"{CHECKPOINT_NAME}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes RuntimeError of a full disk
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot write the checkpoint: {error}",
            hint="make room on the disk and go on with --resume: the last checkpoint is whole",
        ) from error


def read_state(folder: Path, fingerprint: str) -> dict[str, Any]:
    """Read the checkpoint of a run.

    Args:
        folder: where it is.
        fingerprint: what "recipe" in it has to be.

    Raises:
        ConfigError: there is none, or it belongs to another recipe.
        FormatError: it is damaged.
    """
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        raise ConfigError(f"{path}: no checkpoint to resume from", hint="run without --resume")
    try:
        state = torch.load(path, weights_only=True)
        wanted = state["recipe"]
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise damaged(folder, error) from error
    if wanted != fingerprint:
        raise ConfigError(
            f"{path}: this checkpoint belongs to another recipe",
            hint="resume with the recipe it was started with, or start again in another folder",
        )
    assert isinstance(state, dict)
    return state


def damaged(folder: Path, error: Exception) -> FormatError:
    """Return the error for a checkpoint that cannot be used."""
    return FormatError(
        f"{folder / CHECKPOINT_NAME}: this checkpoint is damaged: {type(error).__name__}",
        hint="delete it and start again",
    )
