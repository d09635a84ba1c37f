"""Dense matrices whose values are ternary already: 0 and one size, up to the sign, for each scale.

Dequantised checkpoints hold them. What shares a scale differs: the whole matrix (BitNet), the part
that one device trained (TriLM: rows or columns, whichever way the matrix was cut), or a group of
neighbours in a row. Which it is, the values show; a matrix of a dense network has many sizes in any
group, so it cannot be taken for a ternary one.
"""

from __future__ import annotations

from math import gcd

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import DenseTensor
from bitllm.formats.repack import PackedWeights, coarsest_scales, float_bands, pack_codes, row_bands

__all__ = ["read_one_size", "read_ternary_values"]

F32 = npt.NDArray[np.float32]

_GROUP_SIZES = (256, 128, 64, 32)
_FEWEST_COLUMNS = 16  # in fewer, values of one size prove nothing


def read_one_size(weights: DenseTensor) -> PackedWeights | None:
    """Read weights that are 0 or of one size s, up to the sign.

    The absmean of such a matrix would be s times the fraction of weights that are not zero, so it
    must not be quantised again.

    Args:
        weights: [out, in].

    Returns:
        Codes and s, or None if there are weights of two different sizes, or none but zeros.

    Raises:
        QuantizationError: NaN or infinity.
    """
    scale = np.float32(0)
    for values in float_bands(weights):
        sizes = np.abs(values)
        largest = np.float32(sizes.max())
        if largest == 0:
            continue
        if scale not in (0, largest) or ((sizes != 0) & (sizes != largest)).any():
            return None
        scale = largest
    return None if scale == 0 else PackedWeights(pack_codes(weights, np.sign), np.asarray(scale))


def read_ternary_values(weights: DenseTensor, shards: int = 1) -> PackedWeights | None:
    """Read weights that are 0 or of one size, in the matrix, in each row, or in groups of a row.

    Args:
        weights: [out, in].
        shards: parts that the matrix may have been cut into along its rows or its columns.

    Returns:
        Codes and scales, the fewest that there can be, or None if the weights are not ternary.
        Groups of zeros take the scale of their row, or of the matrix; a matrix of zeros has 1.

    Raises:
        QuantizationError: NaN or infinity.
    """
    out, width = weights.shape
    sizes = _group_sizes(width, shards)
    if not sizes:
        return read_one_size(weights)
    finest = gcd(*sizes)
    largest = np.empty((out, width // finest), np.float32)
    for band, values in zip(row_bands(out, width), float_bands(weights), strict=True):
        groups = np.abs(values).reshape(len(values), -1, finest)
        largest[band] = groups.max(axis=2)
        if ((groups != 0) & (groups != largest[band][:, :, None])).any():
            return None
    if not largest.any():
        largest[:] = 1
    found = _coarsen(largest, finest, sizes)
    if found is None:
        return None
    packed = pack_codes(weights, np.sign)
    return PackedWeights(packed, *coarsest_scales(_filled(found[0]), found[1]))


def _group_sizes(width: int, shards: int) -> list[int]:
    """Group sizes to be tried, the largest first; the row itself is the first."""
    if width < _FEWEST_COLUMNS:
        return []
    cut = [width // shards] if shards > 1 and width % shards == 0 else []
    usual = [size for size in _GROUP_SIZES if width % size == 0 and size < width]
    found = sorted({width, *cut, *usual}, reverse=True)
    return [size for size in found if size >= _FEWEST_COLUMNS]


def _coarsen(largest: F32, finest: int, sizes: list[int]) -> tuple[F32, int] | None:
    """Merge groups into the largest that still have one size each."""
    for size in sizes:
        merged = largest.reshape(len(largest), -1, size // finest)
        scales = merged.max(axis=2)
        if ((merged == 0) | (merged == scales[:, :, None])).all():
            return scales, size
    return None


def _filled(scales: F32) -> F32:
    """Give groups of zeros the scale of their row, rows of zeros that of the matrix."""
    rows = scales.max(axis=1, keepdims=True)
    filled = np.where(scales == 0, rows, scales)
    filled[rows[:, 0] == 0] = scales.max()
    return filled
