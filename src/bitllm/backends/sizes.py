"""How many bytes a model takes, by its architecture alone: what memory plans add up."""

from __future__ import annotations

from typing import Literal

from bitllm.checkpoint import ModelSpec
from bitllm.config import HeadName, KvDtype

__all__ = [
    "Packing",
    "kv_bytes_per_token",
    "mlx_ternary_bytes",
    "rounded_head_bytes",
    "ternary_bytes",
]

Packing = Literal["2bit", "base3"]

_BLOCK_BYTES = 64  # rows are whole blocks, which all kernels read at once
_BLOCK_WEIGHTS = {"2bit": 256, "base3": 320}
_VALUE_BYTES = {"bf16": 2, "fp32": 4, "int8": 1}
_SCALE_BYTES = 4
_SCREEN_ROWS, _SCREEN_GROUP = 16, 64
_SCREEN_GROUP_BYTES = 34  # of 64 columns in 4 bits, and their scale
_WORTH_SCREENING = 32 << 20
_MLX_COLUMNS = 32  # rows are padded to a multiple of this


def ternary_bytes(spec: ModelSpec, packing: Packing) -> int:
    """Return the bytes of all ternary matrices as the CPU kernels read them, scales left out.

    Rows that are all zero are counted, though they are not stored: only the weights tell.
    """
    weights = _BLOCK_WEIGHTS[packing]
    return sum(
        linear.out_features * -(-linear.in_features // weights) * _BLOCK_BYTES
        for _, linear in spec.linear_names()
    )


def mlx_ternary_bytes(spec: ModelSpec) -> int:
    """Return the bytes of all ternary matrices as MLX reads them.

    Four codes a byte, in rows of whole groups of 32 columns or more. The scales 1 and biases -1
    of MLX's format are shared by all matrices of a shape and left out; so are scales of groups,
    which only the weights tell of.
    """
    return sum(
        linear.out_features * -(-linear.in_features // _MLX_COLUMNS) * (_MLX_COLUMNS // 4)
        for _, linear in spec.linear_names()
    )


def kv_bytes_per_token(spec: ModelSpec, kv_dtype: KvDtype) -> int:
    """Return the bytes of keys and values of one position, over all layers."""
    scale = _SCALE_BYTES if kv_dtype == "int8" else 0  # of a position's keys in a KV head
    return sum(
        2 * layer.num_kv_heads * (layer.head_dim * _VALUE_BYTES[kv_dtype] + scale)
        for layer in spec.layers
    )


def rounded_head_bytes(spec: ModelSpec, head: HeadName, value_bytes: int) -> int:
    """Return the bytes of the rounded copy of the head that finds the rows worth computing.

    Args:
        spec: the architecture.
        head: how logits are to be computed; "auto" screens heads of 32 MiB or more.
        value_bytes: bytes of a weight of the head as it is stored.
    """
    stored = spec.vocab_size * spec.hidden_size * value_bytes
    if head == "full" or (head == "auto" and stored < _WORTH_SCREENING):
        return 0
    norms = _SCALE_BYTES * spec.vocab_size
    if head in ("int8", "int8-screened"):
        return spec.vocab_size * spec.hidden_size + norms + _SCALE_BYTES * spec.vocab_size
    rows = -(-spec.vocab_size // _SCREEN_ROWS) * _SCREEN_ROWS
    return rows * -(-spec.hidden_size // _SCREEN_GROUP) * _SCREEN_GROUP_BYTES + norms
