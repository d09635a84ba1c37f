// The kernels for AVX2 with F16C. One register holds 8 float lanes, so the 16 lanes of the numerics
// contract are a pair: `low` lanes 0-7, `high` lanes 8-15.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

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

// 16 lanes -> 8 -> 4 -> 2 -> 1, the upper half added to the lower half.
inline float sum_lanes(__m256 low_f32x8, __m256 high_f32x8) {
    const __m256 sum_f32x8 = _mm256_add_ps(low_f32x8, high_f32x8);
    const __m128 sum_f32x4 =
        _mm_add_ps(_mm256_castps256_ps128(sum_f32x8), _mm256_extractf128_ps(sum_f32x8, 1));
    const __m128 sum_f32x2 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x2, _mm_movehdup_ps(sum_f32x2)));
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
    __m128 absmax_f32x4 =
        _mm_max_ps(_mm256_castps256_ps128(absmax_f32x8), _mm256_extractf128_ps(absmax_f32x8, 1));
    absmax_f32x4 = _mm_max_ps(absmax_f32x4, _mm_movehl_ps(absmax_f32x4, absmax_f32x4));
    absmax_f32x4 = _mm_max_ss(absmax_f32x4, _mm_movehdup_ps(absmax_f32x4));
    const float absmax = _mm_cvtss_f32(absmax_f32x4);
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

inline Codes unpack(const uint8_t* packed) {
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

// ROWS rows by TOKENS tokens: each block is unpacked once for all tokens, each piece of q read once
// for all rows as long as the registers suffice.
template <size_t ROWS, size_t TOKENS>
inline void ternary_tile(const uint8_t* packed, size_t row_bytes, size_t blocks, const int8_t* q,
                         size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    __m256i sum_i32x8[ROWS][TOKENS];
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t t = 0; t < TOKENS; ++t) sum_i32x8[r][t] = _mm256_setzero_si256();
    for (size_t first = 0; first < blocks; first += MAX_BLOCKS) {
        const size_t last = first + MAX_BLOCKS < blocks ? first + MAX_BLOCKS : blocks;
        __m256i sum_i16x16[ROWS][TOKENS];
        for (size_t r = 0; r < ROWS; ++r)
            for (size_t t = 0; t < TOKENS; ++t) sum_i16x16[r][t] = _mm256_setzero_si256();
        for (size_t block = first; block < last; ++block) {
            for (size_t half = 0; half < TERNARY_BLOCK_BYTES; half += 32) {
                for (size_t r = 0; r < ROWS; ++r) {
                    const uint8_t* bytes =
                        packed + r * row_bytes + block * TERNARY_BLOCK_BYTES + half;
                    if (TOKENS == 1 && half == 0) prefetch(bytes);
                    const Codes codes = unpack(bytes);
                    for (size_t part = 0; part < 4; ++part) {
                        const int8_t* q_part = q + block * TERNARY_BLOCK + part * 64 + half;
                        for (size_t t = 0; t < TOKENS; ++t) {
                            const __m256i products_i16x16 = _mm256_maddubs_epi16(
                                codes.u8x32[part], load_i8x32(q_part + t * q_stride));
                            sum_i16x16[r][t] = _mm256_add_epi16(sum_i16x16[r][t], products_i16x16);
                            settle(sum_i16x16[r][t]);
                        }
                    }
                }
            }
        }
        for (size_t r = 0; r < ROWS; ++r)
            for (size_t t = 0; t < TOKENS; ++t)
                sum_i32x8[r][t] = widen_add(sum_i32x8[r][t], sum_i16x16[r][t]);
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t t = 0; t < TOKENS; ++t)
            acc[t * acc_stride + r] = sum_i32(sum_i32x8[r][t]) - q_sums[t];
}

void ternary_matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
                    int32_t* acc) {
    const size_t row_bytes = ternary_row_bytes(k), blocks = ternary_blocks(k);
    size_t r = 0;
    for (; r + 4 <= rows; r += 4)
        ternary_tile<4, 1>(packed + r * row_bytes, row_bytes, blocks, q, 0, &q_sum, acc + r, 0);
    for (; r < rows; ++r)
        ternary_tile<1, 1>(packed + r * row_bytes, row_bytes, blocks, q, 0, &q_sum, acc + r, 0);
}

// One tile of tokens over all rows: its activations stay in the cache while the weights pass by.
template <size_t TOKENS>
void ternary_rows(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                  const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    const size_t row_bytes = ternary_row_bytes(k);
    for (size_t r = 0; r < rows; ++r)
        ternary_tile<1, TOKENS>(packed + r * row_bytes, row_bytes, ternary_blocks(k), q,
                                padded_columns(k), q_sums, acc + r, acc_stride);
}

void ternary_matmul(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                    const int32_t* q_sums, size_t tokens, int32_t* acc, size_t acc_stride) {
    const size_t q_stride = padded_columns(k);
    size_t t = 0;
    for (; t + 8 <= tokens; t += 8)
        ternary_rows<8>(packed, rows, k, q + t * q_stride, q_sums + t, acc + t * acc_stride,
                        acc_stride);
    for (; t + 4 <= tokens; t += 4)
        ternary_rows<4>(packed, rows, k, q + t * q_stride, q_sums + t, acc + t * acc_stride,
                        acc_stride);
    for (; t + 2 <= tokens; t += 2)
        ternary_rows<2>(packed, rows, k, q + t * q_stride, q_sums + t, acc + t * acc_stride,
                        acc_stride);
    for (; t < tokens; ++t)
        ternary_matvec(packed, rows, k, q + t * q_stride, q_sums[t], acc + t * acc_stride);
}

// out[r] = lane_sum(w[r] * x) * scale for ROWS rows, so that additions of one row hide the latency
// of others.
template <class Stored, size_t ROWS>
inline void dot_tile(const char* w, size_t n, const float* x, float scale, float* out) {
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
    for (size_t r = 0; r < ROWS; ++r) out[r] = sum_lanes(low_f32x8[r], high_f32x8[r]) * scale;
}

template <class Stored>
void dot_rows(const void* w, size_t rows, size_t n, const float* x, float scale, float* out) {
    const char* bytes = static_cast<const char*>(w);
    const size_t row_bytes = n * Stored::BYTES;
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) dot_tile<Stored, 4>(bytes + r * row_bytes, n, x, scale, out + r);
    for (; r < rows; ++r) dot_tile<Stored, 1>(bytes + r * row_bytes, n, x, scale, out + r);
}

void attention_scores(const float* q, const void* k, FloatType type, size_t count, size_t n,
                      float scale, float* out) {
    switch (type) {
        case FloatType::F32:
            return dot_rows<StoredF32>(k, count, n, q, scale, out);
        case FloatType::BF16:
            return dot_rows<StoredBF16>(k, count, n, q, scale, out);
        case FloatType::F16:
            return dot_rows<StoredF16>(k, count, n, q, scale, out);
    }
}

void dense_matvec(const void* w, FloatType type, size_t rows, size_t n, const float* x,
                  float* out) {
    attention_scores(x, w, type, rows, n, 1.0f, out);  // a factor of 1 changes no bit
}

// Columns first .. first + 8 * REGISTERS of the sum stay in registers while the rows pass by.
template <class Stored, size_t REGISTERS>
inline void sum_columns(const float* p, const char* v, size_t count, size_t n, size_t first,
                        float* out) {
    __m256 sum_f32x8[REGISTERS];
    for (size_t c = 0; c < REGISTERS; ++c) sum_f32x8[c] = _mm256_setzero_ps();
    for (size_t j = 0; j < count; ++j) {
        const __m256 p_f32x8 = _mm256_set1_ps(p[j]);
        const char* at = v + (j * n + first) * Stored::BYTES;
        for (size_t c = 0; c < REGISTERS; ++c) {
            const __m256 v_f32x8 = Stored::load(at + c * WIDTH * Stored::BYTES);
            sum_f32x8[c] = _mm256_add_ps(sum_f32x8[c], _mm256_mul_ps(p_f32x8, v_f32x8));
        }
    }
    for (size_t c = 0; c < REGISTERS; ++c) _mm256_storeu_ps(out + first + c * WIDTH, sum_f32x8[c]);
}

template <class Stored>
void sum_rows(const float* p, const void* rows, size_t count, size_t n, float* out) {
    const char* v = static_cast<const char*>(rows);
    size_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH) sum_columns<Stored, 4>(p, v, count, n, i, out);
    for (; i + WIDTH <= n; i += WIDTH) sum_columns<Stored, 1>(p, v, count, n, i, out);
    if (i == n) return;
    __m256 sum_f32x8 = _mm256_setzero_ps();
    for (size_t j = 0; j < count; ++j) {
        const __m256 v_f32x8 = Stored::load_part(v + (j * n + i) * Stored::BYTES, n - i);
        sum_f32x8 = _mm256_add_ps(sum_f32x8, _mm256_mul_ps(_mm256_set1_ps(p[j]), v_f32x8));
    }
    store_part(out + i, n - i, sum_f32x8);
}

void weighted_sum(const float* p, const void* v, FloatType type, size_t count, size_t n,
                  float* out) {
    switch (type) {
        case FloatType::F32:
            return sum_rows<StoredF32>(p, v, count, n, out);
        case FloatType::BF16:
            return sum_rows<StoredBF16>(p, v, count, n, out);
        case FloatType::F16:
            return sum_rows<StoredF16>(p, v, count, n, out);
    }
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

}  // namespace

const Kernels avx2_kernels = {
    .name = "avx2",
    .rms_norm = rms_norm,
    .quantize = quantize,
    .ternary_matvec = ternary_matvec,
    .ternary_matmul = ternary_matmul,
    .dense_matvec = dense_matvec,
    .attention_scores = attention_scores,
    .weighted_sum = weighted_sum,
    .exp_shifted = exp_shifted,
    .gated = gated,
    .rescale = rescale,
    .add = add,
};

}  // namespace bitllm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
