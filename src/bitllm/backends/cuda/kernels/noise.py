"""Logits over temperature plus Gumbel noise, in float64: what the drawn token is the argmax of.

The same operations in the same order as `bitllm.backends.numerics`, none of them fused, so that a
GPU draws what the host draws from the same logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["perturb"]

_IDS = 512  # a program's share of a row


@triton.jit
def _log(x):
    """Natural logarithm as `numerics.log_f64`."""
    bits = x.to(tl.int64, bitcast=True)
    e = (bits >> 52) - 1023
    m = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    big = m >= 1.4142135623730951
    m = tl.where(big, m * 0.5, m)
    exponent = tl.where(big, e + 1, e).to(tl.float64)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    p = tl.full(x.shape, 1.0 / 21.0, tl.float64)
    for step in tl.static_range(10):
        p = p * s2 + tl.full(x.shape, 1.0 / (19.0 - 2.0 * step), tl.float64)
    return exponent * tl.full(x.shape, 0.6931471805599453, tl.float64) + (2.0 * s) * p


@triton.jit
def _perturb(logits, temperatures, keys, values, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < vocab
    x = tl.load(logits + row * vocab + ids, mask=inside, other=0.0).to(tl.float64)
    temperature = tl.load(temperatures + row).to(tl.float64)
    if temperature != 0.0:
        # Philox4x32-10: 32 bits of each counter and key, in 64.
        low: tl.constexpr = 0xFFFFFFFF
        key0, key1 = tl.load(keys + row * 4), tl.load(keys + row * 4 + 1)
        c0 = (ids >> 2).to(tl.int64)
        c1 = tl.zeros_like(c0) + tl.load(keys + row * 4 + 2)
        c2 = tl.zeros_like(c0) + tl.load(keys + row * 4 + 3)
        c3 = tl.zeros_like(c0)
        for _ in tl.static_range(10):
            p0 = c0 * 0xD2511F53
            p1 = c2 * 0xCD9E8D57
            c0 = ((p1 >> 32) & low) ^ c1 ^ key0
            c1 = p1 & low
            c2 = ((p0 >> 32) & low) ^ c3 ^ key1
            c3 = p0 & low
            key0 = (key0 + 0x9E3779B9) & low
            key1 = (key1 + 0xBB67AE85) & low
        lane = ids & 3
        word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
        noise = -_log(-_log((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
        x = x / temperature + noise
    tl.store(values + row * vocab + ids, x, mask=inside)


def perturb(logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return logits / temperature + noise, or the logits where temperature is 0.

    Args:
        logits: float32 [rows, vocab], contiguous.
        temperatures: float32 [rows].
        keys: int64 [rows, 4]: low and high word of the seed, position, choice.

    Returns:
        float64 [rows, vocab].
    """
    rows, vocab = logits.shape
    values = torch.empty((rows, vocab), dtype=torch.float64, device=logits.device)
    _perturb[(rows, triton.cdiv(vocab, _IDS))](
        logits,
        temperatures,
        keys,
        values,
        vocab,
        BLOCK=_IDS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return values
