"""Ternary checkpoints in GGUF files: every tensor in its place, read when a backend asks for it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import (
    Checkpoint,
    DenseDtype,
    DenseTensor,
    LayerSpec,
    MappedSource,
    ModelSpec,
    StridedMatrix,
    TernaryMatrix,
)
from bitllm.errors import (
    ConfigError,
    FormatError,
    MissingTensorError,
    NotTernaryError,
    QuantizationError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats.gguf.architecture import gguf_architecture, read_gguf_spec
from bitllm.formats.gguf.container import GgufTensor
from bitllm.formats.gguf.dense_blocks import decode_quantized
from bitllm.formats.gguf.names import stored_name
from bitllm.formats.gguf.plausibility import warn_of_layout, warn_of_scales
from bitllm.formats.gguf.rope import ROPE_FREQS
from bitllm.formats.gguf.scales import settle_scales
from bitllm.formats.gguf.shards import GgufModel
from bitllm.formats.gguf.ternary_blocks import (
    I2S_LAYOUTS,
    I2sLayout,
    TernaryBlocks,
    decode_ternary,
)
from bitllm.formats.ternary_values import read_ternary_values
from bitllm.ternary import dequantize, unpack

__all__ = ["LAYOUT_VARIABLE", "neighbour_order", "open_gguf"]

LAYOUT_VARIABLE = "BITLLM_I2S_LAYOUT"
_FLOATS: dict[str, DenseDtype] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_T = TypeVar("_T", bound=np.generic)
_ZERO_WEIGHTS = np.uint8(0b01010101)


def open_gguf(path: Path, *, i2s_layout: str | None = None) -> Checkpoint:
    """Open a model in a GGUF file; tensors are read when they are asked for.

    Args:
        path: the file, or any of the files of a model that was split.
        i2s_layout: order of the codes of I2_S tensors, "x86_128", "arm_64" or "row4"; None = what
            the environment variable BITLLM_I2S_LAYOUT says, or else "x86_128", with a warning
            where another one looks right.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the files.
        ConfigError: no such layout.
    """
    asked = i2s_layout or os.environ.get(LAYOUT_VARIABLE) or None
    layout = _checked_layout(asked) if asked else I2S_LAYOUTS[0]
    model = GgufModel(path)
    spec = read_gguf_spec(model)
    source = _GgufSource(model, spec, layout)
    if asked is None:
        warn_of_layout(model, spec)
    warn_of_scales(model, spec)
    return Checkpoint(spec, source, str(model.path))


def _checked_layout(value: str) -> I2sLayout:
    for layout in I2S_LAYOUTS:
        if value == layout:
            return layout
    raise ConfigError(
        f"there is no I2_S layout {value!r:.40}", hint=f"choose one of {', '.join(I2S_LAYOUTS)}"
    )


def neighbour_order(heads: int, head_dim: int) -> npt.NDArray[np.intp]:
    """Return which row of q or k each row of a `llama` file is, intp [heads * head_dim].

    RoPE turns rows r and r + head_dim / 2 of a head together; there they lie side by side.
    """
    rows = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)


class _GgufSource(MappedSource):
    """A source over mapped GGUF files."""

    def __init__(self, model: GgufModel, spec: ModelSpec, layout: I2sLayout) -> None:
        self._model, self._spec, self._layout = model, spec, layout
        self._permuted = gguf_architecture(model).permuted
        self._linears = dict(spec.linear_names())
        self._decoded: WeakValueDictionary[str, npt.NDArray[np.float32]] = WeakValueDictionary()
        for name, shape in spec.dense_shapes().items():
            self._check(name, shape, ("float", "quantized", "ternary"))
        for name, linear in self._linears.items():
            self._check(name, (linear.out_features, linear.in_features), ("float", "ternary"))
        self._check_unused()

    def dense(self, name: str) -> DenseTensor | None:
        """Return the dense tensor called `name`, decoded if it is quantised, or None."""
        if self._spec.dense_shape(name) is None:
            return None
        tensor = self._model.tensors[stored_name(name)]
        with self._naming(tensor):
            found = self._read_dense(tensor)
        return self._in_order(name, found) if name.endswith(".bias") else found

    def dense_dtype(self, name: str) -> DenseDtype | None:
        """Return the dtype of the dense tensor called `name` without decoding it, or None."""
        if self._spec.dense_shape(name) is None:
            return None
        return _FLOATS.get(self._model.tensors[stored_name(name)].type.name, "f32")

    def is_mapped(self, name: str) -> bool:
        """Whether the dense tensor called `name` is a view of the file."""
        return self._model.tensors[stored_name(name)].type.kind == "float"

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Read the ternary matrix called `name` into the canonical packing, or None."""
        if name not in self._linears:
            return None
        tensor = self._model.tensors[stored_name(name)]
        with self._naming(tensor):
            found = settle_scales(self._read_ternary(tensor))
            found = self._with_factor(name, found)
        packed, scales = found.packed, found.scales
        order = self._row_order(name)
        if order is not None:
            packed = _undo(packed, order)
            scales = _undo(scales, order) if scales.ndim else scales
        if (packed == _ZERO_WEIGHTS).all():
            warnings.warn(
                f"{self._model.file_of(tensor.name)}: every weight of {tensor.name!r} is zero",
                stacklevel=2,
            )
        return TernaryMatrix(packed, tensor.shape[1], scales, found.group_size)

    def strided(self, name: str) -> StridedMatrix | None:
        """Return None: no type of GGUF files has the layout of transformers."""
        return None

    def release(self) -> None:
        """Drop from memory what was read of the files."""
        self._model.release()

    @contextmanager
    def _naming(self, tensor: GgufTensor) -> Iterator[None]:
        """Put the file and the tensor in front of what is wrong with it."""
        try:
            yield
        except (FormatError, NotTernaryError, QuantizationError) as error:
            kind = NotTernaryError if isinstance(error, NotTernaryError) else FormatError
            where = f"{self._model.file_of(tensor.name)}: {tensor.name!r} ({tensor.type.name})"
            raise kind(f"{where}: {error.message}", hint=error.hint) from error

    def _check(self, name: str, shape: tuple[int, ...], kinds: tuple[str, ...]) -> None:
        stored = stored_name(name)
        tensor = self._model.tensors.get(stored)
        if tensor is None:
            raise MissingTensorError(
                f"{self._model.path}: tensor {stored!r} is missing",
                hint="download the model again; a converter may have left it out",
            )
        if tensor.shape != shape:
            raise TensorShapeError(
                f"{self._model.file_of(stored)}: {stored!r} should be {[*shape]}, "
                f"but is {[*tensor.shape]}",
                hint="the metadata do not belong to these weights, or the file is damaged",
            )
        kind = tensor.type
        if kind.kind == "refused":
            raise UnsupportedModelError(
                f"{self._model.file_of(stored)}: {stored!r} is of type {kind.name}, "
                "which is not read",
                hint=kind.advice,
            )
        if kind.kind not in kinds:
            raise NotTernaryError(
                f"{self._model.file_of(stored)}: {stored!r} is of type {kind.name}, "
                "so these are the weights of a dense model",
                hint="bitllm runs ternary models: I2_S, TQ1_0, TQ2_0 and their like",
            )

    def _check_unused(self) -> None:
        """Refuse tensors that the architecture does not use: they would silently be ignored."""
        used = {stored_name(name) for name in self._spec.dense_shapes()}
        used |= {stored_name(name) for name in self._linears}
        used |= {_factor_name(name) for name in self._linears} | {ROPE_FREQS}
        unused = sorted(set(self._model.tensors) - used)
        if unused:
            raise UnsupportedModelError(
                f"{self._model.path}: {len(unused)} tensors have no place in "
                f"{self._spec.architecture}, among them {', '.join(unused[:3])!r:.200}",
                hint="the model has parts that bitllm does not compute, or its metadata describe "
                "fewer layers than the file holds",
            )

    def _read_dense(self, tensor: GgufTensor) -> DenseTensor:
        kind = tensor.type
        if kind.kind == "float":
            dtype = _FLOATS[kind.name]
            stored = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[dtype]
            values = self._model.bytes(tensor.name).view(stored).reshape(tensor.shape)
            native = values.dtype.newbyteorder("=")
            return DenseTensor(values.astype(native, copy=False), dtype)
        decoded = self._decoded.get(tensor.name)
        if decoded is None:
            decoded = self._decode(tensor)
            self._decoded[tensor.name] = decoded
        return DenseTensor(decoded, "f32")

    def _decode(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        """Decode a quantised or ternary tensor to float32, which holds all of its values."""
        if tensor.type.kind == "quantized":
            return decode_quantized(tensor.type, self._model.bytes(tensor.name), tensor.shape)
        if len(tensor.shape) != 2:
            raise FormatError("vectors are not read in this type")
        found = self._read_ternary(tensor)
        values = np.empty(tensor.shape, np.float32)
        for start in range(0, tensor.shape[0], 256):
            rows = slice(start, start + 256)
            scales = found.scales[rows] if found.scales.ndim else found.scales
            codes = unpack(found.packed[rows], tensor.shape[1])
            values[rows] = dequantize(codes, scales, found.group_size)
        return values

    def _read_ternary(self, tensor: GgufTensor) -> TernaryBlocks:
        out, width = tensor.shape
        if tensor.type.kind == "ternary":
            data = self._model.bytes(tensor.name)
            return decode_ternary(tensor.type, data, (out, width), self._layout)
        found = read_ternary_values(self._read_dense(tensor))
        if found is None:
            raise NotTernaryError(
                "the weights are not ternary: they have several sizes",
                hint="bitllm runs ternary models: I2_S, TQ1_0, TQ2_0 and their like",
            )
        return TernaryBlocks(found.packed, found.scales, found.group_size)

    def _with_factor(self, name: str, found: TernaryBlocks) -> TernaryBlocks:
        """Multiply the scales with that of `blk.N.<name>.scale`, where there is one."""
        stored = _factor_name(name)
        tensor = self._model.tensors.get(stored)
        if tensor is None:
            return found
        values = self._model.bytes(stored).view("<f4") if tensor.type.name == "F32" else None
        if values is None or values.size != 1:
            raise FormatError(f"{stored!r} should be one number in F32")
        factor = np.float32(values[0])
        with np.errstate(over="ignore"):
            scales = np.asarray(found.scales * factor, np.float32)
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise FormatError(f"{stored!r} is {factor}, which gives no positive weight scale")
        return TernaryBlocks(found.packed, scales, found.group_size)

    def _row_order(self, name: str) -> npt.NDArray[np.intp] | None:
        """Return which row each stored row of q or k is, None where they are in order."""
        _, index, part = name.split(".")[:3]
        if not self._permuted or part not in ("q", "k"):
            return None
        layer: LayerSpec = self._spec.layers[int(index)]
        heads = layer.num_heads if part == "q" else layer.num_kv_heads
        return neighbour_order(heads, layer.head_dim)

    def _in_order(self, name: str, bias: DenseTensor) -> DenseTensor:
        order = self._row_order(name)
        return bias if order is None else DenseTensor(_undo(bias.data, order), bias.dtype)


def _undo(rows: npt.NDArray[_T], order: npt.NDArray[np.intp]) -> npt.NDArray[_T]:
    restored = np.empty_like(rows)
    restored[order] = rows
    return restored


def _factor_name(name: str) -> str:
    return stored_name(name).removesuffix(".weight") + ".scale"
