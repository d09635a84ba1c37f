"""MLX's affine quantisation: weights in groups, w = scale * q + bias, q of a few bits.

A group is ternary if its bias is -scale and q is 0, 1 or 2: then w = scale * (q - 1), which is
exact. MLX stores sixteen such q in a word of 32 bits, the first lowest, along a row; as bytes that
is the canonical packing itself, so a ternary matrix is a view of the file.

`mx.quantize` does not make such groups of a ternary matrix: it fits four levels between the
extremes, and half of the negative weights' size is lost. Only matrices packed by hand are ternary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import DenseDtype, DenseTensor
from bitllm.errors import FormatError, NotTernaryError, TensorShapeError, UnsupportedModelError
from bitllm.formats.config_fields import ConfigFields
from bitllm.formats.repack import PackedWeights, coarsest_scales, refuse_code_three, row_bands
from bitllm.formats.weight_files import FLOATS, WeightFile, entry_of

__all__ = ["AffineLayout", "AffineTensors", "find_affine", "read_affine_layout"]

_TERNARY_BITS = 2
_BITS = (2, 4, 8)
_GROUP_SIZES = (32, 64, 128)
_WORD_BITS = 32

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class AffineLayout:
    """The section `quantization` of config.json: bits and group size, and modules that differ."""

    bits: int
    group_size: int
    modules: Mapping[str, AffineLayout] = field(default_factory=dict)

    def of(self, module: str) -> AffineLayout:
        """Return the layout of one module."""
        return self.modules.get(module, self)


def read_affine_layout(section: ConfigFields) -> AffineLayout:
    """Read `quantization` of an MLX directory's config.json.

    Raises:
        UnsupportedModelError: a mode other than affine, or bits or groups that are not read.
        FormatError: a value of the wrong type.
    """
    whole = _one_layout(section, None)
    modules = {
        name: _one_layout(ConfigFields(section.path, value), whole)
        for name, value in section.fields.items()
        if isinstance(value, dict)
    }
    return AffineLayout(whole.bits, whole.group_size, modules)


def _one_layout(section: ConfigFields, whole: AffineLayout | None) -> AffineLayout:
    mode = section.text("mode", "affine")
    bits = section.size("bits", None if whole is None else whole.bits)
    group_size = section.size("group_size", None if whole is None else whole.group_size)
    if mode != "affine" or bits not in _BITS or group_size not in _GROUP_SIZES:
        raise UnsupportedModelError(
            f"{section.path}: MLX quantisation {mode!r:.40} of {bits} bits in groups of "
            f"{group_size} is not supported",
            hint="read are affine groups of 32, 64 or 128: 2 bits if they are ternary, and "
            "embeddings and heads of 2, 4 or 8 bits",
        )
    return AffineLayout(bits, group_size)


@dataclass(frozen=True, slots=True)
class AffineTensors:
    """The three tensors of a quantised matrix [out, in], their shapes and dtypes checked."""

    module: str
    weight: WeightFile
    scales: WeightFile
    biases: WeightFile
    layout: AffineLayout

    def read_ternary(self) -> PackedWeights:
        """Return the matrix as ternary weights; codes are a view of the file.

        Raises:
            FormatError: the code 3, or a scale that is not a positive number.
            NotTernaryError: more or fewer bits than 2, or a group whose bias is not -scale.
        """
        if self.layout.bits != _TERNARY_BITS:
            raise NotTernaryError(
                f"MLX quantised this projection to {self.layout.bits} bits, so it is not ternary",
                hint="use a repository whose weights are packed as ternary ones: bits 2",
            )
        scales = self._dense("scales").to_float32()
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise FormatError(
                "the scale of a group is not a positive number",
                hint="the file is damaged; fetch it again",
            )
        if (self._dense("biases").to_float32() != -scales).any():
            raise NotTernaryError(
                "the groups are not ternary: a bias is not -scale",
                hint="mlx_lm.convert -q and mx.quantize round ternary weights to four levels, "
                "which loses them; use the original repository, or `bitllm convert`",
            )
        packed = self._bytes()
        for band in row_bands(*packed.shape):
            refuse_code_three(packed[band], band.start)
        return PackedWeights(packed, *coarsest_scales(scales, self.layout.group_size))

    def dequantize(self) -> DenseTensor:
        """Return scale * q + bias [out, in]: in the dtype of the scales if exact, else float32."""
        scales, biases = self._dense("scales"), self._dense("biases")
        step, low = scales.to_float32(), biases.to_float32()
        packed, bits = self._bytes(), self.layout.bits
        columns = packed.shape[1] * 8 // bits
        ternary = bits == _TERNARY_BITS and bool((low == -step).all()) and not _has_three(packed)
        dtype = scales.dtype if ternary else "f32"
        values = np.empty((len(packed), columns), scales.data.dtype if ternary else np.float32)
        for band in row_bands(len(packed), columns):
            q = _unpack(packed[band], bits).reshape(-1, step.shape[1], self.layout.group_size)
            floats = (step[band, :, None] * q + low[band, :, None]).reshape(-1, columns)
            values[band] = floats.view(np.uint32) >> 16 if dtype == "bf16" else floats
        return DenseTensor(values, dtype)

    def dequantized_dtype(self) -> DenseDtype:
        """Return the dtype that `dequantize` gives, taking 2 bits to be ternary."""
        return self._dense("scales").dtype if self.layout.bits == _TERNARY_BITS else "f32"

    def _dense(self, part: str) -> DenseTensor:
        file: WeightFile = getattr(self, part)
        return file.dense(f"{self.module}.{part}")

    def _bytes(self) -> U8:
        """The words of `weight` as bytes in little-endian order, uint8 [out, in * bits / 8]."""
        words: Any = self.weight.array(f"{self.module}.weight")
        bytes_of_words: U8 = words.astype("<u4", copy=False).view(np.uint8)
        return bytes_of_words


def find_affine(
    files: Mapping[str, WeightFile], module: str, shape: tuple[int, int], layout: AffineLayout
) -> AffineTensors:
    """Find weight, scales and biases of a module and check them.

    Args:
        files: the file of each tensor.
        module: prefix of the tensors' names.
        shape: (out, in) that the architecture asks for.
        layout: what config.json says of this module.

    Raises:
        MissingTensorError: one of the three is not there.
        TensorShapeError: one has another shape or dtype.
    """
    out, width = shape
    per_word = _WORD_BITS // layout.bits
    groups = width / layout.group_size
    wanted = {"weight": ("U32",), "scales": FLOATS, "biases": FLOATS}
    for part, dtypes in wanted.items():
        name = f"{module}.{part}"
        entry = entry_of(files, name)
        columns = width / per_word if part == "weight" else groups
        if entry.dtype not in dtypes or entry.shape != (out, columns):
            raise TensorShapeError(
                f"{files[name].path}: {name!r} should be {' or '.join(dtypes)} [{out}, "
                f"{columns:g}] for {layout.bits} bits in groups of {layout.group_size}, "
                f"but is {entry.dtype} {[*entry.shape]}",
                hint="config.json does not belong to these weights, or one of them is damaged",
            )
    weight, scales, biases = (files[f"{module}.{part}"] for part in wanted)
    return AffineTensors(module, weight, scales, biases, layout)


def _has_three(packed: U8) -> bool:
    return any(
        bool((packed[band] & (packed[band] >> np.uint8(1)) & np.uint8(0x55)).any())
        for band in row_bands(*packed.shape)
    )


def _unpack(packed: U8, bits: int) -> F32:
    """Codes of a few bits each, low bits first, uint8 [rows, n] -> float32 [rows, n * 8 / bits]."""
    places = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[:, :, None] >> places) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), -1).astype(np.float32)
