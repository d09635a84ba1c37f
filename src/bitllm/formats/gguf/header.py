"""The header of a GGUF file: magic, counts, metadata (typed values by key), and tensor infos.

Everything it says is checked before any byte of data is touched, and nothing is allocated for a
count or a length before it is known that the file has the bytes for it. Arrays are stepped over;
`Cursor.strings` decodes them later.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitllm.errors import FormatError, UnsupportedModelError
from bitllm.formats.gguf.ggml_types import GGML_TYPES, UNSIZED_TYPES, GgmlType

__all__ = ["HEADER_BYTES", "SCALARS", "STRING", "Cursor", "GgufArray", "GgufTensor", "Header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
HEADER_BYTES = 24
"""Bytes of magic, version and counts: no file is shorter."""

_MAX_KEYS = 65_536
_MAX_TENSORS = 1 << 20
_MAX_KEY_BYTES = 65_535
_MAX_NAME_BYTES = 1_024
_MAX_TEXT_BYTES = 16 << 20
_MAX_STRINGS = 1 << 22  # in all arrays together: stepping over them takes time
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 48
_MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32

SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, _ARRAY = 8, 9
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata that nobody has decoded yet; `start` is the byte of its elements."""

    element_type: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor info: `shape` has the fastest axis last, `start` and `stop` are bytes of the file.

    `stop` is the end of the tensor's own bytes, without what fills up to the next one.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    start: int
    stop: int


class Cursor:
    """A place in the mapped file; every step is checked against its end first."""

    def __init__(self, path: Path, data: mmap.mmap, size: int, place: int) -> None:
        self.path, self._data, self._size, self.place = path, data, size, place

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes; return where they begin."""
        start = self.place
        if count > self._size - start:
            raise FormatError(
                f"{self.path}: {what} needs {count} bytes at byte {start}, "
                f"the file has {self._size}",
                hint="the download stopped early, or the file is damaged; fetch it again",
            )
        self.place = start + count
        return start

    def u32(self, what: str) -> int:
        """Step over a uint32; return it. `what` is named where it is not there."""
        return int(_U32.unpack_from(self._data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """Step over a uint64; return it."""
        return int(_U64.unpack_from(self._data, self.take(8, what))[0])

    def scalar(self, dtype: np.dtype[Any], what: str) -> Any:
        """Step over a number or switch; return it."""
        start = self.take(dtype.itemsize, what)
        return np.frombuffer(self._data, dtype, 1, start)[0].item()

    def text(self, what: str, most: int) -> str:
        """Step over a string of at most `most` bytes; return it."""
        length = self.u64(f"the length of {what}")
        if length > most:
            raise FormatError(
                f"{self.path}: {what} is said to be {length} bytes long, more than {most}",
                hint="the file is damaged; fetch it again",
            )
        start = self.take(length, what)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {what} is no UTF-8 text ({error})") from error

    def strings(self, what: str, count: int) -> list[str]:
        """Decode `count` strings, which have been stepped over before."""
        data, place, unpack = self._data, self.place, _U64.unpack_from
        found = []
        try:
            for _ in range(count):
                stop = place + 8 + unpack(data, place)[0]
                found.append(str(data[place + 8 : stop], "utf-8"))
                place = stop
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{self.path}: string {len(found)} of {what} is no UTF-8 text ({error})"
            ) from error
        return found

    def skip_strings(self, what: str, count: int) -> None:
        """Step over `count` strings."""
        data, place, end, unpack = self._data, self.place, self._size - 8, _U64.unpack_from
        for index in range(count):
            if place > end:
                self.place = min(place, self._size)
                self.take(8, f"string {index} of {what}")
            place += 8 + unpack(data, place)[0]
        if place > self._size:
            raise FormatError(
                f"{self.path}: the strings of {what} reach behind the end of the file",
                hint="the download stopped early, or the file is damaged; fetch it again",
            )
        self.place = place


@dataclass(frozen=True, slots=True)
class _Info:
    """A tensor info as it stands in the file: `type_id` may mean several types."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


class Header:
    """All that stands before the data, parsed and checked."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._size = path, size
        self._cursor = Cursor(path, data, size, 0)
        tensor_count, key_count = self._read_counts(data[:8])
        self._strings_left = _MAX_STRINGS
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            self._read_pair()
        alignment = self._alignment()
        infos = self._read_infos(tensor_count, alignment)
        data_start = -(-self._cursor.place // alignment) * alignment
        self.tensors = self._place(infos, data_start, alignment)

    def _read_counts(self, first: bytes) -> tuple[int, int]:
        if first[:4] != _MAGIC:
            raise FormatError(f"{self._path}: not a GGUF file", hint=_hint_from_first_bytes(first))
        self._cursor.take(4, "the magic")
        version = self._cursor.u32("the version")
        if version and not version & 0xFFFF:
            raise UnsupportedModelError(
                f"{self._path}: a GGUF file in big-endian byte order, which is not read",
                hint="fetch the little-endian version, which is the usual one",
            )
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"{self._path}: version {version} of GGUF is not read",
                hint="versions 2 and 3 are; convert the model again with a newer converter",
            )
        tensors, keys = self._cursor.u64("the counts"), self._cursor.u64("the counts")
        self._check_count("tensors", tensors, _MAX_TENSORS, 24)
        self._check_count("metadata keys", keys, _MAX_KEYS, 13)
        return tensors, keys

    def _check_count(self, what: str, count: int, most: int, smallest: int) -> None:
        """Refuse a count for which the file has no room: an entry takes `smallest` bytes."""
        room = (self._size - self._cursor.place) // smallest
        if count > min(most, room):
            raise FormatError(
                f"{self._path}: {count} {what} are announced, "
                f"a file of {self._size} bytes has at most {min(most, room)}",
                hint="the file is damaged; fetch it again",
            )

    def _read_pair(self) -> None:
        key = self._cursor.text("a metadata key", _MAX_KEY_BYTES)
        what = f"the value of {_short(key)}"
        if key in self.metadata:
            raise FormatError(f"{self._path}: the metadata name {_short(key)} twice")
        kind = self._cursor.u32(what)
        if kind == STRING:
            self.metadata[key] = self._cursor.text(what, _MAX_TEXT_BYTES)
        elif kind == _ARRAY:
            self.metadata[key] = self._skip_array(what)
        elif kind in SCALARS:
            self.metadata[key] = self._cursor.scalar(np.dtype(SCALARS[kind]), what)
        else:
            raise FormatError(f"{self._path}: {what} has the unknown type {kind}")

    def _skip_array(self, what: str) -> GgufArray:
        kind, count = self._cursor.u32(what), self._cursor.u64(what)
        start = self._cursor.place
        if kind == STRING:
            self._check_count(f"strings of {what}", count, self._strings_left, 8)
            self._strings_left -= count
            self._cursor.skip_strings(what, count)
        elif kind in SCALARS:
            self._cursor.take(count * np.dtype(SCALARS[kind]).itemsize, what)
        else:
            wanted = "an array of arrays" if kind == _ARRAY else f"of the unknown type {kind}"
            raise FormatError(f"{self._path}: {what} is {wanted}, which is not read")
        return GgufArray(kind, count, start)

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        fits = type(value) is int and 8 <= value <= _MAX_ALIGNMENT and not value & (value - 1)
        if not fits:
            raise FormatError(
                f"{self._path}: general.alignment should be a power of two from 8 to "
                f"{_MAX_ALIGNMENT}, got {_short(value)}"
            )
        return int(value)

    def _read_infos(self, count: int, alignment: int) -> list[_Info]:
        infos: dict[str, _Info] = {}
        for _ in range(count):
            name = self._cursor.text("a tensor's name", _MAX_NAME_BYTES)
            if name in infos:
                raise FormatError(f"{self._path}: two tensors are called {_short(name)}")
            infos[name] = self._read_info(name, alignment)
        return list(infos.values())

    def _read_info(self, name: str, alignment: int) -> _Info:
        what = f"tensor {_short(name)}"
        dimensions = self._cursor.u32(what)
        if dimensions > _MAX_DIMENSIONS:
            raise FormatError(f"{self._path}: {what} has {dimensions} dimensions")
        # The file names the fastest axis first.
        shape = tuple(self._cursor.u64(what) for _ in range(dimensions))[::-1]
        type_id, offset = self._cursor.u32(what), self._cursor.u64(what)
        if 0 in shape or math.prod(shape) > _MAX_ELEMENTS:
            raise FormatError(f"{self._path}: {what} has the impossible shape {_short([*shape])}")
        if offset % alignment:
            raise FormatError(
                f"{self._path}: {what} begins at byte {offset}, no multiple of {alignment}"
            )
        return _Info(name, shape, type_id, offset)

    def _place(self, infos: list[_Info], start: int, alignment: int) -> dict[str, GgufTensor]:
        """Resolve the types by the space of the tensors, and check that none overlaps another."""
        room = dict(self._rooms(infos, start))
        placed = {}
        for type_id in {info.type_id for info in infos}:
            members = sorted(
                (info for info in infos if info.type_id == type_id), key=lambda info: info.offset
            )
            kind = self._resolve(type_id, members, room, alignment)
            for info in members:
                size = self._size_of(info, kind, room[info.name])
                begin = start + info.offset
                placed[info.name] = GgufTensor(info.name, kind, info.shape, begin, begin + size)
        return {info.name: placed[info.name] for info in infos}

    def _rooms(self, infos: list[_Info], start: int) -> Iterator[tuple[str, int]]:
        """Yield the name of each tensor and the bytes from its beginning to the next one's."""
        ordered = sorted(infos, key=lambda info: info.offset)
        ends = [info.offset for info in ordered[1:]] + [self._size - start]
        for info, end in zip(ordered, ends, strict=False):  # without tensors there is one end
            if end < info.offset:
                raise FormatError(
                    f"{self._path}: tensor {_short(info.name)} begins behind the end of the file",
                    hint="the download stopped early; fetch the file again",
                )
            yield info.name, end - info.offset

    def _resolve(
        self, type_id: int, members: list[_Info], room: Mapping[str, int], alignment: int
    ) -> GgmlType:
        candidates = GGML_TYPES.get(type_id)
        if candidates is None:
            raise UnsupportedModelError(
                f"{self._path}: tensor {_short(members[0].name)} has the type {type_id}, "
                "which bitllm does not know",
                hint="fetch the model as I2_S, TQ2_0 or TQ1_0, or its safetensors version",
            )
        if len(candidates) == 1 and type_id not in UNSIZED_TYPES:
            return candidates[0]
        for known in (members, members[:-1]):  # what a truncated file cut off fits no type
            for kind in candidates:
                if known and all(_fits(kind, info, room[info.name], alignment) for info in known):
                    return kind
        return UNSIZED_TYPES.get(type_id, candidates[0])

    def _size_of(self, info: _Info, kind: GgmlType, room: int) -> int:
        size = kind.size(info.shape)
        what = f"{self._path}: tensor {_short(info.name)} of type {kind.name}"
        if size is None:
            raise FormatError(
                f"{what} has rows of {info.shape[-1] if info.shape else 1} values, "
                f"which are no blocks of {kind.block}"
            )
        if size > room:
            raise FormatError(
                f"{what} and shape {[*info.shape]} needs {size} bytes, "
                f"{room} are there until the next tensor or the end of the file",
                hint="the download stopped early, or the file is damaged; fetch it again",
            )
        return size


def _fits(kind: GgmlType, info: _Info, room: int, alignment: int) -> bool:
    size = kind.size(info.shape)
    return size is not None and 0 <= room - size < alignment


def _hint_from_first_bytes(first: bytes) -> str:
    if first.startswith(b"version "):
        return "this is a Git LFS pointer, not the file; run `git lfs pull` where it was cloned"
    if first.lstrip().startswith((b"<", b"{")):
        return "this is a text file, perhaps a saved web page; download the model again"
    if first.startswith(b"FUGG"):
        return "its byte order is big-endian, which is not read"
    if first[:4] in (b"ggml", b"ggjt", b"lmgg", b"tjgg"):
        return "this is a format from before GGUF; convert the model again"
    return "the file is damaged, or of another format"


def _short(value: object) -> str:
    """A value from the file for a message: it may be long or hold control characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
