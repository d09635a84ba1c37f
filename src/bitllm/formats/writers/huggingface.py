"""Packed checkpoints as transformers loads them: safetensors, config.json and the text files.

byte[r, k] of a projection holds rows r, r + R, r + 2R and r + 3R at column k, R = ceil(out / 4), as
code + 1, low bits first. `weight_scale` multiplies (linear_class "autobitlinear") or divides (no
linear_class); what the source stored is written back as it was where the convention is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    DenseDtype,
    DenseTensor,
    ModelSpec,
    ScaleConvention,
    WeightScales,
)
from bitllm.errors import UnsupportedModelError
from bitllm.formats.tensor_names import TensorNames
from bitllm.formats.writers.config import default_convention, plan_config
from bitllm.formats.writers.dense import dense_chunks, narrowed, relative_error, round_to
from bitllm.formats.writers.layouts import row_strided
from bitllm.formats.writers.planned import (
    Chunks,
    PlannedFile,
    PlannedTensor,
    WritePlan,
    refuse_unwritten,
)
from bitllm.formats.writers.safetensors import plan_safetensors
from bitllm.formats.writers.texts import CONFIG_FILE, ModelTexts

__all__ = ["SHARD_BYTES", "STORED_DTYPES", "plan_dense", "plan_huggingface", "stored_names"]

SHARD_BYTES = 5 * 10**9
"""Data in one file at most, as transformers has it."""

STORED_DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
"""Dtypes as safetensors files call them."""


def stored_names(spec: ModelSpec) -> dict[str, str]:
    """Return the names in the file, by canonical name; of a projection, the one of its module."""
    names = TensorNames(spec, ())
    dense = {name: names.dense(name) for name in spec.dense_shapes()}
    return dense | {name: names.module(name) for name, _ in spec.linear_names()}


def plan_huggingface(
    checkpoint: Checkpoint,
    texts: ModelTexts,
    *,
    convention: ScaleConvention | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> WritePlan:
    """Plan a model directory of packed weights.

    Args:
        checkpoint: what to write.
        texts: its text files, which are carried over.
        convention: of the weight scales; None = that of the source, or else the one that published
            models of this architecture have.
        shard_bytes: data in one file at most.

    Raises:
        UnsupportedModelError: the format cannot hold this model; names the reason.
    """
    spec = checkpoint.spec
    refuse_unwritten(spec)
    scales = {name: checkpoint.scales(name) for name, _ in spec.linear_names()}
    if convention is None:
        convention = _source_convention(scales) or default_convention(spec)
    dtype = checkpoint.dense_dtype("embed")
    stored = {name: stored_scale(name, scale, convention) for name, scale in scales.items()}
    names = stored_names(spec)
    tensors = [
        *_dense_tensors(checkpoint, names, texts, stored, convention),
        *_packed_tensors(checkpoint, names, stored),
    ]
    written = [tensor.name for tensor in tensors]
    config = plan_config(spec, texts, convention, tensors=written, dtype=dtype)
    files = [
        *plan_safetensors(tensors, {"format": "pt"}, shard_bytes),
        PlannedFile.of(CONFIG_FILE, config),
        *texts.planned(),
    ]
    errors = {
        name: relative_error(applied(stored[name], convention), scale.scales)
        for name, scale in scales.items()
    }
    if convention == "multiply":
        errors |= _bias_errors(checkpoint, stored)
    inexact = {name: error for name, error in errors.items() if error}
    return WritePlan("huggingface", tuple(tensors), tuple(files), inexact)


def _source_convention(scales: dict[str, WeightScales]) -> ScaleConvention | None:
    """Return the convention in which all scales are stored, None where they are not kept."""
    kept = {s.source_convention for s in scales.values() if s.source_scales is not None}
    return kept.pop() if len(kept) == 1 else None


def stored_scale(name: str, scales: WeightScales, convention: ScaleConvention) -> DenseTensor:
    """Return a weight scale as the file is to hold it, shape [1].

    The bits of the source where it has the same convention; else bfloat16 if the scale is read
    from that exactly, or else float32.

    Raises:
        UnsupportedModelError: the matrix has more than one scale.
    """
    distinct = np.unique(scales.scales)
    if len(distinct) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(distinct)} different weight scales; the packed Hugging Face format "
            "holds one for a matrix",
            hint="MLX directories and the GGUF types TQ1_0 and TQ2_0 hold more",
        )
    source = scales.source_scales
    if source is not None and source.data.size == 1 and scales.source_convention == convention:
        return DenseTensor(source.data.reshape(1), source.dtype)
    wanted = distinct.astype(np.float32)
    held = wanted if convention == "multiply" else (np.float32(1) / wanted).astype(np.float32)
    candidates = [round_to(held, "bf16"), DenseTensor(held, "f32")]
    if convention == "divide":
        # A reciprocal is rounded twice on its way; that of a neighbour may hit the scale.
        ends = (np.float32(0), np.float32(np.inf))
        candidates += [DenseTensor(np.nextafter(held, end), "f32") for end in ends]
    exact = (c for c in candidates if (applied(c, convention) == wanted).all())
    return next(exact, candidates[1])


def applied(stored: DenseTensor, convention: ScaleConvention) -> npt.NDArray[np.float32]:
    """Return the factor float32 [1] that a reader makes of a stored weight scale."""
    value = stored.to_float32()
    return value if convention == "multiply" else (np.float32(1) / value).astype(np.float32)


def _packed_tensors(
    checkpoint: Checkpoint, names: dict[str, str], stored: dict[str, DenseTensor]
) -> Iterator[PlannedTensor]:
    for name, linear in checkpoint.spec.linear_names():
        module = names[name]
        shape = (-(-linear.out_features // 4), linear.in_features)

        def codes(name: str = name) -> Chunks:
            matrix = checkpoint.ternary(name)
            yield from row_strided(matrix.packed, matrix.in_features)
            checkpoint.release()

        yield PlannedTensor(f"{module}.weight", "U8", shape, math.prod(shape), name, codes)
        yield _plan(f"{module}.weight_scale", name, stored[name])


def _plan(stored_name: str, origin: str, tensor: DenseTensor) -> PlannedTensor:
    """Plan a small tensor that is in memory."""
    return PlannedTensor(
        stored_name,
        STORED_DTYPES[tensor.dtype],
        tensor.shape,
        tensor.nbytes,
        origin,
        lambda: dense_chunks(tensor),
    )


def _dense_tensors(
    checkpoint: Checkpoint,
    names: dict[str, str],
    texts: ModelTexts,
    scales: dict[str, DenseTensor],
    convention: ScaleConvention,
) -> Iterator[PlannedTensor]:
    """Plan embedding, head, norms and biases: as they are, vectors narrowed where that is exact.

    Formats that hold every vector in float32 leave no trace of the model's dtype but in its
    embedding; transformers would round all of them to it while loading.
    """
    dtype = checkpoint.dense_dtype("embed")
    for name, shape in checkpoint.spec.dense_shapes().items():
        linear = name.removesuffix(".bias")
        if linear != name and convention == "multiply":
            # transformers multiplies the bias by the scale too, and so do readers.
            bias = _unscaled(checkpoint.dense(name), scales[linear], dtype)
            yield _plan(names[name], name, bias)
        elif texts.config is None and len(shape) == 1:
            yield _plan(names[name], name, narrowed(checkpoint.dense(name), dtype))
        else:
            yield plan_dense(checkpoint, name, names[name], shape)


def plan_dense(
    checkpoint: Checkpoint, name: str, stored_name: str, shape: tuple[int, ...]
) -> PlannedTensor:
    """Plan a dense tensor as it is, read again when it is written."""

    def chunks() -> Chunks:
        for band in dense_chunks(checkpoint.dense(name)):
            yield band
            checkpoint.release()

    dtype = checkpoint.dense_dtype(name)
    nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
    return PlannedTensor(stored_name, STORED_DTYPES[dtype], shape, nbytes, name, chunks)


def _bias_errors(checkpoint: Checkpoint, scales: dict[str, DenseTensor]) -> dict[str, float]:
    errors = {}
    for name in checkpoint.spec.dense_shapes():
        if name.endswith(".bias"):
            bias, scale = checkpoint.dense(name), scales[name.removesuffix(".bias")]
            read = _unscaled(bias, scale, "f32").to_float32() * scale.to_float32()
            errors[name] = relative_error(read, bias.to_float32())
    return errors


def _unscaled(bias: DenseTensor, scale: DenseTensor, dtype: DenseDtype) -> DenseTensor:
    """Return the bias whose product with the scale is `bias`."""
    values = (bias.to_float32() / scale.to_float32()).astype(np.float32)
    return narrowed(DenseTensor(values, "f32"), dtype)
