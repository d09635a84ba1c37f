"""Attention over a KV cache in blocks, in MLX: storage, positions, and runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from bitllm.backends.base import KV_BLOCK_SIZE, Batch
from bitllm.backends.mlx.linear import quantize_activations
from bitllm.backends.numerics import sincos_f64
from bitllm.checkpoint import LayerSpec, RopeSpec
from bitllm.config import KvDtype

__all__ = ["Angles", "KvCache", "RunGroup", "StepLayout", "attend", "group_runs", "rotate"]

I32 = npt.NDArray[np.int32]
_STORED = {"bf16": mx.bfloat16, "fp32": mx.float32, "int8": mx.int8}


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of a step's positions, float32 [tokens, 1, rope.dim / 2]."""

    cosine: mx.array
    sine: mx.array

    @classmethod
    def of(cls, positions: I32, rope: RopeSpec) -> Angles:
        """Compute them on the host, as every backend does: the GPU has no float64."""
        radians = positions.astype(np.float32)[:, None] * rope.inverse_frequencies()
        sine, cosine = sincos_f64(radians.astype(np.float64))
        return cls(*(mx.array(part.astype(np.float32)[:, None]) for part in (cosine, sine)))


def rotate(x: mx.array, angles: Angles) -> mx.array:
    """Turn each head [tokens, heads, head_dim] by its position, rotate-half style."""
    half = angles.cosine.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [x1 * angles.cosine - x2 * angles.sine, x2 * angles.cosine + x1 * angles.sine]
    return mx.concatenate([*turned, rest], axis=-1)


class KvCache:
    """Keys and values of one layer: two arrays [blocks, KV_BLOCK_SIZE, kv_heads, head_dim].

    In int8 each vector of head_dim has a scale of its own, in two arrays [blocks, KV_BLOCK_SIZE,
    kv_heads, 1]. Arrays are replaced when they are written to; as nobody else holds them, MLX does
    so in place.
    """

    def __init__(self, blocks: int, layer: LayerSpec, dtype: KvDtype) -> None:
        places = (blocks, KV_BLOCK_SIZE, layer.num_kv_heads)
        scaled = dtype == "int8"
        values = [mx.zeros((*places, layer.head_dim), _STORED[dtype]) for _ in range(2)]
        scales = [mx.zeros((*places, 1), mx.float32) for _ in range(2 if scaled else 0)]
        self.arrays = values + scales

    def write(self, blocks: mx.array, places: mx.array, keys: mx.array, values: mx.array) -> None:
        """Store float32 [tokens, kv_heads, head_dim], rounded to the dtype of the cache."""
        for index, new in enumerate((keys, values)):
            stored = self.arrays[index]
            if stored.dtype == mx.int8:
                new, a = quantize_activations(new)
                self.arrays[2 + index][blocks, places] = 1.0 / a
            stored[blocks, places] = new.astype(stored.dtype)

    def read(self, tables: mx.array, last: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values of whole block tables.

        Args:
            tables: int32 [runs, blocks].
            last: int32 [runs], the last position of each run; values behind it are zero, for what
                another sequence left there may be no numbers, and no weight makes zeros of those.

        Returns:
            Two of float32 [runs, kv_heads, blocks * KV_BLOCK_SIZE, head_dim].
        """
        keys, values = self._read(0, tables), self._read(1, tables)
        written = mx.arange(values.shape[2])[None, None, :, None] <= last[:, None, None, None]
        return keys, mx.where(written, values, 0.0)

    def _read(self, index: int, tables: mx.array) -> mx.array:
        values = self.arrays[index][tables].astype(mx.float32)
        if len(self.arrays) > 2:
            values = values * self.arrays[2 + index][tables]
        runs, blocks, size, heads, width = values.shape
        return values.reshape(runs, blocks * size, heads, width).transpose(0, 2, 1, 3)


@dataclass(frozen=True)
class RunGroup:
    """Runs of one length that are attended to together.

    Attributes:
        rows: int32 [runs * length], their token rows, run by run.
        length: tokens of each.
        tables: int32 [runs, blocks], padded with block 0, which the mask hides.
        positions: int32 [runs, length].
    """

    rows: mx.array
    length: int
    tables: mx.array
    positions: mx.array

    def mask(self, window: int | None) -> mx.array:
        """Return which positions each token sees, bool [runs, 1, length, blocks * block size]."""
        seen = mx.arange(self.tables.shape[1] * KV_BLOCK_SIZE)
        query = self.positions[:, None, :, None]
        visible = seen <= query
        return visible if window is None else visible & (seen > query - window)


@dataclass(frozen=True)
class StepLayout:
    """Where the tokens of a step belong, made once for all layers.

    Attributes:
        blocks, places: int32 [tokens], the place of each in the KV cache.
        groups: the runs, those of one length together.
        order: int32 [tokens], from the rows of the groups back to the rows of the step; None where
            they are the same.
        masks: of each group by the window of a layer.
    """

    blocks: mx.array
    places: mx.array
    groups: list[RunGroup]
    order: mx.array | None
    masks: dict[int | None, list[mx.array]]


def group_runs(batch: Batch, windows: set[int | None]) -> StepLayout:
    """Lay out a step.

    Args:
        batch: the step.
        windows: of the model's layers.
    """
    offsets, lengths = batch.run_offsets, np.diff(batch.run_offsets)
    run_of = np.repeat(np.arange(len(lengths)), lengths)
    blocks = batch.block_tables[run_of, batch.positions // KV_BLOCK_SIZE]
    groups, rows = [], []
    for length in np.unique(lengths).tolist():
        runs = np.flatnonzero(lengths == length)
        members = offsets[runs][:, None] + np.arange(length)
        groups.append(_group(batch, runs, members))
        rows.append(members.ravel())
    every = np.concatenate(rows)
    unchanged = bool((every == np.arange(len(every))).all())
    return StepLayout(
        blocks=mx.array(blocks),
        places=mx.array(batch.positions % KV_BLOCK_SIZE),
        groups=groups,
        order=None if unchanged else mx.array(np.argsort(every).astype(np.int32)),
        masks={window: [group.mask(window) for group in groups] for window in windows},
    )


def _group(batch: Batch, runs: npt.NDArray[Any], rows: npt.NDArray[Any]) -> RunGroup:
    positions = batch.positions[rows]
    width = int(positions.max()) // KV_BLOCK_SIZE + 1
    tables = np.maximum(batch.block_tables[runs, :width], 0)
    flat = mx.array(rows.ravel().astype(np.int32))
    return RunGroup(flat, rows.shape[1], mx.array(tables), mx.array(positions))


def attend(query: mx.array, layout: StepLayout, cache: KvCache, layer: LayerSpec) -> mx.array:
    """Attention of all tokens over their own sequences.

    Args:
        query: float32 [tokens, heads, head_dim].
        layout: of the step, whose keys and values are in the cache already.
        cache: of the layer.
        layer: its switches.

    Returns:
        float32 [tokens, heads * head_dim].
    """
    parts = []
    for group, mask in zip(layout.groups, layout.masks[layer.sliding_window], strict=True):
        runs = len(group.tables)
        keys, values = cache.read(group.tables, group.positions[:, -1])
        q = query[group.rows].reshape(runs, group.length, layer.num_heads, layer.head_dim)
        seen = mx.fast.scaled_dot_product_attention(
            q.transpose(0, 2, 1, 3), keys, values, scale=layer.query_scale, mask=mask
        )
        parts.append(seen.transpose(0, 2, 1, 3).reshape(runs * group.length, -1))
    attended = mx.concatenate(parts) if len(parts) > 1 else parts[0]
    return attended if layout.order is None else attended[layout.order]
