"""Ternary products: int8 codes of activations times 2-bit codes of weights, on int8 tensor cores.

The packing of the device: a row in blocks of 256 columns, 64 bytes each; bits 2j of byte b hold
code + 1 of column 64 j + b of the block. So each of the four shifts of a tile of bytes is a tile of
64 neighbouring columns, which a tensor core multiplies with as many neighbouring activations. The
codes are multiplied as 0, 1, 2, and the sum of the activations is taken away once at the end.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from bitllm.backends.cuda.kernels.quantize import COLUMN_BLOCK, Codes
from bitllm.checkpoint import Activation

__all__ = ["GROUP_UNIT", "gated_product", "grouped_product", "pack_rows", "ternary_product"]

GROUP_UNIT = COLUMN_BLOCK // 4
"""Groups that share a scale have a multiple of so many columns."""

_SLICE = GROUP_UNIT  # bytes of a block, and columns of each of its four slices
_ZERO_WEIGHTS = 0b01010101


def pack_rows(packed: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Turn the canonical packing into that of the device.

    Args:
        packed: uint8 [out, ceil(columns / 4)], four neighbouring columns in a byte.
        columns: of the matrix.

    Returns:
        uint8 [out, 64 * blocks], filled up with weights of zero.
    """
    out, blocks = len(packed), -(-columns // COLUMN_BLOCK)
    filled = np.full((out, blocks * _SLICE), _ZERO_WEIGHTS, np.uint8)
    filled[:, : packed.shape[1]] = packed
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    codes = (filled[:, :, None] >> shifts) & np.uint8(3)
    slices = codes.reshape(out, blocks, 4, _SLICE)
    bytes_of = np.bitwise_or.reduce(slices << shifts[:, None], axis=2)
    return np.asarray(bytes_of.reshape(out, blocks * _SLICE), np.uint8)


@triton.jit
def _accumulate(
    x_codes,
    weights,
    first_row,
    first_column,
    tokens,
    out,
    padded,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the int32 sums of codes times (code + 1) for a tile."""
    SLICE: tl.constexpr = 64
    rows, columns, b = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, SLICE)
    row_mask, column_mask = first_row + rows < tokens, first_column + columns < out
    # Numbers of 64 bits only for where the tile begins: offsets within it take fewer registers.
    x_tile = x_codes + first_row.to(tl.int64) * padded
    w_tile = weights + first_column.to(tl.int64) * (padded // 4)
    x_offsets = rows[:, None] * padded + b[None, :]
    w_offsets = columns[None, :] * (padded // 4) + b[:, None]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for _ in range(0, padded, 4 * SLICE):
        packed = tl.load(w_tile + w_offsets, mask=column_mask[None, :], other=0)
        for j in tl.static_range(4):
            x = tl.load(x_tile + j * SLICE + x_offsets, mask=row_mask[:, None], other=0)
            sums = tl.dot(x, ((packed >> (2 * j)) & 3).to(tl.int8), sums, out_dtype=tl.int32)
        x_tile += 4 * SLICE
        w_tile += SLICE
    return sums


@triton.jit
def _ternary_product(
    x_codes,
    factors,
    x_sums,
    weights,
    scales,
    bias,
    y,
    tokens,
    out,
    padded,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row, first_column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    sums = _accumulate(
        x_codes, weights, first_row, first_column, tokens, out, padded, ROWS, COLUMNS
    )
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < tokens, columns < out
    sums -= tl.load(x_sums + rows, mask=row_mask, other=0)[:, None]
    factor = tl.load(factors + rows, mask=row_mask, other=1.0)
    scale = tl.load(scales + columns, mask=column_mask, other=0.0)
    values = tl.div_rn(sums.to(tl.float32), factor[:, None] + tl.zeros_like(scale)[None, :])
    values = values * scale[None, :]
    if HAS_BIAS:
        values += tl.load(bias + columns, mask=column_mask, other=0.0)[None, :]
    where = y + first_row.to(tl.int64) * out + (rows - first_row)[:, None] * out + columns[None, :]
    tl.store(where, values, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _gated_product(
    x_codes,
    factors,
    x_sums,
    weights,
    scales,
    bias,
    y,
    tokens,
    out,
    padded,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row, first_column = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    gate = _accumulate(
        x_codes, weights, first_row, first_column, tokens, out, padded, ROWS, COLUMNS
    )
    up_weights = weights + out.to(tl.int64) * (padded // 4)
    up = _accumulate(
        x_codes, up_weights, first_row, first_column, tokens, out, padded, ROWS, COLUMNS
    )
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < tokens, columns < out
    x_sum = tl.load(x_sums + rows, mask=row_mask, other=0)[:, None]
    factor = tl.load(factors + rows, mask=row_mask, other=1.0)
    scale = tl.load(scales + columns, mask=column_mask, other=0.0)
    factor = factor[:, None] + tl.zeros_like(scale)[None, :]
    gate = tl.div_rn((gate - x_sum).to(tl.float32), factor) * scale[None, :]
    scale = tl.load(scales + out + columns, mask=column_mask, other=0.0)
    up = tl.div_rn((up - x_sum).to(tl.float32), factor) * scale[None, :]
    if HAS_BIAS:
        gate += tl.load(bias + columns, mask=column_mask, other=0.0)[None, :]
        up += tl.load(bias + out + columns, mask=column_mask, other=0.0)[None, :]
    if ACTIVATION == "relu2":
        # A comparison, and not max(), which drops NaN.
        gate = tl.where(gate < 0.0, 0.0, gate)
        gate = gate * gate
    elif ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    else:
        u = 0.7978845608 * (gate + 0.044715 * gate * gate * gate)  # sqrt(2 / pi)
        gate = 0.5 * gate * (2.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))  # 1 + tanh(u)
    where = y + first_row.to(tl.int64) * out + (rows - first_row)[:, None] * out + columns[None, :]
    tl.store(where, gate * up, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _grouped_product(
    x_codes,
    factors,
    weights,
    scales,
    bias,
    y,
    tokens,
    out,
    padded,
    columns,
    groups,
    GROUP_SLICES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    SLICE: tl.constexpr = 64
    first_row, first_out = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    rows, outs, b = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, SLICE)
    row_mask, out_mask = first_row + rows < tokens, first_out + outs < out
    x_tile = x_codes + first_row.to(tl.int64) * padded
    w_tile = weights + first_out.to(tl.int64) * (padded // 4)
    x_offsets = rows[:, None] * padded + b[None, :]
    w_offsets = outs[None, :] * (padded // 4) + b[:, None]
    factor = tl.load(factors + first_row + rows, mask=row_mask, other=1.0)
    factor = factor[:, None] + tl.zeros((ROWS, COLUMNS), tl.float32)
    slices = (columns + SLICE - 1) // SLICE
    values = tl.zeros((ROWS, COLUMNS), tl.float32)
    for group in range(groups):
        sums = tl.zeros((ROWS, COLUMNS), tl.int32)
        x_sums = tl.zeros((ROWS,), tl.int32)
        end = tl.minimum((group + 1) * GROUP_SLICES, slices)
        for index in range(group * GROUP_SLICES, end):
            x = tl.load(x_tile + index * SLICE + x_offsets, mask=row_mask[:, None], other=0)
            block = w_tile + (index // 4) * SLICE
            packed = tl.load(block + w_offsets, mask=out_mask[None, :], other=0)
            codes = ((packed >> (2 * (index % 4))) & 3).to(tl.int8)
            sums = tl.dot(x, codes, sums, out_dtype=tl.int32)
            x_sums += tl.sum(x.to(tl.int32), axis=1)
        where = scales + (first_out + outs).to(tl.int64) * groups + group
        scale = tl.load(where, mask=out_mask, other=0.0)
        values += tl.div_rn((sums - x_sums[:, None]).to(tl.float32), factor) * scale[None, :]
    if HAS_BIAS:
        values += tl.load(bias + first_out + outs, mask=out_mask, other=0.0)[None, :]
    place = y + first_row.to(tl.int64) * out + rows[:, None] * out + (first_out + outs)[None, :]
    tl.store(place, values, mask=row_mask[:, None] & out_mask[None, :])


def _tile(tokens: int, generation: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and the warps that compute it.

    Args:
        tokens: of the step.
        generation: of the GPU, its major compute capability; sums of larger tiles than these spill
            registers (tests/test_cuda_compiled.py).
    """
    if tokens <= 16:
        return 16, 32, 4
    if tokens <= 64:
        return 32, 64, 4
    return 128, 128 if generation >= 9 else 64, 8


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def ternary_product(
    x: Codes, weights: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return (codes @ weights / factor) * scale + bias, float32 [tokens, out].

    Args:
        x: the activations.
        weights: uint8 [out, padded columns / 4] in the packing of the device.
        scales: float32 [out].
        bias: float32 [out], or None.
    """
    (tokens, padded), out = x.codes.shape, len(weights)
    y = torch.empty((tokens, out), dtype=torch.float32, device=weights.device)
    rows, columns, warps = _tile(tokens, _generation(weights.device))
    _ternary_product[(triton.cdiv(out, columns), triton.cdiv(tokens, rows))](
        x.codes,
        x.factors,
        x.sums,
        weights,
        scales,
        scales if bias is None else bias,
        y,
        tokens,
        out,
        padded,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y


def _grouped_tile(tokens: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile of `grouped_product`, and its warps: it has two sums."""
    return (16, 32, 4) if tokens <= 16 else (64, 64, 8)


def grouped_product(
    x: Codes,
    weights: torch.Tensor,
    scales: torch.Tensor,
    columns: int,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum over groups of (codes @ weights / factor) * scale, + bias.

    Args:
        x: the activations.
        weights: uint8 [out, padded columns / 4] in the packing of the device.
        scales: float32 [out, groups].
        columns: of the matrix.
        group_size: columns that share a scale, a multiple of `GROUP_UNIT`.
        bias: float32 [out], or None.

    Returns:
        float32 [tokens, out]; the groups are added in order, so it is the reference's to the bit.
    """
    (tokens, padded), out = x.codes.shape, len(weights)
    y = torch.empty((tokens, out), dtype=torch.float32, device=weights.device)
    rows, outs, warps = _grouped_tile(tokens)
    _grouped_product[(triton.cdiv(out, outs), triton.cdiv(tokens, rows))](
        x.codes,
        x.factors,
        weights,
        scales,
        scales if bias is None else bias,
        y,
        tokens,
        out,
        padded,
        columns,
        scales.shape[1],
        GROUP_SLICES=group_size // GROUP_UNIT,
        HAS_BIAS=bias is not None,
        ROWS=rows,
        COLUMNS=outs,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y


def gated_product(
    x: Codes,
    weights: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    activation: Activation,
) -> torch.Tensor:
    """Return act(gate) * up, float32 [tokens, out]; both products as in `ternary_product`.

    Args:
        x: the activations.
        weights: uint8 [2 * out, padded columns / 4]: the rows of gate, then those of up.
        scales: float32 [2 * out].
        bias: float32 [2 * out], or None.
        activation: of the gate.
    """
    (tokens, padded), out = x.codes.shape, len(weights) // 2
    y = torch.empty((tokens, out), dtype=torch.float32, device=weights.device)
    rows, columns, warps = _tile(tokens, _generation(weights.device))
    _gated_product[(triton.cdiv(out, columns), triton.cdiv(tokens, rows))](
        x.codes,
        x.factors,
        x.sums,
        weights,
        scales,
        scales if bias is None else bias,
        y,
        tokens,
        out,
        padded,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return y
