"""GGUF files of ternary models: I2_S, TQ1_0 or TQ2_0, and everything else as it is.

The architecture's name says what the file's readers compute: `bitnet-b1.58` for sub-norms with
squared ReLU, `bitnet` for sub-norms with SiLU, `qwen3`, and `llama`, whose q and k rows are
reordered from rotating halves to rotating neighbours. Vectors become float32, which is exact;
embedding and head keep their dtype.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitllm.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    LayerSpec,
    LinearSpec,
    ModelSpec,
    TernaryMatrix,
    WeightScales,
)
from bitllm.errors import UnsupportedModelError
from bitllm.formats.gguf.checkpoint import neighbour_order
from bitllm.formats.gguf.ggml_types import GGML_TYPES, TYPE_NAMES
from bitllm.formats.gguf.names import ACTIVATION_BITS, ARCHITECTURES, stored_name
from bitllm.formats.gguf.rope import ROPE_FREQS, rope_divisors
from bitllm.formats.writers.dense import dense_chunks, relative_error
from bitllm.formats.writers.gguf_file import Value, plan_gguf_file
from bitllm.formats.writers.layouts import TQ_BLOCK, i2_s, tq1_0, tq2_0
from bitllm.formats.writers.planned import (
    Chunks,
    PlannedTensor,
    WritePlan,
    refuse_unwritten,
)

__all__ = ["GGUF_TYPES", "GgufType", "gguf_architecture", "plan_gguf"]

GgufType = Literal["i2_s", "tq1_0", "tq2_0"]
GGUF_TYPES: tuple[GgufType, ...] = ("i2_s", "tq2_0", "tq1_0")
"""The ternary types that are written."""

_FILE_TYPES = {"i2_s": 40, "tq1_0": 36, "tq2_0": 37}
_I2_S_BLOCK = 128
_I2_S_TRAILER = 32
_DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}


def plan_gguf(
    checkpoint: Checkpoint,
    name: str,
    kind: GgufType = "i2_s",
    *,
    tokenizer: dict[str, Value] | None = None,
    notes: tuple[str, ...] = (),
) -> WritePlan:
    """Plan a GGUF file.

    Args:
        checkpoint: what to write.
        name: of the model, for people.
        kind: type of the ternary matrices.
        tokenizer: metadata of the tokenizer; None = the file has none.
        notes: what else the reader of the plan should know.

    Raises:
        UnsupportedModelError: the format cannot hold this model; names the reason.
    """
    spec = checkpoint.spec
    refuse_unwritten(spec)
    architecture = gguf_architecture(spec)
    permuted = ARCHITECTURES[architecture].permuted
    scales = {}
    for linear_name, linear in spec.linear_names():
        _check_width(linear_name, linear, kind)
        scales[linear_name] = checkpoint.scales(linear_name)
    tensors = [
        *_dense_tensors(checkpoint, permuted),
        *(
            _ternary_tensor(checkpoint, linear_name, linear, kind, permuted)
            for linear_name, linear in spec.linear_names()
        ),
    ]
    errors = {
        name: error for name, scale in scales.items() if (error := _scale_error(name, scale, kind))
    }
    metadata: dict[str, Value] = {
        "general.architecture": ("str", architecture),
        "general.type": ("str", "model"),
        "general.name": ("str", name),
        "general.file_type": ("u32", _FILE_TYPES[kind]),
        "general.quantization_version": ("u32", 2),
        **_architecture_metadata(spec, architecture),
        **(tokenizer or {"tokenizer.ggml.model": ("str", "none")}),
    }
    if architecture == "bitnet" and not spec.tied_head:
        notes = (*notes, "llama.cpp takes the embedding for the head of a `bitnet` model.")
    file = plan_gguf_file(f"{name}.gguf", metadata, tensors)
    return WritePlan("gguf", tuple(tensors), (file,), errors, notes)


def gguf_architecture(spec: ModelSpec) -> str:
    """Return the architecture string under which readers compute this model.

    Raises:
        UnsupportedModelError: there is none; names the reason.
    """
    layer = spec.layers[0]
    _check_sayable(spec, layer)
    if layer.attn_sub_norm:
        return "bitnet-b1.58" if layer.activation == "relu2" else "bitnet"
    return "qwen3" if layer.qk_norm else "llama"


def _check_sayable(spec: ModelSpec, layer: LayerSpec) -> None:
    linears = [linear for _, linear in spec.linear_names()]
    relu2 = layer.activation == "relu2"
    biased = any(linear.bias for linear in linears)
    sayable = {
        "layers that differ": all(other == layer for other in spec.layers),
        "missing norms": layer.attn_norm
        and layer.ffn_norm
        and layer.attn_sub_norm == layer.ffn_sub_norm,
        "q/k norms beside sub-norms": not (layer.qk_norm and layer.attn_sub_norm),
        "norms of each linear's own input": all(linear.norm_eps is None for linear in linears),
        f"the activation {layer.activation} without sub-norms": not relu2 or layer.attn_sub_norm,
        f"the activation {layer.activation}": layer.activation in ("relu2", "silu"),
        "biases beside sub-norms or q/k norms": not (
            biased and (layer.attn_sub_norm or layer.qk_norm)
        ),
        "a sliding window": layer.sliding_window is None,
        "YaRN's RoPE": layer.rope.scaling != "yarn",
        "RoPE over a part of the head": layer.rope.dim == layer.head_dim,
        "scaled RoPE beside sub-norms or q/k norms": layer.rope.scaling == "none"
        or not (layer.attn_sub_norm or layer.qk_norm),
        "an embedding scale": spec.embedding_scale == 1.0,
        "two norm epsilons": spec.norm_eps == layer.norm_eps,
        "a query scale of its own": abs(layer.query_scale * layer.head_dim**0.5 - 1) < 1e-6,
    }
    for what, fine in sayable.items():
        if not fine:
            raise UnsupportedModelError(
                f"GGUF files are not written of models with {what}",
                hint="write it as a Hugging Face directory",
            )


def _architecture_metadata(spec: ModelSpec, architecture: str) -> dict[str, Value]:
    layer = spec.layers[0]
    numbers = {
        "block_count": len(spec.layers),
        "context_length": spec.max_context,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": layer.gate.out_features,
        "vocab_size": spec.vocab_size,
        "attention.head_count": layer.num_heads,
        "attention.head_count_kv": layer.num_kv_heads,
        "attention.key_length": layer.head_dim,
        "attention.value_length": layer.head_dim,
        "rope.dimension_count": layer.rope.dim,
    }
    metadata: dict[str, Value] = {
        f"{architecture}.{key}": ("u32", number) for key, number in numbers.items()
    }
    metadata[f"{architecture}.attention.layer_norm_rms_epsilon"] = ("f32", spec.norm_eps)
    metadata[f"{architecture}.rope.freq_base"] = ("f32", layer.rope.theta)
    if layer.rope.scaling == "linear":
        metadata[f"{architecture}.rope.scaling.type"] = ("str", "linear")
        metadata[f"{architecture}.rope.scaling.factor"] = ("f32", layer.rope.factor)
    # No key of the format says how activations are quantised; readers that know none of this one
    # take what their architecture or type does.
    metadata[ACTIVATION_BITS] = ("u32", layer.q.activation_bits or 0)
    return metadata


def _row_order(layer: LayerSpec, part: str) -> npt.NDArray[np.intp] | None:
    heads = {"q": layer.num_heads, "k": layer.num_kv_heads}.get(part)
    return None if heads is None else neighbour_order(heads, layer.head_dim)


def _dense_tensors(checkpoint: Checkpoint, permuted: bool) -> Iterator[PlannedTensor]:
    spec = checkpoint.spec
    for name, shape in spec.dense_shapes().items():
        if len(shape) == 1:
            yield _vector(checkpoint, name, shape, permuted)
            continue
        dtype = checkpoint.dense_dtype(name)

        def chunks(name: str = name) -> Chunks:
            for band in dense_chunks(checkpoint.dense(name)):
                yield band
                checkpoint.release()

        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        yield PlannedTensor(stored_name(name), _DTYPES[dtype], shape, nbytes, name, chunks)
    rope = spec.layers[0].rope
    if rope.scaling == "llama3":
        factors = rope_divisors(rope)
        yield PlannedTensor(
            ROPE_FREQS,
            "F32",
            factors.shape,
            factors.nbytes,
            "rope",
            lambda: iter([factors.astype("<f4")]),
        )


def _vector(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], permuted: bool
) -> PlannedTensor:
    """Plan a norm or a bias as float32; the bias of permuted rows goes with them."""

    def chunks() -> Chunks:
        values = checkpoint.dense(name).to_float32()
        if permuted and name.endswith(".bias"):
            _, layer, part, _ = name.split(".")
            order = _row_order(checkpoint.spec.layers[int(layer)], part)
            values = values if order is None else values[order]
        yield values.astype("<f4")

    return PlannedTensor(stored_name(name), "F32", shape, 4 * shape[0], name, chunks)


def _check_width(name: str, linear: LinearSpec, kind: GgufType) -> None:
    block = _I2_S_BLOCK if kind == "i2_s" else TQ_BLOCK
    if linear.in_features % block:
        raise UnsupportedModelError(
            f"{name} has rows of {linear.in_features} weights; {kind.upper()} holds blocks of "
            f"{block}",
            hint="write it as a Hugging Face directory",
        )


def _ternary_tensor(
    checkpoint: Checkpoint, name: str, linear: LinearSpec, kind: GgufType, permuted: bool
) -> PlannedTensor:
    shape = (linear.out_features, linear.in_features)
    nbytes = GGML_TYPES[TYPE_NAMES[kind.upper()]][0].size(shape)
    assert nbytes is not None  # its width was checked
    _, layer, part = name.split(".")
    order = _row_order(checkpoint.spec.layers[int(layer)], part) if permuted else None

    def chunks() -> Chunks:
        yield from _encoded(name, checkpoint.ternary(name), kind, order)
        checkpoint.release()

    return PlannedTensor(stored_name(name), kind.upper(), shape, nbytes, name, chunks)


def _encoded(
    name: str, matrix: TernaryMatrix, kind: GgufType, order: npt.NDArray[np.intp] | None
) -> Chunks:
    """Yield the bytes of a matrix, its rows in another order if one is given."""
    packed = matrix.packed if order is None else matrix.packed[order]
    if kind == "i2_s":
        yield from i2_s(packed, matrix.in_features)
        scale = struct.pack("<f", _only_scale(name, matrix.scales))
        yield scale.ljust(_I2_S_TRAILER, b"\0")
        return
    scales = _block_scales(name, WeightScales(matrix.scales, matrix.group_size))
    blocks = matrix.in_features // TQ_BLOCK
    if matrix.group_size is not None:
        scales = scales[:, :blocks]  # the last group of a row may end beyond it
    scales = np.broadcast_to(scales, (matrix.out_features, blocks))
    encode = tq2_0 if kind == "tq2_0" else tq1_0
    yield from encode(packed, matrix.in_features, scales if order is None else scales[order])


def _only_scale(name: str, scales: npt.NDArray[np.float32]) -> float:
    distinct = np.unique(scales)
    if len(distinct) != 1:
        raise UnsupportedModelError(
            f"{name} has {len(distinct)} different weight scales; I2_S holds one for a matrix",
            hint="TQ2_0 and TQ1_0 hold one for each 256 weights",
        )
    return float(distinct[0])


def _block_scales(name: str, scales: WeightScales) -> npt.NDArray[np.float16]:
    """Return the scales as TQ1_0 and TQ2_0 store them, to be broadcast to [out, in / 256]."""
    values = scales.scales
    if scales.group_size is not None:
        if scales.group_size % TQ_BLOCK:
            raise UnsupportedModelError(
                f"{name} has a scale for each {scales.group_size} weights of a row; TQ1_0 and "
                f"TQ2_0 hold one for {TQ_BLOCK}",
                hint="write it as an MLX directory",
            )
        values = np.repeat(values, scales.group_size // TQ_BLOCK, axis=1)
    elif values.ndim == 1:
        values = values[:, None]
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    if not (np.isfinite(stored) & (stored > 0)).all():
        raise UnsupportedModelError(
            f"{name} has a weight scale outside of float16, in which TQ1_0 and TQ2_0 store it",
            hint="I2_S stores it in float32",
        )
    return stored


def _scale_error(name: str, scales: WeightScales, kind: GgufType) -> float:
    """Return the largest relative error of the scales as stored."""
    if kind == "i2_s":
        _only_scale(name, scales.scales)
        return 0.0
    stored = _block_scales(name, scales).astype(np.float32)
    wanted = scales.scales
    if scales.group_size is not None:
        wanted = np.repeat(wanted, scales.group_size // TQ_BLOCK, axis=1)
    elif wanted.ndim == 1:
        wanted = wanted[:, None]
    return relative_error(stored, wanted)
