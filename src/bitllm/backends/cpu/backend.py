"""Loading: checks what the native decoder can run, then streams the tensors into it."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from bitllm import _native
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions
from bitllm.backends.cpu.decoder import CpuDecoder
from bitllm.backends.cpu.tuning import choose_packing
from bitllm.backends.sizes import (
    Packing,
    kv_bytes_per_token,
    rounded_head_bytes,
    ternary_bytes,
)
from bitllm.checkpoint import (
    DTYPE_BYTES,
    LINEAR_NAMES,
    Checkpoint,
    DenseTensor,
    LayerSpec,
    ModelSpec,
    StridedMatrix,
    TernaryMatrix,
)
from bitllm.errors import (
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    QuantizationError,
    UnsupportedModelError,
)

__all__ = ["CpuBackend"]

_LARGEST_INPUT = (1 << 24) // 127  # int32 accumulators pass through float32, exact up to 2^24
_KV_TYPES = {"bf16": "bf16", "fp32": "f32", "int8": "i8"}  # the names of the native code
_GROUP_GRAIN = 32  # columns that the kernels multiply at once


class CpuBackend:
    """Loads checkpoints into `CpuDecoder`."""

    name = "cpu"

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> CpuDecoder:
        """Pack the ternary matrices of `checkpoint` one by one; embedding and head stay mapped.

        What was read of mapped files is dropped from memory after each matrix.

        Raises:
            CheckpointError: a tensor is missing or broken, or the model has a feature that the
                native decoder does not run (scales of groups whose size is no multiple of 32).
            ConfigError: `options.isa` names a kernel set that this machine does not run, or the
                system refuses so many threads.
            InsufficientMemoryError: weights and KV cache do not fit into the free memory.
        """
        _native.trim_heap()  # reading a tokenizer leaves as much again behind as it keeps
        spec = checkpoint.spec
        isa = _kernel_set(options.isa)
        threads = options.threads or _native.cpu_info()["physical_cores"]
        kv_blocks = -(-(options.kv_tokens or spec.max_context) // KV_BLOCK_SIZE)
        _refuse_unsupported(checkpoint)
        packing = choose_packing(
            options.packing,
            cpu=_native.cpu_info()["name"],
            isa=isa,
            threads=threads,
            ternary_bytes=ternary_bytes(spec, "2bit"),
        ).name
        _refuse_too_large(checkpoint, kv_blocks, options, packing)
        try:
            native = _empty_decoder(spec, options, isa, threads, kv_blocks, packing)
            dense_bytes = _load_tensors(native, checkpoint, options.head)
            native.prepare()
            checkpoint.release()
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{checkpoint.origin}: the system refused memory for weights, KV cache or scratch",
                hint="ask for a shorter context (kv_tokens) or a smaller max_batch_tokens",
            ) from error
        return CpuDecoder(native, spec, options, isa, threads, packing, dense_bytes)


def _empty_decoder(
    spec: ModelSpec,
    options: LoadOptions,
    isa: str,
    threads: int,
    kv_blocks: int,
    packing: Packing,
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
            packing=packing,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"the system does not give {threads} threads: {error}", hint="ask for fewer threads"
        ) from error


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
        if linear.in_features > _LARGEST_INPUT:
            raise UnsupportedModelError(
                f"{checkpoint.origin}: {name} has {linear.in_features} columns; "
                f"exact products on the cpu device need {_LARGEST_INPUT} or fewer",
                hint='use device="reference"',
            )


def _refuse_too_large(
    checkpoint: Checkpoint, kv_blocks: int, options: LoadOptions, packing: Packing
) -> None:
    # Embedding and head stay in the mapped file, which the system may drop and read again.
    spec = checkpoint.spec
    head = "embed" if spec.tied_head else "head"
    weights = ternary_bytes(spec, packing)
    value_bytes = DTYPE_BYTES[checkpoint.dense_dtype(head)]
    weights += rounded_head_bytes(spec, options.head, value_bytes)
    cache = kv_blocks * KV_BLOCK_SIZE * kv_bytes_per_token(spec, options.kv_dtype)
    free = _native.available_memory()
    if free and weights + cache > free:
        raise InsufficientMemoryError(
            f"{checkpoint.origin} needs {weights / 2**20:.0f} MiB for its weights and "
            f"{cache / 2**20:.0f} MiB for a KV cache of {kv_blocks * KV_BLOCK_SIZE} tokens, "
            f"but only {free / 2**20:.0f} MiB of memory are free",
            hint="ask for a shorter context (kv_tokens)" if weights < free else None,
        )


def _load_tensors(native: _native.Decoder, checkpoint: Checkpoint, head_kind: str) -> int:
    """Hand every tensor to the native decoder; returns the bytes of embedding and head."""
    spec = checkpoint.spec
    embed = checkpoint.dense("embed")
    head = embed if spec.tied_head else checkpoint.dense("head")
    native.set_embedding(_bytes(embed), embed.dtype)
    native.set_head(_bytes(head), head.dtype, head_kind)
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
    # A layout the native code reads by itself takes half the time.
    matrix = checkpoint.strided(full_name) or checkpoint.ternary(full_name)
    try:
        rows = _set_linear(native, checkpoint, matrix, index, name)
    except QuantizationError:  # a ValueError too, and says all there is
        raise
    except ValueError as error:
        if isinstance(matrix, StridedMatrix):
            checkpoint.ternary(full_name)  # the reader finds the place that is damaged
        raise QuantizationError(
            f"{checkpoint.origin}: {full_name}: {error}",
            hint="the file is damaged or of another format than it says",
        ) from error
    if rows == 0 and isinstance(matrix, StridedMatrix):
        warnings.warn(f"{checkpoint.origin}: every weight of {full_name} is zero", stacklevel=2)
    del matrix
    checkpoint.release()
    if linear.norm_eps is not None:
        gain = _vector(checkpoint, f"{full_name}.norm")
        native.set_linear_norm(index, name, gain, linear.norm_eps)
    if linear.bias:
        native.set_linear_bias(index, name, _vector(checkpoint, f"{full_name}.bias"))


def _set_linear(
    native: _native.Decoder,
    checkpoint: Checkpoint,
    matrix: TernaryMatrix | StridedMatrix,
    index: int,
    name: str,
) -> int:
    """Pack a matrix; returns how many of its rows are not all zero."""
    full_name, group = f"layers.{index}.{name}", 0
    if isinstance(matrix, StridedMatrix):
        stored, layout = matrix.stored, "row_strided"
    else:
        stored, layout, group = matrix.packed, "canonical", matrix.group_size or 0
    if group % _GROUP_GRAIN:
        raise UnsupportedModelError(
            f"{checkpoint.origin}: {full_name} has a scale for each group of {group} weights; "
            f"the cpu device runs groups of multiples of {_GROUP_GRAIN}",
            hint='use device="reference"',
        )
    scales = np.ascontiguousarray(matrix.scales).reshape(-1)
    if not np.isfinite(scales).all():
        raise QuantizationError(
            f"{checkpoint.origin}: a scale of {full_name} is NaN or infinite",
            hint="the file is damaged; download it again",
        )
    bits = checkpoint.spec.layers[index].linear(name).activation_bits
    return native.set_linear(
        index,
        name,
        np.ascontiguousarray(stored),
        layout,
        *matrix.shape,
        scales,
        group,
        "float" if bits is None else "int8",
    )


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
    values = np.ascontiguousarray(checkpoint.dense(name).to_float32())
    if not np.isfinite(values).all():
        # Rounding to int8 would make numbers of it again, and the text only nonsense.
        raise FormatError(
            f"{checkpoint.origin}: {name} holds NaN or infinity",
            hint="the file is damaged; download it again",
        )
    return values
