"""Model files: finding them, and reading them into a `bitllm.checkpoint.Checkpoint`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from bitllm.checkpoint import Checkpoint
from bitllm.errors import CheckpointError, UnsupportedModelError
from bitllm.formats.generation import GenerationDefaults, read_generation_config
from bitllm.formats.hub import ModelFiles, resolve_model
from bitllm.formats.huggingface import open_huggingface

__all__ = [
    "GenerationDefaults",
    "ModelFiles",
    "open_checkpoint",
    "read_generation_config",
    "resolve_model",
]


def open_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Open the model in a directory; tensors are read when they are asked for.

    Args:
        path: a directory with config.json and safetensors files, as `resolve_model` returns it.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the files.
    """
    directory = Path(path)
    if directory.suffix == ".gguf" and directory.is_file():
        raise UnsupportedModelError(
            f"{directory}: GGUF files are not supported yet", hint="use the safetensors version"
        )
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not (directory / "config.json").is_file():
        if any(directory.glob("*.gguf")):
            raise UnsupportedModelError(
                f"{directory}: GGUF files are not supported yet",
                hint="use the model's safetensors version",
            )
        raise CheckpointError(
            f"{directory}: no config.json there",
            hint="a model directory holds config.json, model.safetensors and tokenizer.json",
        )
    return open_huggingface(directory)
