"""The canonical packing: four ternary codes in a byte, along a row, low bits first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitllm.errors import QuantizationError

__all__ = ["pack", "unpack"]

_ODD_BITS = np.uint8(0b01010101)


def pack(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack ternary codes into 2 bits each.

    Element k of a row becomes bits 2(k % 4) of byte k // 4, as code + 1; positions behind the end
    of a row hold 1, a zero weight.

    Args:
        codes: int8 [out, in], each -1, 0 or +1.

    Returns:
        uint8 [out, ceil(in / 4)].

    Raises:
        QuantizationError: `codes` is no int8 matrix or holds another value; names the row.
    """
    if codes.ndim != 2 or codes.dtype != np.int8:
        raise QuantizationError(f"codes must be int8 [out, in], got {codes.dtype} {codes.shape}")
    _refuse_rows((codes < -1) | (codes > 1), "holds a value outside -1, 0, +1")
    out_features, in_features = codes.shape
    padded = np.ones((out_features, -(-in_features // 4) * 4), np.uint8)
    padded[:, :in_features] = (codes + np.int8(1)).view(np.uint8)
    quads = padded.reshape(out_features, -1, 4)
    packed = quads[..., 0].copy()
    for place in range(1, 4):
        packed |= quads[..., place] << np.uint8(2 * place)
    return packed


def unpack(packed: npt.NDArray[np.uint8], in_features: int) -> npt.NDArray[np.int8]:
    """Undo `pack`.

    Args:
        packed: uint8 [out, ceil(in / 4)].
        in_features: codes in a row.

    Returns:
        int8 [out, in], each -1, 0 or +1.

    Raises:
        QuantizationError: the shape does not fit, or a position holds 3, which is no ternary code;
            names the row.
    """
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != -(-in_features // 4):
        raise QuantizationError(
            f"{in_features} codes a row need uint8 [out, {-(-in_features // 4)}], "
            f"got {packed.dtype} {packed.shape}"
        )
    _refuse_rows(packed & (packed >> np.uint8(1)) & _ODD_BITS, "holds the code 3")
    codes = np.empty((*packed.shape, 4), np.int8)
    for place in range(4):
        codes[..., place] = (packed >> np.uint8(2 * place)) & np.uint8(3)
    codes -= np.int8(1)
    return np.ascontiguousarray(codes.reshape(len(packed), -1)[:, :in_features])


def _refuse_rows(wrong: npt.NDArray[np.generic], what: str) -> None:
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise QuantizationError(
            f"row {row} {what}: no ternary weights",
            hint="the file is damaged or of another format than it says",
        )
