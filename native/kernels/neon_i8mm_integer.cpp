// Integer products for NEON with dot products and with products of matrices of bytes (dotprod and
// i8mm): the latter for many tokens.
#include "kernels.h"

#if defined(BITLLM_NEON_EXTENSIONS)

#include <arm_neon.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../prefetch.h"

// Only what follows is compiled for the extensions; see avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

namespace bitllm {
namespace {

inline int32x4_t dot(int32x4_t sums, int8x16_t a, int8x16_t b) { return vdotq_s32(sums, a, b); }

template <int GROUP>
inline int32x4_t dot_group(int32x4_t sums, int8x16_t a, int8x16_t b) {
    return vdotq_laneq_s32(sums, a, b, GROUP);
}

}  // namespace
}  // namespace bitllm

#include "neon_integer.h"

namespace bitllm {
namespace {

// vmmlaq_s32 multiplies two rows of 8 bytes with two others and adds the 4 sums. Its operands are
// pairs of rows, which lie apart; so pieces of the rows are first laid out in pairs, where both the
// codes and the activations serve many tiles:
//   pairs[step][p] = 8 bytes of row 2 p, then 8 of row 2 p + 1, of columns 8 * step ..
// for TILE rows, those that are missing as zeros. A tile is then TILE tokens by TILE rows.
constexpr size_t TILE = 8, PAIRS = TILE / 2;
constexpr size_t PIECE = 512;        // columns laid out at a time
constexpr size_t GROUP_TOKENS = 32;  // tokens laid out at a time: 16 KiB
constexpr size_t STEP_BYTES = 8 * TILE;

inline void lay_out_pairs(const int8_t* rows, size_t stride, size_t count, size_t columns,
                          int8_t* pairs) {
    for (size_t p = 0; p < PAIRS; ++p) {
        const int8_t* even = rows + 2 * p * stride;
        for (size_t i = 0; i < columns; i += 16) {
            int64x2_t even_i64x2 = vdupq_n_s64(0), odd_i64x2 = vdupq_n_s64(0);
            if (2 * p < count) even_i64x2 = vreinterpretq_s64_s8(vld1q_s8(even + i));
            if (2 * p + 1 < count) odd_i64x2 = vreinterpretq_s64_s8(vld1q_s8(even + stride + i));
            int8_t* at = pairs + i / 8 * STEP_BYTES + 16 * p;
            vst1q_s8(at, vreinterpretq_s8_s64(vzip1q_s64(even_i64x2, odd_i64x2)));
            vst1q_s8(at + STEP_BYTES, vreinterpretq_s8_s64(vzip2q_s64(even_i64x2, odd_i64x2)));
        }
    }
}

inline void add_row(int32_t* acc, size_t rows, int64x2_t low_rows, int64x2_t high_rows) {
    if (rows == TILE) {
        vst1q_s32(acc, vaddq_s32(vld1q_s32(acc), vreinterpretq_s32_s64(low_rows)));
        vst1q_s32(acc + 4, vaddq_s32(vld1q_s32(acc + 4), vreinterpretq_s32_s64(high_rows)));
        return;
    }
    int32_t sums[TILE];
    vst1q_s32(sums, vreinterpretq_s32_s64(low_rows));
    vst1q_s32(sums + 4, vreinterpretq_s32_s64(high_rows));
    for (size_t r = 0; r < rows; ++r) acc[r] += sums[r];
}

// Adds the products of `tokens` and `rows`, both at most TILE.
inline void pairs_tile(const int8_t* code_pairs, size_t rows, size_t columns, const int8_t* q_pairs,
                       size_t tokens, int32_t* acc, size_t acc_stride) {
    int32x4_t sums[PAIRS][PAIRS];  // tokens 2 t and 2 t + 1 by rows 2 r and 2 r + 1
    for (size_t t = 0; t < PAIRS; ++t)
        for (size_t r = 0; r < PAIRS; ++r) sums[t][r] = vdupq_n_s32(0);
    for (size_t at = 0; at < columns * TILE; at += STEP_BYTES) {
        int8x16_t codes_i8x16[PAIRS];
        for (size_t r = 0; r < PAIRS; ++r) codes_i8x16[r] = vld1q_s8(code_pairs + at + 16 * r);
        for (size_t t = 0; t < PAIRS; ++t) {
            const int8x16_t q_i8x16 = vld1q_s8(q_pairs + at + 16 * t);
            for (size_t r = 0; r < PAIRS; ++r)
                sums[t][r] = vmmlaq_s32(sums[t][r], q_i8x16, codes_i8x16[r]);
        }
    }
    for (size_t t = 0; t < PAIRS; ++t) {
        int64x2_t row_pairs[PAIRS];
        for (size_t r = 0; r < PAIRS; ++r) row_pairs[r] = vreinterpretq_s64_s32(sums[t][r]);
        int32_t* at = acc + 2 * t * acc_stride;
        if (2 * t < tokens)
            add_row(at, rows, vzip1q_s64(row_pairs[0], row_pairs[1]),
                    vzip1q_s64(row_pairs[2], row_pairs[3]));
        if (2 * t + 1 < tokens)
            add_row(at + acc_stride, rows, vzip2q_s64(row_pairs[0], row_pairs[1]),
                    vzip2q_s64(row_pairs[2], row_pairs[3]));
    }
}

void paired_codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k,
                         const int8_t* q, size_t q_stride, const int32_t* q_sums, size_t tokens,
                         int32_t* acc, size_t acc_stride) {
    // To lay out codes for less than half a tile costs more than it saves.
    const size_t rest = tokens % TILE <= PAIRS ? tokens % TILE : 0, paired = tokens - rest;
    codes_matmul(codes, codes_stride, rows, k, q + paired * q_stride, q_stride, q_sums + paired,
                 rest, acc + paired * acc_stride, acc_stride);

    alignas(16) int8_t q_pairs[GROUP_TOKENS * PIECE], code_pairs[TILE * PIECE];
    for (size_t t = 0; t < paired; ++t) std::fill_n(acc + t * acc_stride, rows, -q_sums[t]);
    for (size_t first = 0; first < paired; first += GROUP_TOKENS) {
        const size_t last = std::min(first + GROUP_TOKENS, paired);
        for (size_t column = 0; column < k; column += PIECE) {
            const size_t columns = std::min(PIECE, k - column);
            for (size_t t = first; t < last; t += TILE)
                lay_out_pairs(q + t * q_stride + column, q_stride, last - t, columns,
                              q_pairs + (t - first) * PIECE);
            for (size_t r = 0; r < rows; r += TILE) {
                lay_out_pairs(reinterpret_cast<const int8_t*>(codes + r * codes_stride + column),
                              codes_stride, rows - r, columns, code_pairs);
                for (size_t t = first; t < last; t += TILE)
                    pairs_tile(code_pairs, std::min(TILE, rows - r), columns,
                               q_pairs + (t - first) * PIECE, std::min(TILE, last - t),
                               acc + t * acc_stride + r, acc_stride);
            }
        }
    }
}

int64_t peak(size_t iterations) {
    return peak_of(3 * iterations, 32,
                   [](int32x4_t sums, int8x16_t a, int8x16_t b) { return vmmlaq_s32(sums, a, b); });
}

}  // namespace

constinit const IntegerKernels neon_i8mm_integer_kernels = {
    .packed = {TWO_BIT_KERNELS, BASE3_KERNELS},
    .codes_matmul = paired_codes_matmul,
    .screen_rows = screen_rows,
    .peak = peak,
};

}  // namespace bitllm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
