"""Ternary checkpoints as transformers and MLX write them: config.json and weight files.

Opening a directory reads config.json and the headers of the weight files, and checks that each
tensor the architecture needs is there with the right shape and dtype, and that no tensor is there
that would be left out of the computation. Values are read when a backend asks for them, one tensor
at a time.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import (
    Checkpoint,
    DenseDtype,
    DenseTensor,
    LinearSpec,
    MappedSource,
    ModelSpec,
    StridedMatrix,
    TernaryMatrix,
    WeightScales,
)
from bitllm.errors import (
    FormatError,
    NotTernaryError,
    QuantizationError,
    UnsupportedModelError,
)
from bitllm.formats.architecture import ARCHITECTURES, read_model_spec
from bitllm.formats.json_file import read_json_object
from bitllm.formats.mlx import AffineTensors, find_affine
from bitllm.formats.pooling import read_pooling
from bitllm.formats.projections import Projection, ProjectionFinder, check_all_converted
from bitllm.formats.quantization import Quantization, dense_model, read_quantization
from bitllm.formats.refusals import refuse_known_models
from bitllm.formats.repack import PackedWeights, quantize_masters, repack_row_strided
from bitllm.formats.tensor_names import MAY_BE_UNUSED, NORMS, TensorNames
from bitllm.formats.ternary_values import read_one_size, read_ternary_values
from bitllm.formats.weight_files import (
    FLOATS,
    WeightFile,
    entry_of,
    open_weight_files,
    wrong_tensor,
)

__all__ = ["open_huggingface"]

_ZERO_WEIGHTS = np.uint8(0b01010101)
_LARGEST_USUAL_SCALE = 8  # of a ternary weight; 2B-4T has 1 to 2, others less
_MATRICES = ("embed", "head")
_ONE = np.asarray(np.float32(1))


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a model directory in the layout of the Hugging Face Hub.

    Args:
        directory: holds config.json and model.safetensors or pytorch_model.bin, or shards of one
            of them with their index.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the files.
    """
    config_file = directory / "config.json"
    fields = read_json_object(config_file)
    refuse_known_models(config_file, fields, ())
    read_quantization(config_file, fields)  # says what is wrong before weights are looked for
    files = open_weight_files(directory)
    refuse_known_models(config_file, fields, files)
    quantization = read_quantization(config_file, fields, files)
    spec = read_model_spec(config_file, fields, quantization, files)
    pooling = read_pooling(directory, spec.architecture)
    headless = pooling != "none" and "lm_head.weight" not in files
    spec = replace(spec, pooling=pooling, tied_head=spec.tied_head or headless)
    source = _HuggingFaceSource(directory, spec, quantization, files)
    if not quantization.declared and not source.shows_ternary_values():
        raise dense_model(config_file)
    return Checkpoint(spec, source, str(directory))


class _HuggingFaceSource(MappedSource):
    """A source over mapped weight files."""

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        quantization: Quantization,
        files: Mapping[str, WeightFile],
    ) -> None:
        self._directory = directory
        self._files = files
        self._quantization = quantization
        self._linears = dict(spec.linear_names())
        self._names = TensorNames(spec, files)
        self._gain_offset = ARCHITECTURES[spec.architecture].gain_offset
        self._dense_names = {name: self._names.dense(name) for name in spec.dense_shapes()}
        self._affine = self._find_affine_matrices(spec)
        self._dequantized: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._warned = False
        self._check_dense(spec)
        modules = {name: self._names.module(name) for name in self._linears}
        check_all_converted(directory, modules.values(), spec.tied_head, quantization.skipped)
        finder = ProjectionFinder(directory, files, quantization)
        self._projections = {
            name: finder.find(modules[name], linear) for name, linear in self._linears.items()
        }
        self._check_unused(spec)

    def dense(self, name: str) -> DenseTensor | None:
        """Return the dense tensor called `name`, or None if the model has none.

        A view of the file, but for gains stored less one, and for matrices that MLX quantised.
        """
        stored = self._dense_names.get(name)
        if stored is None:
            return None
        if name in self._affine:
            return self._dequantize(name)
        tensor = self._files[stored].dense(stored)
        if self._gain_offset and _is_own_norm(name):
            return DenseTensor(tensor.to_float32() + np.float32(self._gain_offset), "f32")
        if name.endswith(".bias") and self._scales_bias(name.removesuffix(".bias")):
            return self._scaled_bias(name.removesuffix(".bias"), tensor)
        return tensor

    def dense_dtype(self, name: str) -> DenseDtype | None:
        """Return the dtype of the dense tensor called `name`, or None; dequantises nothing."""
        affine = self._affine.get(name)
        return super().dense_dtype(name) if affine is None else affine.dequantized_dtype()

    def is_mapped(self, name: str) -> bool:
        """Whether the dense tensor called `name` is a view of a file, and not dequantised."""
        return name not in self._affine

    def ternary(self, name: str) -> TernaryMatrix | None:
        """Read the ternary matrix called `name` into the canonical packing, or None."""
        projection = self._projections.get(name)
        if projection is None:
            return None
        stored = f"{projection.module}.weight"
        file = self._files[stored]
        with self._naming(stored):
            matrix = self._read(projection, self._linears[name])
        file.release(stored)
        if (matrix.packed == _ZERO_WEIGHTS).all():
            warnings.warn(f"{file.path}: every weight of {stored!r} is zero", stacklevel=2)
        self._warn_of_scale(stored, float(matrix.scales.max()))
        return matrix

    def strided(self, name: str) -> StridedMatrix | None:
        """Return a view of the matrix called `name` if the file holds it packed, else None."""
        projection = self._projections.get(name)
        if projection is None or projection.storage != "packed":
            return None
        stored = f"{projection.module}.weight"
        data: Any = self._files[stored].array(stored)
        with self._naming(stored):
            scale, _ = self._stored_scale(projection, np.float32(1))
        self._warn_of_scale(stored, float(scale))
        return StridedMatrix(data, self._linears[name].out_features, scale)

    def scales(self, name: str) -> WeightScales | None:
        """Return the scale of the matrix called `name` if the file holds it packed, else None."""
        projection = self._projections.get(name)
        if projection is None or projection.storage != "packed":
            return None
        with self._naming(f"{projection.module}.weight"):
            scale, stored = self._stored_scale(projection, np.float32(1))
        return WeightScales(
            scale, source_scales=stored, source_convention=self._quantization.convention
        )

    def release(self) -> None:
        """Drop from memory what was read of the files."""
        for file in set(self._files.values()):
            file.release()

    def shows_ternary_values(self) -> bool:
        """Whether a projection of the first layer holds ternary values, and not only zeros."""
        return any(
            self._holds_ternary_values(f"{projection.module}.weight")
            for name, projection in self._projections.items()
            if name.startswith("layers.0.")
        )

    def _holds_ternary_values(self, stored: str) -> bool:
        with self._naming(stored):
            found = read_ternary_values(self._files[stored].dense(stored))
        return found is not None and bool((found.packed != _ZERO_WEIGHTS).any())

    def _warn_of_scale(self, stored: str, scale: float) -> None:
        """Say once that scales look as if they were meant to divide, or the other way round."""
        if scale > _LARGEST_USUAL_SCALE and not self._warned:
            self._warned = True
            verb = "divides" if self._quantization.convention == "divide" else "multiplies"
            warnings.warn(
                f"{self._files[stored].path}: {stored!r} has the weight scale {scale:.3g}, which "
                f"looks inverted; by linear_class in config.json the stored scale {verb}",
                stacklevel=3,
            )

    @contextmanager
    def _naming(self, stored: str) -> Iterator[None]:
        """Put the file and the tensor in front of what is wrong with it."""
        try:
            yield
        except (FormatError, NotTernaryError, QuantizationError) as error:
            kind = NotTernaryError if isinstance(error, NotTernaryError) else FormatError
            where = f"{self._files[stored].path}: {stored!r}"
            raise kind(f"{where}: {error.message}", hint=error.hint) from error

    def _scales_bias(self, linear: str) -> bool:
        """Whether transformers multiplies the bias by the weight scale too: (x W + b) * scale.

        Its AutoBitLinear does with stored scales; not its BitLinear, and not with masters.
        """
        return self._projections[linear].has_scale and self._quantization.convention == "multiply"

    def _scaled_bias(self, linear: str, bias: DenseTensor) -> DenseTensor:
        name = f"{self._projections[linear].module}.weight_scale"
        scale = self._files[name].dense(name).to_float32().reshape(())
        return DenseTensor(bias.to_float32() * scale, "f32")

    def _find_affine_matrices(self, spec: ModelSpec) -> dict[str, AffineTensors]:
        """Embedding and head, where MLX quantised them too."""
        layout = self._quantization.affine
        if layout is None:
            return {}
        modules = {
            name: self._names.module(name) for name in _MATRICES if name in self._dense_names
        }
        shape = spec.vocab_size, spec.hidden_size
        return {
            name: find_affine(self._files, module, shape, layout.of(module))
            for name, module in modules.items()
            if f"{module}.scales" in self._files
        }

    def _dequantize(self, name: str) -> DenseTensor:
        """The matrix in floating point; made once for all who hold it."""
        kept = self._dequantized.get(name)
        if kept is None:
            tensor = self._affine[name].dequantize()
            self._dequantized[name] = tensor.data
            return tensor
        dtypes: dict[Any, Any] = {"f": "f32", "e": "f16", "H": "bf16"}
        return DenseTensor(kept, dtypes[kept.dtype.char])

    def _check_dense(self, spec: ModelSpec) -> None:
        for name, shape in spec.dense_shapes().items():
            if name in self._affine:
                continue
            stored = self._dense_names[name]
            entry = entry_of(self._files, stored)
            if entry.shape != shape or entry.dtype not in FLOATS:
                raise wrong_tensor(self._files, stored, f"F32, BF16 or F16 {[*shape]}")

    def _check_unused(self, spec: ModelSpec) -> None:
        """Refuse tensors that the architecture does not use: they would silently be ignored."""
        used = set(self._dense_names.values())
        for projection in self._projections.values():
            used.add(f"{projection.module}.weight")
            used.add(f"{projection.module}.weight_scale")
        if spec.tied_head:
            used.add("lm_head.weight")
        modules = [p.module for p in self._projections.values() if p.affine is not None]
        modules += [affine.module for affine in self._affine.values()]
        modules += ["lm_head"] if spec.tied_head and self._quantization.affine else []
        used.update(f"{module}.{part}" for module in modules for part in ("scales", "biases"))
        unused = [name for name in self._files if not (name in used or MAY_BE_UNUSED.search(name))]
        if unused:
            raise UnsupportedModelError(
                f"{self._directory}: {len(unused)} tensors have no place in {spec.architecture}, "
                f"among them {', '.join(sorted(unused)[:3])}",
                hint="the model has parts that bitllm does not compute, or config.json describes "
                "fewer layers than the files hold",
            )

    def _read(self, projection: Projection, linear: LinearSpec) -> TernaryMatrix:
        if projection.affine is not None:
            return _matrix(projection.affine.read_ternary(), linear)
        stored = f"{projection.module}.weight"
        file = self._files[stored]
        if projection.storage == "packed":
            data: Any = file.array(stored)
            packed = repack_row_strided(data, linear.out_features)
            return self._with_stored_scale(projection, linear, PackedWeights(packed, _ONE))
        weights = file.dense(stored)
        if projection.storage == "masters":
            return _matrix(read_one_size(weights) or quantize_masters(weights), linear)
        found = read_ternary_values(weights, self._quantization.shards)
        if found is None or (projection.has_scale and found.scales.ndim):
            raise NotTernaryError(
                "the weights are not ternary, although config.json says that they were quantised",
                hint='for master weights, set "quantization_mode": "online" in config.json',
            )
        if projection.has_scale:
            return self._with_stored_scale(projection, linear, found)
        return _matrix(found, linear)

    def _with_stored_scale(
        self, projection: Projection, linear: LinearSpec, weights: PackedWeights
    ) -> TernaryMatrix:
        size = np.float32(weights.scales)
        scale, stored = self._stored_scale(projection, size)
        return TernaryMatrix(
            weights.packed,
            linear.in_features,
            scale,
            source_scales=stored if size == 1 else None,
            source_convention=self._quantization.convention,
        )

    def _stored_scale(
        self, projection: Projection, size: np.float32
    ) -> tuple[npt.NDArray[np.float32], DenseTensor]:
        """Apply the file's weight scale, which multiplies or divides, to codes of size `size`.

        Returns:
            float32 (), and what the file holds.
        """
        name = f"{projection.module}.weight_scale"
        stored = self._files[name].dense(name)
        stored = replace(stored, data=stored.data.reshape(()).copy())
        value = stored.to_float32()
        divides = self._quantization.convention == "divide"
        with np.errstate(divide="ignore", over="ignore"):
            scale = size / value if divides else size * value
        if not (np.isfinite(scale) and scale > 0 and np.isfinite(value)):
            raise FormatError(f"the weight scale {value} is not a positive number")
        return np.asarray(scale, np.float32), stored


def _matrix(weights: PackedWeights, linear: LinearSpec) -> TernaryMatrix:
    return TernaryMatrix(weights.packed, linear.in_features, weights.scales, weights.group_size)


def _is_own_norm(name: str) -> bool:
    """Whether a tensor is a norm of the architecture, and not one that precedes a projection."""
    _, _, part = name.rpartition(".")
    return name == "final_norm" or part in NORMS
