// Integer products for NEON with dot products of bytes (dotprod).
#include "kernels.h"

#if defined(BITLLM_NEON_EXTENSIONS)

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../prefetch.h"

// Only what follows is compiled for the extension; see avx2.cpp.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace bitllm {
namespace {

inline int32x4_t dot(int32x4_t sums, int8x16_t a, int8x16_t b) { return vdotq_s32(sums, a, b); }

template <int GROUP>
inline int32x4_t dot_group(int32x4_t sums, int8x16_t a, int8x16_t b) {
    return vdotq_laneq_s32(sums, a, b, GROUP);
}

}  // namespace
}  // namespace bitllm

#include "neon_integer.h"

namespace bitllm {
namespace {

int64_t peak(size_t iterations) {
    return peak_of(5 * iterations, 16,
                   [](int32x4_t sums, int8x16_t a, int8x16_t b) { return vdotq_s32(sums, a, b); });
}

}  // namespace

constinit const IntegerKernels neon_integer_kernels = {
    .packed = {TWO_BIT_KERNELS, BASE3_KERNELS},
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
