// The kernel table: what one instruction set has to provide, and the exact results it must give.
//
// Every function gives the same bits on every instruction set: integers are exact, float reductions
// run in LANES lanes (lane j adds elements j, j + LANES, ... in order; then the upper half of the
// lanes is added to the lower half, 16 -> 8 -> 4 -> 2 -> 1) or "in order", one after another from
// 0; elementwise float code uses IEEE operations in the written order and no fused multiply-add.
// src/bitllm/backends/numerics.py is the normative text. No allocation, no threads, no
// Python in here. Pointers need no alignment unless a comment says so.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitllm {

inline constexpr size_t LANES = 16;

// How ternary rows are packed; one layout of each for all instruction sets. A row is whole blocks
// of 64 bytes: byte b of a block holds elements b, b + 64, b + 128, ... of the block as code + 1.
//   TWO_BIT: 256 weights a block; element b + 64 p is bits 2 p of the byte.
//   BASE3: 320 weights a block; with digits d0 (element b) .. d4 (element b + 256), the byte is
//     v = 81 d0 + 27 d1 + 9 d2 + 3 d3 + d4 written as a fraction, ceil(256 v / 243): the digits
//     come out in order as what is carried beyond 8 bits when the byte is tripled again and again.
// Padding weights are zeros (1), so that a row of any length can be multiplied in whole blocks.
enum class Packing : uint8_t { TWO_BIT = 0, BASE3 = 1 };
inline constexpr size_t PACKING_COUNT = 2;
inline constexpr size_t BLOCK_BYTES = 64;

inline constexpr size_t block_weights(Packing packing) {
    return packing == Packing::TWO_BIT ? 4 * BLOCK_BYTES : 5 * BLOCK_BYTES;
}
inline constexpr size_t row_blocks(Packing packing, size_t k) {
    return (k + block_weights(packing) - 1) / block_weights(packing);
}
inline constexpr size_t packed_row_bytes(Packing packing, size_t k) {
    return row_blocks(packing, k) * BLOCK_BYTES;
}

// Quantised activations and unpacked codes are padded, with 0 and 1, to whole blocks of every
// packing.
inline constexpr size_t padded_columns(size_t k) {
    const size_t two_bit = row_blocks(Packing::TWO_BIT, k) * block_weights(Packing::TWO_BIT);
    const size_t base3 = row_blocks(Packing::BASE3, k) * block_weights(Packing::BASE3);
    return two_bit > base3 ? two_bit : base3;
}

// A dense matrix in 4 bits, for screening (head_screen.h). 16 rows lie together, in groups of 64
// columns: 8 steps of 64 bytes, then 16 scales in bf16. Step s holds columns 8 s .. 8 s + 7; byte
// 4 r + j of it belongs to row r, its low half to column 8 s + j, its high half to column
// 8 s + 4 + j, each as code + 8 with a code in -7 .. 7. Rows and columns are padded with code 0.
inline constexpr size_t SCREEN_ROWS = 16;
inline constexpr size_t SCREEN_GROUP = 64;
inline constexpr size_t SCREEN_GROUP_BYTES = SCREEN_ROWS * (SCREEN_GROUP / 2 + 2);

enum class ValueType : uint8_t { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };
inline constexpr size_t VALUE_BYTES[] = {4, 2, 2, 1};
enum class Activation : uint8_t { RELU2 = 0, SILU = 1, GELU_TANH = 2 };

// Positions of a block of keys and values.
inline constexpr size_t KV_BLOCK_SIZE = 32;

// Products of ternary rows that are packed in one way.
struct PackedKernels {
    // acc[r] = sum over i < k of (code - 1) * q[i], for `rows` rows of packed_row_bytes(., k)
    // bytes: int32, exact for k <= 2^24 / 127. q: padded_columns(k) values; q_sum: their sum.
    void (*matvec)(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
                   int32_t* acc);

    // codes[r * padded_columns(k) + i] = code + 1 of each row, 0 .. 2; behind the last block of the
    // packing it writes 1.
    void (*unpack)(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes);

    // acc[t * acc_stride + r], as matvec gives it, for the rows t of q, each of padded_columns(k)
    // values. For 2 to `few_tokens` tokens; for more, unpacking rows once for all is faster.
    void (*matmul)(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                   const int32_t* q_sums, size_t tokens, int32_t* acc, size_t acc_stride) = nullptr;
    size_t few_tokens = 0;
};

// Everything that multiplies integers.
struct IntegerKernels {
    PackedKernels packed[PACKING_COUNT];

    // acc[t * acc_stride + r] = (sum over i < k of codes[r * codes_stride + i] * q[t * q_stride +
    // i]) - q_sums[t], for codes 0 .. 2 and a k that is a multiple of 32: int32, exact for k <=
    // 2^24 / 127.
    void (*codes_matmul)(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k,
                         const int8_t* q, size_t q_stride, const int32_t* q_sums, size_t tokens,
                         int32_t* acc, size_t acc_stride);

    // For each of `row_groups` * SCREEN_ROWS rows, with the scales s and codes c of its groups g:
    //   approx[r] = sum over g in order of s[g] * float(D[g]),
    //     D[g] = (256 * sum(u * high) + sum(u * low)) - offsets[g], u = c + 8, over columns of g;
    //   spread[r] = sum over g in order of (s[g] * s[g]) * squares[g].
    // high, low: groups * SCREEN_GROUP values. D is exact.
    void (*screen_rows)(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                        const int8_t* low, const int32_t* offsets, const float* squares,
                        float* approx, float* spread);

    // Runs the densest loop of 8-bit multiplications and additions that the set knows, without
    // memory where that can be, and returns how many multiplications it did, about 1000 *
    // `iterations`: no product is faster, so this is the yardstick of all of them.
    int64_t (*peak)(size_t iterations);
};

struct Kernels {
    const char* name;
    const IntegerKernels* integer;

    // y[i] = (x[i] * inv) * gain[i], inv = 1 / sqrt(lane_sum(x * x) / n + eps); y may be x.
    void (*rms_norm)(const float* x, const float* gain, size_t n, float eps, float* y);

    // Per-token absmax: a = 127 / max(max|x|, 1e-5); q[i] = clamp(round_half_even(x[i] * a), -128,
    // 127); writes padded_columns(n) values, zeros behind n; *q_sum = sum of q. Returns a.
    float (*quantize)(const float* x, size_t n, int8_t* q, int32_t* q_sum);

    // out[r] = lane_sum(float(w[r][i]) * x[i]) for `rows` contiguous rows of n values of `type`.
    void (*dense_matvec)(const void* w, ValueType type, size_t rows, size_t n, const float* x,
                         float* out);

    // Scores of some queries against all KV_BLOCK_SIZE keys of a block, which is stored by
    // dimension, keys[d][j]: out[i * KV_BLOCK_SIZE + j] = (sum over d in order of q[i * n + d] *
    // float(keys[d][j])) * scale. Meanwhile it asks for what lies `ahead` bytes behind the keys,
    // unless that is 0: a decoded token waits for memory more than it computes.
    void (*attention_scores)(const float* q, size_t queries, const void* keys, ValueType type,
                             size_t n, float scale, uintptr_t ahead, float* out);

    // From scores to the softmax weights of one block, in place: with h = max of w[begin .. end),
    // w[j] = exp(w[j] - h) for begin <= j < end and 0 elsewhere; *total = lane_sum of all
    // KV_BLOCK_SIZE weights. Returns h. 0 <= begin < end <= KV_BLOCK_SIZE; no score is NaN.
    float (*block_weights)(float* w, size_t begin, size_t end, float* total);

    // Merges a block into running sums: out[i * n + d] = out[i * n + d] * keep[i] + (sum over begin
    // <= j < end in order of w[i * KV_BLOCK_SIZE + j] * float(values[j][d])) * join[i]. `ahead`: as
    // above, behind the values. end <= KV_BLOCK_SIZE, but for one query it may be anything.
    void (*weighted_values)(const float* w, size_t queries, const void* values, ValueType type,
                            size_t begin, size_t end, size_t n, const float* keep,
                            const float* join, uintptr_t ahead, float* out);

    // out[i] = float(values[i]).
    void (*widen)(const void* values, ValueType type, size_t n, float* out);

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

// The kernel sets this build contains; each knows whether this CPU runs it (dispatch.h).
extern const Kernels scalar_kernels;
extern const IntegerKernels scalar_integer_kernels;
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels avx2_kernels;
extern const IntegerKernels avx2_integer_kernels;
extern const Kernels avxvnni_kernels;
extern const IntegerKernels avxvnni_integer_kernels;
extern const Kernels avx512vnni_kernels;
extern const IntegerKernels avx512vnni_integer_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_base_kernels;
extern const IntegerKernels neon_base_integer_kernels;
// clang before 16 has the instructions of dotprod and i8mm only where a whole file is built for
// them.
#if !defined(__clang__) || __clang_major__ >= 16
#define BITLLM_NEON_EXTENSIONS 1
extern const Kernels neon_kernels;
extern const IntegerKernels neon_integer_kernels;
extern const Kernels neon_i8mm_kernels;
extern const IntegerKernels neon_i8mm_integer_kernels;
#endif
#endif

}  // namespace bitllm
