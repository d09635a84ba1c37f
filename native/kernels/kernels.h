// The kernel table: what one instruction set has to provide, and the exact results it must give.
//
// Every function gives the same bits on every instruction set: integers are exact, float reductions
// run in LANES lanes (lane j adds elements j, j + LANES, ... in order; then the upper half of the
// lanes is added to the lower half, 16 -> 8 -> 4 -> 2 -> 1), elementwise float code uses IEEE
// operations in the written order and no fused multiply-add.
// src/bitllm/backends/reference/numerics.py is the normative text. No allocation, no threads, no
// Python in here. Pointers need no alignment unless a comment says so.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitllm {

inline constexpr size_t LANES = 16;

// Packed ternary rows, one layout for all instruction sets: K is padded to whole blocks of 256
// weights = 64 bytes; byte b of a block holds elements b, b + 64, b + 128, b + 192 at bits 0, 2, 4,
// 6, as code + 1. Padding weights are 1 (zero). Quantised activations are padded with 0 to the same
// length.
inline constexpr size_t TERNARY_BLOCK = 256;
inline constexpr size_t TERNARY_BLOCK_BYTES = 64;

inline constexpr size_t ternary_blocks(size_t k) { return (k + TERNARY_BLOCK - 1) / TERNARY_BLOCK; }
inline constexpr size_t ternary_row_bytes(size_t k) {
    return ternary_blocks(k) * TERNARY_BLOCK_BYTES;
}
inline constexpr size_t padded_columns(size_t k) { return ternary_blocks(k) * TERNARY_BLOCK; }

enum class FloatType : uint8_t { F32 = 0, BF16 = 1, F16 = 2 };
enum class Activation : uint8_t { RELU2 = 0, SILU = 1, GELU_TANH = 2 };

struct Kernels {
    const char* name;

    // y[i] = (x[i] * inv) * gain[i], inv = 1 / sqrt(lane_sum(x * x) / n + eps); y may be x.
    void (*rms_norm)(const float* x, const float* gain, size_t n, float eps, float* y);

    // Per-token absmax: a = 127 / max(max|x|, 1e-5); q[i] = clamp(round_half_even(x[i] * a), -128,
    // 127); writes padded_columns(n) values, zeros behind n; *q_sum = sum of q. Returns a.
    float (*quantize)(const float* x, size_t n, int8_t* q, int32_t* q_sum);

    // acc[r] = sum_k (packed[r][k] - 1) * q[k] for `rows` rows of ternary_row_bytes(k) bytes,
    // int32, exact for k <= 2^24 / 127. q_sum is that of quantize.
    void (*ternary_matvec)(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                           int32_t q_sum, int32_t* acc);

    // The same for `tokens` activation vectors (q: tokens x padded_columns(k), q_sums: tokens):
    // acc[t * acc_stride + r].
    void (*ternary_matmul)(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                           const int32_t* q_sums, size_t tokens, int32_t* acc, size_t acc_stride);

    // out[r] = lane_sum(float(w[r][i]) * x[i]) for `rows` contiguous rows of n values of `type`.
    void (*dense_matvec)(const void* w, FloatType type, size_t rows, size_t n, const float* x,
                         float* out);

    // out[j] = lane_sum(q * float(k[j])) * scale for j < count; row j of k starts j * n values
    // behind k.
    void (*attention_scores)(const float* q, const void* k, FloatType type, size_t count, size_t n,
                             float scale, float* out);

    // out[i] = ((0 + p[0] * v[0][i]) + p[1] * v[1][i]) + ... in order of j < count; rows of n
    // values.
    void (*weighted_sum)(const float* p, const void* v, FloatType type, size_t count, size_t n,
                         float* out);

    // x[i] = exp(x[i] - shift), the exp of numerics.py; in place.
    void (*exp_shifted)(float* x, size_t n, float shift);

    // out[i] = act(gate[i]) * up[i]; relu2: max(x, 0)^2; silu: x / (1 + exp(-x)); gelu_tanh:
    // (0.5 * x) * (1 + (1 - 2 / (exp(2 * u) + 1))), u = 0.7978845608 * (x + (0.044715 * ((x * x) *
    // x))). out may be gate.
    void (*gated)(Activation activation, const float* gate, const float* up, size_t n, float* out);

    // y[i] = (float(acc[i]) / a) * scale[scale_stride * i]; scale_stride is 0 or 1.
    void (*rescale)(const int32_t* acc, size_t n, float a, const float* scale, size_t scale_stride,
                    float* y);

    // x[i] += y[i].
    void (*add)(float* x, const float* y, size_t n);
};

// The kernel sets this build contains, best first; each knows whether this CPU runs it
// (dispatch.h).
extern const Kernels scalar_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx2_kernels;
extern const Kernels avx512vnni_kernels;
#endif

}  // namespace bitllm
