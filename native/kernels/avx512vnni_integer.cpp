// Integer products for AVX-512 (F, BW, DQ, VL) with VNNI.
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

#include "../prefetch.h"

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

#include "vnni_integer.h"

namespace bitllm {
namespace {

struct Avx512 {
    using Integers = __m512i;
    using Floats = __m512;
    static constexpr size_t BYTES = 64;
    static constexpr size_t TOKENS = 6;  // 24 sums, 6 tokens and one register of codes, of 32
    static constexpr size_t FEW_ROWS = 2, FEW_TOKENS = 8;  // 16 sums, 2 rows, their codes, one q

    static Integers load(const void* at) { return _mm512_loadu_si512(at); }
    // The upper half is 0.
    static Integers load_32(const void* at) {
        return _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
    }
    static void store(void* at, Integers values) { _mm512_storeu_si512(at, values); }
    static Integers all_i8(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
    static Integers all_i32(int32_t value) { return _mm512_set1_epi32(value); }

    static Integers bits_of_both(Integers a, Integers b) { return _mm512_and_si512(a, b); }
    static Integers add_i8(Integers a, Integers b) { return _mm512_add_epi8(a, b); }
    static Integers add_i32(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
    static Integers subtract_i32(Integers a, Integers b) { return _mm512_sub_epi32(a, b); }
    template <unsigned BITS>
    static Integers words_right(Integers a) {
        return _mm512_srli_epi16(a, BITS);
    }
    template <unsigned BITS>
    static Integers right(Integers a_i32x16) {
        return _mm512_srai_epi32(a_i32x16, BITS);
    }
    template <unsigned BITS>
    static Integers left(Integers a_i32x16) {
        return _mm512_slli_epi32(a_i32x16, BITS);
    }
    static Integers add_products(Integers sum_i32x16, Integers u8x64, Integers i8x64) {
        return _mm512_dpbusd_epi32(sum_i32x16, u8x64, i8x64);
    }

    // The first of base 3, which is 1 from a third of 256 on and 2 from two thirds on.
    static Integers first_digit(Integers v_u8x64) {
        const Integers one = all_i8(1);
        const __mmask64 third = _mm512_cmpge_epu8_mask(v_u8x64, all_i8(86));
        const __mmask64 two_thirds = _mm512_cmpge_epu8_mask(v_u8x64, all_i8(171));
        const Integers digit = _mm512_maskz_mov_epi8(third, one);
        return _mm512_mask_add_epi8(digit, two_thirds, digit, one);
    }

    // (a0 + a2, b0 + b2, a1 + a3, b1 + b3) of each 128 bits.
    static Integers add_pairs(Integers a_i32x16, Integers b_i32x16) {
        return _mm512_add_epi32(_mm512_unpacklo_epi32(a_i32x16, b_i32x16),
                                _mm512_unpackhi_epi32(a_i32x16, b_i32x16));
    }
    static __m128i sum_lanes(Integers a, Integers b, Integers c, Integers d) {
        const Integers ab = add_pairs(a, b), cd = add_pairs(c, d);
        const Integers sum_i32x16 =
            _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
        const __m256i sum_i32x8 = _mm256_add_epi32(_mm512_castsi512_si256(sum_i32x16),
                                                   _mm512_extracti64x4_epi64(sum_i32x16, 1));
        return _mm_add_epi32(_mm256_castsi256_si128(sum_i32x8),
                             _mm256_extracti128_si256(sum_i32x8, 1));
    }

    static int32_t sum_i32(Integers a) {
        const Integers zero = all_i32(0);
        return _mm_cvtsi128_si32(sum_lanes(a, zero, zero, zero));
    }

    static Floats all_f32(float value) { return _mm512_set1_ps(value); }
    static Floats add_f32(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static Floats multiply_f32(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats convert_i32(Integers a_i32x16) { return _mm512_cvtepi32_ps(a_i32x16); }
    static Floats load_bf16(const void* at) {
        const __m256i bits_u16x16 = _mm256_loadu_si256(static_cast<const __m256i*>(at));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits_u16x16), 16));
    }
    static void store_f32(float* at, Floats values) { _mm512_storeu_ps(at, values); }
};

}  // namespace

const IntegerKernels avx512vnni_integer_kernels = KERNELS<Avx512>;

}  // namespace bitllm

#if !defined(BITLLM_EMULATE_AVX512)
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif

#endif
