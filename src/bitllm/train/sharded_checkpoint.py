"""Checkpoints of several ranks: each writes its shards (torch.distributed.checkpoint).

A checkpoint is a folder `checkpoint-STEP`. It counts from the moment it has its `.metadata`, which
is written when the shards of all ranks are there; older ones are removed after that. It can be
resumed by another number of ranks. PyTorch keeps that file as a pickle: resume only what you
trust, as with everything that `pickle` reads.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bitllm.errors import CheckpointError, ConfigError, FormatError
from bitllm.train.ranks import Ranks
from bitllm.train.run_checkpoint import read_state, write_state

__all__ = ["has_shards", "read_shards", "write_shards_of_run"]

_NAME = re.compile(r"checkpoint-([0-9]{8})")
_COMPLETE = ".metadata"


def write_shards_of_run(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    ranks: Ranks,
) -> None:
    """Write the checkpoint of a step; all ranks have to call it.

    Args:
        folder: of the run, on a file system that all ranks see.
        step: its number.
        tensors: sharded or equal on all ranks, by name.
        state: the rest, which the first rank writes.
        ranks: all of them.

    Raises:
        CheckpointError: it cannot be written; the one before is left.
    """
    path = folder / f"checkpoint-{step:08d}"
    if ranks.first:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        write_state(path, state)
    ranks.wait()
    try:
        save(dict(tensors), checkpoint_id=path)
    except Exception as error:  # what a rank meets is wrapped, and raised by all of them
        raise CheckpointError(
            f"{path}: cannot write the checkpoint: {error}",
            hint="make room on the disk and go on with --resume: the one before is whole",
        ) from error
    if ranks.first:
        for other in _folders(folder):
            if other != path:
                shutil.rmtree(other, ignore_errors=True)
    ranks.wait()


def read_shards(
    folder: Path, fingerprint: str, blank: Any, ranks: Ranks
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the last whole checkpoint; all ranks have to call it.

    Args:
        folder: of the run.
        fingerprint: as for `read_state`.
        blank: makes the tensor to read into, by its name.
        ranks: all of them.

    Returns:
        The tensors, and the rest.

    Raises:
        ConfigError: there is none, or it belongs to another recipe.
        FormatError: it is damaged.
    """
    complete = [path for path in _folders(folder) if (path / _COMPLETE).is_file()]
    if not complete:
        raise ConfigError(f"{folder}: no checkpoint to resume from", hint="run without --resume")
    path = complete[-1]
    state = read_state(path, fingerprint)
    try:
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {name: blank(name) for name in names}
        load(tensors, checkpoint_id=path)
    except Exception as error:  # whatever the bytes provoke
        raise FormatError(
            f"{path}: this checkpoint is damaged: {type(error).__name__}",
            hint="delete it and start again",
        ) from error
    ranks.wait()
    return tensors, state


def has_shards(folder: Path) -> bool:
    """Say whether there is a checkpoint of several ranks."""
    return any((path / _COMPLETE).is_file() for path in _folders(folder))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name))
