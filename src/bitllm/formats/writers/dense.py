"""Dense values on their way into a file: piece by piece, and rounded where a format asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import DenseDtype, DenseTensor

__all__ = ["dense_chunks", "narrowed", "relative_error", "round_to"]

_BAND_BYTES = 1 << 22


def dense_chunks(tensor: DenseTensor) -> Iterator[npt.NDArray[np.generic]]:
    """Yield the values as stored, little endian, in pieces of some megabytes."""
    flat = tensor.data.reshape(-1)
    step = _BAND_BYTES // flat.dtype.itemsize
    for start in range(0, max(1, flat.size), step):
        piece = flat[start : start + step]
        yield piece.astype(piece.dtype.newbyteorder("<"), copy=False)


def round_to(values: npt.NDArray[np.float32], dtype: DenseDtype) -> DenseTensor:
    """Round float32 values to a dtype, half to even; what it cannot hold becomes infinity."""
    if dtype == "f32":
        return DenseTensor(values, "f32")
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return DenseTensor(values.astype(np.float16), "f16")
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return DenseTensor((rounded >> np.uint32(16)).astype(np.uint16), "bf16")


def narrowed(tensor: DenseTensor, dtype: DenseDtype) -> DenseTensor:
    """Return the tensor in a dtype that holds each of its values exactly, else unchanged."""
    if tensor.dtype != "f32":
        return tensor
    values = np.ascontiguousarray(tensor.data, np.float32)
    short = round_to(values, dtype)
    return short if (short.to_float32() == values).all() else tensor


def relative_error(stored: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    """Return the largest |stored - wanted| / |wanted|; 0 where both are 0."""
    sizes = np.abs(wanted.astype(np.float64))
    difference = np.abs(stored.astype(np.float64) - wanted.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(difference == 0, 0.0, difference / sizes)
    return float(errors.max())
