"""From the canonical packing to the layouts of files, a few rows at a time.

Each function takes `packed` uint8 [out, ceil(in / 4)] (`bitllm.checkpoint.TernaryMatrix`) and
yields the stored bytes of consecutive rows. The formulas hold c = code + 1, so 0, 1 or 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = [
    "TQ_BLOCK",
    "affine_2bit",
    "codes_from_zero",
    "i2_s",
    "row_strided",
    "tq1_0",
    "tq2_0",
]

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]

TQ_BLOCK = 256
"""Weights along a row that share a scale in TQ1_0 and TQ2_0."""

_BAND_CODES = 1 << 19
_I2_S_BLOCK = 128
# The four codes of each byte, one a byte, the first lowest: what a byte unpacks to.
_SPREAD = sum(
    ((np.arange(256, dtype=np.uint32) >> np.uint32(2 * place)) & np.uint32(3))
    << np.uint32(8 * place)
    for place in range(4)
).astype("<u4")  # type: ignore[union-attr]


def codes_from_zero(packed: U8, in_features: int) -> U8:
    """Unpack canonical rows into uint8 [rows, in] of c, without a look at the code 3."""
    spread = _SPREAD[packed].view(np.uint8)
    return spread.reshape(len(packed), -1)[:, :in_features]


def row_strided(packed: U8, in_features: int) -> Iterator[U8]:
    """Yield the layout of transformers, uint8 [some rows, in] until there are ceil(out / 4).

    byte[r, k] = sum over i of c[r + i * ceil(out / 4), k] << 2i; rows beyond the last are 0.
    """
    out_features = len(packed)
    rows = -(-out_features // 4)
    for start, stop in _bands(rows, 4 * in_features):
        band = np.zeros((stop - start, in_features), np.uint8)
        for place in range(4):
            first = start + place * rows
            last = min(stop + place * rows, out_features)
            if first < last:
                codes = codes_from_zero(packed[first:last], in_features)
                band[: last - first] |= codes << np.uint8(2 * place)
        yield band


def affine_2bit(packed: U8, in_features: int) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the 2-bit layout of MLX, uint32 [out, in / 16]: 16 neighbours, the first lowest.

    That is the canonical packing, read as little-endian words; `in_features` is a multiple of 16.
    """
    yield np.ascontiguousarray(packed).view("<u4")


def i2_s(packed: U8, in_features: int) -> Iterator[U8]:
    """Yield the codes of I2_S in its 128/32 layout, uint8 [some rows, in / 4].

    Byte g of a block of 128 holds c[g] << 6 | c[g + 32] << 4 | c[g + 64] << 2 | c[g + 96].
    `in_features` is a multiple of 128.
    """
    for start, stop in _bands(len(packed), in_features):
        codes = codes_from_zero(packed[start:stop], in_features)
        blocks = codes.reshape(stop - start, -1, 4, _I2_S_BLOCK // 4)
        stored = blocks[:, :, 0] << np.uint8(6)
        for place in range(1, 4):
            stored |= blocks[:, :, place] << np.uint8(6 - 2 * place)
        yield stored.reshape(stop - start, -1)


def tq2_0(packed: U8, in_features: int, scales: F16) -> Iterator[U8]:
    """Yield blocks of TQ2_0, uint8 [some rows, in / 256, 66].

    Element half * 128 + l * 32 + m is at bits 2l of byte half * 32 + m; a float16 scale follows.

    Args:
        packed: canonical rows.
        in_features: a multiple of 256.
        scales: float16, broadcast to [out, in / 256].
    """
    for rows, blocks in _tq_blocks(packed, in_features):
        lanes = blocks.reshape(*blocks.shape[:2], 2, 4, 32)
        stored = lanes[..., 0, :].copy()
        for place in range(1, 4):
            stored |= lanes[..., place, :] << np.uint8(2 * place)
        yield _with_scales(stored.reshape(*blocks.shape[:2], 64), scales[rows])


def tq1_0(packed: U8, in_features: int, scales: F16) -> Iterator[U8]:
    """Yield blocks of TQ1_0, uint8 [some rows, in / 256, 54]; arguments as for `tq2_0`.

    A byte is ceil(v * 256 / 243) of five base-3 digits v, the first the highest: 32 bytes for
    elements 0..159 (digits 32 apart), 16 for 160..239 (16 apart), and 4 bytes of four digits, 4
    apart, with 0 as the fifth, for 240..255; a float16 scale follows.
    """
    for rows, blocks in _tq_blocks(packed, in_features):
        parts = [
            _base3(blocks[..., first : first + digits * width], width)
            for first, digits, width in ((0, 5, 32), (160, 5, 16), (240, 4, 4))
        ]
        yield _with_scales(np.concatenate(parts, axis=-1), scales[rows])


def _base3(codes: U8, width: int) -> U8:
    """Put codes that lie `width` apart into one byte, [..., digits * width] -> [..., width]."""
    digits = codes.reshape(*codes.shape[:-1], -1, width).astype(np.uint16)
    value = np.zeros(digits[..., 0, :].shape, np.uint16)
    for place in range(5):
        value *= np.uint16(3)
        if place < digits.shape[-2]:
            value += digits[..., place, :]
    return ((value * np.uint32(256) + np.uint32(242)) // np.uint32(243)).astype(np.uint8)


def _tq_blocks(packed: U8, in_features: int) -> Iterator[tuple[slice, U8]]:
    for start, stop in _bands(len(packed), in_features):
        codes = codes_from_zero(packed[start:stop], in_features)
        yield slice(start, stop), codes.reshape(stop - start, -1, TQ_BLOCK)


def _with_scales(stored: U8, scales: F16) -> U8:
    """Append the two bytes of its scale to each block."""
    tail = np.ascontiguousarray(scales, "<f2")[..., None].view(np.uint8)
    return np.concatenate([stored, tail], axis=-1)


def _bands(rows: int, codes_in_a_row: int) -> Iterator[tuple[int, int]]:
    """Cut rows into bands of half a million codes, which stay in the cache of a core."""
    step = max(1, _BAND_CODES // max(1, codes_in_a_row))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
