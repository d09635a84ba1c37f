"""GGUF files for tests, written value by value: nothing here knows the code that reads them."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30,
    "TQ1_0": 34, "TQ2_0": 35, "I2_S": 36, "Q2_0": 42, "Q2_0_G128": 42,
    "IQ1_BN": 134, "IQ2_BN": 135, "PTQ1_0": 143, "IQ2_BN_R4": 335,
}  # fmt: skip
VALUE_TYPES = {"u8": 0, "i8": 1, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "u64": 10}
FORMATS = {"u8": "<B", "i8": "<b", "u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?", "u64": "<Q"}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: str, content: Any) -> bytes:
    """A metadata value with its type; `kind` "[str]" is an array."""
    if kind.startswith("["):
        inner = kind[1:-1]
        head = struct.pack("<IIQ", 9, VALUE_TYPES[inner], len(content))
        return head + b"".join(bare(inner, entry) for entry in content)
    return struct.pack("<I", VALUE_TYPES[kind]) + bare(kind, content)


def bare(kind: str, content: Any) -> bytes:
    return string(content) if kind == "str" else struct.pack(FORMATS[kind], content)


def gguf_bytes(
    metadata: dict[str, tuple[str, Any]],
    tensors: dict[str, tuple[str | int, tuple[int, ...], bytes]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A file; tensors are name: (type, shape with the fastest axis last, bytes)."""
    pairs = b"".join(string(key) + value(*entry) for key, entry in metadata.items())
    infos, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        type_id = kind if isinstance(kind, int) else TYPE_IDS[kind]
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos += string(name) + dims + struct.pack("<IQ", type_id, len(data))
        data += content + bytes(-len(content) % alignment)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + pairs + infos
    return head + bytes(-len(head) % alignment) + data


def write_gguf(path: Path, metadata: Any, tensors: Any, **options: Any) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path


def encode(kind: str, codes: np.ndarray, scale: float = 1.0, layout: str = "x86_128") -> bytes:
    """Ternary codes [out, in] as the bytes of a tensor of this type, by the type's definition."""
    if kind == "I2_S":
        return i2_s(codes, layout) + struct.pack("<f", scale) + b"\xaa" * 28
    if kind == "IQ2_BN_R4":
        return iq2_bn_r4(codes, scale)
    return b"".join(encode_row(kind, row, scale) for row in codes)


def i2_s(codes: np.ndarray, layout: str) -> bytes:
    out, width = codes.shape
    if layout == "row4":
        return bytes(
            sum((int(codes[4 * r + i, k]) + 1) << (6 - 2 * i) for i in range(4))
            for r in range(out // 4)
            for k in range(width)
        )
    step = 32 if layout == "x86_128" else 16
    flat = (codes.ravel() + 1).tolist()
    return bytes(
        sum(flat[start + g + i * step] << (6 - 2 * i) for i in range(4))
        for start in range(0, len(flat), 4 * step)
        for g in range(step)
    )


def encode_row(kind: str, row: np.ndarray, scale: float) -> bytes:
    half = struct.pack("<e", scale)
    c = (row + 1).tolist()
    size = {"TQ1_0": 256, "TQ2_0": 256, "Q2_0_G128": 128, "PTQ1_0": 128}.get(kind, 64)
    blocks = [c[start : start + size] for start in range(0, len(c), size)]
    if kind == "TQ2_0":
        return b"".join(bytes(tq2_0(b)) + half for b in blocks)
    if kind == "TQ1_0":
        return b"".join(bytes(tq1_0(b)) + half for b in blocks)
    if kind in ("Q2_0", "Q2_0_G128"):
        return b"".join(half + bytes(neighbours(b)) for b in blocks)
    if kind == "PTQ1_0":
        return b"".join(bytes(ptq1_0(b)) + half for b in blocks)
    if kind == "IQ2_BN":
        return struct.pack("<f", scale) + b"".join(bytes(iq2_bn(b)) for b in blocks)
    if kind == "IQ1_BN":
        return half + b"".join(bytes(iq1_bn(b)) for b in blocks)
    raise ValueError(kind)


def tq2_0(c: list[int]) -> list[int]:
    return [
        sum(c[half * 128 + place * 32 + m] << (2 * place) for place in range(4))
        for half in range(2)
        for m in range(32)
    ]


def digits(values: list[int]) -> int:
    """Up to five base-3 digits, the first one worth most, as a fraction of 243 in a byte."""
    number = 0
    for place in range(5):
        number = number * 3 + (values[place] if place < len(values) else 0)
    return math.ceil(number * 256 / 243)


def tq1_0(c: list[int]) -> list[int]:
    head = [digits([c[n * 32 + m] for n in range(5)]) for m in range(32)]
    middle = [digits([c[160 + n * 16 + m] for n in range(5)]) for m in range(16)]
    return head + middle + [digits([c[240 + n * 4 + m] for n in range(4)]) for m in range(4)]


def ptq1_0(c: list[int]) -> list[int]:
    head = [digits([c[n * 16 + m] for n in range(5)]) for m in range(16)]
    middle = [digits([c[80 + n * 8 + m] for n in range(5)]) for m in range(8)]
    return head + middle + [digits([c[120 + n * 2 + m] for n in range(4)]) for m in range(2)]


def neighbours(c: list[int]) -> list[int]:
    return [sum(c[j + i] << (2 * i) for i in range(4)) for j in range(0, len(c), 4)]


def iq2_bn(c: list[int]) -> list[int]:
    return [sum(c[j + 16 * i] << (2 * i) for i in range(4)) for j in range(16)]


def iq1_bn(c: list[int]) -> list[int]:
    found = [
        digits(c[16 * group + 5 * k : 16 * group + 5 * k + 5][::-1])
        for group in range(4)
        for k in range(3)
    ]
    return [*found, digits([0, *(c[16 * group + 15] for group in (3, 2, 1, 0))])]


def iq2_bn_r4(codes: np.ndarray, scale: float) -> bytes:
    result = b""
    for start in range(0, len(codes), 4):
        rows = [
            [iq2_bn((row[k : k + 64] + 1).tolist()) for k in range(0, len(row), 64)]
            for row in codes[start : start + 4]
        ]
        result += struct.pack("<4f", *[scale] * 4)
        for block in range(len(rows[0])):
            result += bytes(
                rows[r][block][4 * part + i]
                for part in range(4)
                for r in range(4)
                for i in range(4)
            )
    return result
