"""From the ternary block types of GGUF files to the canonical packing, a band of blocks at a time.

Most types hold in one byte values that lie a stride apart. Bytes that hold neighbours of a stride
are grouped by four, and the same place of all four becomes one canonical byte. The types in base 3
do the same with the digits that a table finds for each byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from bitllm.errors import FormatError
from bitllm.formats.gguf.ggml_types import GgmlType

__all__ = ["I2S_LAYOUTS", "I2sLayout", "TernaryBlocks", "decode_ternary", "i2s_codes"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

I2sLayout = Literal["x86_128", "arm_64", "row4"]
I2S_LAYOUTS: tuple[I2sLayout, ...] = get_args(I2sLayout)
"""The three orders of I2_S, of which a file does not say which it has."""

_BAND_BYTES = 1 << 18
_HIGH_FIRST = (6, 4, 2, 0)
_LOW_FIRST = (0, 2, 4, 6)
_LOW_PAIRS = np.uint32(0x03030303)
# (word & low pairs) * gather holds in its top byte the low two bits of each byte, the first lowest.
_GATHER = np.uint32((1 << 24) | (1 << 18) | (1 << 12) | (1 << 6))
_LOW_BITS = np.uint8(0b01010101)

# A byte of base-3 digits is a fixed-point fraction: digit n is the whole part of three times what
# is left after n digits. DIGITS[n] holds digit n of every byte.
_BYTES = np.arange(256, dtype=np.uint32)
_DIGITS = np.stack([(((_BYTES * 3**n) & 255) * 3) >> 8 for n in range(5)]).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class TernaryBlocks:
    """Codes in the canonical packing uint8 [out, ceil(in / 4)] and their scales, all float32.

    `scales` is [] for a tensor, [out] for rows, [out, in / group] for groups of `group_size`.
    """

    packed: U8
    scales: F32
    group_size: int | None = None


def decode_ternary(
    kind: GgmlType, data: U8, shape: tuple[int, int], layout: I2sLayout = "x86_128"
) -> TernaryBlocks:
    """Decode a tensor of a ternary type.

    Args:
        kind: its type.
        data: its bytes, uint8 [n], n as `kind.size(shape)` says.
        shape: (out, in).
        layout: order of the codes, for I2_S only.

    Raises:
        FormatError: the code 3, or sizes that the type or the layout cannot hold.
    """
    if kind.name == "I2_S":
        return _i2_s(data, shape, layout)
    if kind.name == "IQ2_BN_R4":
        return _iq2_bn_r4(data, shape)
    rows = data.reshape(shape[0], -1)
    if kind.row_bytes:
        dtype = "<f4" if kind.row_bytes == 4 else "<f2"
        scales = np.ascontiguousarray(rows[:, : kind.row_bytes]).view(dtype)[:, 0]
        scales = scales.astype(np.float32)
        return TernaryBlocks(_decode_rows(kind, rows[:, kind.row_bytes :], shape), scales)
    return TernaryBlocks(*_with_block_scales(kind, rows, shape), kind.block)


def _with_block_scales(kind: GgmlType, rows: U8, shape: tuple[int, int]) -> tuple[U8, F32]:
    """Decode blocks that each carry a float16 scale: TQ*, and PTQ1_0 behind; Q2_0 in front."""
    blocks = rows.reshape(shape[0], -1, kind.block_bytes)
    in_front = kind.name.startswith("Q2_0")
    scale_bytes = blocks[..., :2] if in_front else blocks[..., -2:]
    scales = np.ascontiguousarray(scale_bytes).view("<f2")[..., 0].astype(np.float32)
    codes = blocks[..., 2:] if in_front else blocks[..., :-2]
    return _decode_rows(kind, codes, shape), scales


def _decode_rows(kind: GgmlType, codes: U8, shape: tuple[int, int]) -> U8:
    """Decode the code bytes of all blocks, [out, ...], band by band."""
    decode, stride = _DECODERS[kind.name]
    packed = np.empty((shape[0], shape[1] // 4), np.uint8)
    for band in _bands(shape[0], shape[1] // 4):
        part = codes[band].reshape(-1, stride)
        packed[band] = decode(part).reshape(-1, shape[1] // 4)
        _refuse_code_three(packed[band], band.start)
    return packed


def _bands(rows: int, row_bytes: int) -> Iterator[slice]:
    step = max(1, _BAND_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _pack_words(values: U8) -> U8:
    """Bring the low two bits of four neighbours together, uint8 [n, 4 m] -> uint8 [n, m]."""
    words = np.ascontiguousarray(values).view("<u4").astype(np.uint32, copy=False)
    return (((words & _LOW_PAIRS) * _GATHER) >> np.uint32(24)).astype(np.uint8)


def _strided(blocks: U8, shifts: tuple[int, ...]) -> U8:
    """Decode blocks of w bytes, byte m holding the codes of m, m + w, m + 2 w, m + 3 w.

    Args:
        blocks: [n, w], w a multiple of 4.
        shifts: where in a byte each of the four codes stands.

    Returns:
        Canonical bytes [n, w].
    """
    parts = [_pack_words(blocks >> np.uint8(shift)) for shift in shifts]
    return np.concatenate(parts, axis=1)


def _tq2_0(blocks: U8) -> U8:
    return _strided(blocks.reshape(-1, 32), _LOW_FIRST)


def _neighbours(blocks: U8) -> U8:
    """Q2_0 has the canonical packing."""
    return blocks


def _base3(runs: tuple[tuple[slice, int], ...]) -> Callable[[U8], U8]:
    """Return a decoder of blocks in base 3, of which each run of bytes holds so many digits.

    The first digits of a run of w bytes are its first w values, the second digits the next.
    """

    def decode(blocks: U8) -> U8:
        parts = [
            _pack_words(_DIGITS[digit][blocks[:, bytes_of_run]])
            for bytes_of_run, digits in runs
            for digit in range(digits)
        ]
        return np.concatenate(parts, axis=1)

    return decode


def _ptq1_0(blocks: U8) -> U8:
    """Decode 24 bytes of five digits in runs of 16 and 8, then 2 bytes of four, [n, 26]."""
    head = _PTQ1_0_HEAD(blocks)
    tail = np.stack([_DIGITS[digit][blocks[:, 24:26]] for digit in range(4)], axis=1)
    return np.concatenate([head, _pack_words(tail.reshape(-1, 8))], axis=1)


def _iq1_bn(blocks: U8) -> U8:
    """Decode 13 bytes of 64 values: of each 16, three bytes hold five, the last byte one.

    The first value of a byte is its last digit.
    """
    values = np.empty((len(blocks), 4, 16), np.uint8)
    triples = blocks[:, :12].reshape(-1, 4, 3)
    for place in range(5):
        values[..., place:15:5] = _DIGITS[4 - place][triples]
    for group in range(4):
        values[:, group, 15] = _DIGITS[4 - group][blocks[:, 12]]
    return _pack_words(values.reshape(-1, 64))


_PTQ1_0_HEAD = _base3(((slice(0, 16), 5), (slice(16, 24), 5)))
_DECODERS: dict[str, tuple[Callable[[U8], U8], int]] = {
    "TQ2_0": (_tq2_0, 64),
    "TQ1_0": (_base3(((slice(0, 32), 5), (slice(32, 48), 5), (slice(48, 52), 4))), 52),
    "Q2_0": (_neighbours, 16),
    "Q2_0_G128": (_neighbours, 32),
    "PTQ1_0": (_ptq1_0, 26),
    "IQ1_BN": (_iq1_bn, 13),
    "IQ2_BN": (lambda blocks: _strided(blocks, _LOW_FIRST), 16),
}
"""The decoder of each type, and the bytes of codes in a block of it."""


def _iq2_bn_r4(data: U8, shape: tuple[int, int]) -> TernaryBlocks:
    """Decode rows that are interleaved four by four.

    Four float32 scales stand before the rows; then, for each 64 columns, bytes 16 l + 4 r + i hold
    what byte 4 l + i of row r holds in IQ2_BN.
    """
    out, width = shape
    if out % 4:
        raise FormatError(f"IQ2_BN_R4 interleaves four rows, but the matrix has {out}")
    quads = data.reshape(out // 4, -1)
    scales = np.ascontiguousarray(quads[:, :16]).view("<f4").reshape(-1).astype(np.float32)
    packed = np.empty((out // 4, 4, width // 4), np.uint8)
    for band in _bands(out // 4, width):
        blocks = quads[band, 16:].reshape(-1, width // 64, 4, 4, 4)  # quad, block, l, r, i
        rows = np.ascontiguousarray(blocks.transpose(0, 3, 1, 2, 4)).reshape(-1, 16)
        packed[band] = _strided(rows, _LOW_FIRST).reshape(-1, 4, width // 4)
        _refuse_code_three(packed[band].reshape(-1, width // 4), 4 * band.start)
    return TernaryBlocks(packed.reshape(out, width // 4), scales)


def _i2_s(data: U8, shape: tuple[int, int], layout: I2sLayout) -> TernaryBlocks:
    """Decode codes for the whole tensor, then its float32 scale and 28 bytes of no meaning."""
    count = shape[0] * shape[1] // 4
    scale = np.asarray(data[count : count + 4].view("<f4")[0], np.float32)
    return TernaryBlocks(i2s_codes(data[:count], shape, layout), scale)


def i2s_codes(data: U8, shape: tuple[int, int], layout: I2sLayout) -> U8:
    """Decode the codes of I2_S, or of some of its rows.

    `x86_128` has blocks of 32 bytes for 128 values, `arm_64` of 16 for 64, in both the values of a
    byte lie a quarter of the block apart, and rows follow each other without a gap; `row4` holds in
    a byte the same column of four rows. The first value has the highest bits.

    Args:
        data: uint8 [out * in / 4].
        shape: (out, in).
        layout: one of the three.

    Returns:
        Canonical packing, uint8 [out, ceil(in / 4)].

    Raises:
        FormatError: the code 3, or a shape that the layout cannot hold.
    """
    out, width = shape
    if layout == "row4":
        return _i2s_row4(data, shape)
    block = 32 if layout == "x86_128" else 16
    if len(data) % block or width % 4:
        raise FormatError(
            f"{out} x {width} values are no whole blocks of {4 * block}",
            hint="the file was written by a program with another layout of I2_S",
        )
    blocks = data.reshape(-1, block)
    packed = np.empty_like(blocks)
    for band in _bands(len(blocks), block):
        packed[band] = _strided(blocks[band], _HIGH_FIRST)
    packed = packed.reshape(out, width // 4)
    _refuse_code_three(packed, 0)
    return packed


def _i2s_row4(data: U8, shape: tuple[int, int]) -> U8:
    out, width = shape
    if out % 4 or width % 4:
        raise FormatError(
            f"the layout row4 of I2_S holds four rows in a byte, not {out} x {width}",
            hint="the file was written in another layout; unset BITLLM_I2S_LAYOUT",
        )
    rows = data.reshape(out // 4, width)
    packed = np.empty((out // 4, 4, width // 4), np.uint8)
    for band in _bands(out // 4, width):
        for place, shift in enumerate(_HIGH_FIRST):
            packed[band, place] = _pack_words(rows[band] >> np.uint8(shift))
    whole: U8 = packed.reshape(out, width // 4)
    _refuse_code_three(whole, 0)
    return whole


def _refuse_code_three(packed: U8, first_row: int) -> None:
    for band in _bands(len(packed), packed.shape[1]):
        part = packed[band]
        wrong = (part & (part >> np.uint8(1)) & _LOW_BITS).any(axis=1)
        if wrong.any():
            row = first_row + band.start + int(wrong.argmax())
            raise FormatError(
                f"row {row} holds the code 3, which is no ternary weight",
                hint="the file is damaged, or the model is not ternary",
            )
