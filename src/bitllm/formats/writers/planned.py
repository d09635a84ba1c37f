"""What is going to be written: names, types, sizes, and what yields the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import ModelSpec
from bitllm.errors import UnsupportedModelError

__all__ = ["Chunks", "PlannedFile", "PlannedTensor", "WritePlan", "refuse_unwritten"]

Chunks = Iterator["bytes | npt.NDArray[np.generic]"]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of a file.

    Attributes:
        name: its name in the file.
        dtype: its type there, as the format calls it.
        shape: its shape there, rows first.
        nbytes: bytes in the file, without what aligns the next tensor.
        origin: canonical name of the tensor that it holds, or is a part of.
        chunks: yields the bytes piece by piece; called once, when it is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    origin: str
    chunks: Callable[[], Chunks]


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file: its name in the model's directory, its size in bytes, and what yields the bytes."""

    name: str
    nbytes: int
    chunks: Callable[[], Chunks]

    @classmethod
    def of(cls, name: str, content: bytes) -> PlannedFile:
        """Plan a file whose content is in memory."""
        return cls(name, len(content), lambda: iter([content]))


@dataclass(frozen=True, slots=True)
class WritePlan:
    """Everything that will be written, known before any weight is read.

    Attributes:
        format: "huggingface", "gguf" or "mlx".
        tensors: the tensors of all files, in the order in which they are written.
        files: the files.
        errors: largest relative error of the scales of a matrix, or of the values of a vector, by
            canonical name; only of those that the format cannot store exactly.
        notes: what the reader should know of the result, a sentence each.
    """

    format: str
    tensors: tuple[PlannedTensor, ...]
    files: tuple[PlannedFile, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def largest_error(self) -> float:
        """Largest relative error of a scale or a value; 0 where all are exact."""
        return max(self.errors.values(), default=0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


def refuse_unwritten(spec: ModelSpec) -> None:
    """Refuse models that are read, but written in no format.

    Raises:
        UnsupportedModelError: it is one; names the reason.
    """
    unwritten = {
        "embedding models": spec.pooling != "none",
        "models with post-norms (Gemma)": any(layer.post_norms for layer in spec.layers),
    }
    for what, found in unwritten.items():
        if found:
            raise UnsupportedModelError(
                f"{what} are read, but not written, in whatever format",
                hint="use the model as it is; nothing but its conversion is missing",
            )
