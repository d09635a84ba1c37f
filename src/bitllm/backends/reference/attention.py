"""Attention over a KV cache in blocks: positions, storage, and the order of the sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import KV_BLOCK_SIZE
from bitllm.backends.reference.numerics import exp_f32, lane_sum, sincos_f64
from bitllm.checkpoint import LayerSpec, RopeSpec
from bitllm.config import KvDtype

__all__ = ["KvCache", "attend", "rotate"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Stored = npt.NDArray[np.uint16] | F32


def rotate(x: F32, positions: I32, rope: RopeSpec) -> F32:
    """Turn the first `rope.dim` values of each head [tokens, heads, head_dim] by their position."""
    angles = positions.astype(np.float32)[:, None] * rope.inverse_frequencies()
    sine, cosine = (f.astype(np.float32)[:, None] for f in sincos_f64(angles.astype(np.float64)))
    half = rope.dim // 2
    x1, x2 = x[..., :half], x[..., half : rope.dim]
    turned = (x1 * cosine - x2 * sine, x2 * cosine + x1 * sine, x[..., rope.dim :])
    return np.concatenate(turned, axis=-1)


class KvCache:
    """Keys and values of one layer: two arrays [blocks, KV_BLOCK_SIZE, kv_heads, head_dim]."""

    def __init__(self, blocks: int, layer: LayerSpec, dtype: KvDtype) -> None:
        shape = (blocks, KV_BLOCK_SIZE, layer.num_kv_heads, layer.head_dim)
        self.keys: Stored
        self.values: Stored
        if dtype == "bf16":
            self.keys, self.values = np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)
        else:
            self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)

    def write(self, blocks: I32, places: I32, keys: F32, values: F32) -> None:
        """Store float32 [tokens, kv_heads, head_dim], rounded to the dtype of the cache."""
        for cache, new in ((self.keys, keys), (self.values, values)):
            cache[blocks, places] = _to_bf16(new) if cache.dtype == np.uint16 else new

    def read(self, block: int, places: slice) -> tuple[F32, F32]:
        """Return keys and values of some places of a block, float32 [n, kv_heads, head_dim]."""
        return _widen(self.keys[block, places]), _widen(self.values[block, places])


def attend(query: F32, position: int, blocks: I32, cache: KvCache, layer: LayerSpec) -> F32:
    """Attention of one token's query [heads, head_dim] over its sequence; returns the same shape.

    Each KV block gives a maximum, a sum of exponentials and a weighted sum of values; the blocks
    are merged in order of position, so that the result does not depend on how prompts are cut.
    """
    shared_by = layer.num_heads // layer.num_kv_heads
    first = 0
    if layer.sliding_window is not None:
        first = max(0, position + 1 - layer.sliding_window)
    highest = np.full(layer.num_heads, -np.inf, np.float32)
    total = np.zeros(layer.num_heads, np.float32)
    output = np.zeros((layer.num_heads, layer.head_dim), np.float32)
    for index in range(first // KV_BLOCK_SIZE, position // KV_BLOCK_SIZE + 1):
        start = index * KV_BLOCK_SIZE
        places = slice(max(first - start, 0), min(position + 1 - start, KV_BLOCK_SIZE))
        keys, values = cache.read(int(blocks[index]), places)
        keys, values = (np.repeat(part, shared_by, axis=1) for part in (keys, values))
        scores = lane_sum(query * keys) * np.float32(layer.query_scale)  # [n, heads]
        block_highest = scores.max(axis=0)
        weights = exp_f32(scores - block_highest)
        block_total = np.zeros_like(total)
        block_output = np.zeros_like(output)
        for weight, value in zip(weights, values, strict=True):
            block_total = block_total + weight
            block_output = block_output + weight[:, None] * value
        merged = np.maximum(highest, block_highest)
        old, new = exp_f32(highest - merged), exp_f32(block_highest - merged)
        total = total * old + block_total * new
        output = output * old[:, None] + block_output * new[:, None]
        highest = merged
    return output / total[:, None]


def _to_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """Round to the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _widen(stored: Stored) -> F32:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(stored, np.float32)
