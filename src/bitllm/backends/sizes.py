"""How many bytes a model takes, by its architecture alone: what memory plans add up."""

from __future__ import annotations

from typing import Literal

from bitllm.checkpoint import ModelSpec
from bitllm.config import KvDtype

__all__ = ["Packing", "kv_bytes_per_token", "screen_bytes", "ternary_bytes"]

Packing = Literal["2bit", "base3"]

_BLOCK_BYTES = 64  # rows are whole blocks, which all kernels read at once
_BLOCK_WEIGHTS = {"2bit": 256, "base3": 320}
_VALUE_BYTES = {"bf16": 2, "fp32": 4, "int8": 1}
_SCALE_BYTES = 4  # of the keys, and of the values, of a position and KV head in int8
_SCREEN_ROWS, _SCREEN_GROUP, _SCREEN_GROUP_BYTES = 16, 64, 34  # 64 columns of 4 bits and a scale


def ternary_bytes(spec: ModelSpec, packing: Packing) -> int:
    """Return the bytes of all ternary matrices as the CPU kernels read them, scales left out.

    Rows that are all zero are counted, though they are not stored: only the weights tell.
    """
    weights = _BLOCK_WEIGHTS[packing]
    return sum(
        linear.out_features * -(-linear.in_features // weights) * _BLOCK_BYTES
        for _, linear in spec.linear_names()
    )


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: KvDtype) -> int:
    """Return the bytes of keys and values of one position, over all layers."""
    scale = _SCALE_BYTES if kv_dtype == "int8" else 0
    return sum(
        2 * layer.num_kv_heads * (layer.head_dim * _VALUE_BYTES[kv_dtype] + scale)
        for layer in spec.layers
    )


def screen_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the 4-bit copy of the head that finds the rows worth computing."""
    rows = -(-spec.vocab_size // _SCREEN_ROWS) * _SCREEN_ROWS
    return rows * -(-spec.hidden_size // _SCREEN_GROUP) * _SCREEN_GROUP_BYTES
