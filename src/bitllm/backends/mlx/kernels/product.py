"""Integer products of int8 codes and ternary codes, a matrix-vector and a matrix-matrix kernel.

Both compute with floats, which Apple's GPUs multiply fastest: all products and sums are whole
numbers below 2^24, exact in float32 in any order.
"""

from __future__ import annotations

import mlx.core as mx

from bitllm.backends.mlx.kernels.launch import MetalKernel

__all__ = ["MATVEC_TOKENS", "TILES", "VECTOR", "multiply", "ternary_product"]

MATVEC_TOKENS = 4
"""Up to so many tokens, rows of the matrix are read for each token, and not unpacked for many."""

_VECTOR_ROWS = 8  # of a thread group: 2 SIMD groups of 4
_TILE_ROWS, _TILE_TOKENS = 64, 32

# A lane takes every 32nd word of 16 weights, for four rows at once. The weights of a byte are not
# shifted down: the activations that they meet are scaled by 1/4, 1/16 and 1/64 instead. Codes are
# weights plus one, so the sum of the activations is taken off.
_VECTOR = """
uint lane = thread_index_in_simdgroup;
uint rows = codes_shape[0];
uint first = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * 4;
uint token = threadgroup_position_in_grid.y;
float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
for (uint word = lane; word < uint(WORDS); word += 32) {
    float x[16];
    float all = 0.0f;
    for (uint part = 0; part < 4; ++part) {
        uint four = activations[(token * WORDS + word) * 4 + part];
        float x0 = float(int(four << 24) >> 24);
        float x1 = float(int(four << 16) >> 24);
        float x2 = float(int(four << 8) >> 24);
        float x3 = float(int(four) >> 24);
        all += x0 + x1 + x2 + x3;
        x[4 * part] = x0;
        x[4 * part + 1] = x1 * 0.25f;
        x[4 * part + 2] = x2 * 0.0625f;
        x[4 * part + 3] = x3 * 0.015625f;
    }
    for (uint index = 0; index < 4; ++index) {
        uint row = min(first + index, rows - 1);
        uint weights = codes[row * WORDS + word];
        float sum = -all;
        for (uint part = 0; part < 4; ++part) {
            sum += float(weights & 0x03u) * x[4 * part] + float(weights & 0x0cu) * x[4 * part + 1] +
                   float(weights & 0x30u) * x[4 * part + 2] +
                   float(weights & 0xc0u) * x[4 * part + 3];
            weights >>= 8;
        }
        sums[index] += sum;
    }
}
for (uint index = 0; index < 4; ++index) {
    float sum = simd_sum(sums[index]);
    if (lane == 0 && first + index < rows) {
        products[token * rows + first + index] = sum;
    }
}
"""

# Four SIMD groups share a tile of 64 rows and 32 tokens. 32 columns at a time are unpacked into
# halves, which hold every code; each SIMD group multiplies 16 tokens with 32 rows in pieces of 8 x
# 8, adding in float32.
_TILES = """
threadgroup half weight_tile[64 * 32];
threadgroup half token_tile[32 * 32];
threadgroup float sum_tile[32 * 64];
uint thread_index = thread_position_in_threadgroup.x;
uint rows = codes_shape[0];
uint tokens = activations_shape[0];
uint first_row = threadgroup_position_in_grid.x * 64;
uint first_token = threadgroup_position_in_grid.y * 32;
uint my_row = simdgroup_index_in_threadgroup % 2 * 32;
uint my_token = simdgroup_index_in_threadgroup / 2 * 16;
simdgroup_float8x8 sums[2][4];
for (uint i = 0; i < 2; ++i) {
    for (uint j = 0; j < 4; ++j) {
        sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
}
for (uint column = 0; column < uint(WORDS) * 16; column += 32) {
    uint row = first_row + thread_index / 2;
    uint weights = 0x55555555u;
    if (row < rows) {
        weights = codes[row * WORDS + column / 16 + thread_index % 2];
    }
    for (uint i = 0; i < 16; ++i) {
        weight_tile[thread_index * 16 + i] = half(int((weights >> (2 * i)) & 3u) - 1);
    }
    for (uint part = thread_index; part < 256; part += 128) {
        uint token = first_token + part / 8;
        uint four = 0;
        if (token < tokens) {
            four = activations[token * WORDS * 4 + column / 4 + part % 8];
        }
        for (uint i = 0; i < 4; ++i) {
            token_tile[part * 4 + i] = half(int(four << (24 - 8 * i)) >> 24);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < 32; k += 8) {
        simdgroup_half8x8 left[2];
        simdgroup_half8x8 right[4];
        for (uint i = 0; i < 2; ++i) {
            simdgroup_load(left[i], token_tile + (my_token + 8 * i) * 32 + k, 32);
        }
        for (uint j = 0; j < 4; ++j) {
            simdgroup_load(right[j], weight_tile + (my_row + 8 * j) * 32 + k, 32, ulong2(0, 0),
                           true);
        }
        for (uint i = 0; i < 2; ++i) {
            for (uint j = 0; j < 4; ++j) {
                simdgroup_multiply_accumulate(sums[i][j], left[i], right[j], sums[i][j]);
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (uint i = 0; i < 2; ++i) {
    for (uint j = 0; j < 4; ++j) {
        simdgroup_store(sums[i][j], sum_tile + (my_token + 8 * i) * 64 + my_row + 8 * j, 64);
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint place = thread_index; place < 32 * 64; place += 128) {
    uint token = first_token + place / 64;
    uint row = first_row + place % 64;
    if (token < tokens && row < rows) {
        products[token * rows + row] = sum_tile[place];
    }
}
"""

_ARRAYS = ("codes", "activations")
VECTOR = MetalKernel("ternary_vector", _ARRAYS, ("products",), _VECTOR, threads=64)
TILES = MetalKernel("ternary_tiles", _ARRAYS, ("products",), _TILES, threads=128)


def ternary_product(codes: mx.array, activations: mx.array) -> mx.array:
    """Multiply int8 codes with ternary codes.

    Args:
        codes: weights plus one, 16 a word, low bits first, uint32 [rows, words], an even number of
            words.
        activations: four int8 codes a word, uint32 [tokens, 4 * words].

    Returns:
        Whole numbers in float32 [tokens, rows].
    """
    return multiply(VECTOR if len(activations) <= MATVEC_TOKENS else TILES, codes, activations)


def multiply(kernel: MetalKernel, codes: mx.array, activations: mx.array) -> mx.array:
    """Multiply with `VECTOR` or `TILES`; else like `ternary_product`."""
    tokens, (rows, words) = len(activations), codes.shape
    groups = (-(-rows // _VECTOR_ROWS), tokens)
    if kernel is TILES:
        groups = (-(-rows // _TILE_ROWS), -(-tokens // _TILE_TOKENS))
    (products,) = kernel(
        [codes, activations],
        constants={"WORDS": words},
        groups=groups,
        results=[((tokens, rows), mx.float32)],
    )
    return products
