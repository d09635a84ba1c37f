"""How many bytes the intermediate results of a step will take, asked before a model is loaded."""

from __future__ import annotations

import numpy as np

from bitllm import _native
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions
from bitllm.checkpoint import LINEAR_NAMES, DenseDtype, LayerSpec, ModelSpec

__all__ = ["scratch_bytes"]

_MOST_BLOCKS = 2**31 - 1  # their ids are int32; more would not fit into any memory either


def scratch_bytes(spec: ModelSpec, options: LoadOptions, head_dtype: DenseDtype) -> int:
    """Return `DecoderInfo.scratch_bytes` of a model before there is a decoder.

    The native code adds up what it would take; nothing is taken and no thread is started.

    Args:
        spec: the architecture.
        options: how the model would be loaded.
        head_dtype: how the head, or the embedding that stands for it, is stored.

    Returns:
        Bytes. A head that proves unfit for rounding when it is loaded takes less.
    """
    kv_blocks = -(-(options.kv_tokens or spec.max_context) // KV_BLOCK_SIZE)
    shapes = {_shape(layer) for layer in spec.layers}
    frequencies = {layer.rope.inverse_frequencies().tobytes() for layer in spec.layers}
    return _native.scratch_bytes(
        vocab=spec.vocab_size,
        hidden=spec.hidden_size,
        kv_blocks=min(kv_blocks, _MOST_BLOCKS),
        threads=options.threads or _native.cpu_info()["physical_cores"],
        max_batch_tokens=options.max_batch_tokens,
        head=options.head,
        head_dtype=head_dtype,
        layers=np.array(sorted(shapes), np.int64),
        rope_pairs=np.array([len(table) // 4 for table in frequencies], np.int64),
    )


def _shape(layer: LayerSpec) -> tuple[int, ...]:
    linears = [layer.linear(name) for name in LINEAR_NAMES]
    return (
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        layer.down.in_features,
        any(linear.norm_eps is not None for linear in linears),
        any(linear.activation_bits is not None for linear in linears),
        any(linear.activation_bits is None for linear in linears),
    )
