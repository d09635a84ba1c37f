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

#include "../prefetch.h"

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

// Keeps the compiler from reordering the additions of a tile: it would hold many products at once
// and run out of registers. For a variable, not for an element of an array: that would go to
// memory.
inline void settle(__m256i& value) {
#if defined(__GNUC__)
    __asm__("" : "+x"(value));
#else
    (void)value;
#endif
}

// sum_i16x16 plus the products of 32 codes.
inline __m256i add_pairs(__m256i sum_i16x16, __m256i codes_u8x32, __m256i q_i8x32) {
    __m256i sum = _mm256_add_epi16(sum_i16x16, _mm256_maddubs_epi16(codes_u8x32, q_i8x32));
    settle(sum);
    return sum;
}

// Sums of neighbours.
inline __m256i widen(__m256i sum_i16x16) {
    return _mm256_madd_epi16(sum_i16x16, _mm256_set1_epi16(1));
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

// The totals of sums in int16.
template <size_t COUNT>
inline void store_totals(const __m256i (&sums_i16x16)[COUNT], int32_t* at) {
    size_t i = 0;
    for (; i + 4 <= COUNT; i += 4) {
        const __m256i four[4] = {widen(sums_i16x16[i]), widen(sums_i16x16[i + 1]),
                                 widen(sums_i16x16[i + 2]), widen(sums_i16x16[i + 3])};
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + i), totals(four));
    }
    for (; i < COUNT; ++i) at[i] = total(widen(sums_i16x16[i]));
}

// Four weights in 2 bits
// ----------------------
// Shifts of bytes are words that are shifted and masked. A code that is masked where it is, in bits
// 2 and 3, counts four times; so one shift is enough for four codes, and sums of single and of
// fourfold codes are kept apart until the fourfold ones are 16 pairs, which fill int16: 4 blocks.
struct TwoBit {
    static constexpr Packing PACKING = Packing::TWO_BIT;
    static constexpr size_t ROWS = 4;
    static constexpr size_t MAX_BLOCKS = 4;

    struct Sum {
        __m256i single_i16x16, fourfold_i16x16;

        static Sum zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

        void add_block(const uint8_t* packed, const int8_t* q) {
            for (size_t half = 0; half < BLOCK_BYTES; half += WIDTH) add(packed + half, q + half);
        }
        void add(const uint8_t* packed, const int8_t* q) {
            const __m256i bits01 = _mm256_set1_epi8(3), bits23 = _mm256_set1_epi8(12);
            const __m256i lower_u8x32 = load(packed);
            const __m256i upper_u8x32 = _mm256_srli_epi16(lower_u8x32, 4);
            const __m256i codes0 = _mm256_and_si256(lower_u8x32, bits01);
            const __m256i codes1 = _mm256_and_si256(lower_u8x32, bits23);
            single_i16x16 = add_pairs(single_i16x16, codes0, load(q));
            fourfold_i16x16 = add_pairs(fourfold_i16x16, codes1, load(q + BLOCK_BYTES));
            const __m256i codes2 = _mm256_and_si256(upper_u8x32, bits01);
            const __m256i codes3 = _mm256_and_si256(upper_u8x32, bits23);
            single_i16x16 = add_pairs(single_i16x16, codes2, load(q + 2 * BLOCK_BYTES));
            fourfold_i16x16 = add_pairs(fourfold_i16x16, codes3, load(q + 3 * BLOCK_BYTES));
        }
        // At most 16 pairs of single codes and 16 of fourfold ones.
        __m256i total_i32x8() const {
            return widen(_mm256_add_epi16(single_i16x16, _mm256_srai_epi16(fourfold_i16x16, 2)));
        }
    };

    // Calls use(column, 32 codes) for all columns of a block.
    template <class Use>
    static void digits(const uint8_t* packed, Use use) {
        const __m256i low_bits = _mm256_set1_epi8(3);
        for (size_t half = 0; half < BLOCK_BYTES; half += WIDTH) {
            const __m256i bytes = load(packed + half);
            use(half, _mm256_and_si256(bytes, low_bits));
            use(BLOCK_BYTES + half, _mm256_and_si256(_mm256_srli_epi16(bytes, 2), low_bits));
            use(2 * BLOCK_BYTES + half, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_bits));
            use(3 * BLOCK_BYTES + half, _mm256_and_si256(_mm256_srli_epi16(bytes, 6), low_bits));
        }
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
    static constexpr size_t ROWS = 2;
    static constexpr size_t MAX_BLOCKS = MAX_PAIRS / 10;  // of which each takes ten

    struct Sum {
        __m256i i16x16;

        static Sum zero() { return {_mm256_setzero_si256()}; }

        void add_block(const uint8_t* packed, const int8_t* q) {
            digits(packed, [&](size_t column, __m256i codes_u8x32) {
                i16x16 = add_pairs(i16x16, codes_u8x32, load(q + column));
            });
        }
        __m256i total_i32x8() const { return widen(i16x16); }
    };

    // Known to the compiler, it would multiply with shifts and additions, which take longer.
    static __m256i factor(int16_t value) {
        __m256i all = _mm256_set1_epi16(value);
        settle(all);
        return all;
    }

    static __m256i table(const char (&digit)[10]) {
        const auto at = [&](size_t i) { return static_cast<char>(digit[i] - '0'); };
        return _mm256_broadcastsi128_si256(_mm_setr_epi8(at(0), at(1), at(2), at(3), at(4), at(5),
                                                         at(6), at(7), at(8), 0, 0, 0, 0, 0, 0, 0));
    }

    // Calls use(column, 32 codes) for all columns of a block. The halves of the block go side by
    // side: each step of one waits for the step before.
    template <class Use>
    static void digits(const uint8_t* packed, Use use) {
        constexpr size_t HALVES = BLOCK_BYTES / WIDTH;
        const __m256i nine = factor(9), three = factor(3);
        const __m256i nine_odd = _mm256_set1_epi16(9 << 8);
        const __m256i lower = _mm256_set1_epi16(0xff);
        const __m256i upper = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
        const __m256i first_digit = table("000111222"), second_digit = table("012012012");

        __m256i even[HALVES];  // fractions, in the upper half
        __m256i odd[HALVES];   // fractions in the lower half, times nine
        __m256i pair[HALVES];
        const auto use_pairs = [&](size_t column) {
            for (size_t h = 0; h < HALVES; ++h)
                pair[h] = _mm256_or_si256(_mm256_mulhi_epu16(even[h], nine),
                                          _mm256_and_si256(odd[h], upper));
            for (size_t h = 0; h < HALVES; ++h)
                use(column + h * WIDTH, _mm256_shuffle_epi8(first_digit, pair[h]));
            for (size_t h = 0; h < HALVES; ++h)
                use(column + BLOCK_BYTES + h * WIDTH, _mm256_shuffle_epi8(second_digit, pair[h]));
        };
        for (size_t h = 0; h < HALVES; ++h) {
            const __m256i bytes = load(packed + h * WIDTH);
            even[h] = _mm256_slli_epi16(bytes, 8);
            odd[h] = _mm256_maddubs_epi16(bytes, nine_odd);
        }
        use_pairs(0);
        for (size_t h = 0; h < HALVES; ++h) {
            even[h] = _mm256_mullo_epi16(even[h], nine);
            odd[h] = _mm256_mullo_epi16(_mm256_and_si256(odd[h], lower), nine);
        }
        use_pairs(2 * BLOCK_BYTES);
        for (size_t h = 0; h < HALVES; ++h) {
            even[h] = _mm256_mullo_epi16(even[h], nine);
            odd[h] = _mm256_mullo_epi16(_mm256_and_si256(odd[h], lower), three);
        }
        for (size_t h = 0; h < HALVES; ++h)
            use(4 * BLOCK_BYTES + h * WIDTH, _mm256_or_si256(_mm256_mulhi_epu16(even[h], three),
                                                             _mm256_and_si256(odd[h], upper)));
    }
};

// Sums of ROWS rows at a time, in which q is read once for all.
template <class Packed, size_t ROWS>
inline void sum_rows(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                     __m256i* sums_i32x8) {
    constexpr size_t WEIGHTS = block_weights(Packed::PACKING);
    const uintptr_t ahead = tiles_ahead(ROWS * stride);
    for (size_t r = 0; r < ROWS; ++r) sums_i32x8[r] = _mm256_setzero_si256();
    for (size_t first = 0; first < blocks; first += Packed::MAX_BLOCKS) {
        const size_t last =
            first + Packed::MAX_BLOCKS < blocks ? first + Packed::MAX_BLOCKS : blocks;
        typename Packed::Sum sums[ROWS];
        for (size_t r = 0; r < ROWS; ++r) sums[r] = Packed::Sum::zero();
        for (size_t block = first; block < last; ++block) {
            const int8_t* q_block = q + block * WEIGHTS;
            for (size_t r = 0; r < ROWS; ++r) {
                prefetch(packed + (block * ROWS + r) * BLOCK_BYTES, ahead);
                sums[r].add_block(packed + r * stride + block * BLOCK_BYTES, q_block);
            }
        }
        for (size_t r = 0; r < ROWS; ++r)
            sums_i32x8[r] = _mm256_add_epi32(sums_i32x8[r], sums[r].total_i32x8());
    }
}

template <class Packed>
void matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
            int32_t* acc) {
    constexpr size_t ROWS = Packed::ROWS;
    const size_t blocks = row_blocks(Packed::PACKING, k), stride = blocks * BLOCK_BYTES;
    __m256i sums_i32x8[4];
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        for (size_t i = 0; i < 4; i += ROWS)
            sum_rows<Packed, ROWS>(packed + (r + i) * stride, stride, blocks, q, sums_i32x8 + i);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + r),
                         _mm_sub_epi32(totals(sums_i32x8), _mm_set1_epi32(q_sum)));
    }
    for (; r < rows; ++r) {
        sum_rows<Packed, 1>(packed + r * stride, stride, blocks, q, sums_i32x8);
        acc[r] = total(sums_i32x8[0]) - q_sum;
    }
}

template <class Packed>
void unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    constexpr size_t WEIGHTS = block_weights(Packed::PACKING);
    const size_t blocks = row_blocks(Packed::PACKING, k), columns = padded_columns(k);
    for (size_t r = 0; r < rows; ++r, codes += columns) {
        for (size_t block = 0; block < blocks; ++block, packed += BLOCK_BYTES)
            Packed::digits(packed, [&](size_t column, __m256i codes_u8x32) {
                store(codes + block * WEIGHTS + column, codes_u8x32);
            });
        std::memset(codes + blocks * WEIGHTS, 1, columns - blocks * WEIGHTS);
    }
}

// A row unpacked in registers for some tokens at once. FIRST: acc begins with these blocks.
template <class Packed, size_t TOKENS, bool FIRST>
inline void multiply_row(const uint8_t* packed, size_t blocks, const int8_t* q, size_t q_stride,
                         const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    __m256i sums_i16x16[TOKENS];
    for (size_t t = 0; t < TOKENS; ++t) sums_i16x16[t] = _mm256_setzero_si256();
    for (size_t block = 0; block < blocks; ++block) {
        prefetch(packed, PREFETCH_BYTES);
        Packed::digits(packed, [&](size_t column, __m256i codes_u8x32) {
            for (size_t t = 0; t < TOKENS; ++t)
                sums_i16x16[t] =
                    add_pairs(sums_i16x16[t], codes_u8x32, load(q + t * q_stride + column));
        });
        packed += BLOCK_BYTES;
        q += block_weights(Packed::PACKING);
    }
    int32_t sums_i32[TOKENS];
    store_totals(sums_i16x16, sums_i32);
    for (size_t t = 0; t < TOKENS; ++t)
        acc[t * acc_stride] = (FIRST ? -q_sums[t] : acc[t * acc_stride]) + sums_i32[t];
}

// As many blocks at a time as int16 sums hold; the q of all TOKENS stays in the first cache while
// rows pass by.
template <class Packed, size_t TOKENS>
void multiply_rows(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                   const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    constexpr size_t AT_ONCE = MAX_PAIRS / (block_weights(Packed::PACKING) / WIDTH);
    const size_t blocks = row_blocks(Packed::PACKING, k), stride = blocks * BLOCK_BYTES;
    const auto some = [&]<bool FIRST>(size_t first) {
        const size_t count = blocks - first < AT_ONCE ? blocks - first : AT_ONCE;
        for (size_t r = 0; r < rows; ++r)
            multiply_row<Packed, TOKENS, FIRST>(packed + r * stride + first * BLOCK_BYTES, count,
                                                q + first * block_weights(Packed::PACKING),
                                                padded_columns(k), q_sums, acc + r, acc_stride);
    };
    some.template operator()<true>(0);
    for (size_t first = AT_ONCE; first < blocks; first += AT_ONCE)
        some.template operator()<false>(first);
}

template <class Packed>
void matmul(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, const int32_t* q_sums,
            size_t tokens, int32_t* acc, size_t acc_stride) {
    constexpr decltype(&multiply_rows<Packed, 1>) of[] = {
        multiply_rows<Packed, 1>, multiply_rows<Packed, 2>, multiply_rows<Packed, 3>,
        multiply_rows<Packed, 4>, multiply_rows<Packed, 5>, multiply_rows<Packed, 6>,
        multiply_rows<Packed, 7>, multiply_rows<Packed, 8>};
    constexpr size_t TILE = sizeof of / sizeof of[0];
    for (size_t t = 0; t < tokens; t += TILE) {
        const size_t count = tokens - t < TILE ? tokens - t : TILE;
        of[count - 1](packed, rows, k, q + t * padded_columns(k), q_sums + t, acc + t * acc_stride,
                      acc_stride);
    }
}

// Products of unpacked codes
// --------------------------
// Columns are taken MATMUL_COLUMNS at a time: as many as int16 sums hold, and few enough for the q
// of all TOKENS to stay in the first cache while rows pass by. FIRST: acc begins with them.
constexpr size_t MATMUL_COLUMNS = MAX_PAIRS * WIDTH;

template <size_t ROWS, size_t TOKENS, bool FIRST>
inline void matmul_tile(const uint8_t* codes, size_t codes_stride, size_t columns, const int8_t* q,
                        size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    __m256i sums_i16x16[TOKENS * ROWS];
    for (size_t i = 0; i < TOKENS * ROWS; ++i) sums_i16x16[i] = _mm256_setzero_si256();
    for (size_t i = 0; i < columns; i += WIDTH) {
        __m256i codes_u8x32[ROWS];
        for (size_t r = 0; r < ROWS; ++r) codes_u8x32[r] = load(codes + r * codes_stride + i);
        for (size_t t = 0; t < TOKENS; ++t) {
            const __m256i q_i8x32 = load(q + t * q_stride + i);
            for (size_t r = 0; r < ROWS; ++r)
                sums_i16x16[t * ROWS + r] =
                    add_pairs(sums_i16x16[t * ROWS + r], codes_u8x32[r], q_i8x32);
        }
    }
    int32_t sums_i32[TOKENS * ROWS];
    store_totals(sums_i16x16, sums_i32);
    for (size_t t = 0; t < TOKENS; ++t) {
        int32_t* at = acc + t * acc_stride;
        for (size_t r = 0; r < ROWS; ++r)
            at[r] = (FIRST ? -q_sums[t] : at[r]) + sums_i32[t * ROWS + r];
    }
}

template <size_t TOKENS, bool FIRST>
void matmul_rows(const uint8_t* codes, size_t codes_stride, size_t rows, size_t columns,
                 const int8_t* q, size_t q_stride, const int32_t* q_sums, int32_t* acc,
                 size_t acc_stride) {
    constexpr size_t ROWS = TOKENS < 4 ? 4 : 2;  // so that 12 sums, or less, fit the registers
    const auto tile = [&]<size_t COUNT>(size_t r) {
        matmul_tile<COUNT, TOKENS, FIRST>(codes + r * codes_stride, codes_stride, columns, q,
                                          q_stride, q_sums, acc + r, acc_stride);
    };
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) tile.template operator()<ROWS>(r);
    for (; r < rows; ++r) tile.template operator()<1>(r);
}

template <size_t TOKENS>
void matmul_tokens(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k,
                   const int8_t* q, size_t q_stride, const int32_t* q_sums, int32_t* acc,
                   size_t acc_stride) {
    const auto some = [&]<bool FIRST>(size_t i) {
        const size_t columns = k - i < MATMUL_COLUMNS ? k - i : MATMUL_COLUMNS;
        matmul_rows<TOKENS, FIRST>(codes + i, codes_stride, rows, columns, q + i, q_stride, q_sums,
                                   acc, acc_stride);
    };
    some.template operator()<true>(0);
    for (size_t i = MATMUL_COLUMNS; i < k; i += MATMUL_COLUMNS) some.template operator()<false>(i);
}

constexpr size_t TOKEN_TILE = 6;

void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    constexpr decltype(&matmul_tokens<1>) of[TOKEN_TILE] = {matmul_tokens<1>, matmul_tokens<2>,
                                                            matmul_tokens<3>, matmul_tokens<4>,
                                                            matmul_tokens<5>, matmul_tokens<6>};
    for (size_t t = 0; t < tokens; t += TOKEN_TILE) {
        const size_t count = tokens - t < TOKEN_TILE ? tokens - t : TOKEN_TILE;
        of[count - 1](codes, codes_stride, rows, k, q + t * q_stride, q_stride, q_sums + t,
                      acc + t * acc_stride, acc_stride);
    }
}

// Screening
// ---------
// Halves of bytes, 0 .. 15, times int8: pairs lie in -3840 .. 3810, and 8 of them fit int16.
constexpr size_t SCREEN_STEPS = 4;
constexpr size_t SCREEN_STEP_BYTES = 4 * SCREEN_ROWS;
constexpr size_t REGISTERS = SCREEN_STEP_BYTES / WIDTH;  // of 8 rows each

inline __m256i four_columns(const int8_t* at) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(at)));
}

// SCREEN_STEPS steps, added to sums of `high` and of `low`.
inline void screen_steps(const uint8_t* screen, const int8_t* high, const int8_t* low,
                         __m256i (&high_i32x8)[REGISTERS], __m256i (&low_i32x8)[REGISTERS]) {
    const __m256i low_half = _mm256_set1_epi8(15);
    __m256i high_i16x16[REGISTERS], low_i16x16[REGISTERS];
    for (size_t i = 0; i < REGISTERS; ++i) high_i16x16[i] = low_i16x16[i] = _mm256_setzero_si256();
    for (size_t step = 0; step < SCREEN_STEPS; ++step) {
        for (size_t i = 0; i < REGISTERS; ++i) {
            const __m256i bytes = load(screen + step * SCREEN_STEP_BYTES + i * WIDTH);
            const __m256i first_u8x32 = _mm256_and_si256(bytes, low_half);
            const __m256i second_u8x32 = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_half);
            const size_t column = 8 * step;
            high_i16x16[i] = add_pairs(high_i16x16[i], first_u8x32, four_columns(high + column));
            low_i16x16[i] = add_pairs(low_i16x16[i], first_u8x32, four_columns(low + column));
            high_i16x16[i] =
                add_pairs(high_i16x16[i], second_u8x32, four_columns(high + column + 4));
            low_i16x16[i] = add_pairs(low_i16x16[i], second_u8x32, four_columns(low + column + 4));
        }
    }
    for (size_t i = 0; i < REGISTERS; ++i) {
        high_i32x8[i] = _mm256_add_epi32(high_i32x8[i], widen(high_i16x16[i]));
        low_i32x8[i] = _mm256_add_epi32(low_i32x8[i], widen(low_i16x16[i]));
    }
}

inline __m256 scales_f32x8(const uint8_t* at) {
    const __m128i bits_u16x8 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits_u16x8), 16));
}

void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    constexpr size_t PART = 8 * SCREEN_STEPS;  // columns that int16 sums hold
    constexpr size_t CODES = SCREEN_ROWS * SCREEN_GROUP / 2;
    for (size_t i = 0; i < row_groups; ++i, approx += SCREEN_ROWS, spread += SCREEN_ROWS) {
        __m256 approx_f32x8[REGISTERS], spread_f32x8[REGISTERS];
        for (size_t r = 0; r < REGISTERS; ++r)
            approx_f32x8[r] = spread_f32x8[r] = _mm256_setzero_ps();
        for (size_t g = 0; g < groups; ++g, screen += SCREEN_GROUP_BYTES) {
            __m256i high_i32x8[REGISTERS], low_i32x8[REGISTERS];
            for (size_t r = 0; r < REGISTERS; ++r)
                high_i32x8[r] = low_i32x8[r] = _mm256_setzero_si256();
            for (size_t part = 0; part < SCREEN_GROUP; part += PART) {
                const size_t column = g * SCREEN_GROUP + part;
                screen_steps(screen + part / 8 * SCREEN_STEP_BYTES, high + column, low + column,
                             high_i32x8, low_i32x8);
            }
            for (size_t line = 0; line < SCREEN_GROUP_BYTES; line += 64)
                prefetch(screen + line, PREFETCH_BYTES);
            const __m256i offset_i32x8 = _mm256_set1_epi32(offsets[g]);
            const __m256 square_f32x8 = _mm256_set1_ps(squares[g]);
            for (size_t r = 0; r < REGISTERS; ++r) {
                const __m256 scale = scales_f32x8(screen + CODES + r * SCREEN_ROWS);
                const __m256i exact_i32x8 = _mm256_sub_epi32(
                    _mm256_add_epi32(_mm256_slli_epi32(high_i32x8[r], 8), low_i32x8[r]),
                    offset_i32x8);
                approx_f32x8[r] = _mm256_add_ps(
                    approx_f32x8[r], _mm256_mul_ps(scale, _mm256_cvtepi32_ps(exact_i32x8)));
                spread_f32x8[r] = _mm256_add_ps(
                    spread_f32x8[r], _mm256_mul_ps(_mm256_mul_ps(scale, scale), square_f32x8));
            }
        }
        for (size_t r = 0; r < REGISTERS; ++r) {
            _mm256_storeu_ps(approx + 8 * r, approx_f32x8[r]);
            _mm256_storeu_ps(spread + 8 * r, spread_f32x8[r]);
        }
    }
}

// A multiplication and an addition. To the compiler q changes each time, so that no product can be
// left out.
inline void step(__m256i& sum_i16x16, __m256i codes_u8x32, __m256i& q_i8x32) {
    settle(q_i8x32);
    sum_i16x16 = add_pairs(sum_i16x16, codes_u8x32, q_i8x32);
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
    .packed = {{.matvec = matvec<TwoBit>,
                .unpack = unpack<TwoBit>,
                .matmul = matmul<TwoBit>,
                .few_tokens = 16},
               {.matvec = matvec<Base3>,
                .unpack = unpack<Base3>,
                .matmul = matmul<Base3>,
                .few_tokens = 16}},
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
