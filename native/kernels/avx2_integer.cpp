// Integer products for AVX2.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

// Only what follows is compiled for AVX2; see avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace bitllm {
namespace {

inline int32_t sum_i32(__m256i sum_i32x8) {
    const __m128i sum_i32x4 =
        _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8), _mm256_extracti128_si256(sum_i32x8, 1));
    const __m128i sum_i32x2 = _mm_add_epi32(sum_i32x4, _mm_unpackhi_epi64(sum_i32x4, sum_i32x4));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum_i32x2, _mm_shuffle_epi32(sum_i32x2, 1)));
}

// Ternary products
// ----------------
// _mm256_maddubs_epi16 multiplies code + 1 (0 .. 2, unsigned) with q (-128 .. 127, signed) and adds
// neighbours: between 2 * 2 * -128 = -512 and 2 * 2 * 127 = 508. A block of 64 bytes takes 8 of
// them for each int16 lane, so MAX_BLOCKS = 8 blocks, 64 of them, stay within -32768 .. 32512: no
// int16 sum overflows, and each group of 8 blocks is then widened to int32.
constexpr size_t MAX_BLOCKS = 8;

struct Codes {
    __m256i u8x32[4];  // elements b, b + 64, b + 128, b + 192 of the bytes b
};

inline Codes unpack_codes(const uint8_t* packed) {
    const __m256i bytes_u8x32 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed));
    const __m256i low_bits = _mm256_set1_epi8(3);
    return {{_mm256_and_si256(bytes_u8x32, low_bits),
             _mm256_and_si256(_mm256_srli_epi16(bytes_u8x32, 2), low_bits),
             _mm256_and_si256(_mm256_srli_epi16(bytes_u8x32, 4), low_bits),
             _mm256_and_si256(_mm256_srli_epi16(bytes_u8x32, 6), low_bits)}};
}

inline __m256i load_i8x32(const int8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// With one token the tile is bound by memory, and rows are too short for the hardware to foresee
// four of them: asking for the bytes so far ahead made a Zen 3 core read 1.5 times as fast.
constexpr uintptr_t PREFETCH_BYTES = 4096;

inline void prefetch(const uint8_t* at) {
    const uintptr_t ahead =
        reinterpret_cast<uintptr_t>(at) + PREFETCH_BYTES;  // may lie behind the weights
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
}

// Keeps the compiler from reordering the additions of a tile: it would hold all products at once
// and run out of registers.
inline void settle(__m256i& sum) {
#if defined(__GNUC__)
    __asm__("" : "+x"(sum));
#endif
}

// sum_i32x8 plus neighbours of sum_i16x16.
inline __m256i widen_add(__m256i sum_i32x8, __m256i sum_i16x16) {
    return _mm256_add_epi32(sum_i32x8, _mm256_madd_epi16(sum_i16x16, _mm256_set1_epi16(1)));
}

// ROWS rows at a time, so that each piece of q is read once for all of them.
template <size_t ROWS>
inline void matvec_tile(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                        int32_t q_sum, int32_t* acc) {
    __m256i sum_i32x8[ROWS];
    for (size_t r = 0; r < ROWS; ++r) sum_i32x8[r] = _mm256_setzero_si256();
    for (size_t first = 0; first < blocks; first += MAX_BLOCKS) {
        const size_t last = first + MAX_BLOCKS < blocks ? first + MAX_BLOCKS : blocks;
        __m256i sum_i16x16[ROWS];
        for (size_t r = 0; r < ROWS; ++r) sum_i16x16[r] = _mm256_setzero_si256();
        for (size_t block = first; block < last; ++block) {
            for (size_t half = 0; half < BLOCK_BYTES; half += 32) {
                for (size_t r = 0; r < ROWS; ++r) {
                    const uint8_t* bytes = packed + r * stride + block * BLOCK_BYTES + half;
                    if (half == 0) prefetch(bytes);
                    const Codes codes = unpack_codes(bytes);
                    for (size_t part = 0; part < 4; ++part) {
                        const int8_t* at = q + (4 * block + part) * BLOCK_BYTES + half;
                        sum_i16x16[r] = _mm256_add_epi16(
                            sum_i16x16[r], _mm256_maddubs_epi16(codes.u8x32[part], load_i8x32(at)));
                        settle(sum_i16x16[r]);
                    }
                }
            }
        }
        for (size_t r = 0; r < ROWS; ++r) sum_i32x8[r] = widen_add(sum_i32x8[r], sum_i16x16[r]);
    }
    for (size_t r = 0; r < ROWS; ++r) acc[r] = sum_i32(sum_i32x8[r]) - q_sum;
}

void two_bit_matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
                    int32_t* acc) {
    const size_t stride = packed_row_bytes(Packing::TWO_BIT, k);
    const size_t blocks = row_blocks(Packing::TWO_BIT, k);
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        matvec_tile<4>(packed + r * stride, stride, blocks, q, q_sum, acc + r);
    for (; r < rows; ++r) matvec_tile<1>(packed + r * stride, stride, blocks, q, q_sum, acc + r);
}

void base3_matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
                  int32_t* acc) {
    scalar_integer_kernels.packed[1].matvec(packed, rows, k, q, q_sum, acc);
}
void two_bit_unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    scalar_integer_kernels.packed[0].unpack(packed, rows, k, codes);
}
void base3_unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    scalar_integer_kernels.packed[1].unpack(packed, rows, k, codes);
}
void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    scalar_integer_kernels.codes_matmul(codes, codes_stride, rows, k, q, q_stride, q_sums, tokens,
                                        acc, acc_stride);
}
void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    scalar_integer_kernels.screen_rows(screen, row_groups, groups, high, low, offsets, squares,
                                       approx, spread);
}

// A multiplication and an addition. To the compiler q changes each time, so that no product can be
// left out.
inline void step(__m256i& sum_i16x16, __m256i codes_u8x32, __m256i& q_i8x32) {
    settle(q_i8x32);
    sum_i16x16 = _mm256_add_epi16(sum_i16x16, _mm256_maddubs_epi16(codes_u8x32, q_i8x32));
    settle(sum_i16x16);
}

// Eight sums in registers; an array of them would lie in memory.
int64_t peak(size_t iterations) {
    constexpr size_t SUMS = 8, ROUNDS = 4;
    const __m256i codes = _mm256_set1_epi8(1);
    __m256i q = codes, a = codes, b = codes, c = codes, d = codes;
    __m256i e = codes, f = codes, g = codes, h = codes;
    for (size_t i = 0; i < ROUNDS * iterations; ++i) {
        step(a, codes, q), step(b, codes, q), step(c, codes, q), step(d, codes, q);
        step(e, codes, q), step(f, codes, q), step(g, codes, q), step(h, codes, q);
    }
    const __m256i low = _mm256_add_epi16(_mm256_add_epi16(a, b), _mm256_add_epi16(c, d));
    const __m256i high = _mm256_add_epi16(_mm256_add_epi16(e, f), _mm256_add_epi16(g, h));
    volatile int32_t sink = sum_i32(_mm256_add_epi16(low, high));  // has to be computed
    (void)sink;
    return static_cast<int64_t>(iterations * ROUNDS * SUMS * 32);
}

}  // namespace

const IntegerKernels avx2_integer_kernels = {
    .packed = {{.matvec = two_bit_matvec, .unpack = two_bit_unpack},
               {.matvec = base3_matvec, .unpack = base3_unpack}},
    .codes_matmul = codes_matmul,
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
