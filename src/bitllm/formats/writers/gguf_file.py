"""The container of GGUF version 3: metadata and tensor infos from the plan, then aligned data."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bitllm.formats.gguf.ggml_types import TYPE_NAMES
from bitllm.formats.writers.planned import Chunks, PlannedFile, PlannedTensor

__all__ = ["ALIGNMENT", "Value", "plan_gguf_file"]

ALIGNMENT = 32
"""Bytes to whose multiples each tensor is moved: what readers assume without being told."""

Value = tuple[str, Any]
"""The type of a metadata value and the value: ("u32", 1), or ("[str]", ["a", "b"]) for an array."""

_VALUE_TYPES = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8}
_FORMATS = {"u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?"}
_ARRAY = 9
_VERSION = 3


def plan_gguf_file(
    name: str, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]
) -> PlannedFile:
    """Plan a GGUF file.

    Args:
        name: of the file.
        metadata: keys and values, in the order in which they are written.
        tensors: their `dtype` is a key of `TYPE_NAMES`.
    """
    head = bytearray(b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _string(key) + _value(*value)
    offset = 0
    for tensor in tensors:
        head += _tensor_info(tensor, offset)
        offset += _aligned(tensor.nbytes)
    head += bytes(_aligned(len(head)) - len(head))

    def chunks() -> Chunks:
        yield bytes(head)
        for tensor in tensors:
            yield from tensor.chunks()
            yield bytes(_aligned(tensor.nbytes) - tensor.nbytes)

    return PlannedFile(name, len(head) + offset, chunks)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(kind: str, value: Any) -> bytes:
    if not kind.startswith("["):
        return struct.pack("<I", _VALUE_TYPES[kind]) + _bare(kind, value)
    element = kind[1:-1]
    head = struct.pack("<IIQ", _ARRAY, _VALUE_TYPES[element], len(value))
    if element == "str":
        return head + b"".join(map(_string, value))
    return head + np.asarray(value, {"i32": "<i4", "f32": "<f4"}[element]).tobytes()


def _bare(kind: str, value: Any) -> bytes:
    return _string(value) if kind == "str" else struct.pack(_FORMATS[kind], value)


def _tensor_info(tensor: PlannedTensor, offset: int) -> bytes:
    """Name, dimensions with the fastest first, type and offset."""
    sizes = tensor.shape[::-1]
    dimensions = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    kind = struct.pack("<IQ", TYPE_NAMES[tensor.dtype], offset)
    return _string(tensor.name) + dimensions + kind
