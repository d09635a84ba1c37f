// The kernels for AVX-512 (F, BW, DQ, VL) with VNNI, but for the integer ones. One register holds
// the 16 lanes of the numerics contract.
//
// The native tests compile this file a second time with BITLLM_EMULATE_AVX512, against functions of
// the same names that run on any machine.
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
#include <limits>

#include "../prefetch.h"

// Only what follows is compiled for AVX-512; see avx2.cpp.
#if !defined(BITLLM_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif
#endif

namespace bitllm {
namespace {

static_assert(LANES == 16);

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// Mask of the first `count` <= 16 lanes.
inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// `count` <= 16 values; the other lanes are 0 and not read or written.
inline __m512 load_part(const float* at, size_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), at);
}
inline void store_part(float* at, size_t count, __m512 values) {
    _mm512_mask_storeu_ps(at, first_lanes(count), values);
}

// 32 values as two registers of consecutive ones.
template <class Stored>
struct InOrder {
    static void load(const char* at, __m512& first, __m512& second) {
        first = Stored::load(at);
        second = Stored::load(at + 16 * Stored::BYTES);
    }
    static void put_in_order(__m512&, __m512&) {}
};

// How stored values become 16 floats: `load` 16 of them, `load_part` the first `count` <= 16; and
// how `Pair` loads 32, in an order of its own that sums of them are freed from at the end.
struct StoredF32 {
    using Pair = InOrder<StoredF32>;
    static constexpr size_t BYTES = 4;
    static __m512 load(const char* at) { return _mm512_loadu_ps(at); }
    static __m512 load_part(const char* at, size_t count) {
        return _mm512_maskz_loadu_ps(first_lanes(count), at);
    }
};

inline __m256i load_u16x16(const char* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
inline __m256i load_part_u16x16(const char* at, size_t count) {
    return _mm256_maskz_loadu_epi16(first_lanes(count), at);
}

struct StoredBF16 {
    // Those with even and those with odd numbers: a shift and a mask, instead of two shuffles.
    struct Pair {
        static void load(const char* at, __m512& even, __m512& odd) {
            const __m512i bits = _mm512_loadu_si512(at);
            even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
            odd = _mm512_castsi512_ps(
                _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
        }
        static void put_in_order(__m512& even, __m512& odd) {
            const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19,  //
                                                    4, 20, 5, 21, 6, 22, 7, 23);
            const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
            const __m512 first = _mm512_permutex2var_ps(even, lower, odd);
            odd = _mm512_permutex2var_ps(even, upper, odd);
            even = first;
        }
    };
    static constexpr size_t BYTES = 2;
    static __m512 widen(__m256i bits_u16x16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits_u16x16), 16));
    }
    static __m512 load(const char* at) { return widen(load_u16x16(at)); }
    static __m512 load_part(const char* at, size_t count) {
        return widen(load_part_u16x16(at, count));
    }
};

struct StoredF16 {
    using Pair = InOrder<StoredF16>;
    static constexpr size_t BYTES = 2;
    static __m512 load(const char* at) { return _mm512_cvtph_ps(load_u16x16(at)); }
    static __m512 load_part(const char* at, size_t count) {
        return _mm512_cvtph_ps(load_part_u16x16(at, count));
    }
};

struct StoredI8 {
    using Pair = InOrder<StoredI8>;
    static constexpr size_t BYTES = 1;
    static __m512 widen(__m128i codes_i8x16) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes_i8x16));
    }
    static __m512 load(const char* at) {
        return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static __m512 load_part(const char* at, size_t count) {
        return widen(_mm_maskz_loadu_epi8(first_lanes(count), at));
    }
};

inline __m256 upper_half(__m512 values) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(values), 1));
}

// 16 lanes -> 8 -> 4 -> 2 -> 1, the upper half added to the lower half.
inline float sum_lanes(__m512 sum_f32x16) {
    const __m256 sum_f32x8 =
        _mm256_add_ps(_mm512_castps512_ps256(sum_f32x16), upper_half(sum_f32x16));
    const __m128 sum_f32x4 =
        _mm_add_ps(_mm256_castps256_ps128(sum_f32x8), _mm256_extractf128_ps(sum_f32x8, 1));
    const __m128 sum_f32x2 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x2, _mm_movehdup_ps(sum_f32x2)));
}

inline float highest_lane(__m512 max_f32x16) {
    const __m256 max_f32x8 =
        _mm256_max_ps(_mm512_castps512_ps256(max_f32x16), upper_half(max_f32x16));
    const __m128 max_f32x4 =
        _mm_max_ps(_mm256_castps256_ps128(max_f32x8), _mm256_extractf128_ps(max_f32x8, 1));
    const __m128 max_f32x2 = _mm_max_ps(max_f32x4, _mm_movehl_ps(max_f32x4, max_f32x4));
    return _mm_cvtss_f32(_mm_max_ss(max_f32x2, _mm_movehdup_ps(max_f32x2)));
}

inline int32_t sum_i32(__m512i sum_i32x16) {
    const __m256i sum_i32x8 = _mm256_add_epi32(_mm512_castsi512_si256(sum_i32x16),
                                               _mm512_extracti64x4_epi64(sum_i32x16, 1));
    const __m128i sum_i32x4 =
        _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8), _mm256_extracti128_si256(sum_i32x8, 1));
    const __m128i sum_i32x2 = _mm_add_epi32(sum_i32x4, _mm_unpackhi_epi64(sum_i32x4, sum_i32x4));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum_i32x2, _mm_shuffle_epi32(sum_i32x2, 1)));
}

inline __m512 add_product(__m512 sum, __m512 a, __m512 b) {
    return _mm512_add_ps(sum, _mm512_mul_ps(a, b));
}

void rms_norm(const float* x, const float* gain, size_t n, float eps, float* y) {
    const size_t whole = n - n % LANES, rest = n - whole;
    __m512 sum_f32x16 = _mm512_setzero_ps();
    for (size_t i = 0; i < whole; i += LANES) {
        const __m512 x_f32x16 = _mm512_loadu_ps(x + i);
        sum_f32x16 = add_product(sum_f32x16, x_f32x16, x_f32x16);
    }
    const __m512 rest_f32x16 = load_part(x + whole, rest);
    sum_f32x16 = add_product(sum_f32x16, rest_f32x16, rest_f32x16);
    const __m128 mean = _mm_set_ss(sum_lanes(sum_f32x16) / static_cast<float>(n) + eps);
    const __m512 inverse_f32x16 = _mm512_set1_ps(1.0f / _mm_cvtss_f32(_mm_sqrt_ss(mean)));

    for (size_t i = 0; i < whole; i += LANES)
        _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse_f32x16),
                                              _mm512_loadu_ps(gain + i)));
    store_part(
        y + whole, rest,
        _mm512_mul_ps(_mm512_mul_ps(rest_f32x16, inverse_f32x16), load_part(gain + whole, rest)));
}

inline __m512i codes_of(__m512 x_f32x16, __m512 a_f32x16) {
    const __m512 clamped_f32x16 =
        _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x_f32x16, a_f32x16), _mm512_set1_ps(-128.0f)),
                      _mm512_set1_ps(127.0f));
    return _mm512_cvtps_epi32(clamped_f32x16);  // half to even
}

inline void store_codes(int8_t* at, __m512i codes_i32x16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(codes_i32x16));
}

float quantize(const float* x, size_t n, int8_t* q, int32_t* q_sum) {
    const size_t whole = n - n % LANES, rest = n - whole;
    // max(new, old) keeps the old value where the new one is NaN, as the scalar code does.
    __m512 absmax_f32x16 = _mm512_abs_ps(load_part(x + whole, rest));
    absmax_f32x16 = _mm512_max_ps(absmax_f32x16, _mm512_setzero_ps());
    for (size_t i = 0; i < whole; i += LANES)
        absmax_f32x16 = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + i)), absmax_f32x16);
    const float absmax = highest_lane(absmax_f32x16);
    const float a = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);

    const __m512 a_f32x16 = _mm512_set1_ps(a);
    __m512i sum_i32x16 = _mm512_setzero_si512();
    for (size_t i = 0; i < whole; i += LANES) {
        const __m512i codes_i32x16 = codes_of(_mm512_loadu_ps(x + i), a_f32x16);
        sum_i32x16 = _mm512_add_epi32(sum_i32x16, codes_i32x16);
        store_codes(q + i, codes_i32x16);
    }
    std::memset(q + whole, 0, padded_columns(n) - whole);
    if (rest) {
        const __m512i codes_i32x16 = codes_of(load_part(x + whole, rest), a_f32x16);
        sum_i32x16 = _mm512_add_epi32(sum_i32x16, codes_i32x16);
        store_codes(q + whole, codes_i32x16);  // zeros behind n, within the padding
    }
    *q_sum = sum_i32(sum_i32x16);
    return a;
}

// Calls use.operator()<Stored>() for the way in which values of a type are stored.
template <class Use>
inline void with_stored(ValueType type, Use use) {
    switch (type) {
        case ValueType::F32:
            return use.template operator()<StoredF32>();
        case ValueType::BF16:
            return use.template operator()<StoredBF16>();
        case ValueType::F16:
            return use.template operator()<StoredF16>();
        case ValueType::I8:
            return use.template operator()<StoredI8>();
    }
}

// out[r] = lane_sum(w[r] * x) for ROWS rows, so that additions of one row hide the latency of
// others.
template <class Stored, size_t ROWS>
inline void dot_tile(const char* w, size_t n, const float* x, float* out) {
    const size_t row_bytes = n * Stored::BYTES, whole = n - n % LANES, rest = n - whole;
    __m512 sum_f32x16[ROWS];
    for (size_t r = 0; r < ROWS; ++r) sum_f32x16[r] = _mm512_setzero_ps();
    for (size_t i = 0; i < whole; i += LANES) {
        const __m512 x_f32x16 = _mm512_loadu_ps(x + i);
        for (size_t r = 0; r < ROWS; ++r)
            sum_f32x16[r] = add_product(
                sum_f32x16[r], Stored::load(w + r * row_bytes + i * Stored::BYTES), x_f32x16);
    }
    if (rest) {
        const __m512 x_f32x16 = load_part(x + whole, rest);
        for (size_t r = 0; r < ROWS; ++r)
            sum_f32x16[r] = add_product(
                sum_f32x16[r], Stored::load_part(w + r * row_bytes + whole * Stored::BYTES, rest),
                x_f32x16);
    }
    for (size_t r = 0; r < ROWS; ++r) out[r] = sum_lanes(sum_f32x16[r]);
}

void dense_matvec(const void* w, ValueType type, size_t rows, size_t n, const float* x,
                  float* out) {
    with_stored(type, [&]<class Stored>() {
        const char* bytes = static_cast<const char*>(w);
        const size_t row_bytes = n * Stored::BYTES;
        size_t r = 0;
        for (; r + 8 <= rows; r += 8) dot_tile<Stored, 8>(bytes + r * row_bytes, n, x, out + r);
        for (; r < rows; ++r) dot_tile<Stored, 1>(bytes + r * row_bytes, n, x, out + r);
    });
}

// Both products of attention: sums over t in order of a[q][t] * b[t][column], for QUERIES rows of a
// and REGISTERS * 16 columns of b, or the first `count` < 16 of one register.
template <class Stored, size_t QUERIES, size_t REGISTERS, bool PART = false>
inline void product_tile(const float* a, size_t a_stride, size_t begin, size_t end, const char* b,
                         size_t b_stride, uintptr_t ahead, __m512 (&sums)[QUERIES][REGISTERS],
                         size_t count = 0) {
    for (size_t q = 0; q < QUERIES; ++q)
        for (size_t c = 0; c < REGISTERS; ++c) sums[q][c] = _mm512_setzero_ps();
    constexpr bool PAIRS = REGISTERS % 2 == 0;
    for (size_t t = begin; t < end; ++t) {
        __m512 b_f32x16[REGISTERS];
        for (size_t c = 0; c < REGISTERS; c += PAIRS ? 2 : 1) {
            const char* at = b + t * b_stride + c * LANES * Stored::BYTES;
            if (ahead) prefetch<Cache::SECOND>(at, ahead);
            if constexpr (PAIRS)
                Stored::Pair::load(at, b_f32x16[c], b_f32x16[c + 1]);
            else
                b_f32x16[c] = PART ? Stored::load_part(at, count) : Stored::load(at);
        }
        for (size_t q = 0; q < QUERIES; ++q) {
            const __m512 a_f32x16 = _mm512_set1_ps(a[q * a_stride + t]);
            for (size_t c = 0; c < REGISTERS; ++c)
                sums[q][c] = add_product(sums[q][c], a_f32x16, b_f32x16[c]);
        }
    }
    if constexpr (PAIRS)
        for (size_t q = 0; q < QUERIES; ++q)
            for (size_t c = 0; c < REGISTERS; c += 2)
                Stored::Pair::put_in_order(sums[q][c], sums[q][c + 1]);
}

// Calls tile.operator()<Q>(first query) for tiles of Q = 8 and 4 queries, and of 1 for those left
// over: the more queries, the fewer conversions of keys and values.
template <class Tile>
inline void in_tiles(size_t queries, Tile tile) {
    size_t i = 0;
    for (; i + 8 <= queries; i += 8) tile.template operator()<8>(i);
    for (; i + 4 <= queries; i += 4) tile.template operator()<4>(i);
    for (; i < queries; ++i) tile.template operator()<1>(i);
}

void attention_scores(const float* q, size_t queries, const void* keys, ValueType type, size_t n,
                      float scale, uintptr_t ahead, float* out) {
    static_assert(KV_BLOCK_SIZE == 2 * LANES);
    const __m512 scale_f32x16 = _mm512_set1_ps(scale);
    with_stored(type, [&]<class Stored>() {
        in_tiles(queries, [&]<size_t QUERIES>(size_t first) {
            __m512 sums[QUERIES][2];
            product_tile<Stored>(q + first * n, n, 0, n, static_cast<const char*>(keys),
                                 KV_BLOCK_SIZE * Stored::BYTES, first ? 0 : ahead, sums);
            for (size_t i = 0; i < QUERIES; ++i)
                for (size_t c = 0; c < 2; ++c)
                    _mm512_storeu_ps(out + (first + i) * KV_BLOCK_SIZE + c * LANES,
                                     _mm512_mul_ps(sums[i][c], scale_f32x16));
        });
    });
}

// old * keep + sum * join.
inline __m512 merge(__m512 old, float keep, __m512 sum, float join) {
    return add_product(_mm512_mul_ps(old, _mm512_set1_ps(keep)), sum, _mm512_set1_ps(join));
}

void weighted_values(const float* w, size_t queries, const void* values, ValueType type,
                     size_t begin, size_t end, size_t n, const float* keep, const float* join,
                     uintptr_t ahead, float* out) {
    with_stored(type, [&]<class Stored>() {
        in_tiles(queries, [&]<size_t QUERIES>(size_t first) {
            const float* weights = w + first * KV_BLOCK_SIZE;
            const char* rows = static_cast<const char*>(values);
            const auto columns = [&]<size_t REGISTERS>(size_t d) {
                __m512 sums[QUERIES][REGISTERS];
                product_tile<Stored>(weights, KV_BLOCK_SIZE, begin, end, rows + d * Stored::BYTES,
                                     n * Stored::BYTES, first ? 0 : ahead, sums);
                for (size_t i = 0; i < QUERIES; ++i) {
                    for (size_t c = 0; c < REGISTERS; ++c) {
                        float* at = out + (first + i) * n + d + c * LANES;
                        _mm512_storeu_ps(at, merge(_mm512_loadu_ps(at), keep[first + i], sums[i][c],
                                                   join[first + i]));
                    }
                }
            };
            size_t d = 0;
            if constexpr (QUERIES <= 4)
                for (; d + 4 * LANES <= n; d += 4 * LANES) columns.template operator()<4>(d);
            for (; d + 2 * LANES <= n; d += 2 * LANES) columns.template operator()<2>(d);
            for (; d + LANES <= n; d += LANES) columns.template operator()<1>(d);
            if (d == n) return;
            __m512 sums[QUERIES][1];
            product_tile<Stored, QUERIES, 1, true>(weights, KV_BLOCK_SIZE, begin, end,
                                                   rows + d * Stored::BYTES, n * Stored::BYTES,
                                                   first ? 0 : ahead, sums, n - d);
            for (size_t i = 0; i < QUERIES; ++i) {
                float* at = out + (first + i) * n + d;
                store_part(
                    at, n - d,
                    merge(load_part(at, n - d), keep[first + i], sums[i][0], join[first + i]));
            }
        });
    });
}

void widen(const void* values, ValueType type, size_t n, float* out) {
    with_stored(type, [&]<class Stored>() {
        const char* at = static_cast<const char*>(values);
        size_t i = 0;
        for (; i + LANES <= n; i += LANES)
            _mm512_storeu_ps(out + i, Stored::load(at + i * Stored::BYTES));
        if (i < n) store_part(out + i, n - i, Stored::load_part(at + i * Stored::BYTES, n - i));
    });
}

// exp_f32 of numerics.h. min and max have the constant first, so that a NaN passes through.
inline __m512 exp_f32x16(__m512 x) {
    const __m512 lowest = _mm512_set1_ps(-87.0f);
    const __m512 clamped = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(lowest, x));
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512 log2_e = _mm512_set1_ps(1.44269504088896341f);
    const __m512 n = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(clamped, log2_e), magic), magic);
    const __m512 r =
        _mm512_sub_ps(_mm512_sub_ps(clamped, _mm512_mul_ps(n, _mm512_set1_ps(0.693359375f))),
                      _mm512_mul_ps(n, _mm512_set1_ps(-2.12194440e-4f)));
    constexpr double FACTORIALS[] = {720, 120, 24, 6, 2, 1, 1};
    __m512 p = _mm512_set1_ps(static_cast<float>(1.0 / 5040));
    for (const double factorial : FACTORIALS)
        p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(static_cast<float>(1.0 / factorial)));
    const __m512i exponent_i32x16 = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    const __m512 power = _mm512_castsi512_ps(_mm512_slli_epi32(exponent_i32x16, 23));
    const __mmask16 remains = _mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(remains, _mm512_mul_ps(p, power));
}

void exp_shifted(float* x, size_t n, float shift) {
    const __m512 shift_f32x16 = _mm512_set1_ps(shift);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        _mm512_storeu_ps(x + i, exp_f32x16(_mm512_sub_ps(_mm512_loadu_ps(x + i), shift_f32x16)));
    if (i < n)
        store_part(x + i, n - i, exp_f32x16(_mm512_sub_ps(load_part(x + i, n - i), shift_f32x16)));
}

float block_weights(float* w, size_t begin, size_t end, float* total) {
    static_assert(KV_BLOCK_SIZE == 2 * LANES);
    const uint32_t inside = static_cast<uint32_t>((uint64_t{1} << end) - (uint64_t{1} << begin));
    const auto low_inside = static_cast<__mmask16>(inside);
    const auto high_inside = static_cast<__mmask16>(inside >> LANES);
    const __m512 lowest = _mm512_set1_ps(-INFINITE);
    const __m512 low_f32x16 = _mm512_loadu_ps(w), high_f32x16 = _mm512_loadu_ps(w + LANES);
    const float highest =
        highest_lane(_mm512_max_ps(_mm512_mask_mov_ps(lowest, high_inside, high_f32x16),
                                   _mm512_mask_mov_ps(lowest, low_inside, low_f32x16)));
    const __m512 highest_f32x16 = _mm512_set1_ps(highest);
    const __m512 low_power = exp_f32x16(_mm512_sub_ps(low_f32x16, highest_f32x16));
    const __m512 high_power = exp_f32x16(_mm512_sub_ps(high_f32x16, highest_f32x16));
    const __m512 low_weights = _mm512_maskz_mov_ps(low_inside, low_power);
    const __m512 high_weights = _mm512_maskz_mov_ps(high_inside, high_power);
    _mm512_storeu_ps(w, low_weights);
    _mm512_storeu_ps(w + LANES, high_weights);
    *total = sum_lanes(_mm512_add_ps(low_weights, high_weights));
    return highest;
}

struct Relu2 {
    static __m512 of(__m512 x) {
        const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), x);
        return _mm512_mul_ps(positive, positive);
    }
};

struct Silu {
    static __m512 of(__m512 x) {
        const __m512 negated = _mm512_xor_ps(x, _mm512_set1_ps(-0.0f));
        return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp_f32x16(negated)));
    }
};

struct GeluTanh {
    static __m512 of(__m512 x) {
        const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        const __m512 inner = _mm512_add_ps(x, _mm512_mul_ps(_mm512_set1_ps(0.044715f), cube));
        const __m512 u = _mm512_mul_ps(_mm512_set1_ps(0.7978845608f), inner);
        const __m512 grown = _mm512_add_ps(exp_f32x16(_mm512_mul_ps(two, u)), one);
        const __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(two, grown));
        return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x), _mm512_add_ps(one, tanh));
    }
};

template <class Activate>
void gate_with(const float* gate, const float* up, size_t n, float* out) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        _mm512_storeu_ps(out + i, _mm512_mul_ps(Activate::of(_mm512_loadu_ps(gate + i)),
                                                _mm512_loadu_ps(up + i)));
    if (i < n)
        store_part(
            out + i, n - i,
            _mm512_mul_ps(Activate::of(load_part(gate + i, n - i)), load_part(up + i, n - i)));
}

void gated(Activation activation, const float* gate, const float* up, size_t n, float* out) {
    switch (activation) {
        case Activation::RELU2:
            return gate_with<Relu2>(gate, up, n, out);
        case Activation::SILU:
            return gate_with<Silu>(gate, up, n, out);
        case Activation::GELU_TANH:
            return gate_with<GeluTanh>(gate, up, n, out);
    }
}

void rescale(const int32_t* acc, size_t n, float a, const float* scale, size_t scale_stride,
             float* y) {
    const __m512 a_f32x16 = _mm512_set1_ps(a);
    const __m512 shared_f32x16 = _mm512_set1_ps(scale_stride ? 0.0f : *scale);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m512 acc_f32x16 = _mm512_cvtepi32_ps(_mm512_loadu_si512(acc + i));
        const __m512 scale_f32x16 = scale_stride ? _mm512_loadu_ps(scale + i) : shared_f32x16;
        _mm512_storeu_ps(y + i, _mm512_mul_ps(_mm512_div_ps(acc_f32x16, a_f32x16), scale_f32x16));
    }
    for (; i < n; ++i) y[i] = (static_cast<float>(acc[i]) / a) * scale[scale_stride * i];
}

void add(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        _mm512_storeu_ps(x + i, _mm512_add_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(y + i)));
    for (; i < n; ++i) x[i] += y[i];
}

}  // namespace

const Kernels avx512vnni_kernels = {
    .name = "avx512vnni",
    .integer = &avx512vnni_integer_kernels,
    .rms_norm = rms_norm,
    .quantize = quantize,
    .dense_matvec = dense_matvec,
    .attention_scores = attention_scores,
    .block_weights = block_weights,
    .weighted_values = weighted_values,
    .widen = widen,
    .exp_shifted = exp_shifted,
    .gated = gated,
    .rescale = rescale,
    .add = add,
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
