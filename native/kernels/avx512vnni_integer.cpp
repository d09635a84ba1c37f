// Integer products for AVX-512 (F, BW, DQ, VL) with VNNI. _mm512_dpbusd_epi32 multiplies 64
// unsigned bytes with 64 signed ones and adds groups of four to int32, without an int16 step that
// could overflow.
//
// The native tests compile this file a second time; see avx512vnni.cpp.
#include "kernels.h"

#if defined(BITLLM_EMULATE_AVX512)
#include "../tests/emulated_avx512.h"
#elif defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#if defined(__x86_64__) || defined(_M_X64)

#include <cstddef>
#include <cstdint>
#include <cstring>

// Only what follows is compiled for AVX-512; see avx2.cpp.
#if !defined(BITLLM_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#endif

namespace bitllm {
namespace {

// Before a loop over registers of an array: GCC 12 keeps them in memory unless such loops are
// unrolled early.
#if defined(__clang__)
#define BITLLM_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define BITLLM_UNROLL _Pragma("GCC unroll 16")
#else
#define BITLLM_UNROLL
#endif

constexpr size_t WIDTH = 64;  // bytes of a register
static_assert(BLOCK_BYTES == WIDTH);

inline __m512i load_x64(const void* at) { return _mm512_loadu_si512(at); }

// The other half is 0.
inline __m512i load_x32(const void* at) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
}

inline void store_x64(void* at, __m512i values) { _mm512_storeu_si512(at, values); }

// With one token a product is bound by memory, and rows are too short for the hardware to foresee
// four of them: the bytes are asked for so far ahead.
constexpr uintptr_t PREFETCH_BYTES = 4096;

inline void prefetch(const uint8_t* at) {
    const uintptr_t ahead =
        reinterpret_cast<uintptr_t>(at) + PREFETCH_BYTES;  // may lie behind the weights
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
}

// sum_i32x16 plus the sums of groups of four products u * i. The assembly, which is empty, says
// that the sum stays where it is: without it, GCC 12 copies it to and fro.
inline void add_products(__m512i& sum_i32x16, __m512i u8x64, __m512i i8x64) {
    sum_i32x16 = _mm512_dpbusd_epi32(sum_i32x16, u8x64, i8x64);
#if defined(__GNUC__) && !defined(BITLLM_EMULATE_AVX512)
    __asm__("" : "+v"(sum_i32x16));
#endif
}

// (a) + (b) of neighbours: (a0 + a2, b0 + b2, a1 + a3, b1 + b3) of each 128 bits.
inline __m512i add_neighbours(__m512i a_i32x16, __m512i b_i32x16) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(a_i32x16, b_i32x16),
                            _mm512_unpackhi_epi32(a_i32x16, b_i32x16));
}

// The sum over the lanes of each of four registers.
inline __m128i sum_four(__m512i a_i32x16, __m512i b_i32x16, __m512i c_i32x16, __m512i d_i32x16) {
    const __m512i ab_i32x16 = add_neighbours(a_i32x16, b_i32x16);
    const __m512i cd_i32x16 = add_neighbours(c_i32x16, d_i32x16);
    const __m512i sum_i32x16 = _mm512_add_epi32(_mm512_unpacklo_epi64(ab_i32x16, cd_i32x16),
                                                _mm512_unpackhi_epi64(ab_i32x16, cd_i32x16));
    const __m256i sum_i32x8 = _mm256_add_epi32(_mm512_castsi512_si256(sum_i32x16),
                                               _mm512_extracti64x4_epi64(sum_i32x16, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8), _mm256_extracti128_si256(sum_i32x8, 1));
}

// acc[r] = the sum over the lanes of sums[r], less q_sum.
template <size_t ROWS>
inline void store_sums(const __m512i (&sums)[ROWS], int32_t q_sum, int32_t* acc) {
    static_assert(ROWS == 4 || ROWS == 1);
    if constexpr (ROWS == 4) {
        const __m128i sum_i32x4 = sum_four(sums[0], sums[1], sums[2], sums[3]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc),
                         _mm_sub_epi32(sum_i32x4, _mm_set1_epi32(q_sum)));
    } else {
        const __m512i zero = _mm512_setzero_si512();
        *acc = _mm_cvtsi128_si32(sum_four(sums[0], zero, zero, zero)) - q_sum;
    }
}

// Ternary rows
// ------------
// Codes need not be moved to the low end of their bytes: what is 4^p times too large is summed
// apart and divided at the end, exactly. A lane gets less than 2^16 from each block of 256 weights,
// so that sums stay below 2^26.
template <size_t ROWS>
inline void two_bit_tile(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                         int32_t q_sum, int32_t* acc) {
    constexpr size_t PARTS = 4;
    __m512i sums[PARTS][ROWS], bits[PARTS];
    BITLLM_UNROLL for (size_t p = 0; p < PARTS; ++p) {
        bits[p] = _mm512_set1_epi8(static_cast<char>(3 << (2 * p)));
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[p][r] = _mm512_setzero_si512();
    }
    for (size_t block = 0; block < blocks; ++block, q += PARTS * WIDTH) {
        __m512i q_i8x64[PARTS];
        BITLLM_UNROLL for (size_t p = 0; p < PARTS; ++p) q_i8x64[p] = load_x64(q + p * WIDTH);
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
            const uint8_t* at = packed + r * stride + block * WIDTH;
            prefetch(at);
            const __m512i bytes_u8x64 = load_x64(at);
            BITLLM_UNROLL for (size_t p = 0; p < PARTS; ++p)
                add_products(sums[p][r], _mm512_and_si512(bytes_u8x64, bits[p]), q_i8x64[p]);
        }
    }
    BITLLM_UNROLL for (size_t p = PARTS - 1; p > 0; --p)
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[p - 1][r] =
            _mm512_add_epi32(sums[p - 1][r], _mm512_srai_epi32(sums[p][r], 2));
    store_sums<ROWS>(sums[0], q_sum, acc);
}

// A byte v of BASE3 is a fraction of 256. Its first digit is d = (3 v - v') / 256, where v' = 3 v
// mod 256 holds the next ones. So digits are never isolated: with sums of v q and of v' q over all
// digits, sum(d q) = (3 sum(v q) - sum(v' q)) / 256, exactly. A lane gets at most 5 * 4 * 255 * 128
// from each block of 320 weights, which are 413 with k <= 2^24 / 127: three times that is 0.81e9,
// less than 2^31 even with another 0.27e9 of v' q.
inline __m512i tripled(__m512i v_u8x64) {
    return _mm512_add_epi8(_mm512_add_epi8(v_u8x64, v_u8x64), v_u8x64);
}

template <size_t ROWS>
inline void base3_tile(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                       int32_t q_sum, int32_t* acc) {
    constexpr size_t PARTS = 5;
    __m512i sums[ROWS], next_sums[ROWS];
    BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[r] = next_sums[r] = _mm512_setzero_si512();
    for (size_t block = 0; block < blocks; ++block, q += PARTS * WIDTH) {
        __m512i q_i8x64[PARTS];
        BITLLM_UNROLL for (size_t p = 0; p < PARTS; ++p) q_i8x64[p] = load_x64(q + p * WIDTH);
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
            const uint8_t* at = packed + r * stride + block * WIDTH;
            prefetch(at);
            __m512i v_u8x64 = load_x64(at);
            BITLLM_UNROLL for (size_t p = 0; p < PARTS; ++p) {
                add_products(sums[r], v_u8x64, q_i8x64[p]);
                v_u8x64 = tripled(v_u8x64);
                add_products(next_sums[r], v_u8x64, q_i8x64[p]);
            }
        }
    }
    BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
        const __m512i thrice = _mm512_add_epi32(_mm512_slli_epi32(sums[r], 1), sums[r]);
        sums[r] = _mm512_srai_epi32(_mm512_sub_epi32(thrice, next_sums[r]), 8);
    }
    store_sums<ROWS>(sums, q_sum, acc);
}

template <Packing PACKING, size_t ROWS>
inline void packed_tile(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                        int32_t q_sum, int32_t* acc) {
    if constexpr (PACKING == Packing::TWO_BIT)
        two_bit_tile<ROWS>(packed, stride, blocks, q, q_sum, acc);
    else
        base3_tile<ROWS>(packed, stride, blocks, q, q_sum, acc);
}

template <Packing PACKING>
void matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
            int32_t* acc) {
    const size_t stride = packed_row_bytes(PACKING, k), blocks = row_blocks(PACKING, k);
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        packed_tile<PACKING, 4>(packed + r * stride, stride, blocks, q, q_sum, acc + r);
    for (; r < rows; ++r)
        packed_tile<PACKING, 1>(packed + r * stride, stride, blocks, q, q_sum, acc + r);
}

inline void two_bit_codes(__m512i bytes_u8x64, uint8_t* codes) {
    const __m512i low_bits = _mm512_set1_epi8(3);
    store_x64(codes, _mm512_and_si512(bytes_u8x64, low_bits));
    store_x64(codes + WIDTH, _mm512_and_si512(_mm512_srli_epi16(bytes_u8x64, 2), low_bits));
    store_x64(codes + 2 * WIDTH, _mm512_and_si512(_mm512_srli_epi16(bytes_u8x64, 4), low_bits));
    store_x64(codes + 3 * WIDTH, _mm512_and_si512(_mm512_srli_epi16(bytes_u8x64, 6), low_bits));
}

// The first digit is 1 from a third of 256 on, and 2 from two thirds on.
inline void base3_codes(__m512i v_u8x64, uint8_t* codes) {
    const __m512i one = _mm512_set1_epi8(1);
    const __m512i third = _mm512_set1_epi8(86),
                  two_thirds = _mm512_set1_epi8(static_cast<char>(171));
    BITLLM_UNROLL for (size_t p = 0; p < 5; ++p) {
        const __m512i first = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(v_u8x64, third), one);
        const __mmask64 twice = _mm512_cmpge_epu8_mask(v_u8x64, two_thirds);
        store_x64(codes + p * WIDTH, _mm512_mask_add_epi8(first, twice, first, one));
        v_u8x64 = tripled(v_u8x64);
    }
}

template <Packing PACKING>
void unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    const size_t blocks = row_blocks(PACKING, k);
    const size_t behind = padded_columns(k) - blocks * block_weights(PACKING);
    for (size_t r = 0; r < rows; ++r) {
        for (size_t block = 0; block < blocks; ++block) {
            const __m512i bytes_u8x64 = load_x64(packed);
            if constexpr (PACKING == Packing::TWO_BIT)
                two_bit_codes(bytes_u8x64, codes);
            else
                base3_codes(bytes_u8x64, codes);
            packed += WIDTH;
            codes += block_weights(PACKING);
        }
        std::memset(codes, 1, behind);
        codes += behind;
    }
}

// Codes by tokens
// ---------------
// sums[t][r] += codes[r] * q[t], 64 columns of it or 32.
template <size_t ROWS, size_t TOKENS, class Load>
inline void add_columns(__m512i (&sums)[TOKENS][ROWS], const uint8_t* codes, size_t codes_stride,
                        const int8_t* q, size_t q_stride, Load load) {
    __m512i codes_u8x64[ROWS];
    BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) codes_u8x64[r] = load(codes + r * codes_stride);
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) {
        const __m512i q_i8x64 = load(q + t * q_stride);
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r)
            add_products(sums[t][r], codes_u8x64[r], q_i8x64);
    }
}

// With 4 rows and 6 tokens, 24 sums and the 5 registers that feed them fit into the 32 there are,
// and 10 loads feed 24 products: both of the ports that multiply are busy.
template <size_t ROWS, size_t TOKENS>
inline void codes_tile(const uint8_t* codes, size_t codes_stride, size_t k, const int8_t* q,
                       size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    __m512i sums[TOKENS][ROWS];
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t)
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[t][r] = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + WIDTH <= k; i += WIDTH)
        add_columns(sums, codes + i, codes_stride, q + i, q_stride, load_x64);
    if (i < k) add_columns(sums, codes + i, codes_stride, q + i, q_stride, load_x32);
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t)
        store_sums<ROWS>(sums[t], q_sums[t], acc + t * acc_stride);
}

// All rows by TOKENS tokens, which stay in the nearest cache while the rows pass by.
template <size_t TOKENS>
void codes_rows(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        codes_tile<4, TOKENS>(codes + r * codes_stride, codes_stride, k, q, q_stride, q_sums,
                              acc + r, acc_stride);
    for (; r < rows; ++r)
        codes_tile<1, TOKENS>(codes + r * codes_stride, codes_stride, k, q, q_stride, q_sums,
                              acc + r, acc_stride);
}

// Tiles of at most 6 tokens and of nearly the same size: small ones leave the multipliers waiting.
void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    constexpr decltype(&codes_rows<1>) BY_TOKENS[] = {codes_rows<1>, codes_rows<2>, codes_rows<3>,
                                                      codes_rows<4>, codes_rows<5>, codes_rows<6>};
    for (size_t tiles = (tokens + 5) / 6; tiles > 0; --tiles) {
        const size_t count = (tokens + tiles - 1) / tiles;
        BY_TOKENS[count - 1](codes, codes_stride, rows, k, q, q_stride, q_sums, acc, acc_stride);
        q += count * q_stride;
        q_sums += count;
        acc += count * acc_stride;
        tokens -= count;
    }
}

// Screening
// ---------
// A step of 64 bytes is one register, with 4 bytes for each of the 16 rows. The high halves of its
// bytes are used where they are, 16 times too large: their sums are below 2^15 * 2^4.
inline __m512i broadcast_four(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}

// sum(u * q) of 16 rows over one group, for q = high or low.
struct ScreenSums {
    __m512i low_half_i32x16, high_half_i32x16;

    void add_step(__m512i low_half_u8x64, __m512i high_half_u8x64, const int8_t* q) {
        add_products(low_half_i32x16, low_half_u8x64, broadcast_four(q));
        add_products(high_half_i32x16, high_half_u8x64, broadcast_four(q + 4));
    }
    __m512i total() const {
        return _mm512_add_epi32(low_half_i32x16, _mm512_srai_epi32(high_half_i32x16, 4));
    }
};

void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    constexpr size_t STEPS = SCREEN_GROUP / 8;
    static_assert(SCREEN_ROWS == 16);
    const __m512i zero = _mm512_setzero_si512();
    const __m512i low_bits = _mm512_set1_epi8(15), high_bits = _mm512_set1_epi8(-16);
    for (size_t i = 0; i < row_groups; ++i, approx += SCREEN_ROWS, spread += SCREEN_ROWS) {
        __m512 approx_f32x16 = _mm512_setzero_ps(), spread_f32x16 = _mm512_setzero_ps();
        for (size_t g = 0; g < groups; ++g, screen += SCREEN_GROUP_BYTES) {
            ScreenSums high_sums = {zero, zero}, low_sums = {zero, zero};
            for (size_t step = 0; step < STEPS; ++step) {
                prefetch(screen + step * WIDTH);
                const __m512i bytes_u8x64 = load_x64(screen + step * WIDTH);
                const __m512i low_half_u8x64 = _mm512_and_si512(bytes_u8x64, low_bits);
                const __m512i high_half_u8x64 = _mm512_and_si512(bytes_u8x64, high_bits);
                const size_t column = g * SCREEN_GROUP + 8 * step;
                high_sums.add_step(low_half_u8x64, high_half_u8x64, high + column);
                low_sums.add_step(low_half_u8x64, high_half_u8x64, low + column);
            }
            const __m512i both_i32x16 =
                _mm512_add_epi32(_mm512_slli_epi32(high_sums.total(), 8), low_sums.total());
            const __m512 exact_f32x16 =
                _mm512_cvtepi32_ps(_mm512_sub_epi32(both_i32x16, _mm512_set1_epi32(offsets[g])));
            const __m512i bits_u32x16 = _mm512_cvtepu16_epi32(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(screen + STEPS * WIDTH)));
            const __m512 scale_f32x16 = _mm512_castsi512_ps(_mm512_slli_epi32(bits_u32x16, 16));
            approx_f32x16 = _mm512_add_ps(approx_f32x16, _mm512_mul_ps(scale_f32x16, exact_f32x16));
            spread_f32x16 = _mm512_add_ps(spread_f32x16,
                                          _mm512_mul_ps(_mm512_mul_ps(scale_f32x16, scale_f32x16),
                                                        _mm512_set1_ps(squares[g])));
        }
        _mm512_storeu_ps(approx, approx_f32x16);
        _mm512_storeu_ps(spread, spread_f32x16);
    }
}

// Sums enough to hide the latency of a multiplication.
int64_t peak(size_t iterations) {
    constexpr size_t SUMS = 16;
    const __m512i one = _mm512_set1_epi8(1);
    __m512i sums[SUMS];
    BITLLM_UNROLL for (size_t s = 0; s < SUMS; ++s) sums[s] = _mm512_setzero_si512();
    for (size_t i = 0; i < iterations; ++i) {
        BITLLM_UNROLL for (size_t s = 0; s < SUMS; ++s) add_products(sums[s], one, one);
    }
    BITLLM_UNROLL for (size_t s = 1; s < SUMS; ++s) sums[0] = _mm512_add_epi32(sums[0], sums[s]);
    volatile int32_t sink =
        _mm_cvtsi128_si32(_mm512_castsi512_si128(sums[0]));  // has to be computed
    (void)sink;
    return static_cast<int64_t>(iterations * SUMS * WIDTH);
}

}  // namespace

const IntegerKernels avx512vnni_integer_kernels = {
    .packed = {{.matvec = matvec<Packing::TWO_BIT>, .unpack = unpack<Packing::TWO_BIT>},
               {.matvec = matvec<Packing::BASE3>, .unpack = unpack<Packing::BASE3>}},
    .codes_matmul = codes_matmul,
    .screen_rows = screen_rows,
    .peak = peak,
};

}  // namespace bitllm

#if !defined(BITLLM_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif

#endif
