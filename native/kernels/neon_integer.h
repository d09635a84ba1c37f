// Integer products for NEON, the same text for CPUs with and without dot products of bytes. A file
// includes it after
//   int32x4_t dot(int32x4_t sums, int8x16_t a, int8x16_t b): adds the 16 products a[i] * b[i], each
//     of them to a lane that depends on i alone; 32 bits that wrap around;
//   template <int GROUP> int32x4_t dot_group(int32x4_t sums, int8x16_t a, int8x16_t b): adds to
//     lane j the sum over i < 4 of a[4 * j + i] * b[4 * GROUP + i], for a in 0 .. 15;
// and compiles both for its own CPUs, all in its unnamed namespace.
//
// No CPU of this kind was there to be timed on. The loops were chosen by counting vector operations
// for a core that starts four of 128 bits a cycle, has 32 registers and shifts on two of its four
// pipes only.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../prefetch.h"
#include "kernels.h"

namespace bitllm {
namespace {

// Products of a packed row
// ------------------------
// `add` takes 16 bytes of a block and the pieces of q that belong to them; `total` gives the sum of
// (code - 1) * q.

// code + 1 is not shifted down where it need not be: the products of the middle pairs of bits are 4
// and 16 times too large, add up on their own, and are shifted once, at the end. 8 operations for
// 64 weights. No lane overflows for k <= 2^24 / 127: it adds k / 16 products of at most 32 * 128.
struct TwoBitSums {
    static constexpr size_t PARTS = 4;
    int32x4_t ones, fours, sixteens;

    static TwoBitSums zero() { return {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}; }

    void add(uint8x16_t bytes, const int8x16_t (&q)[PARTS]) {
        const auto masked = [&](uint8_t bits) {
            return vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(bits)));
        };
        ones = dot(ones, masked(0x03), q[0]);
        fours = dot(fours, masked(0x0C), q[1]);
        sixteens = dot(sixteens, masked(0x30), q[2]);
        ones = dot(ones, vreinterpretq_s8_u8(vshrq_n_u8(bytes, 6)), q[3]);
    }

    int32_t total(int32_t q_sum) const {
        const int32x4_t sums_i32x4 =
            vaddq_s32(ones, vaddq_s32(vshrq_n_s32(fours, 2), vshrq_n_s32(sixteens, 4)));
        return vaddvq_s32(sums_i32x4) - q_sum;
    }
};

// Read as signed numbers after subtracting 128, the bytes give balanced digits: with s[0] = byte -
// 128 and s[i + 1] = 3 * s[i] wrapped to 8 bits, 3 * s[i] - s[i + 1] is 256 * (code of digit i).
// So nobody has to look at a digit: the sum of code * q is (3 * sum of s[i] * q - sum of s[i + 1] *
// q) / 256. 16 operations for 80 weights, with s[i] = 3^i * s[0].
//
// All of this wraps around (in unsigned operations: for compilers that defines it), but not the
// result: a lane of it is 256 times the sum of k / 4 products of code and q, below 2^31 in
// magnitude for k <= 2^24 / 127.
struct Base3Sums {
    static constexpr size_t PARTS = 5;
    int32x4_t before, after;

    static Base3Sums zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }

    void add(uint8x16_t bytes, const int8x16_t (&q)[PARTS]) {
        const uint8x16_t first = veorq_u8(bytes, vdupq_n_u8(0x80));
        const auto times = [&](uint8_t power) {
            return vreinterpretq_s8_u8(vmulq_u8(first, vdupq_n_u8(power)));
        };
        const int8x16_t s[PARTS + 1] = {times(1),  times(3),  times(9),
                                        times(27), times(81), times(243)};
        for (size_t i = 0; i < PARTS; ++i) {
            before = dot(before, s[i], q[i]);
            after = dot(after, s[i + 1], q[i]);
        }
    }

    int32_t total(int32_t) const {
        const uint32x4_t scaled_u32x4 =
            vsubq_u32(vmulq_n_u32(vreinterpretq_u32_s32(before), 3), vreinterpretq_u32_s32(after));
        return vaddvq_s32(vshrq_n_s32(vreinterpretq_s32_u32(scaled_u32x4), 8));
    }
};

// ROWS rows at a time, so that each piece of q is read once for all of them. One loop over all
// bytes: of one over blocks GCC unrolls the inner part and runs out of registers.
template <class Sums, size_t ROWS>
inline void matvec_tile(const uint8_t* packed, size_t stride, const int8_t* q, int32_t q_sum,
                        int32_t* acc) {
    Sums sums[ROWS];
    const uintptr_t ahead = tiles_ahead(ROWS * stride);
    for (size_t r = 0; r < ROWS; ++r) sums[r] = Sums::zero();
    for (size_t at = 0; at < stride; at += 16) {
        const size_t block = at / BLOCK_BYTES, piece = at % BLOCK_BYTES;
        int8x16_t q_i8x16[Sums::PARTS];
        for (size_t part = 0; part < Sums::PARTS; ++part)
            q_i8x16[part] = vld1q_s8(q + (block * Sums::PARTS + part) * BLOCK_BYTES + piece);
        for (size_t r = 0; r < ROWS; ++r) {
            if (piece == 0) prefetch(packed + (block * ROWS + r) * BLOCK_BYTES, ahead);
            sums[r].add(vld1q_u8(packed + r * stride + at), q_i8x16);
        }
    }
    for (size_t r = 0; r < ROWS; ++r) acc[r] = sums[r].total(q_sum);
}

template <Packing PACKING, class Sums>
void matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
            int32_t* acc) {
    static_assert(Sums::PARTS * BLOCK_BYTES == block_weights(PACKING));
    const size_t stride = packed_row_bytes(PACKING, k);
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        matvec_tile<Sums, 4>(packed + r * stride, stride, q, q_sum, acc + r);
    for (; r < rows; ++r) matvec_tile<Sums, 1>(packed + r * stride, stride, q, q_sum, acc + r);
}

// 16 bytes of a block to their codes, `BLOCK_BYTES` apart.
template <Packing PACKING>
inline void unpack_piece(uint8x16_t bytes, uint8_t* codes) {
    if constexpr (PACKING == Packing::TWO_BIT) {
        const uint8x16_t low_bits = vdupq_n_u8(3);
        vst1q_u8(codes, vandq_u8(bytes, low_bits));
        vst1q_u8(codes + BLOCK_BYTES, vandq_u8(vshrq_n_u8(bytes, 2), low_bits));
        vst1q_u8(codes + 2 * BLOCK_BYTES, vandq_u8(vshrq_n_u8(bytes, 4), low_bits));
        vst1q_u8(codes + 3 * BLOCK_BYTES, vshrq_n_u8(bytes, 6));
    } else {
        for (size_t part = 0; part < 5; ++part) {
            const uint8x16_t three = vdupq_n_u8(3);
            const uint8x16_t low_u16x8 =
                vreinterpretq_u8_u16(vmull_u8(vget_low_u8(bytes), vget_low_u8(three)));
            const uint8x16_t high_u16x8 = vreinterpretq_u8_u16(vmull_high_u8(bytes, three));
            vst1q_u8(codes + part * BLOCK_BYTES, vuzp2q_u8(low_u16x8, high_u16x8));
            bytes = vuzp1q_u8(low_u16x8, high_u16x8);
        }
    }
}

template <Packing PACKING>
void unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    const size_t blocks = row_blocks(PACKING, k), columns = padded_columns(k);
    for (size_t r = 0; r < rows; ++r, codes += columns) {
        uint8_t* to = codes;
        for (size_t block = 0; block < blocks; ++block, to += block_weights(PACKING))
            for (size_t piece = 0; piece < BLOCK_BYTES; piece += 16, packed += 16)
                unpack_piece<PACKING>(vld1q_u8(packed), to + piece);
        std::memset(to, 1, columns - blocks * block_weights(PACKING));
    }
}

// Products of unpacked rows
// -------------------------
inline int32x4_t sum_each(const int32x4_t (&x)[4]) {
    return vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3]));
}

// TOKENS tokens by ROWS rows, 4 or 1: 4 by 4 loads 8 registers for 16 products.
template <size_t TOKENS, size_t ROWS>
inline void codes_tile(const uint8_t* codes, size_t codes_stride, size_t k, const int8_t* q,
                       size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    static_assert(ROWS == 4 || ROWS == 1);
    int32x4_t sums[TOKENS][ROWS];
    for (size_t t = 0; t < TOKENS; ++t)
        for (size_t r = 0; r < ROWS; ++r) sums[t][r] = vdupq_n_s32(0);
    for (size_t i = 0; i < k; i += 16) {
        int8x16_t codes_i8x16[ROWS];
        for (size_t r = 0; r < ROWS; ++r)
            codes_i8x16[r] = vreinterpretq_s8_u8(vld1q_u8(codes + r * codes_stride + i));
        for (size_t t = 0; t < TOKENS; ++t) {
            const int8x16_t q_i8x16 = vld1q_s8(q + t * q_stride + i);
            for (size_t r = 0; r < ROWS; ++r) sums[t][r] = dot(sums[t][r], codes_i8x16[r], q_i8x16);
        }
    }
    for (size_t t = 0; t < TOKENS; ++t) {
        if constexpr (ROWS == 4)
            vst1q_s32(acc + t * acc_stride, vsubq_s32(sum_each(sums[t]), vdupq_n_s32(q_sums[t])));
        else
            acc[t * acc_stride] = vaddvq_s32(sums[t][0]) - q_sums[t];
    }
}

// One tile of tokens over all rows: its activations stay in the cache while the codes pass by.
template <size_t TOKENS>
void codes_rows(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        codes_tile<TOKENS, 4>(codes + r * codes_stride, codes_stride, k, q, q_stride, q_sums,
                              acc + r, acc_stride);
    for (; r < rows; ++r)
        codes_tile<TOKENS, 1>(codes + r * codes_stride, codes_stride, k, q, q_stride, q_sums,
                              acc + r, acc_stride);
}

void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    const auto tokens_at = [&]<size_t TOKENS>(size_t t) {
        codes_rows<TOKENS>(codes, codes_stride, rows, k, q + t * q_stride, q_stride, q_sums + t,
                           acc + t * acc_stride, acc_stride);
    };
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4) tokens_at.template operator()<4>(t);
    for (; t + 2 <= tokens; t += 2) tokens_at.template operator()<2>(t);
    for (; t < tokens; ++t) tokens_at.template operator()<1>(t);
}

// The screened head
// -----------------
// 16 bytes of a step are 4 rows, whose columns are 4 values of `high` and `low`, the same for all
// rows: lanes are rows, and nothing has to be added up across them.
constexpr size_t ROW_PARTS = SCREEN_ROWS / 4;

struct ScreenSums {
    int32x4_t high[ROW_PARTS], low[ROW_PARTS];

    // Two steps, for the 16 columns that a register of `high` and of `low` holds.
    void add(const uint8_t* bytes, int8x16_t high_i8x16, int8x16_t low_i8x16) {
        for (size_t part = 0; part < ROW_PARTS; ++part) {
            add_step<0>(part, vld1q_u8(bytes + 16 * part), high_i8x16, low_i8x16);
            add_step<2>(part, vld1q_u8(bytes + BLOCK_BYTES + 16 * part), high_i8x16, low_i8x16);
        }
    }

    template <int GROUP>
    void add_step(size_t part, uint8x16_t bytes, int8x16_t high_i8x16, int8x16_t low_i8x16) {
        const int8x16_t near = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
        const int8x16_t far = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
        high[part] = dot_group<GROUP>(high[part], near, high_i8x16);
        high[part] = dot_group<GROUP + 1>(high[part], far, high_i8x16);
        low[part] = dot_group<GROUP>(low[part], near, low_i8x16);
        low[part] = dot_group<GROUP + 1>(low[part], far, low_i8x16);
    }
};

void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    constexpr size_t CODE_BYTES = SCREEN_ROWS * SCREEN_GROUP / 2;
    for (size_t i = 0; i < row_groups; ++i, approx += SCREEN_ROWS, spread += SCREEN_ROWS) {
        float32x4_t approx_f32x4[ROW_PARTS], spread_f32x4[ROW_PARTS];
        for (size_t part = 0; part < ROW_PARTS; ++part)
            approx_f32x4[part] = spread_f32x4[part] = vdupq_n_f32(0.0f);
        for (size_t g = 0; g < groups; ++g, screen += SCREEN_GROUP_BYTES) {
            ScreenSums sums;
            for (size_t part = 0; part < ROW_PARTS; ++part)
                sums.high[part] = sums.low[part] = vdupq_n_s32(0);
            for (size_t column = 0; column < SCREEN_GROUP; column += 16)
                sums.add(screen + column / 8 * BLOCK_BYTES,
                         vld1q_s8(high + g * SCREEN_GROUP + column),
                         vld1q_s8(low + g * SCREEN_GROUP + column));
            const float32x4_t square = vdupq_n_f32(squares[g]);
            for (size_t part = 0; part < ROW_PARTS; ++part) {
                const uint8x8_t bits = vld1_u8(screen + CODE_BYTES + 8 * part);
                const float32x4_t scale =
                    vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vreinterpret_u16_u8(bits)), 16));
                const int32x4_t both = vaddq_s32(vshlq_n_s32(sums.high[part], 8), sums.low[part]);
                const int32x4_t exact = vsubq_s32(both, vdupq_n_s32(offsets[g]));
                approx_f32x4[part] =
                    vaddq_f32(approx_f32x4[part], vmulq_f32(scale, vcvtq_f32_s32(exact)));
                spread_f32x4[part] =
                    vaddq_f32(spread_f32x4[part], vmulq_f32(vmulq_f32(scale, scale), square));
            }
        }
        for (size_t part = 0; part < ROW_PARTS; ++part) {
            vst1q_f32(approx + 4 * part, approx_f32x4[part]);
            vst1q_f32(spread + 4 * part, spread_f32x4[part]);
        }
    }
}

// Makes the compiler believe that a value was changed, so that no product can be left out.
template <class Register>
inline void settle(Register& value) {
    __asm__("" : "+w"(value));
}

// Twelve sums, so that four pipes of latency 3 never wait, each in a variable: GCC would keep an
// array in memory. `products` is how many multiply(sums, a, b) makes.
template <class Multiply>
inline int64_t peak_of(size_t rounds, size_t products, Multiply multiply) {
    const int8x16_t a = vdupq_n_s8(1);
    int8x16_t b = a;
    const auto step = [&](int32x4_t& sum) {
        settle(b);
        sum = multiply(sum, a, b);
        settle(sum);
    };
    int32x4_t s0 = vdupq_n_s32(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
    int32x4_t s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;
    for (size_t i = 0; i < rounds; ++i) {
        step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
        step(s6), step(s7), step(s8), step(s9), step(s10), step(s11);
    }
    const int32_t total = vaddvq_s32(sum_each({s0, s1, s2, s3})) +
                          vaddvq_s32(sum_each({s4, s5, s6, s7})) +
                          vaddvq_s32(sum_each({s8, s9, s10, s11}));
    volatile int32_t sink = total;  // has to be computed
    (void)sink;
    return static_cast<int64_t>(rounds * 12 * products);
}

constexpr PackedKernels TWO_BIT_KERNELS = {.matvec = matvec<Packing::TWO_BIT, TwoBitSums>,
                                           .unpack = unpack<Packing::TWO_BIT>};
constexpr PackedKernels BASE3_KERNELS = {.matvec = matvec<Packing::BASE3, Base3Sums>,
                                         .unpack = unpack<Packing::BASE3>};

}  // namespace
}  // namespace bitllm
