"""Reading the GGUF container: a mapped file, a validated header, views into it.

Arrays of the metadata are decoded when somebody asks for them: a vocabulary is a hundred thousand
strings.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.errors import CheckpointError, FormatError, MissingTensorError
from bitllm.formats.gguf.header import (
    HEADER_BYTES,
    SCALARS,
    STRING,
    Cursor,
    GgufArray,
    GgufTensor,
    Header,
)

__all__ = ["GgufArray", "GgufFile", "GgufTensor"]


class GgufFile:
    """A GGUF file mapped into memory.

    The mapping lives as long as this object or any array taken from it.

    Args:
        path: the file.

    Attributes:
        metadata: values by key; arrays as `GgufArray`, see `values`.
        tensors: infos by name, in the order of the file.

    Raises:
        CheckpointError: the file cannot be opened.
        FormatError: the file breaks the format; the message says how.
        UnsupportedModelError: a version, byte order or tensor type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._size = file.seek(0, 2)
                if self._size < HEADER_BYTES:
                    raise FormatError(
                        f"{path}: {self._size} bytes are no GGUF file",
                        hint="the download stopped early; fetch the file again",
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        header = Header(path, self._map, self._size)
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        self.tensors: Mapping[str, GgufTensor] = MappingProxyType(header.tensors)

    def values(self, key: str) -> Any:
        """Return a value of the metadata; arrays as a list of str or a NumPy array, None if absent.

        Raises:
            FormatError: a string that is no UTF-8.
        """
        value = self.metadata.get(key)
        if not isinstance(value, GgufArray):
            return value
        if value.element_type == STRING:
            return Cursor(self.path, self._map, self._size, value.start).strings(key, value.count)
        dtype = np.dtype(SCALARS[value.element_type])
        found = np.frombuffer(self._map, dtype, value.count, value.start)
        return found.astype(dtype.newbyteorder("="))

    def tensor(self, name: str) -> GgufTensor:
        """Return the info of a tensor.

        Raises:
            MissingTensorError: the file has no such tensor.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensorError(f"{self.path}: tensor {name!r} is missing") from None

    def bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a read-only view of a tensor's bytes, uint8 [n].

        Raises:
            MissingTensorError: the file has no such tensor.
            FormatError: the file has become shorter since it was opened.
        """
        tensor = self.tensor(name)
        # Reading a page behind the end of a mapped file kills the process, so look first.
        if self._map.size() < tensor.stop:
            raise FormatError(
                f"{self.path}: the file has become shorter since it was opened "
                f"({self._size} bytes then, {self._map.size()} now)",
                hint="something rewrites the file while it is being read; load it again",
            )
        return np.frombuffer(self._map, np.uint8, tensor.stop - tensor.start, tensor.start)

    def release(self) -> None:
        """Drop the file's pages from memory; they are read again if used again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
