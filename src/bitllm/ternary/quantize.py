"""Rounding to ternary weights and int8 activations, and the exact product of the two.

The formulas are those of BitNet b1.58 (Ma et al., 2024) as transformers 5.23 computes them, in
float32 with every rounding half to even.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitllm.errors import QuantizationError

__all__ = [
    "Granularity",
    "check_weights",
    "dequantize",
    "matmul_int32",
    "quantize_activations",
    "quantize_weights",
]

Granularity = Literal["tensor", "row", "group"]

_SMALLEST_SCALE = np.float32(1e-5)
_FLOAT32_INTEGERS = 1 << 24  # float32 holds every integer up to this size


def quantize_weights(
    weights: npt.NDArray[np.floating[Any]],
    *,
    granularity: Granularity = "tensor",
    group_size: int | None = None,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round master weights to ternary codes by the mean of their sizes.

    scale = max(mean |w|, 1e-5) over the tensor, a row, or a group of a row;
    code = clamp(round_half_even(w * (1 / scale)), -1, 1).

    Args:
        weights: floating point [out, in], read as float32.
        granularity: what shares one scale.
        group_size: weights along a row that share a scale, for "group" only; the last group of a
            row may be shorter.

    Returns:
        codes int8 [out, in], and the scales that multiply them: float32 [] for "tensor", [out] for
        "row", [out, ceil(in / group_size)] for "group".

    Raises:
        QuantizationError: NaN, infinity, no weights at all, or a contradictory granularity.
    """
    values = check_weights(weights, granularity, group_size)
    width = group_size or values.shape[1]
    # The means are taken in float64 so that they do not depend on the order of summation.
    starts = np.arange(0, values.shape[1], width)
    sums = np.add.reduceat(np.abs(values), starts, axis=1, dtype=np.float64)
    if granularity == "tensor":
        means = sums.sum() / values.size
    else:
        means = sums / np.diff(np.append(starts, values.shape[1]))
    scales = np.asarray(np.maximum(np.asarray(means, np.float32), _SMALLEST_SCALE), np.float32)
    codes = _round_to_ternary(values, np.asarray(np.float32(1.0) / scales, np.float32), width)
    return codes, scales[:, 0] if granularity == "row" else scales


def check_weights(
    weights: npt.NDArray[np.floating[Any]], granularity: Granularity, group_size: int | None
) -> npt.NDArray[np.float32]:
    """Return weights that can be quantised so, as float32 [out, in].

    Raises:
        QuantizationError: NaN, infinity, no weights at all, or a contradictory granularity.
    """
    if weights.ndim != 2 or not weights.size:
        raise QuantizationError(f"weights must be a matrix [out, in], got shape {weights.shape}")
    contradiction = (granularity == "group") == (group_size is None)
    if contradiction or (group_size is not None and group_size < 1):
        raise QuantizationError(
            f"granularity {granularity!r} does not go with group_size {group_size}",
            hint='give a positive group_size with granularity "group", and only there',
        )
    return _as_float32(weights, "weights")


def _round_to_ternary(
    values: npt.NDArray[np.float32], inverse: npt.NDArray[np.float32], width: int
) -> npt.NDArray[np.int8]:
    codes = np.empty(values.shape, np.int8)
    for row, row_values in enumerate(values):
        factors = inverse if inverse.ndim == 0 else _spread(inverse[row], width, len(row_values))
        codes[row] = np.clip(np.rint(row_values * factors), -1, 1)
    return codes


def _spread(per_group: npt.NDArray[np.float32], width: int, length: int) -> npt.NDArray[np.float32]:
    """Repeat the factor of each group for its elements, float32 [..., groups] -> [..., length]."""
    return np.repeat(per_group, width, axis=-1)[..., :length]


def quantize_activations(
    x: npt.NDArray[np.floating[Any]],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round activations to int8 by the largest size in each token.

    a = 127 / max(max |x|, 1e-5); q = clamp(round_half_even(x * a), -128, 127).

    Args:
        x: floating point [..., features], read as float32.

    Returns:
        q int8 [..., features] and a float32 [...]; q / a approximates x.

    Raises:
        QuantizationError: NaN or infinity, or no feature axis.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise QuantizationError(f"activations must be [..., features], got shape {x.shape}")
    values = _as_float32(x, "activations")
    largest = np.maximum(np.abs(values).max(axis=-1), _SMALLEST_SCALE)
    a = np.asarray(np.float32(127.0) / largest, np.float32)
    q = np.clip(np.rint(values * a[..., None]), -128, 127).astype(np.int8)
    return q, a


def matmul_int32(codes: npt.NDArray[np.int8], q: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """Multiply ternary codes with quantised activations, exactly.

    Args:
        codes: int8 [out, in], each -1, 0 or +1.
        q: int8 [..., in].

    Returns:
        int32 [..., out], sum over `in` of codes * q.

    Raises:
        QuantizationError: the shapes or dtypes do not fit.
    """
    fits = codes.ndim == 2 and q.ndim >= 1 and codes.shape[1] == q.shape[-1]
    if not fits or codes.dtype != np.int8 or q.dtype != np.int8:
        raise QuantizationError(
            "codes int8 [out, in] and activations int8 [..., in] do not fit: "
            f"{codes.dtype} {codes.shape}, {q.dtype} {q.shape}"
        )
    # Products of floats are fast, and exact while every partial sum is an integer they can hold.
    if 128 * codes.shape[1] <= _FLOAT32_INTEGERS:
        return (q.astype(np.float32) @ codes.astype(np.float32).T).astype(np.int32)
    return (q.astype(np.float64) @ codes.astype(np.float64).T).astype(np.int32)


def dequantize(
    codes: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    group_size: int | None = None,
) -> npt.NDArray[np.float32]:
    """Return the weights that codes and scales stand for.

    Args:
        codes: int8 [out, in].
        scales: float32 [], [out], or [out, ceil(in / group_size)] with a group size.
        group_size: weights along a row that share a scale, or None.

    Returns:
        float32 [out, in].

    Raises:
        QuantizationError: the shape of `scales` does not fit.
    """
    out_features, in_features = codes.shape
    if group_size is not None:
        fits = scales.shape == (out_features, -(-in_features // group_size))
        factors = _spread(scales, group_size, in_features) if fits else scales
    else:
        fits = scales.shape in ((), (out_features,))
        factors = scales[:, None] if scales.ndim == 1 else scales
    if not fits:
        raise QuantizationError(
            f"scales of shape {scales.shape} do not fit codes of shape {codes.shape} "
            f"with group size {group_size}"
        )
    return codes.astype(np.float32) * factors.astype(np.float32)


def _as_float32(values: npt.NDArray[np.floating[Any]], what: str) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused below
        narrowed = np.asarray(values, np.float32)
    finite = np.isfinite(narrowed)
    if not finite.all():
        where = np.argwhere(~finite)[0].tolist()
        raise QuantizationError(
            f"{what} hold {values[tuple(where)]} at {where}: only finite numbers can be quantised",
            hint="the file is damaged, or the computation before this overflowed",
        )
    return narrowed
