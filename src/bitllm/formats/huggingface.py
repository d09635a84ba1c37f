"""Ternary checkpoints as Hugging Face transformers writes them: config.json and safetensors files.

Opening a directory reads config.json and the headers of the weight files, and checks that each
tensor the architecture needs is there with the right shape and dtype, and that no tensor is there
that would be left out of the computation. Values are read when a backend asks for them, one tensor
at a time.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import (
    Checkpoint,
    DenseTensor,
    LinearSpec,
    MappedSource,
    ModelSpec,
    StridedMatrix,
    TernaryMatrix,
    WeightScales,
)
from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    NotTernaryError,
    QuantizationError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats.architecture import Quantization, read_model_spec, read_quantization
from bitllm.formats.json_file import read_json_object
from bitllm.formats.repack import (
    PackedWeights,
    quantize_masters,
    read_ternary_values,
    repack_row_strided,
)
from bitllm.formats.safetensors import SafetensorsFile, TensorEntry

__all__ = ["open_huggingface"]

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_MAX_REPETITIONS = 3  # in a regular expression of the configuration
_FLOATS = ("F32", "BF16", "F16")
_ZERO_WEIGHTS = np.uint8(0b01010101)

_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_DENSE_SUFFIXES = {
    "attn_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
    "attn_sub_norm": ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
    "ffn_sub_norm": ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
}
# Tensors that may be in a file without being used: tables and copies that can be computed.
_UNUSED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|self_attn\.masked_bias)$")

_Storage = Literal["packed", "masters", "values"]


def open_huggingface(directory: Path) -> Checkpoint:
    """Open a model directory in the layout of the Hugging Face Hub.

    Args:
        directory: holds config.json and model.safetensors, or shards with their index.

    Raises:
        CheckpointError: one of its kinds, for whatever is wrong with the files.
    """
    config_file = directory / "config.json"
    fields = read_json_object(config_file)
    quantization = read_quantization(config_file, fields)
    files = _open_files(directory)
    spec = read_model_spec(config_file, fields, quantization, files)
    source = _HuggingFaceSource(directory, spec, quantization, files)
    return Checkpoint(spec, source, str(directory))


def _open_files(directory: Path) -> dict[str, SafetensorsFile]:
    """Map the weight files; return the file of each tensor, by its name there."""
    if (directory / _INDEX_FILE).is_file():
        return _open_shards(directory / _INDEX_FILE)
    if (directory / _SINGLE_FILE).is_file():
        single = SafetensorsFile(directory / _SINGLE_FILE)
        return dict.fromkeys(single.entries, single)
    others = sorted(path.name for path in directory.glob("*") if _looks_like_weights(path))
    if others:
        raise UnsupportedModelError(
            f"{directory}: no {_SINGLE_FILE}, but {', '.join(others[:3])}",
            hint="bitllm reads safetensors; convert the weights with transformers' save_pretrained",
        )
    raise CheckpointError(
        f"{directory}: neither {_SINGLE_FILE} nor {_INDEX_FILE} is there",
        hint="download the model again; a Git clone without LFS has no weights",
    )


def _looks_like_weights(path: Path) -> bool:
    return path.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors", ".npz")


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map should map tensor names to files")
    shards: dict[str, SafetensorsFile] = {}
    files: dict[str, SafetensorsFile] = {}
    for name, shard in weight_map.items():
        # A shard lies beside its index; a path leading elsewhere is not followed.
        if not isinstance(shard, str) or shard in ("", "..") or PurePosixPath(shard).name != shard:
            raise FormatError(
                f"{index}: {name!r} is said to be in {shard!r:.100}, which is no file name"
            )
        if shard not in shards:
            shards[shard] = _open_shard(index, shard)
        if name not in shards[shard].entries:
            raise MissingTensorError(
                f"{index}: {name!r} should be in {shard}, but is not there",
                hint="index and shards do not belong together; download the model again",
            )
        files[name] = shards[shard]
    return files


def _open_shard(index: Path, shard: str) -> SafetensorsFile:
    if not (index.parent / shard).is_file():
        raise CheckpointError(
            f"{index.parent}: the shard {shard} is missing",
            hint="the download is not complete; fetch the model again",
        )
    return SafetensorsFile(index.parent / shard)


@dataclass(frozen=True, slots=True)
class _Projection:
    """Where a ternary matrix is stored: `module` is the prefix of its tensors' names."""

    module: str
    storage: _Storage
    has_scale: bool


class _HuggingFaceSource(MappedSource):
    """A source over mapped safetensors files."""

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        quantization: Quantization,
        files: Mapping[str, SafetensorsFile],
    ) -> None:
        self._directory = directory
        self._files = files
        self._quantization = quantization
        self._linears = dict(spec.linear_names())
        self._prefix = "" if "embed_tokens.weight" in files else "model."
        self._dense_names = {name: self._stored_name(name) for name in spec.dense_shapes()}
        self._check_dense(spec)
        self._check_skipped(spec)
        self._projections = {
            name: self._find_projection(name, linear) for name, linear in self._linears.items()
        }
        self._check_unused(spec)

    def dense(self, name: str) -> DenseTensor | None:
        """Return a view of the dense tensor called `name`, or None if the model has none."""
        stored = self._dense_names.get(name)
        if stored is None:
            return None
        tensor = self._files[stored].dense(stored)
        if name.endswith(".bias") and self._scales_bias(name.removesuffix(".bias")):
            return self._scaled_bias(name.removesuffix(".bias"), tensor)
        return tensor

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

    def _stored_name(self, name: str) -> str:
        """The name in the file of a dense tensor with canonical `name`."""
        top = {
            "embed": f"{self._prefix}embed_tokens.weight",
            "head": "lm_head.weight",
            "final_norm": f"{self._prefix}norm.weight",
        }
        if name in top:
            return top[name]
        _, layer, part, *rest = name.split(".")
        prefix = f"{self._prefix}layers.{layer}."
        if rest:
            suffix = {"norm": "rms_norm.weight", "bias": "bias"}[rest[0]]
            return f"{prefix}{_MODULES[part]}.{suffix}"
        spellings = [f"{prefix}{suffix}.weight" for suffix in _DENSE_SUFFIXES[part]]
        return next((spelling for spelling in spellings if spelling in self._files), spellings[0])

    def _entry(self, stored: str) -> TensorEntry:
        if stored not in self._files:
            raise MissingTensorError(
                f"{self._directory}: tensor {stored!r} is missing",
                hint="download the model again, or check that config.json belongs to these weights",
            )
        return self._files[stored].entry(stored)

    def _check_dense(self, spec: ModelSpec) -> None:
        for name, shape in spec.dense_shapes().items():
            entry = self._entry(self._dense_names[name])
            if entry.shape != shape or entry.dtype not in _FLOATS:
                raise self._wrong(self._dense_names[name], entry, f"F32, BF16 or F16 {[*shape]}")

    def _wrong(self, stored: str, entry: TensorEntry, wanted: str) -> TensorShapeError:
        return TensorShapeError(
            f"{self._files[stored].path}: {stored!r} should be {wanted}, "
            f"but is {entry.dtype} {[*entry.shape]}",
            hint="config.json does not belong to these weights, or one of them is damaged",
        )

    def _check_skipped(self, spec: ModelSpec) -> None:
        """Refuse models with dense projections, or with a quantised head."""
        skipped = self._quantization.skipped
        if skipped is None:
            return
        for pattern in skipped:
            if _may_run_for_ever(pattern):
                raise UnsupportedModelError(
                    f"{self._directory}: modules_to_not_convert holds the intricate pattern "
                    f"{pattern!r:.100}",
                    hint="name the modules instead",
                )
        for name in self._linears:
            module = self._module(name)
            if _is_skipped(module, skipped):
                raise UnsupportedModelError(
                    f"{self._directory}: modules_to_not_convert leaves {module!r} dense; "
                    "models with dense projections are not supported"
                )
        if not spec.tied_head and not _is_skipped("lm_head", skipped):
            raise UnsupportedModelError(
                f"{self._directory}: modules_to_not_convert does not name lm_head, so the head is "
                "quantised; that is not supported"
            )

    def _module(self, name: str) -> str:
        _, layer, part = name.split(".")
        return f"{self._prefix}layers.{layer}.{_MODULES[part]}"

    def _find_projection(self, name: str, linear: LinearSpec) -> _Projection:
        module = self._module(name)
        stored = f"{module}.weight"
        entry = self._entry(stored)
        out, width = linear.out_features, linear.in_features
        has_scale = f"{module}.weight_scale" in self._files
        if entry.dtype == "U8" and entry.shape == (-(-out // 4), width):
            if not has_scale:
                self._entry(f"{module}.weight_scale")
            self._check_scale(f"{module}.weight_scale")
            return _Projection(module, "packed", has_scale)
        if entry.dtype not in _FLOATS or entry.shape != (out, width):
            raise self._wrong(
                stored,
                entry,
                f"U8 {[-(-out // 4), width]} (packed) or floating point {[out, width]}",
            )
        if has_scale:
            self._check_scale(f"{module}.weight_scale")
        masters = self._quantization.online and not has_scale
        return _Projection(module, "masters" if masters else "values", has_scale)

    def _check_scale(self, stored: str) -> None:
        entry = self._entry(stored)
        if math.prod(entry.shape) != 1 or entry.dtype not in _FLOATS:
            raise self._wrong(stored, entry, "one number in F32, BF16 or F16")

    def _check_unused(self, spec: ModelSpec) -> None:
        """Refuse tensors that the architecture does not use: they would silently be ignored."""
        used = set(self._dense_names.values())
        for projection in self._projections.values():
            used.add(f"{projection.module}.weight")
            used.add(f"{projection.module}.weight_scale")
        if spec.tied_head:
            used.add("lm_head.weight")
        unused = [name for name in self._files if name not in used and not _UNUSED.search(name)]
        if unused:
            raise UnsupportedModelError(
                f"{self._directory}: {len(unused)} tensors have no place in {spec.architecture}, "
                f"among them {', '.join(sorted(unused)[:3])}",
                hint="the model has parts that bitllm does not compute, or config.json describes "
                "fewer layers than the files hold",
            )

    def _read(self, projection: _Projection, linear: LinearSpec) -> TernaryMatrix:
        stored = f"{projection.module}.weight"
        file = self._files[stored]
        if projection.storage == "packed":
            data: Any = file.array(stored)
            packed = repack_row_strided(data, linear.out_features)
            return self._with_stored_scale(projection, linear, PackedWeights(packed, np.float32(1)))
        weights = file.dense(stored)
        found = read_ternary_values(weights)
        if projection.storage == "masters":
            found = found or quantize_masters(weights)
            return TernaryMatrix(found.packed, linear.in_features, np.asarray(found.scale))
        if found is None:
            raise NotTernaryError(
                "the weights are not ternary, although config.json says that they were quantised",
                hint='for master weights, set "quantization_mode": "online" in config.json',
            )
        if projection.has_scale:
            return self._with_stored_scale(projection, linear, found)
        return TernaryMatrix(found.packed, linear.in_features, np.asarray(found.scale))

    def _with_stored_scale(
        self, projection: _Projection, linear: LinearSpec, weights: PackedWeights
    ) -> TernaryMatrix:
        scale, stored = self._stored_scale(projection, weights.scale)
        return TernaryMatrix(
            weights.packed,
            linear.in_features,
            scale,
            source_scales=stored if weights.scale == 1 else None,
            source_convention=self._quantization.convention,
        )

    def _stored_scale(
        self, projection: _Projection, size: np.float32
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


def _may_run_for_ever(pattern: str) -> bool:
    """Whether matching could take exponential time: many repetitions, or repeated groups."""
    repetitions = re.findall(r"[*+?{]", pattern.replace("(?", "("))
    return len(repetitions) > _MAX_REPETITIONS or re.search(r"\)[*+?{]", pattern) is not None


def _is_skipped(module: str, skipped: tuple[str, ...]) -> bool:
    """Whether transformers leaves a module as it is: by its path, part of it, or its last parts."""
    for pattern in skipped:
        if module.endswith(pattern):
            return True
        try:
            if re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
                return True
        except re.error:
            continue
    return False
