"""Attention over a KV cache in blocks: positions, storage, and the order of the sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import KV_BLOCK_SIZE
from bitllm.backends.numerics import exp_f32, lane_sum, ordered_sum, sincos_f64
from bitllm.checkpoint import LayerSpec, RopeSpec
from bitllm.config import KvDtype
from bitllm.ternary import quantize_activations

__all__ = ["CHUNK", "KvCache", "attend", "rotate"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
Stored = npt.NDArray[np.uint16] | npt.NDArray[np.int8] | F32

CHUNK = 256
"""Positions whose blocks are merged before they are merged with earlier ones; part of the numerics
contract, like `KV_BLOCK_SIZE`."""

_STORED: dict[str, type[np.generic]] = {"bf16": np.uint16, "fp32": np.float32, "int8": np.int8}


def rotate(x: F32, positions: I32, rope: RopeSpec) -> F32:
    """Turn the first `rope.dim` values of each head [tokens, heads, head_dim] by their position."""
    angles = positions.astype(np.float32)[:, None] * rope.inverse_frequencies()
    sine, cosine = (f.astype(np.float32)[:, None] for f in sincos_f64(angles.astype(np.float64)))
    half = rope.dim // 2
    x1, x2 = x[..., :half], x[..., half : rope.dim]
    turned = (x1 * cosine - x2 * sine, x2 * cosine + x1 * sine, x[..., rope.dim :])
    return np.concatenate(turned, axis=-1)


class KvCache:
    """Keys and values of one layer: two arrays [blocks, KV_BLOCK_SIZE, kv_heads, head_dim].

    In int8 each vector of head_dim has a scale of its own, 1 / a of `quantize_activations`, in two
    arrays [blocks, KV_BLOCK_SIZE, kv_heads].
    """

    def __init__(self, blocks: int, layer: LayerSpec, dtype: KvDtype) -> None:
        places = (blocks, KV_BLOCK_SIZE, layer.num_kv_heads)
        shape, stored = (*places, layer.head_dim), _STORED[dtype]
        self.keys, self.values = np.zeros(shape, stored), np.zeros(shape, stored)
        scales = places if dtype == "int8" else (blocks, 0)
        self.key_scales = np.zeros(scales, np.float32)
        self.value_scales = np.zeros(scales, np.float32)

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """All that is stored, each array [blocks, ...]."""
        return self.keys, self.values, self.key_scales, self.value_scales

    def write(self, blocks: I32, places: I32, keys: F32, values: F32) -> None:
        """Store float32 [tokens, kv_heads, head_dim], rounded to the dtype of the cache."""
        for cache, scales, new in (
            (self.keys, self.key_scales, keys),
            (self.values, self.value_scales, values),
        ):
            if cache.dtype == np.int8:
                codes, a = quantize_activations(new)
                cache[blocks, places] = codes
                scales[blocks, places] = np.float32(1.0) / a
            else:
                cache[blocks, places] = _to_bf16(new) if cache.dtype == np.uint16 else new

    def read(self, block: int, places: slice) -> tuple[F32, F32]:
        """Return keys and values of some places of a block, float32 [n, kv_heads, head_dim].

        Those of int8 are still to be multiplied with `scales`.
        """
        return _widen(self.keys[block, places]), _widen(self.values[block, places])

    def scales(self, block: int, places: slice) -> tuple[F32, F32] | None:
        """Return the scales of keys and values, float32 [n, kv_heads]; None if they have none."""
        if self.keys.dtype != np.int8:
            return None
        return self.key_scales[block, places], self.value_scales[block, places]


class _Softmax:
    """Softmax under way for each head: highest score, sum of weights, weighted sum of values."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.highest = np.full(heads, -np.inf, np.float32)
        self.total = np.zeros(heads, np.float32)
        self.output = np.zeros((heads, head_dim), np.float32)

    def merge(self, highest: F32, total: F32, output: F32) -> None:
        """Add what later positions gave."""
        merged = np.maximum(self.highest, highest)
        old, new = exp_f32(self.highest - merged), exp_f32(highest - merged)
        self.total = self.total * old + total * new
        self.output = self.output * old[:, None] + output * new[:, None]
        self.highest = merged


def attend(query: F32, position: int, blocks: I32, cache: KvCache, layer: LayerSpec) -> F32:
    """Attention of one token's query [heads, head_dim] over its sequence; returns the same shape.

    Each KV block gives a maximum, a sum of exponentials and a weighted sum of values; the blocks of
    a chunk of `CHUNK` positions are merged in order, then the chunks, so that the result does not
    depend on how prompts are cut or on who computes which chunk.
    """
    first = 0
    if layer.sliding_window is not None:
        first = max(0, position + 1 - layer.sliding_window)
    whole = _Softmax(layer.num_heads, layer.head_dim)
    for chunk in range(first // CHUNK, position // CHUNK + 1):
        part = _Softmax(layer.num_heads, layer.head_dim)
        begin, end = max(chunk * CHUNK, first), min((chunk + 1) * CHUNK, position + 1)
        for index in range(begin // KV_BLOCK_SIZE, -(-end // KV_BLOCK_SIZE)):
            start = index * KV_BLOCK_SIZE
            places = slice(max(begin - start, 0), min(end - start, KV_BLOCK_SIZE))
            part.merge(*_attend_block(query, int(blocks[index]), places, cache, layer))
        whole.merge(part.highest, part.total, part.output)
    return whole.output / whole.total[:, None]


def _attend_block(
    query: F32, block: int, places: slice, cache: KvCache, layer: LayerSpec
) -> tuple[F32, F32, F32]:
    shared_by = layer.num_heads // layer.num_kv_heads
    keys, values = (np.repeat(part, shared_by, axis=1) for part in cache.read(block, places))
    scores = ordered_sum(query * keys, axis=2) * np.float32(layer.query_scale)  # [n, heads]
    scales = cache.scales(block, places)
    if scales is not None:
        key_scales, value_scales = (np.repeat(part, shared_by, axis=1) for part in scales)
        scores = scores * key_scales
    highest = scores.max(axis=0)
    weights = exp_f32(scores - highest)
    # Places that are not seen weigh nothing.
    every = np.zeros((layer.num_heads, KV_BLOCK_SIZE), np.float32)
    every[:, places] = weights.T
    if scales is not None:
        weights = weights * value_scales
    return highest, lane_sum(every), ordered_sum(weights[:, :, None] * values, axis=0)


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
