"""Attention over a KV cache in blocks, in PyTorch: storage, positions, and runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from bitllm.backends.base import KV_BLOCK_SIZE, Batch
from bitllm.backends.cuda.linear import quantize_activations
from bitllm.backends.numerics import sincos_f64
from bitllm.checkpoint import LayerSpec, RopeSpec
from bitllm.config import KvDtype

__all__ = ["Angles", "KvCache", "StepLayout", "attend", "lay_out", "rotate"]

I32 = npt.NDArray[np.int32]
_STORED = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of a step's positions, float32 [tokens, 1, rope.dim / 2]."""

    cosine: torch.Tensor
    sine: torch.Tensor

    @classmethod
    def of(cls, positions: I32, rope: RopeSpec, device: torch.device) -> Angles:
        """Compute them on the host, as every backend does."""
        radians = positions.astype(np.float32)[:, None] * rope.inverse_frequencies()
        sine, cosine = sincos_f64(radians.astype(np.float64))
        on_device = [
            torch.from_numpy(part.astype(np.float32)[:, None]).to(device) for part in (cosine, sine)
        ]
        return cls(*on_device)


def rotate(x: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Turn each head [tokens, heads, head_dim] by its position, rotate-half style."""
    half = angles.cosine.shape[-1]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [x1 * angles.cosine - x2 * angles.sine, x2 * angles.cosine + x1 * angles.sine]
    return torch.cat([*turned, rest], dim=-1)


class KvCache:
    """Keys and values of one layer: two tensors [blocks, KV_BLOCK_SIZE, kv_heads, head_dim].

    In int8 each vector of head_dim has a scale of its own, in two tensors [blocks, KV_BLOCK_SIZE,
    kv_heads, 1].
    """

    def __init__(self, blocks: int, layer: LayerSpec, dtype: KvDtype, device: torch.device) -> None:
        places = (blocks, KV_BLOCK_SIZE, layer.num_kv_heads)
        shape, stored = (*places, layer.head_dim), _STORED[dtype]
        self.tensors = [torch.zeros(shape, dtype=stored, device=device) for _ in range(2)]
        if dtype == "int8":
            self.tensors += [torch.zeros((*places, 1), device=device) for _ in range(2)]

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store float32 [tokens, kv_heads, head_dim], rounded to the dtype of the cache.

        Args:
            slots: int32 [tokens], as in `StepLayout`.
            keys: of the tokens.
            values: likewise.
        """
        for index, new in enumerate((keys, values)):
            stored = self.tensors[index]
            if stored.dtype == torch.int8:
                new, a = quantize_activations(new)
                self.tensors[2 + index].flatten(0, 1)[slots] = a.reciprocal()
            stored.flatten(0, 1)[slots] = new.to(stored.dtype)

    def read(self, tables: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of whole block tables.

        Args:
            tables: int64 [runs, blocks].
            last: int64 [runs], the last position of each run; what is behind it is zero, for what
                another sequence left there may be no numbers, and no weight makes zeros of those.

        Returns:
            Two of float32 [runs, kv_heads, blocks * KV_BLOCK_SIZE, head_dim].
        """
        positions = torch.arange(tables.shape[1] * KV_BLOCK_SIZE, device=tables.device)
        unwritten = (positions > last[:, None])[:, None, :, None]
        keys, values = (self._read(index, tables) for index in range(2))
        return keys.masked_fill(unwritten, 0.0), values.masked_fill(unwritten, 0.0)

    def _read(self, index: int, tables: torch.Tensor) -> torch.Tensor:
        values = self.tensors[index][tables].to(torch.float32)
        if len(self.tensors) > 2:
            values = values * self.tensors[2 + index][tables]
        return values.flatten(1, 2).transpose(1, 2)


@dataclass(frozen=True)
class _RunGroup:
    """Runs of one length that are attended to together.

    Attributes:
        rows: int64 [runs * length], their token rows, run by run.
        tables: int64 [runs, blocks], padded with block 0, which the mask hides.
        positions: int64 [runs, length].
    """

    rows: torch.Tensor
    tables: torch.Tensor
    positions: torch.Tensor

    def mask(self, window: int | None) -> torch.Tensor:
        """Return which positions each token sees, bool [runs, 1, length, blocks * block size]."""
        seen = torch.arange(self.tables.shape[1] * KV_BLOCK_SIZE, device=self.rows.device)
        query = self.positions[:, None, :, None]
        visible = seen <= query
        return visible if window is None else visible & (seen > query - window)


@dataclass(frozen=True)
class StepLayout:
    """Where the tokens of a step belong, made once for all layers.

    Attributes:
        slots: int32 [tokens], where each is kept: KV block * KV_BLOCK_SIZE + place in the block.
        runs, positions: int32 [tokens].
        tables: int32 [runs, blocks].
        groups: the runs, those of one length together; only where there are no kernels.
        masks: of each group by the window of a layer.
    """

    slots: torch.Tensor
    runs: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    groups: list[_RunGroup]
    masks: dict[int | None, list[torch.Tensor]]


def lay_out(batch: Batch, windows: set[int | None], device: torch.device) -> StepLayout:
    """Lay out a step.

    Args:
        batch: the step.
        windows: of the layers that are computed without kernels.
        device: of the decoder.
    """
    lengths = np.diff(batch.run_offsets)
    run_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    blocks = batch.block_tables[run_of, batch.positions // KV_BLOCK_SIZE]
    slots = blocks * np.int32(KV_BLOCK_SIZE) + batch.positions % np.int32(KV_BLOCK_SIZE)
    groups = _groups(batch, lengths, device) if windows else []
    return StepLayout(
        slots=torch.from_numpy(slots).to(device),
        runs=torch.from_numpy(run_of).to(device),
        positions=torch.from_numpy(batch.positions).to(device),
        tables=torch.from_numpy(batch.block_tables).to(device),
        groups=groups,
        masks={window: [group.mask(window) for group in groups] for window in windows},
    )


def _groups(batch: Batch, lengths: I32, device: torch.device) -> list[_RunGroup]:
    groups = []
    for length in np.unique(lengths).tolist():
        runs = np.flatnonzero(lengths == length)
        rows = batch.run_offsets[runs][:, None] + np.arange(length)
        groups.append(_group(batch, runs, rows, device))
    return groups


def _group(
    batch: Batch, runs: npt.NDArray[Any], rows: npt.NDArray[Any], device: torch.device
) -> _RunGroup:
    positions = batch.positions[rows]
    width = int(positions.max()) // KV_BLOCK_SIZE + 1
    tables = np.maximum(batch.block_tables[runs, :width], 0)
    return _RunGroup(
        _index(rows.ravel(), device), _index(tables, device), _index(positions, device)
    )


def _index(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def attend(
    query: torch.Tensor, layout: StepLayout, cache: KvCache, layer: LayerSpec
) -> torch.Tensor:
    """Attention of all tokens over their own sequences.

    Args:
        query: float32 [tokens, heads, head_dim].
        layout: of the step, whose keys and values are in the cache already.
        cache: of the layer.
        layer: its switches.

    Returns:
        float32 [tokens, heads * head_dim].
    """
    attended = torch.empty_like(query)
    for group, mask in zip(layout.groups, layout.masks[layer.sliding_window], strict=True):
        runs, length = group.positions.shape
        keys, values = cache.read(group.tables, group.positions[:, -1])
        q = query[group.rows].view(runs, length, layer.num_heads, layer.head_dim)
        seen = scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            scale=layer.query_scale,
            enable_gqa=layer.num_heads != layer.num_kv_heads,
        )
        attended[group.rows] = seen.transpose(1, 2).flatten(0, 1)
    return attended.flatten(1)
