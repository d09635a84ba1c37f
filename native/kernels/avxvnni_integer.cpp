// Integer products for AVX2 with AVX-VNNI, which CPUs without AVX-512 have; the floats are those of
// avx2.cpp.
//
// The native tests compile this file a second time with BITLLM_EMULATE_AVXVNNI, against a dpbusd
// that is made of AVX2.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../prefetch.h"

// Only what follows is compiled for AVX-VNNI; see avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#if defined(BITLLM_EMULATE_AVXVNNI)
#pragma GCC target("avx2")
#else
#pragma GCC target("avx2,avxvnni")
#endif
#endif

#include "vnni_integer.h"

namespace bitllm {
namespace {

struct AvxVnni {
    using Integers = __m256i;
    using Floats = __m256;
    static constexpr size_t BYTES = 32;
    static constexpr size_t TOKENS = 3;  // 12 sums, 3 tokens and one register of codes, of 16
    static constexpr size_t FEW_ROWS = 2, FEW_TOKENS = 4;  // 8 sums, 2 rows, their codes, one q

    static Integers load(const void* at) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(at));
    }
    static Integers load_32(const void* at) { return load(at); }
    static void store(void* at, Integers values) {
        _mm256_storeu_si256(static_cast<__m256i*>(at), values);
    }
    static Integers all_i8(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
    static Integers all_i32(int32_t value) { return _mm256_set1_epi32(value); }

    static Integers bits_of_both(Integers a, Integers b) { return _mm256_and_si256(a, b); }
    static Integers add_i8(Integers a, Integers b) { return _mm256_add_epi8(a, b); }
    static Integers add_i32(Integers a, Integers b) { return _mm256_add_epi32(a, b); }
    static Integers subtract_i32(Integers a, Integers b) { return _mm256_sub_epi32(a, b); }
    template <unsigned BITS>
    static Integers words_right(Integers a) {
        return _mm256_srli_epi16(a, BITS);
    }
    template <unsigned BITS>
    static Integers right(Integers a_i32x8) {
        return _mm256_srai_epi32(a_i32x8, BITS);
    }
    template <unsigned BITS>
    static Integers left(Integers a_i32x8) {
        return _mm256_slli_epi32(a_i32x8, BITS);
    }
#if defined(BITLLM_EMULATE_AVXVNNI)
    static __m256i neighbours(__m128i u8x16, __m128i i8x16) {  // products, two of them added
        return _mm256_madd_epi16(_mm256_cvtepu8_epi16(u8x16), _mm256_cvtepi8_epi16(i8x16));
    }
    static Integers add_products(Integers sum_i32x8, Integers u8x32, Integers i8x32) {
        const __m256i low_i32x8 =
            neighbours(_mm256_castsi256_si128(u8x32), _mm256_castsi256_si128(i8x32));
        const __m256i high_i32x8 =
            neighbours(_mm256_extracti128_si256(u8x32, 1), _mm256_extracti128_si256(i8x32, 1));
        const __m256i fours_i32x8 = _mm256_permute4x64_epi64(
            _mm256_hadd_epi32(low_i32x8, high_i32x8), _MM_SHUFFLE(3, 1, 2, 0));
        return _mm256_add_epi32(sum_i32x8, fours_i32x8);
    }
#else
    static Integers add_products(Integers sum_i32x8, Integers u8x32, Integers i8x32) {
        return _mm256_dpbusd_avx_epi32(sum_i32x8, u8x32, i8x32);
    }
#endif

    // The first of base 3, which is 1 from a third of 256 on and 2 from two thirds on.
    static Integers first_digit(Integers v_u8x32) {
        const auto minus_one_from = [&](int least) {
            return _mm256_cmpeq_epi8(_mm256_max_epu8(v_u8x32, all_i8(least)), v_u8x32);
        };
        return _mm256_abs_epi8(_mm256_add_epi8(minus_one_from(86), minus_one_from(171)));
    }

    static __m128i sum_lanes(Integers a, Integers b, Integers c, Integers d) {
        const Integers sum_i32x8 =
            _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        return _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8),
                             _mm256_extracti128_si256(sum_i32x8, 1));
    }

    static int32_t sum_i32(Integers a) {
        const Integers zero = all_i32(0);
        return _mm_cvtsi128_si32(sum_lanes(a, zero, zero, zero));
    }

    static Floats all_f32(float value) { return _mm256_set1_ps(value); }
    static Floats add_f32(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats multiply_f32(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats convert_i32(Integers a_i32x8) { return _mm256_cvtepi32_ps(a_i32x8); }
    static Floats load_bf16(const void* at) {
        const __m128i bits_u16x8 = _mm_loadu_si128(static_cast<const __m128i*>(at));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits_u16x8), 16));
    }
    static void store_f32(float* at, Floats values) { _mm256_storeu_ps(at, values); }
};

}  // namespace

const IntegerKernels avxvnni_integer_kernels = KERNELS<AvxVnni>;

}  // namespace bitllm

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif
