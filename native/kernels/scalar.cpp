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

struct StoredI8 {
    static constexpr size_t BYTES = 1;
    static float load(const std::byte* at) {
        return static_cast<float>(std::to_integer<int8_t>(*at));
    }
};

// Calls use.operator()<Stored>() for the way in which values of a type are stored.
template <class Use>
void with_stored(ValueType type, Use use) {
    switch (type) {
        case ValueType::F32:
            return use.template operator()<StoredF32>();
        case ValueType::BF16:
            return use.template operator()<StoredBF16>();
        case ValueType::F16:
            return use.template operator()<StoredF16>();
        case ValueType::I8:
            return use.template operator()<StoredI8>();
    }
}

void dense_matvec(const void* w, ValueType type, size_t rows, size_t n, const float* x,
                  float* out) {
    with_stored(type, [&]<class Stored>() {
        const std::byte* at = static_cast<const std::byte*>(w);
        for (size_t r = 0; r < rows; ++r) {
            float lanes[LANES] = {};
            for (size_t i = 0; i < n; ++i, at += Stored::BYTES)
                lanes[i % LANES] += Stored::load(at) * x[i];
            out[r] = lane_sum(lanes, LANES);
        }
    });
}

void attention_scores(const float* q, size_t queries, const void* keys, ValueType type, size_t n,
                      float scale, uintptr_t, float* out) {
    with_stored(type, [&]<class Stored>() {
        for (size_t i = 0; i < queries; ++i, q += n, out += KV_BLOCK_SIZE) {
            const std::byte* at = static_cast<const std::byte*>(keys);
            std::fill_n(out, KV_BLOCK_SIZE, 0.0f);
            for (size_t d = 0; d < n; ++d)
                for (size_t j = 0; j < KV_BLOCK_SIZE; ++j, at += Stored::BYTES)
                    out[j] += q[d] * Stored::load(at);
            for (size_t j = 0; j < KV_BLOCK_SIZE; ++j) out[j] = out[j] * scale;
        }
    });
}

float block_weights(float* w, size_t begin, size_t end, float* total) {
    const float highest = *std::max_element(w + begin, w + end);
    for (size_t j = 0; j < KV_BLOCK_SIZE; ++j)
        w[j] = j < begin || j >= end ? 0.0f : exp_f32(w[j] - highest);
    *total = lane_sum(w, KV_BLOCK_SIZE);
    return highest;
}

void weighted_values(const float* w, size_t queries, const void* values, ValueType type,
                     size_t begin, size_t end, size_t n, const float* keep, const float* join,
                     uintptr_t, float* out) {
    with_stored(type, [&]<class Stored>() {
        const std::byte* rows = static_cast<const std::byte*>(values);
        for (size_t i = 0; i < queries; ++i, w += KV_BLOCK_SIZE, out += n) {
            for (size_t d = 0; d < n; ++d) {
                float sum = 0.0f;
                for (size_t j = begin; j < end; ++j)
                    sum += w[j] * Stored::load(rows + (j * n + d) * Stored::BYTES);
                out[d] = out[d] * keep[i] + sum * join[i];
            }
        }
    });
}

void widen(const void* values, ValueType type, size_t n, float* out) {
    with_stored(type, [&]<class Stored>() {
        const std::byte* at = static_cast<const std::byte*>(values);
        for (size_t i = 0; i < n; ++i, at += Stored::BYTES) out[i] = Stored::load(at);
    });
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
    .integer = &scalar_integer_kernels,
    .rms_norm = rms_norm,
    .quantize = quantize,
    .dense_matvec = dense_matvec,
    .attention_scores = attention_scores,
    .block_weights = block_weights,
    .weighted_values = weighted_values,
    .widen = widen,
    .exp_shifted = exp_shifted,
    .gated = gated,
    .rescale = rescale,
    .add = add,
};

}  // namespace bitllm
