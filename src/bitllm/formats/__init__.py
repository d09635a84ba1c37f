"""Model files: finding them, and reading them into a `bitllm.checkpoint.Checkpoint`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from bitllm.checkpoint import Checkpoint
from bitllm.errors import CheckpointError
from bitllm.formats.generation import GenerationDefaults, read_generation_config
from bitllm.formats.gguf import find_gguf, open_gguf, read_gguf_texts
from bitllm.formats.hub import ModelFiles, resolve_model
from bitllm.formats.huggingface import open_huggingface
from bitllm.formats.peft import open_adapter

__all__ = [
    "GenerationDefaults",
    "ModelFiles",
    "find_gguf",
    "open_adapter",
    "open_checkpoint",
    "read_generation_config",
    "read_gguf_texts",
    "resolve_model",
]


def open_checkpoint(path: str | PathLike[str], *, i2s_layout: str | None = None) -> Checkpoint:
    """Open a model; tensors are read when they are asked for.

    Args:
        path: a directory with config.json and safetensors files, a GGUF file, or a directory with
            one, as `resolve_model` returns it.
        i2s_layout: order of the codes of I2_S tensors in GGUF files, "x86_128", "arm_64" or "row4";
            None = what BITLLM_I2S_LAYOUT says, or else "x86_128".

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the files.
        ModelNotFoundError: the directory holds several models.
        ConfigError: no such layout.
    """
    directory = Path(path)
    gguf = find_gguf(directory)
    if gguf is not None:
        return open_gguf(gguf, i2s_layout=i2s_layout)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory, and no GGUF file")
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: no config.json there",
            hint="a model directory holds config.json, model.safetensors and tokenizer.json",
        )
    return open_huggingface(directory)
