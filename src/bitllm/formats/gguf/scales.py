"""Scales of blocks, made as few as they can be without changing a weight."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitllm.errors import FormatError
from bitllm.formats.gguf.ternary_blocks import TernaryBlocks

__all__ = ["settle_scales"]

_ZERO_WEIGHTS = np.uint8(0b01010101)
F32 = npt.NDArray[np.float32]


def settle_scales(found: TernaryBlocks) -> TernaryBlocks:
    """Return the same weights with one scale for the tensor or for each row, where those are equal.

    Where a scale is 0 the codes become 0, and the scale whatever the others are: quantisers write
    that for blocks of zeros.

    Raises:
        FormatError: a scale that is negative or no number.
    """
    scales = found.scales
    if not (np.isfinite(scales) & (scales >= 0)).all():
        wrong = scales[~(np.isfinite(scales) & (scales >= 0))].flat[0]
        raise FormatError(
            f"a weight scale is {wrong}, which is no positive number", hint="the file is damaged"
        )
    packed = _without_scaleless(found)
    kept = scales[scales > 0]
    if kept.size == 0 or (kept == kept[0]).all():
        only = np.float32(1) if kept.size == 0 else kept[0]
        return TernaryBlocks(packed, np.asarray(only, np.float32))
    largest = scales if scales.ndim == 1 else scales.max(axis=1)
    if scales.ndim == 1 or ((scales == largest[:, None]) | (scales == 0)).all():
        return TernaryBlocks(packed, _ones_for_zeros(largest))
    return TernaryBlocks(packed, _ones_for_zeros(scales), found.group_size)


def _ones_for_zeros(scales: F32) -> F32:
    return np.where(scales == 0, np.float32(1), scales)


def _without_scaleless(found: TernaryBlocks) -> npt.NDArray[np.uint8]:
    """Return the codes, those whose scale is 0 replaced by 0."""
    empty = found.scales == 0
    if not empty.any():
        return found.packed
    packed = found.packed.copy()
    if found.group_size is None:
        packed[empty] = _ZERO_WEIGHTS
    else:
        packed.reshape(*empty.shape, found.group_size // 4)[empty] = _ZERO_WEIGHTS
    return packed
