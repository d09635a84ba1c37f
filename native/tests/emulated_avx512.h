// AVX-512 functions that run on any x86 machine: SIMDe's, under the names of the intrinsics, and
// exact stand-ins for those that SIMDe 0.7.4 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../numerics.h"

namespace bitllm::emulated {

// The lanes of a register, to be looked at one by one.
template <class Value, size_t COUNT = 16>
struct Lanes {
    Value value[COUNT] = {};
    Lanes() = default;
    template <class Register>
    explicit Lanes(const Register& from) {
        static_assert(sizeof(from) == sizeof(value));
        std::memcpy(value, &from, sizeof(value));
    }
    template <class Register>
    operator Register() const {
        static_assert(sizeof(Register) == sizeof(value));
        Register to;
        std::memcpy(&to, value, sizeof(value));
        return to;
    }
};
using F32x16 = Lanes<float>;
using I32x16 = Lanes<int32_t>;
using U16x16 = Lanes<uint16_t>;
using I8x16 = Lanes<int8_t>;
using I8x64 = Lanes<int8_t, 64>;

inline simde__m512 maskz_loadu_ps(uint16_t mask, const void* at) {
    F32x16 lanes;
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy(&lanes.value[i], static_cast<const char*>(at) + 4 * i, 4);
    return lanes;
}

inline void mask_storeu_ps(void* at, uint16_t mask, simde__m512 values) {
    const F32x16 lanes(values);
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy(static_cast<char*>(at) + 4 * i, &lanes.value[i], 4);
}

inline simde__m256i maskz_loadu_epi16(uint16_t mask, const void* at) {
    U16x16 lanes;
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy(&lanes.value[i], static_cast<const char*>(at) + 2 * i, 2);
    return lanes;
}

inline simde__m128i maskz_loadu_epi8(uint16_t mask, const void* at) {
    I8x16 lanes;
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy(&lanes.value[i], static_cast<const char*>(at) + i, 1);
    return lanes;
}

inline simde__m512i zextsi256_si512(simde__m256i values) {
    I8x64 lanes;
    std::memcpy(lanes.value, &values, sizeof values);
    return lanes;
}

inline simde__m512 cvtph_ps(simde__m256i halves) {
    const U16x16 from(halves);
    F32x16 to;
    for (int i = 0; i < 16; ++i) to.value[i] = f32_from_f16(from.value[i]);
    return to;
}

inline simde__m512i cvtepu16_epi32(simde__m256i values) {
    const U16x16 from(values);
    I32x16 to;
    for (int i = 0; i < 16; ++i) to.value[i] = from.value[i];
    return to;
}

inline simde__m512i cvtepi8_epi32(simde__m128i values) {
    const I8x16 from(values);
    I32x16 to;
    for (int i = 0; i < 16; ++i) to.value[i] = from.value[i];
    return to;
}

inline simde__m512i srai_epi32(simde__m512i values, unsigned count) {
    I32x16 lanes(values);
    for (int i = 0; i < 16; ++i) lanes.value[i] >>= count;
    return lanes;
}

// Not inline: a tile of products would take minutes to compile.
[[gnu::noinline]] inline simde__m512i dpbusd_epi32(simde__m512i sum, simde__m512i u8,
                                                   simde__m512i i8) {
    return simde_mm512_dpbusd_epi32(sum, u8, i8);
}

// Half to even; what int32 cannot hold becomes INT32_MIN.
inline simde__m512i cvtps_epi32(simde__m512 values) {
    const F32x16 from(values);
    I32x16 to;
    for (int i = 0; i < 16; ++i) {
        const float rounded = std::nearbyint(from.value[i]);
        const bool fits = rounded >= -0x1p31f && rounded < 0x1p31f;
        to.value[i] = fits ? static_cast<int32_t>(rounded) : INT32_MIN;
    }
    return to;
}

inline simde__m512 cvtepi32_ps(simde__m512i values) {
    const I32x16 from(values);
    F32x16 to;
    for (int i = 0; i < 16; ++i) to.value[i] = static_cast<float>(from.value[i]);
    return to;
}

// The low bytes.
inline simde__m128i cvtepi32_epi8(simde__m512i values) {
    const I32x16 from(values);
    I8x16 to;
    for (int i = 0; i < 16; ++i) to.value[i] = static_cast<int8_t>(from.value[i] & 0xff);
    return to;
}

}  // namespace bitllm::emulated

using __mmask16 = uint16_t;
using __mmask64 = uint64_t;

#define _mm512_maskz_loadu_ps bitllm::emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps bitllm::emulated::mask_storeu_ps
#define _mm256_maskz_loadu_epi16 bitllm::emulated::maskz_loadu_epi16
#define _mm_maskz_loadu_epi8 bitllm::emulated::maskz_loadu_epi8
#define _mm512_zextsi256_si512 bitllm::emulated::zextsi256_si512
#define _mm512_cvtph_ps bitllm::emulated::cvtph_ps
#define _mm512_cvtepu16_epi32 bitllm::emulated::cvtepu16_epi32
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 bitllm::emulated::dpbusd_epi32
#define _mm512_cvtepi8_epi32 bitllm::emulated::cvtepi8_epi32
#define _mm512_srai_epi32 bitllm::emulated::srai_epi32
#define _mm512_cvtps_epi32 bitllm::emulated::cvtps_epi32
#define _mm512_cvtepi32_ps bitllm::emulated::cvtepi32_ps
#define _mm512_cvtepi32_epi8 bitllm::emulated::cvtepi32_epi8
