"""Loading: checks what the native decoder can run, then streams the tensors into it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitllm import _native
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions
from bitllm.backends.cpu.decoder import CpuDecoder
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint, DenseTensor, LayerSpec, ModelSpec
from bitllm.errors import (
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    QuantizationError,
    TensorShapeError,
    UnsupportedModelError,
)

__all__ = ["CpuBackend", "memory_plan"]

_LARGEST_INPUT = (1 << 24) // 127  # int32 accumulators pass through float32, exact up to 2^24
_KV_TYPES = {"bf16": "bf16", "fp32": "f32", "int8": "i8"}  # the names of the native code
_TERNARY_BLOCK = 256  # weights; the kernels pad rows to whole blocks


class CpuBackend:
    """Loads checkpoints into `CpuDecoder`."""

    name = "cpu"

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> CpuDecoder:
        """Repack the ternary matrices of `checkpoint` one by one; embedding and head stay mapped.

        Raises:
            CheckpointError: a tensor is missing or broken, or the model has a feature that the
                native decoder does not run (group scales, activations that are not quantised).
            ConfigError: `options.isa` names a kernel set that this machine does not run, or the
                system refuses so many threads.
            InsufficientMemoryError: weights and KV cache do not fit into the free memory.
        """
        spec = checkpoint.spec
        isa = _kernel_set(options.isa)
        threads = options.threads or _native.cpu_info()["physical_cores"]
        kv_blocks = -(-(options.kv_tokens or spec.max_context) // KV_BLOCK_SIZE)
        _refuse_unsupported(checkpoint)
        _refuse_too_large(checkpoint, kv_blocks, options)
        try:
            native = _empty_decoder(spec, options, isa, threads, kv_blocks)
            dense_bytes = _load_tensors(native, checkpoint)
            native.prepare()
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{checkpoint.origin}: the system refused memory for weights, KV cache or scratch",
                hint="ask for a shorter context (kv_tokens) or a smaller max_batch_tokens",
            ) from error
        return CpuDecoder(native, spec, options, isa, threads, dense_bytes)


def _empty_decoder(
    spec: ModelSpec, options: LoadOptions, isa: str, threads: int, kv_blocks: int
) -> _native.Decoder:
    try:
        return _native.Decoder(
            isa=isa,
            vocab=spec.vocab_size,
            hidden=spec.hidden_size,
            norm_eps=spec.norm_eps,
            embedding_scale=spec.embedding_scale,
            kv_blocks=kv_blocks,
            kv_dtype=_KV_TYPES[options.kv_dtype],
            threads=threads,
            max_batch_tokens=options.max_batch_tokens,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"the system does not give {threads} threads: {error}", hint="ask for fewer threads"
        ) from error


def memory_plan(spec: ModelSpec, kv_blocks: int, kv_dtype: str) -> tuple[int, int]:
    """Return the bytes that (repacked weights, KV cache) of a model take; embedding and head not.

    Those two stay in the mapped file, which the system may drop from memory and read again.
    """
    weights = sum(
        linear.out_features * -(-linear.in_features // _TERNARY_BLOCK) * _TERNARY_BLOCK // 4
        for _, linear in spec.linear_names()
    )
    values = sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    return weights, kv_blocks * KV_BLOCK_SIZE * values * (2 if kv_dtype == "bf16" else 4)


def _kernel_set(wanted: str | None) -> str:
    available = _native.kernel_names()
    if wanted is not None and wanted not in available:
        raise ConfigError(
            f"this machine does not run the kernel set {wanted!r}",
            hint=f"choose one of {', '.join(available)}, or leave isa out",
        )
    return wanted or available[0]


def _refuse_unsupported(checkpoint: Checkpoint) -> None:
    for name, linear in checkpoint.spec.linear_names():
        if linear.activation_bits is None:
            raise UnsupportedModelError(
                f"{checkpoint.origin}: the activations of {name} are not quantised, "
                "which the cpu device does not run yet",
                hint='use device="reference"',
            )
        if linear.in_features > _LARGEST_INPUT:
            raise UnsupportedModelError(
                f"{checkpoint.origin}: {name} has {linear.in_features} columns; "
                f"exact products on the cpu device need {_LARGEST_INPUT} or fewer",
                hint='use device="reference"',
            )


def _refuse_too_large(checkpoint: Checkpoint, kv_blocks: int, options: LoadOptions) -> None:
    weights, cache = memory_plan(checkpoint.spec, kv_blocks, options.kv_dtype)
    free = _native.available_memory()
    if free and weights + cache > free:
        raise InsufficientMemoryError(
            f"{checkpoint.origin} needs {weights / 2**20:.0f} MiB for its weights and "
            f"{cache / 2**20:.0f} MiB for a KV cache of {kv_blocks * KV_BLOCK_SIZE} tokens, "
            f"but only {free / 2**20:.0f} MiB of memory are free",
            hint="ask for a shorter context (kv_tokens)" if weights < free else None,
        )


def _load_tensors(native: _native.Decoder, checkpoint: Checkpoint) -> int:
    """Hand every tensor to the native decoder; returns the bytes of embedding and head."""
    spec = checkpoint.spec
    embed = _dense(checkpoint, "embed")
    head = embed if spec.tied_head else _dense(checkpoint, "head")
    native.set_embedding(_bytes(embed), embed.dtype)
    native.set_head(_bytes(head), head.dtype)
    native.set_final_norm(_vector(checkpoint, "final_norm"))
    for index, layer in enumerate(spec.layers):
        native.add_layer(
            heads=layer.num_heads,
            kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            activation=layer.activation,
            norm_eps=layer.norm_eps,
            query_scale=layer.query_scale,
            window=layer.sliding_window or 0,
            inverse_frequencies=layer.rope.inverse_frequencies(),
        )
        for name in _norm_names(layer):
            native.set_vector(index, name, _vector(checkpoint, f"layers.{index}.{name}"))
        for name in LINEAR_NAMES:
            _load_linear(native, checkpoint, index, name)
    return embed.nbytes + (0 if spec.tied_head else head.nbytes)


def _load_linear(native: _native.Decoder, checkpoint: Checkpoint, index: int, name: str) -> None:
    full_name = f"layers.{index}.{name}"
    linear = checkpoint.spec.layers[index].linear(name)
    matrix = checkpoint.ternary(full_name)
    if matrix.shape != (linear.out_features, linear.in_features):
        raise TensorShapeError(
            f"{checkpoint.origin}: {full_name} has the shape {matrix.shape}, "
            f"the configuration says {(linear.out_features, linear.in_features)}",
            hint="check that config.json belongs to these weights",
        )
    if matrix.group_size is not None:
        raise UnsupportedModelError(
            f"{checkpoint.origin}: {full_name} has a scale for each group of "
            f"{matrix.group_size} weights, which the cpu device does not run yet",
            hint='use device="reference"',
        )
    packed = np.ascontiguousarray(matrix.packed)
    scales = np.ascontiguousarray(matrix.scales).reshape(-1)
    if not np.isfinite(scales).all():
        raise QuantizationError(
            f"{checkpoint.origin}: a scale of {full_name} is NaN or infinite",
            hint="the file is damaged; download it again",
        )
    try:
        native.set_linear(index, name, packed, matrix.in_features, scales)
    except ValueError as error:
        raise QuantizationError(
            f"{checkpoint.origin}: {full_name}: {error}",
            hint="the file is damaged or of another format than it says",
        ) from error
    if linear.norm_eps is not None:
        gain = _vector(checkpoint, f"{full_name}.norm")
        native.set_linear_norm(index, name, gain, linear.norm_eps)
    if linear.bias:
        native.set_linear_bias(index, name, _vector(checkpoint, f"{full_name}.bias"))


def _norm_names(layer: LayerSpec) -> list[str]:
    present = {
        "attn_norm": layer.attn_norm,
        "ffn_norm": layer.ffn_norm,
        "attn_sub_norm": layer.attn_sub_norm,
        "ffn_sub_norm": layer.ffn_sub_norm,
        "q_norm": layer.qk_norm,
        "k_norm": layer.qk_norm,
        "post_attn_norm": layer.post_norms,
        "post_ffn_norm": layer.post_norms,
    }
    return [name for name, there in present.items() if there]


def _bytes(tensor: DenseTensor) -> npt.NDArray[np.uint8]:
    """Return a view of a matrix as it is stored, uint8 [rows, bytes of a row]; copies no file."""
    return np.ascontiguousarray(tensor.data).view(np.uint8)


def _vector(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    values = np.ascontiguousarray(_dense(checkpoint, name).to_float32())
    if not np.isfinite(values).all():
        # Rounding to int8 would make numbers of it again, and the text only nonsense.
        raise FormatError(
            f"{checkpoint.origin}: {name} holds NaN or infinity",
            hint="the file is damaged; download it again",
        )
    return values


def _dense(checkpoint: Checkpoint, name: str) -> DenseTensor:
    tensor, shape = checkpoint.dense(name), checkpoint.spec.dense_shapes()[name]
    if tensor.shape != shape:
        raise TensorShapeError(
            f"{checkpoint.origin}: {name} has the shape {tensor.shape}, "
            f"the configuration says {shape}",
            hint="check that config.json belongs to these weights",
        )
    return tensor
