"""Model directories for MLX: affine 2-bit weights, packed by hand from the codes.

w = scale * q + bias with q = code + 1, so bias = -scale, and q = 3 never occurs: exact. MLX's own
quantiser must not be used on ternary weights: it would turn every -s into -s / 2 where both signs
occur in a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import Checkpoint, DenseDtype, DenseTensor, LinearSpec, WeightScales
from bitllm.errors import UnsupportedModelError
from bitllm.formats.writers.config import plan_mlx_config
from bitllm.formats.writers.dense import dense_chunks, narrowed, round_to
from bitllm.formats.writers.huggingface import (
    SHARD_BYTES,
    STORED_DTYPES,
    plan_dense,
    stored_names,
)
from bitllm.formats.writers.layouts import affine_2bit
from bitllm.formats.writers.planned import (
    Chunks,
    PlannedFile,
    PlannedTensor,
    WritePlan,
    refuse_unwritten,
)
from bitllm.formats.writers.safetensors import plan_safetensors
from bitllm.formats.writers.texts import CONFIG_FILE, ModelTexts

__all__ = ["GROUP_SIZES", "plan_mlx"]

GROUP_SIZES = (128, 64, 32)
"""Weights along a row that may share a scale; the largest that fits is taken."""

_CODES_IN_A_WORD = 16


def plan_mlx(
    checkpoint: Checkpoint, texts: ModelTexts, *, shard_bytes: int = SHARD_BYTES
) -> WritePlan:
    """Plan a model directory for MLX; codes and scales are exact.

    Scales get the dtype of the embedding if that holds all of them exactly, or else float32.

    Args:
        checkpoint: what to write.
        texts: its text files, which are carried over.
        shard_bytes: data in one file at most.

    Raises:
        UnsupportedModelError: the format cannot hold this model; names the reason.
    """
    spec = checkpoint.spec
    refuse_unwritten(spec)
    if any(linear.norm_eps is not None for _, linear in spec.linear_names()):
        raise UnsupportedModelError(
            "MLX has no layers with norms of each linear's own input",
            hint="write it as a Hugging Face directory",
        )
    scales = {name: checkpoint.scales(name) for name, _ in spec.linear_names()}
    group = _group_size(dict(spec.linear_names()), scales)
    dtype = checkpoint.dense_dtype("embed")
    scale_dtype = _scale_dtype(scales, dtype)
    dense = [*_dense_tensors(checkpoint, texts, dtype)]
    names = [tensor.name for tensor in dense]
    config = plan_mlx_config(spec, texts, group, tensors=names, dtype=dtype)
    tensors = [
        *dense,
        *(
            tensor
            for name, linear in spec.linear_names()
            for tensor in _ternary_tensors(
                checkpoint, name, linear, group, scale_dtype, scales[name]
            )
        ),
    ]
    files = [
        *plan_safetensors(tensors, {"format": "mlx"}, shard_bytes),
        PlannedFile.of(CONFIG_FILE, config),
        *texts.planned(),
    ]
    notes = ("MLX itself leaves activations unquantised, so its logits differ by that noise.",)
    return WritePlan("mlx", tuple(tensors), tuple(files), {}, notes)


def _group_size(linears: dict[str, LinearSpec], scales: dict[str, WeightScales]) -> int:
    """Return the largest group that divides every row and every group of the source."""
    for size in GROUP_SIZES:
        rows = all(linear.in_features % size == 0 for linear in linears.values())
        if rows and all((s.group_size or size) % size == 0 for s in scales.values()):
            return size
    widths = sorted({linear.in_features for linear in linears.values()})
    raise UnsupportedModelError(
        f"rows of {', '.join(map(str, widths))} weights; MLX holds groups of "
        f"{', '.join(map(str, GROUP_SIZES))} that divide all of them",
        hint="write it as a Hugging Face directory",
    )


def _scale_dtype(scales: dict[str, WeightScales], dtype: DenseDtype) -> DenseDtype:
    exact = all(
        (round_to(np.ascontiguousarray(s.scales), dtype).to_float32() == s.scales).all()
        for s in scales.values()
    )
    return dtype if exact else "f32"


def _dense_tensors(
    checkpoint: Checkpoint, texts: ModelTexts, dtype: DenseDtype
) -> Iterator[PlannedTensor]:
    names = stored_names(checkpoint.spec)
    for name, shape in checkpoint.spec.dense_shapes().items():
        if texts.config is None and len(shape) == 1:
            yield _small(names[name], name, narrowed(checkpoint.dense(name), dtype))
        else:
            yield plan_dense(checkpoint, name, names[name], shape)


def _small(stored_name: str, origin: str, tensor: DenseTensor) -> PlannedTensor:
    kind = STORED_DTYPES[tensor.dtype]
    return PlannedTensor(
        stored_name, kind, tensor.shape, tensor.nbytes, origin, lambda: dense_chunks(tensor)
    )


def _ternary_tensors(
    checkpoint: Checkpoint,
    name: str,
    linear: LinearSpec,
    group: int,
    dtype: DenseDtype,
    known: WeightScales,
) -> Iterator[PlannedTensor]:
    # Most formats have to read a whole matrix for its scales; those of groups are too many to keep.
    kept = known if known.group_size is None else None
    module = stored_names(checkpoint.spec)[name]
    words = (linear.out_features, linear.in_features // _CODES_IN_A_WORD)
    shape = (linear.out_features, linear.in_features // group)
    size = math.prod(shape) * (4 if dtype == "f32" else 2)

    def codes() -> Chunks:
        matrix = checkpoint.ternary(name)
        yield from affine_2bit(matrix.packed, matrix.in_features)
        checkpoint.release()

    def scales(sign: int) -> Chunks:
        found = kept or checkpoint.scales(name)
        values = np.float32(sign) * _group_scales(found, shape, group)
        yield from dense_chunks(round_to(values, dtype))

    yield PlannedTensor(f"{module}.weight", "U32", words, 4 * math.prod(words), name, codes)
    kind = STORED_DTYPES[dtype]
    yield PlannedTensor(f"{module}.scales", kind, shape, size, name, lambda: scales(1))
    yield PlannedTensor(f"{module}.biases", kind, shape, size, name, lambda: scales(-1))


def _group_scales(
    scales: WeightScales, shape: tuple[int, int], group: int
) -> npt.NDArray[np.float32]:
    """Return the scale of each group of MLX, float32 [out, in / group]."""
    values = scales.scales
    if scales.group_size is not None:
        return np.repeat(values, scales.group_size // group, axis=1)[:, : shape[1]]
    return np.array(np.broadcast_to(values[:, None] if values.ndim else values, shape))
