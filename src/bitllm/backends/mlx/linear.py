"""Ternary products in MLX: int8 codes of activations, 2-bit codes of weights, exact sums of both.

MLX multiplies float32 with weights w = scale * q + bias, q of two bits. With scale 1 and bias -1, w
is the ternary code; activations are their int8 codes held in float32. All partial sums are whole
numbers below 2^24, so float32 holds them, in whatever order they are added.
"""

from __future__ import annotations

import weakref

import mlx.core as mx
import numpy as np

from bitllm.backends.mlx.kernels import quantize_packed, ternary_product, use_kernels
from bitllm.backends.mlx.tensors import vector
from bitllm.checkpoint import Checkpoint, LinearSpec, TernaryMatrix
from bitllm.errors import QuantizationError, UnsupportedModelError

__all__ = ["Linear", "PackedMatrix", "UnitScales", "quantize_activations"]

_GROUPS = (128, 64, 32)  # of columns, as MLX's kernels take them; wide ones cost fewer bytes
_ZERO_WEIGHTS = 0b01010101


def quantize_activations(x: mx.array) -> tuple[mx.array, mx.array]:
    """Round each row to int8 codes: a = 127 / max(absmax, 1e-5), q = round_half_even(x * a).

    Args:
        x: float32 [tokens, in].

    Returns:
        The codes, whole numbers in float32 [tokens, in], and a, float32 [tokens, 1].
    """
    absmax = mx.max(mx.abs(x), axis=-1, keepdims=True)
    a = 127.0 / mx.maximum(absmax, 1e-5)
    return mx.clip(mx.round(x * a), -128.0, 127.0), a


class UnitScales:
    """Scales 1 and biases -1, which matrices of one shape share: a fifth of all bytes otherwise.

    Args:
        shape: (rows, groups) of the matrices.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.scales = mx.ones(shape)
        self.biases = -self.scales

    @classmethod
    def of(cls, rows: int, groups: int) -> UnitScales:
        """Return those of a shape; they are freed with the last matrix that holds them."""
        shape = (rows, groups)
        found = _unit_scales.get(shape)
        if found is None:
            found = _unit_scales[shape] = cls(shape)
        return found


_unit_scales: weakref.WeakValueDictionary[tuple[int, int], UnitScales] = (
    weakref.WeakValueDictionary()
)


class PackedMatrix:
    """A ternary matrix as MLX multiplies it: its scales left out, or those of groups within.

    Args:
        matrix: in the canonical packing, whose bytes are those of MLX too.
        name: of the matrix, for errors.

    Attributes:
        codes: weights plus one, 16 a word, low bits first, uint32 [rows, words].
        nbytes: bytes on the device, without `UnitScales`, which other matrices use too.
    """

    def __init__(self, matrix: TernaryMatrix, name: str) -> None:
        self._columns = matrix.in_features
        self._group = _group_of(matrix, name)
        groups = -(-self._columns // self._group)
        self._padding = groups * self._group - self._columns
        packed = np.full((matrix.out_features, groups * self._group // 4), _ZERO_WEIGHTS, np.uint8)
        packed[:, : matrix.packed.shape[1]] = matrix.packed
        if (packed & (packed >> 1) & 0b01010101).any():
            raise QuantizationError(
                f"{name} holds the code 3, which stands for no ternary weight",
                hint="the file is damaged or of another format than it says",
            )
        self.codes = mx.array(packed.view("<u4"))
        self._unit: UnitScales | None = None
        self.nbytes = self.codes.nbytes
        if matrix.group_size is None:
            self._unit = UnitScales.of(matrix.out_features, groups)
            self._scales, self._biases = self._unit.scales, self._unit.biases
            return
        scales = np.repeat(matrix.scales, matrix.group_size // self._group, axis=1)[:, :groups]
        self._scales = mx.array(np.ascontiguousarray(scales))
        self._biases = -self._scales
        self.nbytes += self._scales.nbytes + self._biases.nbytes

    @property
    def words(self) -> int:
        """Words of 16 codes in a row."""
        return int(self.codes.shape[1])

    def multiply_packed(self, activations: mx.array) -> mx.array:
        """Multiply int8 codes, four a word, uint32 [tokens, 4 * words], by our own kernels."""
        return ternary_product(self.codes, activations)

    def arrays(self) -> list[mx.array]:
        """Return all arrays of the matrix, to be computed by the thread that made them."""
        return [self.codes, self._scales, self._biases]

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply float32 [tokens, in] with the matrix: float32 [tokens, out]."""
        if self._padding:
            x = mx.pad(x, [(0, 0), (0, self._padding)])
        return mx.quantized_matmul(
            x, self.codes, self._scales, self._biases, group_size=self._group, bits=2
        )


def _group_of(matrix: TernaryMatrix, name: str) -> int:
    wanted = matrix.group_size
    if wanted is None:
        return next((g for g in _GROUPS if matrix.in_features % g == 0), _GROUPS[-1])
    for group in _GROUPS:
        if wanted % group == 0:
            return group
    raise UnsupportedModelError(
        f"{name} has a scale for each group of {wanted} weights; "
        "the mlx device runs groups of multiples of 32",
        hint='use device="reference"',
    )


class Linear:
    """One ternary projection with its own norm and bias where the architecture has them.

    Attributes:
        nbytes: bytes of the matrix on the device.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, spec: LinearSpec) -> None:
        self._spec = spec
        matrix = checkpoint.ternary(name)
        if not np.isfinite(matrix.scales).all():
            raise QuantizationError(
                f"{checkpoint.origin}: a scale of {name} is NaN or infinite",
                hint="the file is damaged; download it again",
            )
        self.matrix = PackedMatrix(matrix, f"{checkpoint.origin}: {name}")
        self._scales = None if matrix.group_size is not None else mx.array(matrix.scales)
        self._norm = vector(checkpoint, f"{name}.norm") if spec.norm_eps is not None else None
        self._bias = vector(checkpoint, f"{name}.bias") if spec.bias else None
        self.nbytes = self.matrix.nbytes
        self._own_kernels = matrix.group_size is None and use_kernels()

    def arrays(self) -> list[mx.array]:
        """Return all arrays of the projection, to be computed by the thread that made them."""
        own = [self._scales, self._norm, self._bias]
        return [*self.matrix.arrays(), *(array for array in own if array is not None)]

    def __call__(self, x: mx.array) -> mx.array:
        """Project float32 [tokens, in] to [tokens, out]: (codes @ q / a) * scale + bias."""
        if self._norm is not None and self._spec.norm_eps is not None:
            x = mx.fast.rms_norm(x, self._norm, self._spec.norm_eps)
        if self._spec.activation_bits is None:
            y = self.matrix(x)
        elif self._own_kernels:
            packed, a = quantize_packed(x, self.matrix.words)
            y = self.matrix.multiply_packed(packed) / a
        else:
            codes, a = quantize_activations(x)
            y = self.matrix(codes) / a
        if self._scales is not None:
            y = y * self._scales
        return y if self._bias is None else y + self._bias
