"""From the products of a step to queries and the KV cache: head norms, RoPE, rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["rotate_and_store"]


@triton.jit
def _rotate_and_store(
    qkv,
    cosines,
    sines,
    q_gains,
    k_gains,
    eps,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    heads,
    kv_heads,
    head_dim,
    half,
    HAS_NORM: tl.constexpr,
    INT8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < head_dim
    start = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim
    x = tl.load(start + d, mask=inside, other=0.0)
    if head < heads + kv_heads:
        # Each turned value needs the other of its pair, half a turn away.
        other = tl.where(d < half, d + half, d - half)
        turned = d < 2 * half
        partner = tl.load(start + other, mask=turned, other=0.0)
        if HAS_NORM:
            gains = q_gains if head < heads else k_gains
            mean = tl.div_rn(tl.sum(x * x), head_dim.to(tl.float32))
            inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
            x = (x * inverse) * tl.load(gains + d, mask=inside, other=0.0)
            partner = (partner * inverse) * tl.load(gains + other, mask=turned, other=0.0)
        pair = tl.where(d < half, d, d - half)
        cosine = tl.load(cosines + row * half + pair, mask=turned, other=1.0)
        sine = tl.load(sines + row * half + pair, mask=turned, other=0.0)
        x = x * cosine + partner * tl.where(d < half, -sine, sine)
    if head < heads:
        tl.store(queries + (row * heads + head) * head_dim + d, x, mask=inside)
    else:
        is_key = head < heads + kv_heads
        kv_head = tl.where(is_key, head - heads, head - heads - kv_heads)
        place = tl.load(slots + row).to(tl.int64) * kv_heads + kv_head
        if INT8:
            factor = tl.div_rn(127.0, tl.maximum(tl.max(tl.abs(x)), 1e-5))
            x = (x * factor + 12582912.0) - 12582912.0
            x = tl.minimum(tl.maximum(x, -128.0), 127.0)
            tl.store((key_scales if is_key else value_scales) + place, tl.div_rn(1.0, factor))
        cache = keys if is_key else values
        tl.store(cache + place * head_dim + d, x.to(keys.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    cache: list[torch.Tensor],
    slots: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Turn queries and keys by their positions, store keys and values, and return the queries.

    Args:
        qkv: float32 [tokens, (heads + 2 * kv_heads) * head_dim].
        angles: cosines and sines, float32 [tokens, ..., rope.dim / 2].
        norms: gains of the norms of queries and keys, float32 [head_dim], or None.
        eps: of those norms.
        cache: keys and values [blocks, block size, kv_heads, head_dim]; in int8 their scales too.
        slots: int32 [tokens], block * block size + place of each token.
        num_heads: of queries.

    Returns:
        float32 [tokens, heads, head_dim].
    """
    _, _, kv_heads, head_dim = cache[0].shape
    tokens, half = len(qkv), angles[0].shape[-1]
    queries = torch.empty((tokens, num_heads, head_dim), device=qkv.device)
    quantised = len(cache) > 2
    _rotate_and_store[(tokens, num_heads + 2 * kv_heads)](
        qkv,
        *angles,
        *(norms or angles),
        eps,
        queries,
        cache[0],
        cache[1],
        cache[2] if quantised else queries,
        cache[3] if quantised else queries,
        slots,
        num_heads,
        kv_heads,
        head_dim,
        half,
        HAS_NORM=norms is not None,
        INT8=quantised,
        BLOCK=triton.next_power_of_2(head_dim),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return queries
