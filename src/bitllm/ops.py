"""Single operations through the native kernels: for checks, measurements and integrations.

They give what their namesakes in `bitllm.ternary` give, faster; no decoder step goes through them.
The kernel set can be chosen by name, so that each can be compared with the reference.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from bitllm import _native
from bitllm.backends.sizes import Packing
from bitllm.errors import ConfigError, InsufficientMemoryError, QuantizationError

__all__ = [
    "PreparedMatrix",
    "kernel_names",
    "pack",
    "prepare",
    "quantize_activations",
    "ternary_matmul",
    "unpack",
]

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
    values = x if x.dtype == np.float32 else _narrowed(x)
    features = x.shape[-1]
    rows, kernels = x.size // features, _kernel_set(isa)
    q, a = np.empty(x.shape, np.int8), np.empty(x.shape[:-1], np.float32)
    try:
        _native.quantize_activations(
            np.ascontiguousarray(values).reshape(rows, features),
            q.reshape(rows, features),
            a.reshape(rows),
            kernels,
        )
    except ValueError as error:
        raise QuantizationError(f"{error}: only finite numbers can be quantised") from error
    return q, a


def _narrowed(x: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, refused later
        return x.astype(np.float32)


def prepare(
    packed: npt.NDArray[np.uint8],
    in_features: int | None = None,
    *,
    packing: Packing = "2bit",
    isa: str | None = None,
) -> PreparedMatrix:
    """Pack a ternary matrix for the kernels, once for many products.

    Args:
        packed: uint8 [out, ceil(in / 4)], the canonical packing of `pack`; copied.
        in_features: columns of the matrix; None = all that the bytes have room for.
        packing: "2bit", or "base3" for 1.6 bits a weight.
        isa: kernel set, None = the best.

    Raises:
        ConfigError: this machine does not run the kernel set, or there is no such packing.
        InsufficientMemoryError: the system refuses memory for the copy.
        QuantizationError: shape or dtype do not fit, or `packed` holds bits that are no code.
    """
    if packing not in get_args(Packing):
        raise ConfigError(f"no packing {packing!r}", hint='choose "2bit" or "base3"')
    if packed.ndim != 2 or packed.dtype != np.uint8:
        raise QuantizationError(
            f"weights must be uint8 [out, in / 4], got {packed.dtype} {packed.shape}"
        )
    columns = 4 * packed.shape[1] if in_features is None else in_features
    if not 0 < columns <= _LARGEST_INPUT or packed.shape[1] != -(-columns // 4):
        raise QuantizationError(
            f"weights {packed.shape} do not fit {columns} columns: "
            f"1 to {_LARGEST_INPUT} of them, four in a byte"
        )
    kernels = _kernel_set(isa)
    try:
        native = _native.PreparedMatrix(np.ascontiguousarray(packed), columns, packing, kernels)
    except ValueError as error:
        raise QuantizationError(str(error)) from error
    except MemoryError as error:
        raise _no_memory(f"a matrix of {len(packed)} x {columns}") from error
    return PreparedMatrix(native, (len(packed), columns))


class PreparedMatrix:
    """A ternary matrix [out, in] in the packing of the kernels; made by `prepare`.

    Its memory is given back with the object. Several threads may use it at once; the GIL is
    released meanwhile. It cannot be pickled: `unpack` and `pack` are the way to a file.

    Attributes:
        shape: (out, in).
        nbytes: bytes of the packed rows.
    """

    __slots__ = ("_native", "nbytes", "shape")

    def __init__(self, native: _native.PreparedMatrix, shape: tuple[int, int]) -> None:
        self._native = native
        self.shape = shape
        self.nbytes = native.nbytes

    def matmul(self, q: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
        """Multiply with quantised activations, exactly.

        Args:
            q: int8 [..., in].

        Returns:
            int32 [..., out], sum over `in` of code * q.

        Raises:
            InsufficientMemoryError: the system refuses memory for the product.
            QuantizationError: shape or dtype do not fit.
        """
        rows, columns = self.shape
        if q.dtype != np.int8 or q.ndim == 0 or q.shape[-1] != columns:
            raise QuantizationError(
                f"weights [{rows}, {columns}] and activations int8 [..., {columns}] do not fit: "
                f"{q.dtype} {q.shape}"
            )
        try:
            out = np.empty((*q.shape[:-1], rows), np.int32)
            tokens = q.size // columns
            flat = np.ascontiguousarray(q).reshape(tokens, columns)
            self._native.multiply(flat, out.reshape(tokens, rows))
        except MemoryError as error:
            raise _no_memory(f"products of {q.shape} activations") from error
        return out

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied."""
        raise TypeError("a PreparedMatrix cannot be pickled: pickle the packed array")


def ternary_matmul(
    packed: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], *, isa: str | None = None
) -> npt.NDArray[np.int32]:
    """Multiply packed ternary weights with quantised activations, exactly.

    The matrix is packed for the kernels in each call; `prepare` does so once for many.

    Args:
        packed: uint8 [out, ceil(in / 4)], the canonical packing of `pack`.
        q: int8 [..., in].
        isa: kernel set, None = the best.

    Returns:
        int32 [..., out], sum over `in` of code * q.

    Raises:
        ConfigError: this machine does not run the kernel set.
        InsufficientMemoryError: the system refuses memory for a copy of the matrix.
        QuantizationError: shapes or dtypes do not fit, or `packed` holds bits that are no code.
    """
    fits = packed.ndim == 2 and q.ndim >= 1 and packed.shape[1] == -(-q.shape[-1] // 4) > 0
    if not fits or packed.dtype != np.uint8 or q.dtype != np.int8:
        raise QuantizationError(
            "weights uint8 [out, in / 4] and activations int8 [..., in] do not fit: "
            f"{packed.dtype} {packed.shape}, {q.dtype} {q.shape}"
        )
    return prepare(packed, q.shape[-1], isa=isa).matmul(q)


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


def _no_memory(what: str) -> InsufficientMemoryError:
    return InsufficientMemoryError(f"the system refused memory for {what}")


@cache
def _kernel_set(isa: str | None) -> str:
    available = _native.kernel_names()
    if isa is not None and isa not in available:
        raise ConfigError(
            f"this machine does not run the kernel set {isa!r}",
            hint=f"choose one of {', '.join(available)}",
        )
    return isa or available[0]
