"""The weight files of a model directory: which they are, and the file that holds each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import DenseTensor
from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats.json_file import read_json_object
from bitllm.formats.safetensors import SafetensorsFile, TensorEntry
from bitllm.formats.torch_file import TorchFile

__all__ = ["FLOATS", "WeightFile", "entry_of", "open_weight_files", "wrong_tensor"]

FLOATS = ("F32", "BF16", "F16")
"""Dtypes of dense tensors, as safetensors calls them."""

_SUFFIXES = (".bin", ".pt", ".pth", ".gguf", ".safetensors", ".npz")


class WeightFile(Protocol):
    """A file with tensors in it; the methods are those of `SafetensorsFile`."""

    path: Path

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Dtype and shape of each tensor by its name."""

    def entry(self, name: str) -> TensorEntry:
        """Return dtype and shape of one tensor."""

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a view of a tensor's values."""

    def dense(self, name: str) -> DenseTensor:
        """Return a floating-point tensor as a view."""

    def release(self, name: str | None = None) -> None:
        """Drop what was read of a tensor, or of all, from memory."""


def open_weight_files(directory: Path) -> dict[str, WeightFile]:
    """Open the weight files; return the file of each tensor, by the tensor's name.

    safetensors is preferred; pytorch_model.bin is read where there is nothing else.

    Raises:
        CheckpointError: one of its kinds: no weights there, or files that contradict themselves.
    """
    for stem, suffix, opened in _KINDS:
        index, single = directory / f"{stem}{suffix}.index.json", directory / f"{stem}{suffix}"
        if index.is_file():
            return _open_shards(index, opened)
        if single.is_file():
            file = opened(single)
            return dict.fromkeys(file.entries, file)
    others = sorted(path.name for path in directory.glob("*") if path.suffix in _SUFFIXES)
    if others:
        raise UnsupportedModelError(
            f"{directory}: no model.safetensors, but {', '.join(others[:3])}",
            hint="bitllm reads model.safetensors and pytorch_model.bin, in one file or with an "
            "index; convert the weights with transformers' save_pretrained",
        )
    raise CheckpointError(
        f"{directory}: neither model.safetensors nor model.safetensors.index.json is there",
        hint="download the model again; a Git clone without LFS has no weights",
    )


def entry_of(files: Mapping[str, WeightFile], name: str) -> TensorEntry:
    """Return dtype and shape of the tensor called `name`.

    Raises:
        MissingTensorError: no file has it.
    """
    if name not in files:
        where = next((str(file.path.parent) for file in files.values()), "the model")
        raise MissingTensorError(
            f"{where}: tensor {name!r} is missing",
            hint="download the model again, or check that config.json belongs to these weights",
        )
    return files[name].entry(name)


def wrong_tensor(files: Mapping[str, WeightFile], name: str, wanted: str) -> TensorShapeError:
    """Return the error for a tensor that has another shape or dtype than the model needs."""
    entry = files[name].entry(name)
    return TensorShapeError(
        f"{files[name].path}: {name!r} should be {wanted}, but is {entry.dtype} {[*entry.shape]}",
        hint="config.json does not belong to these weights, or one of them is damaged",
    )


def _open_safetensors(path: Path) -> WeightFile:
    return SafetensorsFile(path)


def _open_torch(path: Path) -> WeightFile:
    return TorchFile(path)


_KINDS: tuple[tuple[str, str, Callable[[Path], WeightFile]], ...] = (
    ("model", ".safetensors", _open_safetensors),
    ("pytorch_model", ".bin", _open_torch),
)


def _open_shards(index: Path, opened: Callable[[Path], WeightFile]) -> dict[str, WeightFile]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map should map tensor names to files")
    shards: dict[str, WeightFile] = {}
    files: dict[str, WeightFile] = {}
    for name, shard in weight_map.items():
        # A shard lies beside its index; a path leading elsewhere is not followed.
        if not isinstance(shard, str) or shard in ("", "..") or PurePosixPath(shard).name != shard:
            raise FormatError(
                f"{index}: {name!r} is said to be in {shard!r:.100}, which is no file name"
            )
        if shard not in shards:
            shards[shard] = _open_shard(index, shard, opened)
        if name not in shards[shard].entries:
            raise MissingTensorError(
                f"{index}: {name!r} should be in {shard}, but is not there",
                hint="index and shards do not belong together; download the model again",
            )
        files[name] = shards[shard]
    return files


def _open_shard(index: Path, shard: str, opened: Callable[[Path], WeightFile]) -> WeightFile:
    if not (index.parent / shard).is_file():
        raise CheckpointError(
            f"{index.parent}: the shard {shard} is missing",
            hint="the download is not complete; fetch the model again",
        )
    return opened(index.parent / shard)
