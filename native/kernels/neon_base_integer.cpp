// Integer products for NEON without dot products of bytes (ARMv8.0: Cortex-A53, A57, A72, A73).
#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "../prefetch.h"

namespace bitllm {
namespace {

// A product of -128 and -128 and another one are too much for 16 bits, so each half is widened on
// its own.
inline int32x4_t dot(int32x4_t sums, int8x16_t a, int8x16_t b) {
    const int32x4_t with_low = vpadalq_s16(sums, vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    return vpadalq_s16(with_low, vmull_high_s8(a, b));
}

template <int GROUP>
inline int32x4_t dot_group(int32x4_t sums, int8x16_t a, int8x16_t b) {
    const int8x16_t group = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(b), GROUP));
    const int16x8_t pairs_i16x8 =
        vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(group)), vmull_high_s8(a, group));
    return vpadalq_s16(sums, pairs_i16x8);
}

}  // namespace
}  // namespace bitllm

#include "neon_integer.h"

namespace bitllm {
namespace {

// Multiplications that add to sums of 16 bits are the densest.
int64_t peak(size_t iterations) {
    return peak_of(5 * iterations, 16, [](int32x4_t sums, int8x16_t a, int8x16_t b) {
        const int16x8_t low = vmlal_s8(vreinterpretq_s16_s32(sums), vget_low_s8(a), vget_low_s8(b));
        return vreinterpretq_s32_s16(vmlal_high_s8(low, a, b));
    });
}

}  // namespace

constinit const IntegerKernels neon_base_integer_kernels = {
    .packed = {TWO_BIT_KERNELS, BASE3_KERNELS},
    .codes_matmul = codes_matmul,
    .screen_rows = screen_rows,
    .peak = peak,
};

}  // namespace bitllm

#endif
