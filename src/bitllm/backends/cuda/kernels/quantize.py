"""RMSNorm and the rounding of activations to int8, in one pass over a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["COLUMN_BLOCK", "Codes", "norm_quantize"]

COLUMN_BLOCK = 256
"""Columns of codes come in whole blocks, filled up with zeros: those of the packed weights."""


@dataclass(frozen=True)
class Codes:
    """Quantised activations.

    Attributes:
        codes: int8 [tokens, columns in whole blocks].
        factors: float32 [tokens]; x is codes / factor.
        sums: int32 [tokens], the sum of each row of codes.
    """

    codes: torch.Tensor
    factors: torch.Tensor
    sums: torch.Tensor


@triton.jit
def _norm_quantize(
    x_rows,
    gains,
    code_rows,
    factors,
    sums,
    columns,
    padded,
    eps,
    HAS_GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    x = tl.load(x_rows + row * columns + k, mask=k < columns, other=0.0)
    if HAS_GAIN:
        mean = tl.div_rn(tl.sum(x * x), columns.to(tl.float32))
        gain = tl.load(gains + k, mask=k < columns, other=0.0)
        x = (x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))) * gain
    absmax = tl.max(tl.abs(x))
    # max() drops NaN; the factor must not.
    broken = tl.sum(tl.where(x - x == 0.0, 0, 1)) > 0
    factor = tl.div_rn(127.0, tl.maximum(absmax, 1e-5))
    # Adding and taking away 1.5 * 2^23 rounds half to even.
    rounded = (x * factor + 12582912.0) - 12582912.0
    codes = tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int8)
    tl.store(code_rows + row * padded + k, codes, mask=k < padded)
    tl.store(factors + row, tl.where(broken, float("nan"), factor))
    tl.store(sums + row, tl.sum(codes.to(tl.int32)))


def norm_quantize(x: torch.Tensor, gain: torch.Tensor | None = None, eps: float = 0.0) -> Codes:
    """Normalise rows where a gain is given, then round them to int8.

    a = 127 / max(absmax, 1e-5), q = round_half_even(x * a). A row that holds NaN or infinity gets
    the factor NaN, so that what is computed from it is no number either.

    Args:
        x: float32 [tokens, columns].
        gain: float32 [columns]; None = no norm.
        eps: of the norm.
    """
    tokens, columns = x.shape
    padded = triton.cdiv(columns, COLUMN_BLOCK) * COLUMN_BLOCK
    codes = torch.empty((tokens, padded), dtype=torch.int8, device=x.device)
    factors = torch.empty(tokens, dtype=torch.float32, device=x.device)
    sums = torch.empty(tokens, dtype=torch.int32, device=x.device)
    _norm_quantize[(tokens,)](
        x,
        x if gain is None else gain,
        codes,
        factors,
        sums,
        columns,
        padded,
        eps,
        HAS_GAIN=gain is not None,
        BLOCK=triton.next_power_of_2(padded),
        num_warps=8 if padded > 2048 else 4,
        enable_fp_fusion=False,  # a fused multiply-add would round x * factor only once
    )
    return Codes(codes, factors, sums)
