"""Reading safetensors files without copying: a mapped file, a validated header, views into it.

A file is 8 bytes of header length (little endian), the header (JSON: the dtype, shape and byte
range of each tensor by its name), and the data. Everything the header says is checked before any
byte of data is touched, so that a file that lies cannot make us read outside of it, or read one
tensor as another.
"""

from __future__ import annotations

import json
import math
import mmap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import DenseTensor
from bitllm.errors import CheckpointError, FormatError, MissingTensorError, TensorShapeError

__all__ = ["SafetensorsFile", "TensorEntry"]

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMENSIONS = 32
_MAX_EXTENT = 1 << 48

# Bits of one element, for every dtype of the format; those without a NumPy dtype can be skipped
# over but not read.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_NUMPY = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "I16": "<i2", "U16": "<u2", "F16": "<f2",
    "BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8",
    "F64": "<f8",
}  # fmt: skip
_DENSE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One line of a header: what a tensor is and where its bytes are.

    `start` and `stop` are byte offsets from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file mapped into memory.

    The mapping lives as long as this object or any array taken from it.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be opened.
        FormatError: the file breaks the format; the message says how.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                header = _read_header(path, file.read(_LENGTH_BYTES), size, file.read)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        self._size = size
        self.metadata: Mapping[str, str] = MappingProxyType(header.metadata)
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(header.entries)

    def entry(self, name: str) -> TensorEntry:
        """Return the header's entry for `name`.

        Raises:
            MissingTensorError: the file has no such tensor.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise MissingTensorError(f"{self.path}: tensor {name!r} is missing") from None

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a read-only view of a tensor's values; bf16 comes as the uint16 of its bits.

        Raises:
            MissingTensorError: the file has no such tensor.
            TensorShapeError: NumPy has no dtype for it.
            FormatError: the file has become shorter since it was opened.
        """
        entry = self.entry(name)
        if entry.dtype not in _NUMPY:
            raise TensorShapeError(f"{self.path}: {name!r} is {entry.dtype}, which is not read")
        # Reading a page behind the end of a mapped file kills the process, so look first.
        if self._map.size() < entry.stop:
            raise FormatError(
                f"{self.path}: the file has become shorter since it was opened "
                f"({self._size} bytes then, {self._map.size()} now)",
                hint="something rewrites the file while it is being read; load it again",
            )
        dtype = np.dtype(_NUMPY[entry.dtype])
        values = np.frombuffer(
            self._map, dtype, count=math.prod(entry.shape), offset=entry.start
        ).reshape(entry.shape)
        return values if dtype.isnative else values.astype(dtype.newbyteorder("="))

    def dense(self, name: str) -> DenseTensor:
        """Return a floating-point tensor as a view.

        Raises:
            MissingTensorError: the file has no such tensor.
            TensorShapeError: it is not F32, BF16 or F16.
            FormatError: the file has become shorter since it was opened.
        """
        entry = self.entry(name)
        if entry.dtype not in _DENSE:
            raise TensorShapeError(
                f"{self.path}: {name!r} should be F32, BF16 or F16, but is {entry.dtype}"
            )
        return DenseTensor(self.array(name), _DENSE[entry.dtype])  # type: ignore[arg-type]

    def release(self, name: str | None = None) -> None:
        """Drop the pages of a tensor, or of all, from memory; they are read again if used again."""
        start, stop = 0, self._size
        if name is not None:
            entry = self.entry(name)
            start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(frozen=True, slots=True)
class _Header:
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]


def _read_header(path: Path, length_bytes: bytes, file_size: int, read: Any) -> _Header:
    if len(length_bytes) < _LENGTH_BYTES:
        raise FormatError(
            f"{path}: {file_size} bytes are no safetensors file",
            hint="the download stopped early; fetch the file again",
        )
    length = int.from_bytes(length_bytes, "little")
    if length > file_size - _LENGTH_BYTES or length > _MAX_HEADER_BYTES:
        raise FormatError(
            f"{path}: the header is said to be {length} bytes long, the file has {file_size}",
            hint=_hint_from_first_bytes(length_bytes),
        )
    fields = _parse_json(path, read(length))
    metadata = _check_metadata(path, fields.pop("__metadata__", {}))
    data_start = _LENGTH_BYTES + length
    entries = {name: _check_entry(path, name, raw, data_start) for name, raw in fields.items()}
    _check_layout(path, entries, data_start, file_size)
    return _Header(metadata, entries)


def _hint_from_first_bytes(first: bytes) -> str:
    if first == b"version ":
        return "this is a Git LFS pointer, not the file; run `git lfs pull` where it was cloned"
    if first.lstrip().startswith((b"<", b"{")):
        return "this is a text file, perhaps a saved web page; download the model again"
    if first.startswith(b"GGUF"):
        return "this is a GGUF file under another name"
    return "the file is truncated or not a safetensors file; download it again"


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise FormatError(f"{path}: the header names {_short(twice)} twice")
        return fields

    def refuse_constant(constant: str) -> Any:
        raise FormatError(f"{path}: the header holds the number {constant}")

    if text[:1] != b"{":
        raise FormatError(f"{path}: the header is not a JSON object")
    try:
        fields = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(
            f"{path}: the header is not valid JSON ({reason})", hint="the file is damaged"
        ) from error
    if not isinstance(fields, dict):
        raise FormatError(f"{path}: the header is not a JSON object")
    return fields


def _check_metadata(path: Path, raw: Any) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    return raw


def _check_entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise FormatError(f"{where} has the unknown dtype {_short(dtype)}")
    if (
        not _are_naturals(shape)
        or len(shape) > _MAX_DIMENSIONS
        or max(shape, default=0) > _MAX_EXTENT
    ):
        raise FormatError(f"{where} has the impossible shape {_short(shape)}")
    if not _are_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where} has the impossible data_offsets {_short(offsets)}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise FormatError(
            f"{where} of dtype {dtype} and shape {_short(shape)} needs {bits / 8:g} bytes, "
            f"its data_offsets {_short(offsets)} hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(
    path: Path, entries: dict[str, TensorEntry], data_start: int, file_size: int
) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    end, before = data_start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fault = "overlaps with" if entry.start < end else "leaves a hole behind"
            raise FormatError(f"{path}: tensor {_short(name)} {fault} {before}")
        end, before = entry.stop, _short(name)
    if end > file_size:
        raise FormatError(
            f"{path}: the file has {file_size} bytes, its header describes {end}",
            hint="the download stopped early; fetch the file again",
        )
    if end < file_size:
        raise FormatError(f"{path}: {file_size - end} bytes at the end belong to no tensor")


def _short(value: object) -> str:
    """A value from the file for a message: it may be long or hold control characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
