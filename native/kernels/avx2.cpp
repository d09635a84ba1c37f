// The kernels for AVX2 with F16C. One register holds 8 float lanes, so the 16 lanes of the numerics
// contract are a pair: `low` lanes 0-7, `high` lanes 8-15.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../prefetch.h"

// Only what follows is compiled for AVX2: code of the headers stays at the baseline, because the
// linker may keep this file's copy of an inline function for the whole program.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace bitllm {
namespace {

constexpr size_t WIDTH = 8;

// Mask of the first `count` of 8 lanes.
inline __m256i first_lanes(size_t count) {
    const __m256i lane_i32x8 = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane_i32x8);
}

// `count` <= 8 values; the other lanes are 0 and not read or written.
inline __m256 load_part(const float* at, size_t count) {
    return _mm256_maskload_ps(at, first_lanes(count));
}
inline void store_part(float* at, size_t count, __m256 values) {
    _mm256_maskstore_ps(at, first_lanes(count), values);
}

// How stored values become 8 floats: `load` 8 of them, `load_part` the first `count` <= 8.
struct StoredF32 {
    static constexpr size_t BYTES = 4;
    static __m256 load(const char* at) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    }
    static __m256 load_part(const char* at, size_t count) {
        return _mm256_maskload_ps(reinterpret_cast<const float*>(at), first_lanes(count));
    }
};

inline __m128i load_u16x8(const char* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}
inline __m128i load_part_u16x8(const char* at, size_t count) {
    alignas(16) char padded[16] = {};
    std::memcpy(padded, at, count * 2);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(padded));
}

struct StoredBF16 {
    static constexpr size_t BYTES = 2;
    static __m256 widen(__m128i bits_u16x8) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits_u16x8), 16));
    }
    static __m256 load(const char* at) { return widen(load_u16x8(at)); }
    static __m256 load_part(const char* at, size_t count) {
        return widen(load_part_u16x8(at, count));
    }
};

struct StoredF16 {
    static constexpr size_t BYTES = 2;
    static __m256 load(const char* at) { return _mm256_cvtph_ps(load_u16x8(at)); }
    static __m256 load_part(const char* at, size_t count) {
        return _mm256_cvtph_ps(load_part_u16x8(at, count));
    }
};

struct StoredI8 {
    static constexpr size_t BYTES = 1;
    static __m256 load(const char* at) {
        const __m128i codes_i8x8 = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes_i8x8));
    }
    static __m256 load_part(const char* at, size_t count) {
        char padded[8] = {};
        std::memcpy(padded, at, count);
        return load(padded);
    }
};

// 16 lanes -> 8 -> 4 -> 2 -> 1, the upper half added to the lower half.
inline float sum_lanes(__m256 low_f32x8, __m256 high_f32x8) {
    const __m256 sum_f32x8 = _mm256_add_ps(low_f32x8, high_f32x8);
    const __m128 sum_f32x4 =
        _mm_add_ps(_mm256_castps256_ps128(sum_f32x8), _mm256_extractf128_ps(sum_f32x8, 1));
    const __m128 sum_f32x2 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x2, _mm_movehdup_ps(sum_f32x2)));
}

inline float highest_lane(__m256 x_f32x8) {
    __m128 x_f32x4 = _mm_max_ps(_mm256_castps256_ps128(x_f32x8), _mm256_extractf128_ps(x_f32x8, 1));
    x_f32x4 = _mm_max_ps(x_f32x4, _mm_movehl_ps(x_f32x4, x_f32x4));
    return _mm_cvtss_f32(_mm_max_ss(x_f32x4, _mm_movehdup_ps(x_f32x4)));
}

inline int32_t sum_i32(__m256i sum_i32x8) {
    const __m128i sum_i32x4 =
        _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8), _mm256_extracti128_si256(sum_i32x8, 1));
    const __m128i sum_i32x2 = _mm_add_epi32(sum_i32x4, _mm_unpackhi_epi64(sum_i32x4, sum_i32x4));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum_i32x2, _mm_shuffle_epi32(sum_i32x2, 1)));
}

inline __m256 add_square(__m256 sum, __m256 x) { return _mm256_add_ps(sum, _mm256_mul_ps(x, x)); }

void rms_norm(const float* x, const float* gain, size_t n, float eps, float* y) {
    const size_t whole = n - n % LANES;
    __m256 low_f32x8 = _mm256_setzero_ps(), high_f32x8 = _mm256_setzero_ps();
    for (size_t i = 0; i < whole; i += LANES) {
        low_f32x8 = add_square(low_f32x8, _mm256_loadu_ps(x + i));
        high_f32x8 = add_square(high_f32x8, _mm256_loadu_ps(x + i + WIDTH));
    }
    const size_t rest = n - whole, low_rest = rest < WIDTH ? rest : WIDTH;
    low_f32x8 = add_square(low_f32x8, load_part(x + whole, low_rest));
    if (rest > WIDTH)
        high_f32x8 = add_square(high_f32x8, load_part(x + whole + WIDTH, rest - WIDTH));
    const __m128 mean = _mm_set_ss(sum_lanes(low_f32x8, high_f32x8) / static_cast<float>(n) + eps);
    const float inverse = 1.0f / _mm_cvtss_f32(_mm_sqrt_ss(mean));

    const __m256 inverse_f32x8 = _mm256_set1_ps(inverse);
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse_f32x8),
                                              _mm256_loadu_ps(gain + i)));
    if (i < n)
        store_part(y + i, n - i,
                   _mm256_mul_ps(_mm256_mul_ps(load_part(x + i, n - i), inverse_f32x8),
                                 load_part(gain + i, n - i)));
}

inline __m256i codes_of(__m256 x_f32x8, __m256 a_f32x8) {
    const __m256 clamped_f32x8 =
        _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(x_f32x8, a_f32x8), _mm256_set1_ps(-128.0f)),
                      _mm256_set1_ps(127.0f));
    return _mm256_cvtps_epi32(clamped_f32x8);  // half to even
}

// 8 int32 in -128 .. 127 as 8 bytes.
inline void store_codes(int8_t* at, __m256i codes_i32x8) {
    const __m128i codes_i16x8 = _mm_packs_epi32(_mm256_castsi256_si128(codes_i32x8),
                                                _mm256_extracti128_si256(codes_i32x8, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), _mm_packs_epi16(codes_i16x8, codes_i16x8));
}

float quantize(const float* x, size_t n, int8_t* q, int32_t* q_sum) {
    const size_t whole = n - n % WIDTH, rest = n - whole;
    const __m256 magnitude_bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    // max(new, old) keeps the old value where the new one is NaN, as the scalar code does.
    __m256 absmax_f32x8 = _mm256_setzero_ps();
    for (size_t i = 0; i < whole; i += WIDTH)
        absmax_f32x8 =
            _mm256_max_ps(_mm256_and_ps(_mm256_loadu_ps(x + i), magnitude_bits), absmax_f32x8);
    if (rest)
        absmax_f32x8 =
            _mm256_max_ps(_mm256_and_ps(load_part(x + whole, rest), magnitude_bits), absmax_f32x8);
    const float absmax = highest_lane(absmax_f32x8);
    const float a = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);

    const __m256 a_f32x8 = _mm256_set1_ps(a);
    __m256i sum_i32x8 = _mm256_setzero_si256();
    for (size_t i = 0; i < whole; i += WIDTH) {
        const __m256i codes_i32x8 = codes_of(_mm256_loadu_ps(x + i), a_f32x8);
        sum_i32x8 = _mm256_add_epi32(sum_i32x8, codes_i32x8);
        store_codes(q + i, codes_i32x8);
    }
    std::memset(q + whole, 0, padded_columns(n) - whole);
    if (rest) {
        // Lanes that were not loaded give inf * 0 = NaN if a is infinite, so they are cleared.
        const __m256i codes_i32x8 =
            _mm256_and_si256(codes_of(load_part(x + whole, rest), a_f32x8), first_lanes(rest));
        sum_i32x8 = _mm256_add_epi32(sum_i32x8, codes_i32x8);
        store_codes(q + whole, codes_i32x8);  // within the padding, which `rest` makes non-empty
    }
    *q_sum = sum_i32(sum_i32x8);
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
    __m256 low_f32x8[ROWS], high_f32x8[ROWS];
    for (size_t r = 0; r < ROWS; ++r) low_f32x8[r] = high_f32x8[r] = _mm256_setzero_ps();
    for (size_t i = 0; i < whole; i += LANES) {
        const __m256 x_low = _mm256_loadu_ps(x + i), x_high = _mm256_loadu_ps(x + i + WIDTH);
        for (size_t r = 0; r < ROWS; ++r) {
            const char* at = w + r * row_bytes + i * Stored::BYTES;
            const __m256 w_low = Stored::load(at);
            const __m256 w_high = Stored::load(at + WIDTH * Stored::BYTES);
            low_f32x8[r] = _mm256_add_ps(low_f32x8[r], _mm256_mul_ps(w_low, x_low));
            high_f32x8[r] = _mm256_add_ps(high_f32x8[r], _mm256_mul_ps(w_high, x_high));
        }
    }
    for (size_t part = 0; part < rest; part += WIDTH) {
        const size_t count = rest - part < WIDTH ? rest - part : WIDTH, i = whole + part;
        const __m256 x_part = load_part(x + i, count);
        for (size_t r = 0; r < ROWS; ++r) {
            const __m256 w_part = Stored::load_part(w + r * row_bytes + i * Stored::BYTES, count);
            __m256& sum_f32x8 = part ? high_f32x8[r] : low_f32x8[r];
            sum_f32x8 = _mm256_add_ps(sum_f32x8, _mm256_mul_ps(w_part, x_part));
        }
    }
    for (size_t r = 0; r < ROWS; ++r) out[r] = sum_lanes(low_f32x8[r], high_f32x8[r]);
}

void dense_matvec(const void* w, ValueType type, size_t rows, size_t n, const float* x,
                  float* out) {
    with_stored(type, [&]<class Stored>() {
        const char* bytes = static_cast<const char*>(w);
        const size_t row_bytes = n * Stored::BYTES;
        size_t r = 0;
        for (; r + 4 <= rows; r += 4) dot_tile<Stored, 4>(bytes + r * row_bytes, n, x, out + r);
        for (; r < rows; ++r) dot_tile<Stored, 1>(bytes + r * row_bytes, n, x, out + r);
    });
}

// Both products of attention: sums over t in order of a[q][t] * b[t][column], for QUERIES rows of a
// and REGISTERS * 8 columns of b, or the first `count` < 8 of one register.
template <class Stored, size_t QUERIES, size_t REGISTERS, bool PART = false>
inline void product_tile(const float* a, size_t a_stride, size_t begin, size_t end, const char* b,
                         size_t b_stride, uintptr_t ahead, __m256 (&sums)[QUERIES][REGISTERS],
                         size_t count = 0) {
    for (size_t q = 0; q < QUERIES; ++q)
        for (size_t c = 0; c < REGISTERS; ++c) sums[q][c] = _mm256_setzero_ps();
    for (size_t t = begin; t < end; ++t) {
        __m256 b_f32x8[REGISTERS];
        for (size_t c = 0; c < REGISTERS; ++c) {
            const char* at = b + t * b_stride + c * WIDTH * Stored::BYTES;
            if (ahead) prefetch<Cache::SECOND>(at, ahead);
            b_f32x8[c] = PART ? Stored::load_part(at, count) : Stored::load(at);
        }
        for (size_t q = 0; q < QUERIES; ++q) {
            const __m256 a_f32x8 = _mm256_set1_ps(a[q * a_stride + t]);
            for (size_t c = 0; c < REGISTERS; ++c)
                sums[q][c] = _mm256_add_ps(sums[q][c], _mm256_mul_ps(a_f32x8, b_f32x8[c]));
        }
    }
}

// Calls tile.operator()<Q>(first query) for tiles of Q = 4 queries, and of 1 for those left over.
template <class Tile>
inline void in_tiles(size_t queries, Tile tile) {
    size_t i = 0;
    for (; i + 4 <= queries; i += 4) tile.template operator()<4>(i);
    for (; i < queries; ++i) tile.template operator()<1>(i);
}

void attention_scores(const float* q, size_t queries, const void* keys, ValueType type, size_t n,
                      float scale, uintptr_t ahead, float* out) {
    const __m256 scale_f32x8 = _mm256_set1_ps(scale);
    with_stored(type, [&]<class Stored>() {
        in_tiles(queries, [&]<size_t QUERIES>(size_t first) {
            for (size_t place = 0; place < KV_BLOCK_SIZE; place += 2 * WIDTH) {
                const char* at = static_cast<const char*>(keys) + place * Stored::BYTES;
                __m256 sums[QUERIES][2];
                product_tile<Stored>(q + first * n, n, 0, n, at, KV_BLOCK_SIZE * Stored::BYTES,
                                     first ? 0 : ahead, sums);
                for (size_t i = 0; i < QUERIES; ++i)
                    for (size_t c = 0; c < 2; ++c)
                        _mm256_storeu_ps(out + (first + i) * KV_BLOCK_SIZE + place + c * WIDTH,
                                         _mm256_mul_ps(sums[i][c], scale_f32x8));
            }
        });
    });
}

// old * keep + sum * join.
inline __m256 merge(__m256 old, float keep, __m256 sum, float join) {
    return _mm256_add_ps(_mm256_mul_ps(old, _mm256_set1_ps(keep)),
                         _mm256_mul_ps(sum, _mm256_set1_ps(join)));
}

void weighted_values(const float* w, size_t queries, const void* values, ValueType type,
                     size_t begin, size_t end, size_t n, const float* keep, const float* join,
                     uintptr_t ahead, float* out) {
    with_stored(type, [&]<class Stored>() {
        in_tiles(queries, [&]<size_t QUERIES>(size_t first) {
            const float* weights = w + first * KV_BLOCK_SIZE;
            const char* rows = static_cast<const char*>(values);
            const auto columns = [&]<size_t REGISTERS>(size_t d) {
                __m256 sums[QUERIES][REGISTERS];
                product_tile<Stored>(weights, KV_BLOCK_SIZE, begin, end, rows + d * Stored::BYTES,
                                     n * Stored::BYTES, first ? 0 : ahead, sums);
                for (size_t i = 0; i < QUERIES; ++i) {
                    for (size_t c = 0; c < REGISTERS; ++c) {
                        float* at = out + (first + i) * n + d + c * WIDTH;
                        _mm256_storeu_ps(at, merge(_mm256_loadu_ps(at), keep[first + i], sums[i][c],
                                                   join[first + i]));
                    }
                }
            };
            size_t d = 0;
            for (; d + 2 * WIDTH <= n; d += 2 * WIDTH) columns.template operator()<2>(d);
            for (; d + WIDTH <= n; d += WIDTH) columns.template operator()<1>(d);
            if (d == n) return;
            __m256 sums[QUERIES][1];
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
        for (; i + WIDTH <= n; i += WIDTH)
            _mm256_storeu_ps(out + i, Stored::load(at + i * Stored::BYTES));
        if (i < n) store_part(out + i, n - i, Stored::load_part(at + i * Stored::BYTES, n - i));
    });
}

// exp_f32 of numerics.h. min and max have the constant first, so that a NaN passes through.
inline __m256 exp_f32x8(__m256 x) {
    const __m256 lowest = _mm256_set1_ps(-87.0f);
    const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(lowest, x));
    const __m256 magic = _mm256_set1_ps(12582912.0f);
    const __m256 log2_e = _mm256_set1_ps(1.44269504088896341f);
    const __m256 n = _mm256_sub_ps(_mm256_add_ps(_mm256_mul_ps(clamped, log2_e), magic), magic);
    const __m256 r =
        _mm256_sub_ps(_mm256_sub_ps(clamped, _mm256_mul_ps(n, _mm256_set1_ps(0.693359375f))),
                      _mm256_mul_ps(n, _mm256_set1_ps(-2.12194440e-4f)));
    constexpr double FACTORIALS[] = {720, 120, 24, 6, 2, 1, 1};
    __m256 p = _mm256_set1_ps(static_cast<float>(1.0 / 5040));
    for (const double factorial : FACTORIALS)
        p = _mm256_add_ps(_mm256_mul_ps(p, r), _mm256_set1_ps(static_cast<float>(1.0 / factorial)));
    const __m256i exponent_i32x8 = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent_i32x8, 23));
    const __m256 vanishes = _mm256_cmp_ps(x, lowest, _CMP_LT_OQ);
    return _mm256_andnot_ps(vanishes, _mm256_mul_ps(p, power));
}

void exp_shifted(float* x, size_t n, float shift) {
    const __m256 shift_f32x8 = _mm256_set1_ps(shift);
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        _mm256_storeu_ps(x + i, exp_f32x8(_mm256_sub_ps(_mm256_loadu_ps(x + i), shift_f32x8)));
    if (i < n)
        store_part(x + i, n - i, exp_f32x8(_mm256_sub_ps(load_part(x + i, n - i), shift_f32x8)));
}

float block_weights(float* w, size_t begin, size_t end, float* total) {
    constexpr size_t REGISTERS = KV_BLOCK_SIZE / WIDTH;
    const __m256i begin_i32x8 = _mm256_set1_epi32(static_cast<int>(begin));
    const __m256i end_i32x8 = _mm256_set1_epi32(static_cast<int>(end));
    const __m256 lowest = _mm256_set1_ps(-__builtin_inff());
    __m256 scores[REGISTERS], inside[REGISTERS], highest_f32x8 = lowest;
    for (size_t c = 0; c < REGISTERS; ++c) {
        const __m256i place_i32x8 = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(c * WIDTH)),
                                                     _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        inside[c] =
            _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(begin_i32x8, place_i32x8),
                                                    _mm256_cmpgt_epi32(end_i32x8, place_i32x8)));
        scores[c] = _mm256_loadu_ps(w + c * WIDTH);
        highest_f32x8 =
            _mm256_max_ps(highest_f32x8, _mm256_blendv_ps(lowest, scores[c], inside[c]));
    }
    const float highest = highest_lane(highest_f32x8);
    for (size_t c = 0; c < REGISTERS; ++c) {
        const __m256 power = exp_f32x8(_mm256_sub_ps(scores[c], _mm256_set1_ps(highest)));
        scores[c] = _mm256_and_ps(power, inside[c]);
        _mm256_storeu_ps(w + c * WIDTH, scores[c]);
    }
    *total = sum_lanes(_mm256_add_ps(scores[0], scores[2]), _mm256_add_ps(scores[1], scores[3]));
    return highest;
}

struct Relu2 {
    static __m256 of(__m256 x) {
        const __m256 positive = _mm256_max_ps(_mm256_setzero_ps(), x);
        return _mm256_mul_ps(positive, positive);
    }
};

struct Silu {
    static __m256 of(__m256 x) {
        const __m256 negated = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
        return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp_f32x8(negated)));
    }
};

struct GeluTanh {
    static __m256 of(__m256 x) {
        const __m256 one = _mm256_set1_ps(1.0f), two = _mm256_set1_ps(2.0f);
        const __m256 cube = _mm256_mul_ps(_mm256_mul_ps(x, x), x);
        const __m256 u =
            _mm256_mul_ps(_mm256_set1_ps(0.7978845608f),
                          _mm256_add_ps(x, _mm256_mul_ps(_mm256_set1_ps(0.044715f), cube)));
        const __m256 grown = _mm256_add_ps(exp_f32x8(_mm256_mul_ps(two, u)), one);
        const __m256 tanh = _mm256_sub_ps(one, _mm256_div_ps(two, grown));
        return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), x), _mm256_add_ps(one, tanh));
    }
};

template <class Activate>
void gate_with(const float* gate, const float* up, size_t n, float* out) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        _mm256_storeu_ps(out + i, _mm256_mul_ps(Activate::of(_mm256_loadu_ps(gate + i)),
                                                _mm256_loadu_ps(up + i)));
    if (i < n)
        store_part(
            out + i, n - i,
            _mm256_mul_ps(Activate::of(load_part(gate + i, n - i)), load_part(up + i, n - i)));
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
    const __m256 a_f32x8 = _mm256_set1_ps(a);
    const __m256 shared_f32x8 = _mm256_set1_ps(scale_stride ? 0.0f : *scale);
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const __m256i acc_i32x8 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + i));
        const __m256 quotient = _mm256_div_ps(_mm256_cvtepi32_ps(acc_i32x8), a_f32x8);
        const __m256 scale_f32x8 = scale_stride ? _mm256_loadu_ps(scale + i) : shared_f32x8;
        _mm256_storeu_ps(y + i, _mm256_mul_ps(quotient, scale_f32x8));
    }
    for (; i < n; ++i) y[i] = (static_cast<float>(acc[i]) / a) * scale[scale_stride * i];
}

void add(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; ++i) x[i] += y[i];
}

constexpr Kernels with_integers(const char* name, const IntegerKernels* integer) {
    return {
        .name = name,
        .integer = integer,
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
}

}  // namespace

constinit const Kernels avx2_kernels = with_integers("avx2", &avx2_integer_kernels);
constinit const Kernels avxvnni_kernels = with_integers("avxvnni", &avxvnni_integer_kernels);

}  // namespace bitllm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
