// The kernels in plain C++: what the other instruction sets have to match bit for bit, and what
// machines without a set of their own run. Written for reading first.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../numerics.h"
#include "kernels.h"

namespace bitllm {
namespace {

// a > b ? a : b, and not std::max, wherever the order of arguments says which of them survives a
// NaN.
inline float greater(float a, float b) { return a > b ? a : b; }
inline float less(float a, float b) { return a < b ? a : b; }

void rms_norm(const float* x, const float* gain, size_t n, float eps, float* y) {
    float lanes[LANES] = {};
    for (size_t i = 0; i < n; ++i) lanes[i % LANES] += x[i] * x[i];
    const float mean = lane_sum(lanes, LANES) / static_cast<float>(n);
    const float inverse = 1.0f / std::sqrt(mean + eps);
    for (size_t i = 0; i < n; ++i) y[i] = (x[i] * inverse) * gain[i];
}

float quantize(const float* x, size_t n, int8_t* q, int32_t* q_sum) {
    float absmax = 0.0f;
    for (size_t i = 0; i < n; ++i) absmax = greater(std::fabs(x[i]), absmax);
    const float a = 127.0f / greater(absmax, 1e-5f);
    int32_t sum = 0;
    for (size_t i = 0; i < n; ++i) {
        const float clamped = less(greater(x[i] * a, -128.0f), 127.0f);
        const float magic =
            12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds half to even
        const auto code = static_cast<int8_t>((clamped + magic) - magic);
        q[i] = code;
        sum += code;
    }
    std::memset(q + n, 0, padded_columns(n) - n);
    *q_sum = sum;
    return a;
}

// Sum over a row of (code + 1) * q.
int32_t ternary_row(const uint8_t* packed, size_t blocks, const int8_t* q) {
    int32_t sum = 0;
    for (size_t block = 0; block < blocks; ++block) {
        for (size_t b = 0; b < TERNARY_BLOCK_BYTES; ++b) {
            const int byte = packed[b];
            sum += (byte & 3) * q[b] + (byte >> 2 & 3) * q[b + 64] + (byte >> 4 & 3) * q[b + 128] +
                   (byte >> 6) * q[b + 192];
        }
        packed += TERNARY_BLOCK_BYTES;
        q += TERNARY_BLOCK;
    }
    return sum;
}

void ternary_matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
                    int32_t* acc) {
    const size_t row_bytes = ternary_row_bytes(k);
    for (size_t r = 0; r < rows; ++r)
        acc[r] = ternary_row(packed + r * row_bytes, ternary_blocks(k), q) - q_sum;
}

void ternary_matmul(const uint8_t* packed, size_t rows, size_t k, const int8_t* q,
                    const int32_t* q_sums, size_t tokens, int32_t* acc, size_t acc_stride) {
    for (size_t t = 0; t < tokens; ++t)
        ternary_matvec(packed, rows, k, q + t * padded_columns(k), q_sums[t], acc + t * acc_stride);
}

// How stored values are read; they need not be aligned.
struct StoredF32 {
    static constexpr size_t BYTES = 4;
    static float load(const std::byte* at) {
        float value;
        std::memcpy(&value, at, BYTES);
        return value;
    }
};

template <float convert(uint16_t)>
struct Stored16 {
    static constexpr size_t BYTES = 2;
    static float load(const std::byte* at) {
        uint16_t bits;
        std::memcpy(&bits, at, BYTES);
        return convert(bits);
    }
};
using StoredBF16 = Stored16<f32_from_bf16>;
using StoredF16 = Stored16<f32_from_f16>;

template <class Stored>
void dot_rows(const void* w, size_t rows, size_t n, const float* x, float scale, float* out) {
    const std::byte* at = static_cast<const std::byte*>(w);
    for (size_t r = 0; r < rows; ++r) {
        float lanes[LANES] = {};
        for (size_t i = 0; i < n; i += LANES) {
            const size_t width = std::min(LANES, n - i);
            for (size_t lane = 0; lane < width; ++lane, at += Stored::BYTES)
                lanes[lane] += Stored::load(at) * x[i + lane];
        }
        out[r] = lane_sum(lanes, LANES) * scale;
    }
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

template <class Stored>
void sum_rows(const float* p, const void* v, size_t count, size_t n, float* out) {
    const std::byte* at = static_cast<const std::byte*>(v);
    std::fill(out, out + n, 0.0f);
    for (size_t j = 0; j < count; ++j)
        for (size_t i = 0; i < n; ++i, at += Stored::BYTES) out[i] += p[j] * Stored::load(at);
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

void exp_shifted(float* x, size_t n, float shift) {
    for (size_t i = 0; i < n; ++i) x[i] = exp_f32(x[i] - shift);
}

float relu2(float x) {
    const float positive = greater(0.0f, x);  // NaN for NaN
    return positive * positive;
}

float silu(float x) { return x / (1.0f + exp_f32(-x)); }

float gelu_tanh(float x) {
    const float u = 0.7978845608f * (x + (0.044715f * ((x * x) * x)));
    return (0.5f * x) * (1.0f + (1.0f - 2.0f / (exp_f32(2.0f * u) + 1.0f)));
}

template <float activate(float)>
void gate_with(const float* gate, const float* up, size_t n, float* out) {
    for (size_t i = 0; i < n; ++i) out[i] = activate(gate[i]) * up[i];
}

void gated(Activation activation, const float* gate, const float* up, size_t n, float* out) {
    switch (activation) {
        case Activation::RELU2:
            return gate_with<relu2>(gate, up, n, out);
        case Activation::SILU:
            return gate_with<silu>(gate, up, n, out);
        case Activation::GELU_TANH:
            return gate_with<gelu_tanh>(gate, up, n, out);
    }
}

void rescale(const int32_t* acc, size_t n, float a, const float* scale, size_t scale_stride,
             float* y) {
    for (size_t i = 0; i < n; ++i)
        y[i] = (static_cast<float>(acc[i]) / a) * scale[scale_stride * i];
}

void add(float* x, const float* y, size_t n) {
    for (size_t i = 0; i < n; ++i) x[i] += y[i];
}

}  // namespace

const Kernels scalar_kernels = {
    .name = "scalar",
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
