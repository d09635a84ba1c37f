"""Rounding dense weights to a few bits without training: what ternary weights are compared with.

w is approximated by level * scale, the level a whole number; what shares a scale is the tensor, a
row, or a group of a row, as for `quantize_weights`.

    1 bit      level = sign(w), +1 for 0; scale = mean |w|, which makes the squared error of signs
               smallest (Rastegari et al., XNOR-Net, 2016)
    1.58 bits  `quantize_weights` (Ma et al., 2024): three levels
    n bits     level = clamp(round_half_even(w / scale), -m, m), m = 2^(n - 1) - 1;
               scale = max |w| / m, symmetric, so 2 bits have the three levels -1, 0, +1 too
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from bitllm.errors import QuantizationError
from bitllm.ternary.quantize import Granularity, check_weights, quantize_weights

__all__ = ["BASELINES", "Baseline", "reconstruct", "round_to_baseline"]

Baseline = Literal["1", "1.58", "2", "4", "8"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
"""Bits of a weight."""

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]

_SMALLEST_SCALE = np.float32(1e-30)  # for groups of zeros, whose levels are 0 with any scale


def round_to_baseline(
    weights: npt.NDArray[np.floating[Any]],
    bits: Baseline,
    *,
    granularity: Granularity = "tensor",
    group_size: int | None = None,
) -> tuple[I8, F32]:
    """Round weights to one of the baselines.

    Args:
        weights: floating point [out, in], read as float32.
        bits: which baseline.
        granularity: what shares one scale.
        group_size: weights along a row that share a scale, for "group" only.

    Returns:
        levels int8 [out, in], and the scales that multiply them: float32 [] for "tensor", [out] for
        "row", [out, ceil(in / group_size)] for "group".

    Raises:
        QuantizationError: NaN, infinity, no weights at all, or a contradictory granularity.
    """
    if bits not in BASELINES:
        raise QuantizationError(
            f"no baseline has {bits!r:.20} bits", hint=f"choose one of {', '.join(BASELINES)}"
        )
    values = check_weights(weights, granularity, group_size)
    if bits == "1.58":
        return quantize_weights(values, granularity=granularity, group_size=group_size)
    width = group_size or values.shape[1]
    if bits == "1":
        scales = _reduced(np.add, np.abs(values), granularity, width)
        return np.where(values < 0, -1, 1).astype(np.int8), scales
    most = np.float32(2 ** (int(bits) - 1) - 1)
    largest = _reduced(np.maximum, np.abs(values), granularity, width)
    scales = np.maximum(largest / most, _SMALLEST_SCALE).astype(np.float32)
    levels = np.empty(values.shape, np.int8)
    for row, row_values in enumerate(values):
        steps = row_values / _row_of(scales, row, width, values.shape[1])
        levels[row] = np.clip(np.rint(steps), -most, most)
    return levels, scales


def reconstruct(levels: I8, scales: F32, rows: slice, group_size: int | None = None) -> F32:
    """Return level * scale of some rows, float32 [rows, in].

    Args:
        levels: int8 [out, in].
        scales: as `round_to_baseline` returns them.
        rows: which.
        group_size: weights along a row that share a scale, or None.
    """
    taken = levels[rows].astype(np.float32)
    if scales.ndim == 0:
        return taken * scales
    factors = scales[rows] if scales.ndim == 2 else scales[rows, None]
    width = group_size or levels.shape[1]
    return taken * np.repeat(factors, width, axis=1)[:, : levels.shape[1]]


def _reduced(operation: np.ufunc, sizes: F32, granularity: Granularity, width: int) -> F32:
    """Mean (for `np.add`) or maximum of what shares a scale; sums are taken in float64."""
    starts = np.arange(0, sizes.shape[1], width)
    parts = operation.reduceat(sizes, starts, axis=1, dtype=np.float64)
    counts = np.broadcast_to(np.diff(np.append(starts, sizes.shape[1])), parts.shape)
    if granularity == "tensor":
        parts, counts = operation.reduce(parts, axis=None), np.asarray(sizes.size)
    if operation is np.add:
        parts = parts / counts
    found = np.asarray(parts, np.float32)
    return found[:, 0] if granularity == "row" else found


def _row_of(scales: F32, row: int, width: int, columns: int) -> F32:
    if scales.ndim == 0:
        return scales
    if scales.ndim == 1:
        return np.asarray(scales[row])
    return np.repeat(scales[row], width)[:columns]
