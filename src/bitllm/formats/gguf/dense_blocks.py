"""Decoding the block types that hold embeddings and heads: Q8_0, Q6_K, Q4_0 and Q4_K to float32.

The products of scales and integers are exact in float32, so nothing is lost that the file holds;
16-bit floats could not hold them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitllm.formats.gguf.ggml_types import GgmlType

__all__ = ["decode_quantized"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_BAND_BYTES = 1 << 20


def decode_quantized(kind: GgmlType, data: U8, shape: tuple[int, ...]) -> F32:
    """Decode a tensor of a quantised type, a band of blocks at a time.

    Args:
        kind: its type, of kind "quantized".
        data: its bytes, uint8 [n], n as `kind.size(shape)` says.
        shape: the fastest axis last.

    Returns:
        float32 [shape].
    """
    decode = _DECODERS[kind.name]
    blocks = data.reshape(-1, kind.block_bytes)
    values = np.empty((len(blocks), kind.block), np.float32)
    step = max(1, _BAND_BYTES // kind.block_bytes)
    for start in range(0, len(blocks), step):
        band = blocks[start : start + step]
        values[start : start + step] = decode(band).reshape(len(band), kind.block)
    return values.reshape(shape)


def _halves(blocks: U8, start: int) -> F32:
    """The float16 at byte `start` of each block, float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _q8_0(blocks: U8) -> F32:
    """Scale, then 32 int8."""
    return _halves(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: U8) -> F32:
    """Scale, then 16 bytes: the first half of the block in the low nibbles, plus 8."""
    low, high = blocks[:, 2:] & np.uint8(15), blocks[:, 2:] >> np.uint8(4)
    values = np.concatenate([low, high], axis=1).astype(np.float32) - np.float32(8)
    return _halves(blocks, 0) * values


def _q6_k(blocks: U8) -> F32:
    """Decode 128 bytes of low nibbles, 64 of high pairs, 16 int8 scales, a float16 scale of those.

    Each half of the block has 128 values in four runs of 32. The low nibbles of its 64 bytes are
    runs 0 and 1, the high ones 2 and 3; pair n of its 32 bytes of pairs belongs to run n.
    """
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=2).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((high >> shifts) & np.uint8(3)) << np.uint8(4)
    values = (low | high).astype(np.float32).reshape(-1, 16, 16) - np.float32(32)
    scales = _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales[..., None] * values


def _q4_k(blocks: U8) -> F32:
    """Decode two float16, 8 packed pairs of scale and offset, and 128 bytes of nibbles.

    Runs of 32 values: run 2 n is the low nibbles of 32 bytes, run 2 n + 1 the high ones. A value is
    d * scale * nibble - dmin * offset.
    """
    scales, offsets = _q4_k_scales(blocks[:, 4:16])
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32)
    nibbles = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=2)
    values = nibbles.reshape(-1, 8, 32).astype(np.float32)
    factors = (_halves(blocks, 0) * scales.astype(np.float32))[..., None]
    return factors * values - (_halves(blocks, 2) * offsets.astype(np.float32))[..., None]


def _q4_k_scales(packed: U8) -> tuple[U8, U8]:
    """Unpack 8 scales and 8 offsets of 6 bits from 12 bytes, uint8 [n, 12] -> two of [n, 8].

    The first four of each are the low six bits of bytes 0..3 and 4..7; the last four have their low
    nibbles in bytes 8..11 and their high pairs on top of the first four.
    """
    scales, offsets, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    low = np.uint8(63)
    late_scales = (mixed & np.uint8(15)) | ((scales >> np.uint8(6)) << np.uint8(4))
    late_offsets = (mixed >> np.uint8(4)) | ((offsets >> np.uint8(6)) << np.uint8(4))
    return (
        np.concatenate([scales & low, late_scales], axis=1),
        np.concatenate([offsets & low, late_offsets], axis=1),
    )


_DECODERS: dict[str, Callable[[U8], F32]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q6_K": _q6_k,
    "Q4_K": _q4_k,
}
