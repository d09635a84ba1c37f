// Integer products for AVX2.
//
// _mm256_maddubs_epi16 multiplies 32 unsigned bytes with 32 signed ones and adds neighbours into 16
// int16; a code times q lies in 2 * -128 .. 2 * 127, so a pair in -512 .. 508, and 64 pairs in
// -32768 .. 32512: MAX_PAIRS products can be added up in int16 before they are widened to int32.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

// Only what follows is compiled for AVX2; see avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

namespace bitllm {
namespace {

constexpr size_t WIDTH = 32;  // bytes of a register
constexpr size_t MAX_PAIRS = 64;

inline __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
inline void store(void* at, __m256i values) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), values);
}

// sum_i16x16 plus the products of 32 codes.
inline __m256i add_pairs(__m256i sum_i16x16, __m256i codes_u8x32, __m256i q_i8x32) {
    return _mm256_add_epi16(sum_i16x16, _mm256_maddubs_epi16(codes_u8x32, q_i8x32));
}

// Sums of neighbours.
inline __m256i widen(__m256i sum_i16x16) {
    return _mm256_madd_epi16(sum_i16x16, _mm256_set1_epi16(1));
}

// Keeps the compiler from reordering the additions of a tile: it would hold all products at once
// and run out of registers.
inline void settle(__m256i& sum) {
#if defined(__GNUC__)
    __asm__("" : "+x"(sum));
#endif
}

inline __m128i add_halves(__m256i sum_i32x8) {
    return _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8), _mm256_extracti128_si256(sum_i32x8, 1));
}

inline int32_t total(__m256i sum_i32x8) {
    const __m128i sum_i32x4 = add_halves(sum_i32x8);
    const __m128i sum_i32x2 = _mm_add_epi32(sum_i32x4, _mm_unpackhi_epi64(sum_i32x4, sum_i32x4));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum_i32x2, _mm_shuffle_epi32(sum_i32x2, 1)));
}

// The totals of four registers, side by side.
inline __m128i totals(const __m256i (&sums)[4]) {
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(sums[0], sums[1]),
                                        _mm256_unpackhi_epi32(sums[0], sums[1]));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(sums[2], sums[3]),
                                        _mm256_unpackhi_epi32(sums[2], sums[3]));
    return add_halves(
        _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd)));
}

// With one token a product is bound by memory, and rows are too short for the hardware to foresee
// four of them: asking for the bytes so far ahead made a Zen 3 core read 1.5 times as fast.
constexpr uintptr_t PREFETCH_BYTES = 4096;

inline void prefetch(const uint8_t* at) {
    const uintptr_t ahead =
        reinterpret_cast<uintptr_t>(at) + PREFETCH_BYTES;  // may lie behind the weights
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
}

// Four weights in 2 bits
// ----------------------
// Shifts of bytes are words that are shifted and masked. A code that is masked where it is, in bits
// 2 and 3, counts four times; so one shift is enough for four codes, and sums of single and of
// fourfold codes are kept apart until the fourfold ones are 16 pairs, which fill int16: 4 blocks.
struct TwoBit {
    static constexpr Packing PACKING = Packing::TWO_BIT;
    static constexpr size_t PARTS = 4;
    static constexpr size_t MAX_BLOCKS = 4;

    struct Sum {
        __m256i single_i16x16, fourfold_i16x16;

        static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
        void add(__m256i packed_u8x32, const int8_t* q) {
            const __m256i bits01 = _mm256_set1_epi8(3), bits23 = _mm256_set1_epi8(12);
            const __m256i upper_u8x32 = _mm256_srli_epi16(packed_u8x32, 4);
            single_i16x16 =
                add_pairs(single_i16x16, _mm256_and_si256(packed_u8x32, bits01), load(q));
            settle(single_i16x16);
            fourfold_i16x16 = add_pairs(fourfold_i16x16, _mm256_and_si256(packed_u8x32, bits23),
                                        load(q + BLOCK_BYTES));
            settle(fourfold_i16x16);
            single_i16x16 = add_pairs(single_i16x16, _mm256_and_si256(upper_u8x32, bits01),
                                      load(q + 2 * BLOCK_BYTES));
            settle(single_i16x16);
            fourfold_i16x16 = add_pairs(fourfold_i16x16, _mm256_and_si256(upper_u8x32, bits23),
                                        load(q + 3 * BLOCK_BYTES));
            settle(fourfold_i16x16);
        }
        // At most 32 pairs of single codes and 16 of fourfold ones, which are 16 after the shift.
        __m256i total_i32x8() const {
            return widen(_mm256_add_epi16(single_i16x16, _mm256_srai_epi16(fourfold_i16x16, 2)));
        }
    };

    static void digits(__m256i packed_u8x32, __m256i (&codes_u8x32)[PARTS]) {
        const __m256i low_bits = _mm256_set1_epi8(3);
        codes_u8x32[0] = _mm256_and_si256(packed_u8x32, low_bits);
        codes_u8x32[1] = _mm256_and_si256(_mm256_srli_epi16(packed_u8x32, 2), low_bits);
        codes_u8x32[2] = _mm256_and_si256(_mm256_srli_epi16(packed_u8x32, 4), low_bits);
        codes_u8x32[3] = _mm256_and_si256(_mm256_srli_epi16(packed_u8x32, 6), low_bits);
    }
};

// Five weights in 8 bits
// ----------------------
// Nine times a fraction is two digits, 0 .. 8, and 8 bits that are the fraction of the digits
// behind them. Bytes are multiplied as words: one in the upper half of its word leaves its digits
// to the multiplication that returns the upper half, one in the lower half to the upper half of the
// plain product. Two tables then turn two digits into each of them.
struct Base3 {
    static constexpr Packing PACKING = Packing::BASE3;
    static constexpr size_t PARTS = 5;
    static constexpr size_t MAX_BLOCKS = MAX_PAIRS / (2 * PARTS);

    struct Sum {
        __m256i sum_i16x16;

        static Sum zero() { return {_mm256_setzero_si256()}; }
        void add(__m256i packed_u8x32, const int8_t* q) {
            __m256i codes_u8x32[PARTS];
            digits(packed_u8x32, codes_u8x32);
            for (size_t part = 0; part < PARTS; ++part) {
                sum_i16x16 = add_pairs(sum_i16x16, codes_u8x32[part], load(q + part * BLOCK_BYTES));
                settle(sum_i16x16);
            }
        }
        __m256i total_i32x8() const { return widen(sum_i16x16); }
    };

    static __m256i table(const uint8_t (&digit)[9]) {
        return _mm256_broadcastsi128_si256(_mm_setr_epi8(digit[0], digit[1], digit[2], digit[3],
                                                         digit[4], digit[5], digit[6], digit[7],
                                                         digit[8], 0, 0, 0, 0, 0, 0, 0));
    }

    static void digits(__m256i packed_u8x32, __m256i (&codes_u8x32)[PARTS]) {
        const __m256i nine = _mm256_set1_epi16(9), three = _mm256_set1_epi16(3);
        const __m256i nine_odd = _mm256_set1_epi16(9 << 8);
        const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
        const __m256i first_digit = table({0, 0, 0, 1, 1, 1, 2, 2, 2});
        const __m256i second_digit = table({0, 1, 2, 0, 1, 2, 0, 1, 2});

        __m256i even = _mm256_slli_epi16(packed_u8x32, 8);           // in the upper half
        __m256i odd = _mm256_maddubs_epi16(packed_u8x32, nine_odd);  // times nine
        __m256i odd_digits = _mm256_and_si256(odd, upper);
        __m256i pair = _mm256_or_si256(_mm256_mulhi_epu16(even, nine), odd_digits);
        codes_u8x32[0] = _mm256_shuffle_epi8(first_digit, pair);
        codes_u8x32[1] = _mm256_shuffle_epi8(second_digit, pair);

        even = _mm256_mullo_epi16(even, nine);
        odd = _mm256_mullo_epi16(_mm256_xor_si256(odd, odd_digits), nine);
        odd_digits = _mm256_and_si256(odd, upper);
        pair = _mm256_or_si256(_mm256_mulhi_epu16(even, nine), odd_digits);
        codes_u8x32[2] = _mm256_shuffle_epi8(first_digit, pair);
        codes_u8x32[3] = _mm256_shuffle_epi8(second_digit, pair);

        even = _mm256_mullo_epi16(even, nine);
        odd = _mm256_mullo_epi16(_mm256_xor_si256(odd, odd_digits), three);
        codes_u8x32[4] =
            _mm256_or_si256(_mm256_mulhi_epu16(even, three), _mm256_and_si256(odd, upper));
    }
};

// ROWS rows at a time, so that their additions overlap.
template <class Packed, size_t ROWS>
inline void sum_rows(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                     __m256i (&sums_i32x8)[ROWS]) {
    constexpr size_t WEIGHTS = block_weights(Packed::PACKING);
    for (size_t r = 0; r < ROWS; ++r) sums_i32x8[r] = _mm256_setzero_si256();
    for (size_t first = 0; first < blocks; first += Packed::MAX_BLOCKS) {
        const size_t last =
            first + Packed::MAX_BLOCKS < blocks ? first + Packed::MAX_BLOCKS : blocks;
        typename Packed::Sum sums[ROWS];
        for (size_t r = 0; r < ROWS; ++r) sums[r] = Packed::Sum::zero();
        for (size_t block = first; block < last; ++block) {
            for (size_t half = 0; half < BLOCK_BYTES; half += WIDTH) {
                for (size_t r = 0; r < ROWS; ++r) {
                    const uint8_t* bytes = packed + r * stride + block * BLOCK_BYTES + half;
                    if (half == 0) prefetch(bytes);
                    sums[r].add(load(bytes), q + block * WEIGHTS + half);
                }
            }
        }
        for (size_t r = 0; r < ROWS; ++r)
            sums_i32x8[r] = _mm256_add_epi32(sums_i32x8[r], sums[r].total_i32x8());
    }
}

template <class Packed>
void matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
            int32_t* acc) {
    const size_t blocks = row_blocks(Packed::PACKING, k), stride = blocks * BLOCK_BYTES;
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        __m256i sums_i32x8[4];
        sum_rows<Packed>(packed + r * stride, stride, blocks, q, sums_i32x8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + r),
                         _mm_sub_epi32(totals(sums_i32x8), _mm_set1_epi32(q_sum)));
    }
    for (; r < rows; ++r) {
        __m256i sum_i32x8[1];
        sum_rows<Packed>(packed + r * stride, stride, blocks, q, sum_i32x8);
        acc[r] = total(sum_i32x8[0]) - q_sum;
    }
}

template <class Packed>
void unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    const size_t blocks = row_blocks(Packed::PACKING, k), columns = padded_columns(k);
    const size_t whole = blocks * block_weights(Packed::PACKING);
    for (size_t r = 0; r < rows; ++r, codes += columns) {
        uint8_t* at = codes;
        for (size_t block = 0; block < blocks; ++block, packed += BLOCK_BYTES) {
            for (size_t half = 0; half < BLOCK_BYTES; half += WIDTH) {
                __m256i codes_u8x32[Packed::PARTS];
                Packed::digits(load(packed + half), codes_u8x32);
                for (size_t part = 0; part < Packed::PARTS; ++part)
                    store(at + part * BLOCK_BYTES + half, codes_u8x32[part]);
            }
            at += block_weights(Packed::PACKING);
        }
        std::memset(codes + whole, 1, columns - whole);
    }
}

// Products of unpacked codes
// --------------------------
// acc of ROWS rows and TOKENS tokens: each register of codes meets TOKENS registers of q.
template <size_t ROWS, size_t TOKENS>
inline void matmul_tile(const uint8_t* codes, size_t codes_stride, size_t k, const int8_t* q,
                        size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    __m256i sums_i32x8[TOKENS][ROWS];
    for (size_t t = 0; t < TOKENS; ++t)
        for (size_t r = 0; r < ROWS; ++r) sums_i32x8[t][r] = _mm256_setzero_si256();
    for (size_t first = 0; first < k; first += MAX_PAIRS * WIDTH) {
        const size_t last = first + MAX_PAIRS * WIDTH < k ? first + MAX_PAIRS * WIDTH : k;
        __m256i sums_i16x16[TOKENS][ROWS];
        for (size_t t = 0; t < TOKENS; ++t)
            for (size_t r = 0; r < ROWS; ++r) sums_i16x16[t][r] = _mm256_setzero_si256();
        for (size_t i = first; i < last; i += WIDTH) {
            __m256i codes_u8x32[ROWS];
            for (size_t r = 0; r < ROWS; ++r) codes_u8x32[r] = load(codes + r * codes_stride + i);
            for (size_t t = 0; t < TOKENS; ++t) {
                const __m256i q_i8x32 = load(q + t * q_stride + i);
                for (size_t r = 0; r < ROWS; ++r) {
                    sums_i16x16[t][r] = add_pairs(sums_i16x16[t][r], codes_u8x32[r], q_i8x32);
                    settle(sums_i16x16[t][r]);
                }
            }
        }
        for (size_t t = 0; t < TOKENS; ++t)
            for (size_t r = 0; r < ROWS; ++r)
                sums_i32x8[t][r] = _mm256_add_epi32(sums_i32x8[t][r], widen(sums_i16x16[t][r]));
    }
    for (size_t t = 0; t < TOKENS; ++t)
        for (size_t r = 0; r < ROWS; ++r)
            acc[t * acc_stride + r] = total(sums_i32x8[t][r]) - q_sums[t];
}

template <size_t TOKENS>
void matmul_tokens(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k,
                   const int8_t* q, size_t q_stride, const int32_t* q_sums, int32_t* acc,
                   size_t acc_stride) {
    const auto tile = [&]<size_t ROWS>(size_t r) {
        matmul_tile<ROWS, TOKENS>(codes + r * codes_stride, codes_stride, k, q, q_stride, q_sums,
                                  acc + r, acc_stride);
    };
    size_t r = 0;
    for (; r + 3 <= rows; r += 3) tile.template operator()<3>(r);
    if (r + 2 == rows) tile.template operator()<2>(r);
    if (r + 1 == rows) tile.template operator()<1>(r);
}

void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    const auto some = [&]<size_t TOKENS>(size_t t) {
        matmul_tokens<TOKENS>(codes, codes_stride, rows, k, q + t * q_stride, q_stride, q_sums + t,
                              acc + t * acc_stride, acc_stride);
    };
    size_t t = 0;
    for (; t + 4 <= tokens; t += 4) some.template operator()<4>(t);
    if (t + 3 == tokens) some.template operator()<3>(t);
    if (t + 2 == tokens) some.template operator()<2>(t);
    if (t + 1 == tokens) some.template operator()<1>(t);
}

// Screening
// ---------
// Halves of bytes, 0 .. 15, times int8: pairs lie in -3840 .. 3810, and 8 of them fit int16.
struct ScreenSums {
    __m256i high_i32x8, low_i32x8;
};

// SCREEN_STEPS steps of 8 rows.
constexpr size_t SCREEN_STEPS = 4;

inline __m256i four_columns(const int8_t* at) {
    int32_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return _mm256_set1_epi32(bits);
}

inline void screen_steps(const uint8_t* screen, const int8_t* high, const int8_t* low,
                         ScreenSums& sums) {
    const __m256i low_half = _mm256_set1_epi8(15);
    __m256i high_i16x16 = _mm256_setzero_si256(), low_i16x16 = _mm256_setzero_si256();
    for (size_t step = 0; step < SCREEN_STEPS; ++step) {
        const __m256i bytes = load(screen + step * 4 * SCREEN_ROWS);
        const __m256i first_u8x32 = _mm256_and_si256(bytes, low_half);
        const __m256i second_u8x32 = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
        high_i16x16 = add_pairs(high_i16x16, first_u8x32, four_columns(high + 8 * step));
        low_i16x16 = add_pairs(low_i16x16, first_u8x32, four_columns(low + 8 * step));
        high_i16x16 = add_pairs(high_i16x16, second_u8x32, four_columns(high + 8 * step + 4));
        low_i16x16 = add_pairs(low_i16x16, second_u8x32, four_columns(low + 8 * step + 4));
    }
    sums.high_i32x8 = _mm256_add_epi32(sums.high_i32x8, widen(high_i16x16));
    sums.low_i32x8 = _mm256_add_epi32(sums.low_i32x8, widen(low_i16x16));
}

void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    constexpr size_t HALF_STEPS = SCREEN_GROUP / 8 / SCREEN_STEPS;
    constexpr size_t SCALES = SCREEN_ROWS * SCREEN_GROUP / 2;  // where the scales begin
    for (size_t i = 0; i < row_groups; ++i, approx += SCREEN_ROWS, spread += SCREEN_ROWS) {
        __m256 approx_f32x8[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        __m256 spread_f32x8[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (size_t g = 0; g < groups; ++g, screen += SCREEN_GROUP_BYTES) {
            for (size_t line = 0; line < SCREEN_GROUP_BYTES; line += 64) prefetch(screen + line);
            for (size_t half = 0; half < 2; ++half) {  // of the rows
                ScreenSums sums = {_mm256_setzero_si256(), _mm256_setzero_si256()};
                for (size_t part = 0; part < HALF_STEPS; ++part) {
                    const size_t column = g * SCREEN_GROUP + part * 8 * SCREEN_STEPS;
                    screen_steps(screen + part * SCREEN_STEPS * 4 * SCREEN_ROWS + half * WIDTH,
                                 high + column, low + column, sums);
                }
                const __m256i exact_i32x8 = _mm256_sub_epi32(
                    _mm256_add_epi32(_mm256_slli_epi32(sums.high_i32x8, 8), sums.low_i32x8),
                    _mm256_set1_epi32(offsets[g]));
                const __m256 scale_f32x8 = _mm256_castsi256_ps(_mm256_slli_epi32(
                    _mm256_cvtepu16_epi32(_mm_loadu_si128(
                        reinterpret_cast<const __m128i*>(screen + SCALES + half * SCREEN_ROWS))),
                    16));
                approx_f32x8[half] =
                    _mm256_add_ps(approx_f32x8[half],
                                  _mm256_mul_ps(scale_f32x8, _mm256_cvtepi32_ps(exact_i32x8)));
                spread_f32x8[half] = _mm256_add_ps(
                    spread_f32x8[half], _mm256_mul_ps(_mm256_mul_ps(scale_f32x8, scale_f32x8),
                                                      _mm256_set1_ps(squares[g])));
            }
        }
        for (size_t half = 0; half < 2; ++half) {
            _mm256_storeu_ps(approx + 8 * half, approx_f32x8[half]);
            _mm256_storeu_ps(spread + 8 * half, spread_f32x8[half]);
        }
    }
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
    volatile int32_t sink = total(_mm256_add_epi16(low, high));  // has to be computed
    (void)sink;
    return static_cast<int64_t>(iterations * ROUNDS * SUMS * 32);
}

}  // namespace

const IntegerKernels avx2_integer_kernels = {
    .packed = {{.matvec = matvec<TwoBit>, .unpack = unpack<TwoBit>},
               {.matvec = matvec<Base3>, .unpack = unpack<Base3>}},
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
