"""From the layouts found on disk to the canonical packing, a few rows at a time.

The canonical packing (`bitllm.checkpoint.TernaryMatrix`) holds four neighbours of a row in a byte.
The layout of Hugging Face transformers holds in one byte four rows that lie ceil(out / 4) apart:
byte[r, k] = sum over i of (code[r + i * ceil(out / 4), k] + 1) << 2i.
Neither is unpacked here into one value per byte for more than a band of rows, so that a conversion
needs little more memory than its result. Dense matrices that hold ternary values are read in
`bitllm.formats.ternary_values`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import DenseTensor
from bitllm.errors import FormatError, QuantizationError

__all__ = [
    "PackedWeights",
    "coarsest_scales",
    "float_bands",
    "pack_codes",
    "quantize_masters",
    "refuse_code_three",
    "repack_row_strided",
    "row_bands",
]

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
F32 = npt.NDArray[np.float32]

_BAND_ELEMENTS = 1 << 20
_SUSPICIOUS_ZERO_BYTES = 256
_SMALLEST_SCALE = np.float32(1e-5)
_LOW_BITS = np.uint8(0b01010101)
_ZERO_WEIGHTS = np.uint8(0b01010101)
# (word & low pairs) * gather holds in its top byte the low two bits of each byte, the first lowest.
_GATHER = np.uint32((1 << 24) | (1 << 18) | (1 << 12) | (1 << 6))
_LOW_PAIRS = np.uint32(0x03030303)


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Canonically packed codes and their scales; fields as in `bitllm.checkpoint.TernaryMatrix`."""

    packed: U8
    scales: F32
    group_size: int | None = None


def repack_row_strided(stored: U8, out_features: int) -> U8:
    """Convert the layout of transformers into the canonical packing.

    Args:
        stored: uint8 [ceil(out / 4), in].
        out_features: rows of the matrix.

    Returns:
        uint8 [out, ceil(in / 4)].

    Raises:
        FormatError: the code 3, or not one byte set in a large matrix (a hole in the file).
    """
    rows, in_features = stored.shape
    packed = np.empty((out_features, -(-in_features // 4)), np.uint8)
    any_bit = False
    for band in row_bands(rows, in_features):
        words = _as_words(stored[band])
        any_bit = any_bit or bool(stored[band].any())
        for place in range(4):
            first = band.start + place * rows
            last = min(band.stop + place * rows, out_features)
            if first < last:
                packed[first:last] = _pack_words(words[: last - first] >> np.uint32(2 * place))
                refuse_code_three(packed[first:last], first)
    if not any_bit and stored.size >= _SUSPICIOUS_ZERO_BYTES:
        raise FormatError(
            "all bytes are zero, so every weight would be -1",
            hint="the download left a hole in the file; fetch it again",
        )
    return packed


def coarsest_scales(scales: F32, group_size: int) -> tuple[F32, int | None]:
    """Say the same scales with as few numbers as can be.

    Args:
        scales: float32 [out, groups], of groups of `group_size` along a row.
        group_size: columns of a group.

    Returns:
        float32 () if all are equal, [out] if those of each row are, otherwise as they came; and
        the group size, or None.
    """
    if (scales == scales[0, 0]).all():
        return np.asarray(scales[0, 0]), None
    if (scales == scales[:, :1]).all():
        return np.ascontiguousarray(scales[:, 0]), None
    return np.ascontiguousarray(scales), group_size


def quantize_masters(weights: DenseTensor) -> PackedWeights:
    """Quantise master weights with absmean, bit for bit as `bitllm.ternary.quantize_weights` does.

    s = max(mean |w|, 1e-5); code = clamp(round_half_even(w * (1 / s)), -1, 1).

    Args:
        weights: [out, in].

    Raises:
        QuantizationError: NaN or infinity.
    """
    sums = [
        np.add.reduceat(np.abs(values), [0], axis=1, dtype=np.float64)
        for values in float_bands(weights)
    ]
    mean = np.float32(np.concatenate(sums).sum() / weights.data.size)
    scale = np.maximum(mean, _SMALLEST_SCALE)
    inverse = np.float32(1.0) / scale
    packed = pack_codes(weights, lambda values: np.clip(np.rint(values * inverse), -1, 1))
    return PackedWeights(packed, np.asarray(scale))


def pack_codes(weights: DenseTensor, to_codes: Callable[[F32], F32]) -> U8:
    """Pack what `to_codes` makes of float32 [rows, in]: -1, 0 and +1; uint8 [out, ceil(in / 4)]."""
    packed = np.empty((weights.shape[0], -(-weights.shape[1] // 4)), np.uint8)
    for band, values in zip(row_bands(*weights.shape), float_bands(weights), strict=True):
        packed[band] = _pack_words(_as_words((to_codes(values) + 1).astype(np.uint8)))
    return packed


def row_bands(rows: int, columns: int) -> Iterator[slice]:
    """Cut the rows of a matrix into bands of about a million elements."""
    step = max(1, _BAND_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def float_bands(weights: DenseTensor) -> Iterator[F32]:
    """Yield float32 [rows, in], band by band.

    Raises:
        QuantizationError: NaN or infinity.
    """
    for band in row_bands(*weights.shape):
        values = DenseTensor(weights.data[band], weights.dtype).to_float32()
        finite = np.isfinite(values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0].tolist()
            raise QuantizationError(
                f"{values[row, column]} at row {band.start + row}, column {column}",
                hint="the file is damaged; fetch it again",
            )
        yield values


def _as_words(rows: U8) -> U32:
    """Group four neighbours of a row into a uint32, the first lowest; ends are filled up with 1s.

    A filled byte means weight 0 in each of its places, and for codes stored one by one too.
    """
    padding = -rows.shape[1] % 4
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=_ZERO_WEIGHTS)
    return np.ascontiguousarray(rows).view("<u4").astype(np.uint32, copy=False)


def _pack_words(words: U32) -> U8:
    """Bring the low two bits of each byte of a word together, uint32 [r, n] -> uint8 [r, n]."""
    return (((words & _LOW_PAIRS) * _GATHER) >> np.uint32(24)).astype(np.uint8)


def refuse_code_three(packed: U8, first_row: int = 0) -> None:
    """Look for the code 3 in canonically packed rows.

    Raises:
        FormatError: it is there; names the row, counted from `first_row`.
    """
    wrong = (packed & (packed >> np.uint8(1)) & _LOW_BITS).any(axis=1)
    if wrong.any():
        raise FormatError(
            f"row {first_row + int(wrong.argmax())} holds the code 3, which is no ternary weight",
            hint="the file is damaged, or packed by another rule than its config.json says",
        )
