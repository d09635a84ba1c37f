"""Single operations through the native kernels: for checks, measurements and integrations.

They give what their namesakes in `bitllm.ternary` give, faster; no decoder step goes through them.
The kernel set can be chosen by name, so that each can be compared with the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm import _native
from bitllm.errors import ConfigError, QuantizationError

__all__ = ["kernel_names", "pack", "quantize_activations", "ternary_matmul", "unpack"]

_LARGEST_INPUT = (1 << 24) // 127  # columns for which products are exact in every kernel


def kernel_names() -> list[str]:
    """Return the kernel sets this machine runs, best first."""
    return _native.kernel_names()


def quantize_activations(
    x: npt.NDArray[np.floating[Any]], *, isa: str | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round activations to int8 by the largest size in each token.

    a = 127 / max(max |x|, 1e-5); q = clamp(round_half_even(x * a), -128, 127).

    Args:
        x: floating point [..., features], read as float32.
        isa: kernel set, None = the best.

    Returns:
        q int8 [..., features] and a float32 [...]; q / a approximates x.

    Raises:
        ConfigError: this machine does not run the kernel set.
        QuantizationError: NaN or infinity, or no feature axis.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise QuantizationError(f"activations must be [..., features], got shape {x.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused below
        values = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(values).all():
        raise QuantizationError(
            "activations hold NaN or infinity: only finite numbers can be quantised"
        )
    q, a = np.empty(x.shape, np.int8), np.empty(x.shape[:-1], np.float32)
    features = x.shape[-1]
    _native.quantize_activations(
        values.reshape(-1, features), q.reshape(-1, features), a.reshape(-1), _kernel_set(isa)
    )
    return q, a


def ternary_matmul(
    packed: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], *, isa: str | None = None
) -> npt.NDArray[np.int32]:
    """Multiply packed ternary weights with quantised activations, exactly.

    Args:
        packed: uint8 [out, ceil(in / 4)], the canonical packing of `pack`.
        q: int8 [..., in].
        isa: kernel set, None = the best.

    Returns:
        int32 [..., out], sum over `in` of code * q.

    Raises:
        ConfigError: this machine does not run the kernel set.
        QuantizationError: shapes or dtypes do not fit, or `packed` holds bits that are no code.
    """
    fits = packed.ndim == 2 and q.ndim >= 1 and packed.shape[1] == -(-q.shape[-1] // 4) > 0
    if not fits or packed.dtype != np.uint8 or q.dtype != np.int8:
        raise QuantizationError(
            "weights uint8 [out, in / 4] and activations int8 [..., in] do not fit: "
            f"{packed.dtype} {packed.shape}, {q.dtype} {q.shape}"
        )
    if q.shape[-1] > _LARGEST_INPUT:
        raise QuantizationError(f"{q.shape[-1]} columns are more than {_LARGEST_INPUT}")
    out = np.empty((*q.shape[:-1], len(packed)), np.int32)
    rows = np.ascontiguousarray(q).reshape(-1, q.shape[-1])
    kernels = _kernel_set(isa)
    try:
        _native.ternary_matmul(
            np.ascontiguousarray(packed), rows, out.reshape(len(rows), len(packed)), kernels
        )
    except ValueError as error:
        raise QuantizationError(str(error)) from error
    return out


def pack(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Pack ternary codes into 2 bits each: element k is bits 2(k % 4) of byte k // 4, as code + 1.

    Args:
        codes: int8 [out, in], each -1, 0 or +1.

    Returns:
        uint8 [out, ceil(in / 4)]; positions behind the end of a row hold 1, a zero weight.

    Raises:
        QuantizationError: `codes` is no int8 matrix or holds another value.
    """
    if codes.ndim != 2 or codes.dtype != np.int8:
        raise QuantizationError(f"codes must be int8 [out, in], got {codes.dtype} {codes.shape}")
    packed = np.empty((len(codes), -(-codes.shape[1] // 4)), np.uint8)
    try:
        _native.pack(np.ascontiguousarray(codes), packed)
    except ValueError as error:
        raise QuantizationError(str(error)) from error
    return packed


def unpack(packed: npt.NDArray[np.uint8], in_features: int) -> npt.NDArray[np.int8]:
    """Undo `pack`.

    Args:
        packed: uint8 [out, ceil(in / 4)].
        in_features: codes in a row.

    Returns:
        int8 [out, in], each -1, 0 or +1.

    Raises:
        QuantizationError: the shape does not fit, or a position holds 3, which is no ternary code.
    """
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != -(-in_features // 4):
        raise QuantizationError(
            f"{in_features} codes a row need uint8 [out, {-(-in_features // 4)}], "
            f"got {packed.dtype} {packed.shape}"
        )
    codes = np.empty((len(packed), in_features), np.int8)
    try:
        _native.unpack(np.ascontiguousarray(packed), codes)
    except ValueError as error:
        raise QuantizationError(str(error)) from error
    return codes


def _kernel_set(isa: str | None) -> str:
    available = _native.kernel_names()
    if isa is not None and isa not in available:
        raise ConfigError(
            f"this machine does not run the kernel set {isa!r}",
            hint=f"choose one of {', '.join(available)}",
        )
    return isa or available[0]
