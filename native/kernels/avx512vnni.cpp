// The kernels for AVX-512 (F, BW, DQ, VL) with VNNI. One register holds the 16 lanes of the
// numerics contract.
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

static_assert(LANES == 16);

// Mask of the first `count` <= 16 lanes.
inline __mmask16 first_lanes(size_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// `count` <= 16 values; the other lanes are 0 and not read or written.
inline __m512 load_part(const float* at, size_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), at);
}
inline void store_part(float* at, size_t count, __m512 values) {
    _mm512_mask_storeu_ps(at, first_lanes(count), values);
}

// How stored values become 16 floats: `load` 16 of them, `load_part` the first `count` <= 16.
struct StoredF32 {
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
    static constexpr size_t BYTES = 2;
    static __m512 load(const char* at) { return _mm512_cvtph_ps(load_u16x16(at)); }
    static __m512 load_part(const char* at, size_t count) {
        return _mm512_cvtph_ps(load_part_u16x16(at, count));
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

inline float max_lanes(__m512 max_f32x16) {
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
    const float absmax = max_lanes(absmax_f32x16);
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

// Ternary products
// ----------------
// A block of 64 bytes is one register. _mm512_dpbusd_epi32 multiplies code + 1 (0 .. 2, unsigned)
// with q (signed) and adds groups of four to int32, without an int16 step that could overflow.
struct Codes {
    __m512i u8x64[4];  // elements b, b + 64, b + 128, b + 192 of the bytes b
};

inline Codes unpack(const uint8_t* packed) {
    const __m512i bytes_u8x64 = _mm512_loadu_si512(packed);
    const __m512i low_bits = _mm512_set1_epi8(3);
    return {{_mm512_and_si512(bytes_u8x64, low_bits),
             _mm512_and_si512(_mm512_srli_epi16(bytes_u8x64, 2), low_bits),
             _mm512_and_si512(_mm512_srli_epi16(bytes_u8x64, 4), low_bits),
             _mm512_and_si512(_mm512_srli_epi16(bytes_u8x64, 6), low_bits)}};
}

// ROWS rows by TOKENS tokens: each block is unpacked once for all tokens.
template <size_t ROWS, size_t TOKENS>
inline void ternary_tile(const uint8_t* packed, size_t row_bytes, size_t blocks, const int8_t* q,
                         size_t q_stride, const int32_t* q_sums, int32_t* acc, size_t acc_stride) {
    __m512i sum_i32x16[ROWS][TOKENS];
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t t = 0; t < TOKENS; ++t) sum_i32x16[r][t] = _mm512_setzero_si512();
    for (size_t block = 0; block < blocks; ++block) {
        for (size_t r = 0; r < ROWS; ++r) {
            const Codes codes = unpack(packed + r * row_bytes + block * TERNARY_BLOCK_BYTES);
            for (size_t t = 0; t < TOKENS; ++t) {
                const int8_t* q_i8 = q + t * q_stride + block * TERNARY_BLOCK;
                for (size_t part = 0; part < 4; ++part)
                    sum_i32x16[r][t] = _mm512_dpbusd_epi32(sum_i32x16[r][t], codes.u8x64[part],
                                                           _mm512_loadu_si512(q_i8 + part * 64));
            }
        }
    }
    for (size_t r = 0; r < ROWS; ++r)
        for (size_t t = 0; t < TOKENS; ++t)
            acc[t * acc_stride + r] = sum_i32(sum_i32x16[r][t]) - q_sums[t];
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
    for (size_t r = 0; r < ROWS; ++r) out[r] = sum_lanes(sum_f32x16[r]) * scale;
}

template <class Stored>
void dot_rows(const void* w, size_t rows, size_t n, const float* x, float scale, float* out) {
    const char* bytes = static_cast<const char*>(w);
    const size_t row_bytes = n * Stored::BYTES;
    size_t r = 0;
    for (; r + 8 <= rows; r += 8) dot_tile<Stored, 8>(bytes + r * row_bytes, n, x, scale, out + r);
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

// Columns first .. first + 16 * REGISTERS of the sum stay in registers while the rows pass by.
template <class Stored, size_t REGISTERS>
inline void sum_columns(const float* p, const char* v, size_t count, size_t n, size_t first,
                        float* out) {
    __m512 sum_f32x16[REGISTERS];
    for (size_t c = 0; c < REGISTERS; ++c) sum_f32x16[c] = _mm512_setzero_ps();
    for (size_t j = 0; j < count; ++j) {
        const __m512 p_f32x16 = _mm512_set1_ps(p[j]);
        const char* at = v + (j * n + first) * Stored::BYTES;
        for (size_t c = 0; c < REGISTERS; ++c)
            sum_f32x16[c] =
                add_product(sum_f32x16[c], p_f32x16, Stored::load(at + c * LANES * Stored::BYTES));
    }
    for (size_t c = 0; c < REGISTERS; ++c) _mm512_storeu_ps(out + first + c * LANES, sum_f32x16[c]);
}

template <class Stored>
void sum_rows(const float* p, const void* rows, size_t count, size_t n, float* out) {
    const char* v = static_cast<const char*>(rows);
    size_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) sum_columns<Stored, 4>(p, v, count, n, i, out);
    for (; i + LANES <= n; i += LANES) sum_columns<Stored, 1>(p, v, count, n, i, out);
    if (i == n) return;
    __m512 sum_f32x16 = _mm512_setzero_ps();
    for (size_t j = 0; j < count; ++j)
        sum_f32x16 = add_product(sum_f32x16, _mm512_set1_ps(p[j]),
                                 Stored::load_part(v + (j * n + i) * Stored::BYTES, n - i));
    store_part(out + i, n - i, sum_f32x16);
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
    for (size_t i = 0; i < n; i += LANES) {
        const size_t count = n - i < LANES ? n - i : LANES;
        store_part(x + i, count, exp_f32x16(_mm512_sub_ps(load_part(x + i, count), shift_f32x16)));
    }
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
    for (size_t i = 0; i < n; i += LANES) {
        const size_t count = n - i < LANES ? n - i : LANES;
        store_part(
            out + i, count,
            _mm512_mul_ps(Activate::of(load_part(gate + i, count)), load_part(up + i, count)));
    }
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
    for (size_t i = 0; i < n; i += LANES) {
        const size_t count = n - i < LANES ? n - i : LANES;
        store_part(x + i, count, _mm512_add_ps(load_part(x + i, count), load_part(y + i, count)));
    }
}

}  // namespace

const Kernels avx512vnni_kernels = {
    .name = "avx512vnni",
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

#if !defined(BITLLM_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif

#endif
