"""Attention over the KV cache in blocks: for decode and prefill, a token's positions in parts.

Keys and values are multiplied on tensor cores as bfloat16, which holds what bf16 and int8 caches
store exactly. Queries and weights are float32; each goes in as the sum of two bfloat16 numbers, so
that 16 bits of it count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitllm.backends.base import KV_BLOCK_SIZE
from bitllm.backends.cuda.kernels import INTERPRETED

__all__ = ["attend"]

_SPLIT_BLOCKS = 8  # blocks of the context a program reads, where there are few programs
_LARGEST_SPLITS = 32
_ENOUGH_PROGRAMS = 256


@triton.jit
def _product(a, b, sums, FLOAT32: tl.constexpr):
    """Sums + a @ b; b is exact in bfloat16 unless FLOAT32."""
    if FLOAT32:
        return tl.dot(a, b, sums, input_precision="ieee")
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    exact = b.to(tl.bfloat16)
    return tl.dot(low, exact, tl.dot(high, exact, sums))


@triton.jit
def _attend(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    runs,
    positions,
    output,
    highest_of,
    total_of,
    scale,
    window,
    table_width,
    heads,
    kv_heads,
    head_dim,
    SHARED: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    INT8: tl.constexpr,
    FLOAT32: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    PLACES: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    table = tables + tl.load(runs + row) * table_width
    first = tl.maximum(position + 1 - window, 0) if window > 0 else 0
    begin = first // PLACES
    share = (position // PLACES + 1 - begin + SPLITS - 1) // SPLITS
    begin += split * share
    end = tl.minimum(begin + share, position // PLACES + 1)

    g, d, p = tl.arange(0, QUERY_ROWS), tl.arange(0, BLOCK), tl.arange(0, PLACES)
    inside = (d < head_dim)[None, :]
    head = kv_head * SHARED + g
    some = (g < SHARED)[:, None]
    query_rows = (row * heads + head)[:, None] * head_dim + d[None, :]
    q = tl.load(queries + query_rows, mask=some & inside, other=0.0)
    highest = tl.full((QUERY_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_ROWS,), tl.float32)
    sums = tl.zeros((QUERY_ROWS, BLOCK), tl.float32)
    for index in range(begin, end):
        place = (tl.load(table + index).to(tl.int64) * PLACES + p) * kv_heads + kv_head
        seen = index * PLACES + p
        visible = (seen <= position) & (seen >= first)
        where = place[:, None] * head_dim + d[None, :]
        k = tl.load(keys + where, mask=inside & visible[:, None], other=0.0).to(tl.float32)
        scores = _product(q, tl.trans(k), tl.zeros((QUERY_ROWS, PLACES), tl.float32), FLOAT32)
        scores *= scale
        if INT8:
            scores *= tl.load(key_scales + place, mask=visible, other=0.0)[None, :]
        scores = tl.where(visible[None, :], scores, float("-inf"))
        merged = tl.maximum(highest, tl.max(scores, axis=1))
        kept = tl.exp(highest - merged)
        weights = tl.exp(scores - merged[:, None])
        total = total * kept + tl.sum(weights, axis=1)
        if INT8:
            weights *= tl.load(value_scales + place, mask=visible, other=0.0)[None, :]
        v = tl.load(values + where, mask=inside & visible[:, None], other=0.0).to(tl.float32)
        sums = _product(weights, v, sums * kept[:, None], FLOAT32)
        highest = merged

    part = (row * heads + head) * SPLITS + split
    if SPLITS == 1:
        sums = sums / total[:, None]
    else:
        tl.store(highest_of + part, highest, mask=g < SHARED)
        tl.store(total_of + part, total, mask=g < SHARED)
    tl.store(output + part[:, None] * head_dim + d[None, :], sums, mask=some & inside)


@triton.jit
def _merge(
    parts, highest_of, total_of, output, head_dim, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK)
    inside = d < head_dim
    highest = tl.load(highest_of + head * SPLITS + s)
    kept = tl.exp(highest - tl.max(highest))
    total = tl.sum(tl.load(total_of + head * SPLITS + s) * kept)
    where = (head * SPLITS + s)[:, None] * head_dim + d[None, :]
    sums = tl.load(parts + where, mask=inside[None, :], other=0.0)
    merged = tl.sum(sums * kept[:, None], axis=0) / total
    tl.store(output + head * head_dim + d, merged, mask=inside)


def _splits(tokens: int, kv_heads: int, table_width: int) -> int:
    """Return in how many parts a context is read: more where tokens alone fill no GPU."""
    wanted = min(triton.cdiv(_ENOUGH_PROGRAMS, tokens * kv_heads), _LARGEST_SPLITS)
    useful = triton.cdiv(table_width, _SPLIT_BLOCKS)
    return int(triton.next_power_of_2(max(1, min(wanted, useful))))


def attend(
    queries: torch.Tensor,
    cache: list[torch.Tensor],
    tables: torch.Tensor,
    runs: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention of all tokens of a step, whose keys and values are in the cache already.

    Args:
        queries: float32 [tokens, heads, head_dim].
        cache: keys and values [blocks, block size, kv_heads, head_dim]; in int8 their scales too.
        tables: int32 [runs, blocks], the KV blocks of each run.
        runs: int32 [tokens], the run of each token.
        positions: int32 [tokens].
        scale: of the scores.
        window: how many positions a token sees, itself included; None = all.

    Returns:
        float32 [tokens, heads * head_dim].
    """
    tokens, heads, head_dim = queries.shape
    kv_heads, width = cache[0].shape[2], tables.shape[1]
    splits, quantised = _splits(tokens, kv_heads, width), len(cache) > 2
    shape = (tokens, heads, splits, head_dim)
    parts = torch.empty(shape, device=queries.device)
    highest, total = torch.empty((2, *shape[:3]), device=queries.device)
    block = triton.next_power_of_2(head_dim)
    _attend[(tokens, kv_heads, splits)](
        queries,
        cache[0],
        cache[1],
        cache[2] if quantised else queries,
        cache[3] if quantised else queries,
        tables,
        runs,
        positions,
        parts,
        highest,
        total,
        scale,
        window or 0,
        width,
        heads,
        kv_heads,
        head_dim,
        SHARED=heads // kv_heads,
        QUERY_ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        INT8=quantised,
        FLOAT32=INTERPRETED or cache[0].dtype == torch.float32,
        BLOCK=max(16, block),
        SPLITS=splits,
        PLACES=KV_BLOCK_SIZE,
        num_warps=4,
    )
    if splits == 1:
        return parts.view(tokens, heads * head_dim)
    output = torch.empty((tokens, heads * head_dim), device=queries.device)
    _merge[(tokens * heads,)](
        parts, highest, total, output, head_dim, SPLITS=splits, BLOCK=block, num_warps=4
    )
    return output
