"""GGUF models of one file or several: `name-00001-of-00003.gguf` and its siblings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.errors import CheckpointError, FormatError, MissingTensorError, ModelNotFoundError
from bitllm.formats.gguf.container import GgufFile, GgufTensor
from bitllm.formats.gguf.file_names import MOST_PARTS, gguf_parts, split_number

__all__ = ["GgufModel", "find_gguf"]

_IMAGE_ENCODER = "mmproj"  # lies beside models that read images too


class GgufModel:
    """The tensors of all files of a model, and the metadata of the first.

    Args:
        path: the model's file, or any of its files.

    Attributes:
        path: the first file.
        files: all of them.
        tensors: infos by name.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with a file.
    """

    def __init__(self, path: Path) -> None:
        self.path, *others = _shard_paths(path)
        first = GgufFile(self.path)
        count = first.metadata.get("split.count", 1 + len(others))
        if count != 1 + len(others):
            raise FormatError(
                f"{self.path}: the first of {count} files of a model, by its metadata",
                hint="keep the names that the files were published under (...-00001-of-0000N.gguf)",
            )
        self.files = (first, *(GgufFile(other) for other in others))
        self._owner: dict[str, GgufFile] = {}
        for file in self.files:
            for name in file.tensors:
                if name in self._owner:
                    raise FormatError(
                        f"{file.path}: tensor {name!r:.100} is in {self._owner[name].path.name} too"
                    )
                self._owner[name] = file
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(
            {name: file.tensors[name] for name, file in self._owner.items()}
        )

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Values of the first file by key; arrays are not decoded, see `values`."""
        return self.files[0].metadata

    def values(self, key: str) -> Any:
        """Return a value of the metadata, arrays decoded, None if absent."""
        return self.files[0].values(key)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, the first one if none does."""
        return self._owner.get(name, self.files[0]).path

    def bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a read-only view of a tensor's bytes, uint8 [n].

        Raises:
            MissingTensorError: no file has such a tensor.
            FormatError: the file has become shorter since it was opened.
        """
        if name not in self._owner:
            raise MissingTensorError(f"{self.path}: tensor {name!r} is missing")
        return self._owner[name].bytes(name)

    def release(self) -> None:
        """Drop the pages of all files from memory."""
        for file in self.files:
            file.release()


def _shard_paths(path: Path) -> list[Path]:
    """Return all files of a model, given one of them."""
    split = split_number(path.name)
    if split is None:
        return [path]
    number, count = split
    if not 1 <= number <= count <= MOST_PARTS:
        raise FormatError(f"{path}: a file of this name is part of no model")
    shards = [path.with_name(name) for name in gguf_parts(path.name)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{path.parent}: {len(missing)} of the model's {count} files are missing, "
            f"among them {missing[0]}",
            hint="the download is not complete; fetch the other files too",
        )
    return shards


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only model in a directory.

    None if it is a directory without GGUF files, or with safetensors files, which are preferred.

    Raises:
        ModelNotFoundError: the directory holds several models.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(entry for entry in path.glob("*.gguf") if entry.is_file())
    found = [entry for entry in files if not entry.name.startswith(_IMAGE_ENCODER)]
    if not found or any(path.glob("*.safetensors")):
        return None
    firsts = [entry for entry in found if _is_first(entry)]
    if len(firsts) != 1:
        names = ", ".join(entry.name for entry in (firsts or found)[:5])
        raise ModelNotFoundError(
            f"{path} holds several GGUF files: {names}", hint="name one of them instead"
        )
    return firsts[0]


def _is_first(path: Path) -> bool:
    split = split_number(path.name)
    return split is None or split[0] == 1
