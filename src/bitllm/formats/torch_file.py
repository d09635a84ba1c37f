"""pytorch_model.bin: a pickle, so a program of strangers. Read by PyTorch's restricted loader only.

PyTorch itself is not needed for anything else here and is imported when such a file is opened.
`weights_only=True` builds tensors and plain containers and runs nothing; before 2.6 that could be
got around (CVE-2025-32434), so older versions are refused. The file is mapped, not read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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
from bitllm.formats.safetensors import TensorEntry

if TYPE_CHECKING:
    import torch

__all__ = ["TorchFile"]

_OLDEST = (2, 6)
_MAX_PICKLE_BYTES = 64 << 20
_INSTALL = "pip install 'torch>=2.6', or convert the weights to safetensors elsewhere"
_DENSE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}


class TorchFile:
    """A file of `torch.save` that maps names to tensors; methods are those of `SafetensorsFile`.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be opened.
        FormatError: it is no such file, or holds something else than tensors.
        UnsupportedModelError: PyTorch is not installed, or too old.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._torch = _import_torch(path)
        _check_archive(path)
        self._tensors = self._load()
        self._dtypes = _dtype_names(self._torch)
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(
            {name: self._describe(name, tensor) for name, tensor in self._tensors.items()}
        )

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            held = self._torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror or error}") from error
        except Exception as error:  # of many kinds, for pickles that are broken or hostile
            raise FormatError(
                f"{self.path}: PyTorch does not load it as weights: "
                f"{(str(error).strip() or type(error).__name__).splitlines()[0][:200]}",
                hint="the file is damaged, or would run code; use the safetensors version",
            ) from error
        if not isinstance(held, Mapping) or not held:
            raise FormatError(
                f"{self.path}: should map names to tensors, is {held!r:.40}",
                hint="use the safetensors version of the model",
            )
        for name, tensor in held.items():
            if not isinstance(name, str) or not isinstance(tensor, self._torch.Tensor):
                raise FormatError(
                    f"{self.path}: {name!r:.100} is no tensor but {type(tensor).__name__}",
                    hint="this is a training checkpoint, not the weights of a model",
                )
        return dict(held)

    def _describe(self, name: str, tensor: torch.Tensor) -> TensorEntry:
        strided = tensor.layout == self._torch.strided and tensor.device.type == "cpu"
        strided = strided and not tensor.is_neg()
        if not strided or tensor.dtype not in self._dtypes or not tensor.is_contiguous():
            raise FormatError(
                f"{self.path}: {name!r:.100} is not stored as one dense array of numbers",
                hint="use the safetensors version of the model",
            )
        size = tensor.numel() * tensor.element_size()
        return TensorEntry(self._dtypes[tensor.dtype], tuple(tensor.shape), 0, size)

    def entry(self, name: str) -> TensorEntry:
        """Return dtype and shape of `name`.

        Raises:
            MissingTensorError: the file has no such tensor.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise MissingTensorError(f"{self.path}: tensor {name!r} is missing") from None

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a view of a tensor's values; bf16 comes as the uint16 of its bits.

        Raises:
            MissingTensorError: the file has no such tensor.
        """
        bits = self.entry(name).dtype == "BF16"
        tensor = self._tensors[name].detach()
        values: Any = (tensor.view(self._torch.int16) if bits else tensor).numpy()
        return np.asarray(values.view(np.uint16) if bits else values)

    def dense(self, name: str) -> DenseTensor:
        """Return a floating-point tensor as a view.

        Raises:
            MissingTensorError: the file has no such tensor.
            TensorShapeError: it is not F32, BF16 or F16.
        """
        entry = self.entry(name)
        if entry.dtype not in _DENSE:
            raise TensorShapeError(
                f"{self.path}: {name!r} should be F32, BF16 or F16, but is {entry.dtype}"
            )
        return DenseTensor(self.array(name), _DENSE[entry.dtype])  # type: ignore[arg-type]

    def release(self, name: str | None = None) -> None:
        """Do nothing: PyTorch owns the mapping, and the system drops its pages when it must."""


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UnsupportedModelError(
            f"{path}: a file of PyTorch, which is not installed", hint=_INSTALL
        ) from error
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST:
        raise UnsupportedModelError(
            f"{path}: a file of PyTorch, whose version {torch.__version__} cannot load it safely",
            hint=_INSTALL,
        )
    return torch


def _check_archive(path: Path) -> None:
    """Refuse what could not be mapped: old files that are a bare pickle, and compressed ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise FormatError(
            f"{path}: no file of torch.save ({error})",
            hint="the download stopped early, or the file is older than PyTorch 1.6; "
            "use the safetensors version",
        ) from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise FormatError(f"{path}: {member.filename!r:.100} is compressed or encrypted")
        if member.filename.endswith(".pkl") and member.file_size > _MAX_PICKLE_BYTES:
            raise FormatError(f"{path}: {member.filename!r:.100} is larger than 64 MiB")


def _dtype_names(torch: Any) -> dict[Any, str]:
    return {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
        torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
        torch.float64: "F64",
    }  # fmt: skip
