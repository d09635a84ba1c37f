// The kernels for NEON, the vector unit that every aarch64 CPU has. Four registers hold the 16
// float lanes of the numerics contract.
#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../prefetch.h"

namespace bitllm {
namespace {

constexpr size_t REGISTER = 4;  // floats of one register

struct F32x16 {
    float32x4_t part[4];  // lanes 0-3, 4-7, 8-11, 12-15
};

template <class Operation>
inline F32x16 each(F32x16 a, F32x16 b, Operation operation) {
    return {{operation(a.part[0], b.part[0]), operation(a.part[1], b.part[1]),
             operation(a.part[2], b.part[2]), operation(a.part[3], b.part[3])}};
}

inline F32x16 operator+(F32x16 a, F32x16 b) {
    return each(a, b, [](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
    return each(a, b, [](float32x4_t x, float32x4_t y) { return vsubq_f32(x, y); });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
    return each(a, b, [](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
    return each(a, b, [](float32x4_t x, float32x4_t y) { return vdivq_f32(x, y); });
}

// NaN where one of both is NaN.
inline F32x16 greater(F32x16 a, F32x16 b) {
    return each(a, b, [](float32x4_t x, float32x4_t y) { return vmaxq_f32(x, y); });
}
inline F32x16 less(F32x16 a, F32x16 b) {
    return each(a, b, [](float32x4_t x, float32x4_t y) { return vminq_f32(x, y); });
}

inline F32x16 all(float x) {
    const float32x4_t x_f32x4 = vdupq_n_f32(x);
    return {{x_f32x4, x_f32x4, x_f32x4, x_f32x4}};
}

inline F32x16 load(const float* at) {
    return {{vld1q_f32(at), vld1q_f32(at + REGISTER), vld1q_f32(at + 2 * REGISTER),
             vld1q_f32(at + 3 * REGISTER)}};
}
inline void store(float* at, F32x16 values) {
    for (size_t c = 0; c < 4; ++c) vst1q_f32(at + c * REGISTER, values.part[c]);
}

// `count` <= 16 values; the other lanes are 0 and not read or written.
inline F32x16 load_part(const float* at, size_t count) {
    float padded[LANES] = {};
    std::memcpy(padded, at, count * sizeof(float));
    return load(padded);
}
inline void store_part(float* at, size_t count, F32x16 values) {
    float padded[LANES];
    store(padded, values);
    std::memcpy(at, padded, count * sizeof(float));
}

// How stored values become 16 floats. They are loaded as bytes, which need no alignment.
struct StoredF32 {
    static constexpr size_t BYTES = 4;
    static F32x16 load(const uint8_t* at) {
        return {{vreinterpretq_f32_u8(vld1q_u8(at)), vreinterpretq_f32_u8(vld1q_u8(at + 16)),
                 vreinterpretq_f32_u8(vld1q_u8(at + 32)), vreinterpretq_f32_u8(vld1q_u8(at + 48))}};
    }
};

struct StoredBF16 {
    static constexpr size_t BYTES = 2;
    static F32x16 load(const uint8_t* at) {
        const uint16x8_t zero = vdupq_n_u16(0);
        const uint16x8_t low_u16x8 = vreinterpretq_u16_u8(vld1q_u8(at));
        const uint16x8_t high_u16x8 = vreinterpretq_u16_u8(vld1q_u8(at + 16));
        return {{vreinterpretq_f32_u16(vzip1q_u16(zero, low_u16x8)),
                 vreinterpretq_f32_u16(vzip2q_u16(zero, low_u16x8)),
                 vreinterpretq_f32_u16(vzip1q_u16(zero, high_u16x8)),
                 vreinterpretq_f32_u16(vzip2q_u16(zero, high_u16x8))}};
    }
};

struct StoredF16 {
    static constexpr size_t BYTES = 2;
    static F32x16 load(const uint8_t* at) {
        const float16x8_t low_f16x8 = vreinterpretq_f16_u8(vld1q_u8(at));
        const float16x8_t high_f16x8 = vreinterpretq_f16_u8(vld1q_u8(at + 16));
        return {{vcvt_f32_f16(vget_low_f16(low_f16x8)), vcvt_high_f32_f16(low_f16x8),
                 vcvt_f32_f16(vget_low_f16(high_f16x8)), vcvt_high_f32_f16(high_f16x8)}};
    }
};

struct StoredI8 {
    static constexpr size_t BYTES = 1;
    static F32x16 load(const uint8_t* at) {
        const int8x16_t codes_i8x16 = vreinterpretq_s8_u8(vld1q_u8(at));
        const int16x8_t low_i16x8 = vmovl_s8(vget_low_s8(codes_i8x16));
        const int16x8_t high_i16x8 = vmovl_high_s8(codes_i8x16);
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low_i16x8))),
                 vcvtq_f32_s32(vmovl_high_s16(low_i16x8)),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(high_i16x8))),
                 vcvtq_f32_s32(vmovl_high_s16(high_i16x8))}};
    }
};

// The first `count` <= 16 of them, the other lanes 0.
template <class Stored>
inline F32x16 load_stored_part(const uint8_t* at, size_t count) {
    uint8_t padded[LANES * Stored::BYTES] = {};
    std::memcpy(padded, at, count * Stored::BYTES);
    return Stored::load(padded);
}

// 16 lanes -> 8 -> 4 -> 2 -> 1, the upper half added to the lower half.
inline float sum_lanes(F32x16 sum) {
    const float32x4_t sum_f32x4 =
        vaddq_f32(vaddq_f32(sum.part[0], sum.part[2]), vaddq_f32(sum.part[1], sum.part[3]));
    const float32x2_t sum_f32x2 = vadd_f32(vget_low_f32(sum_f32x4), vget_high_f32(sum_f32x4));
    return vget_lane_f32(sum_f32x2, 0) + vget_lane_f32(sum_f32x2, 1);
}

inline float highest_lane(F32x16 x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.part[0], x.part[1]), vmaxq_f32(x.part[2], x.part[3])));
}

void rms_norm(const float* x, const float* gain, size_t n, float eps, float* y) {
    const size_t whole = n - n % LANES, rest = n - whole;
    F32x16 sum = all(0.0f);
    for (size_t i = 0; i < whole; i += LANES) {
        const F32x16 x_f32x16 = load(x + i);
        sum = sum + x_f32x16 * x_f32x16;
    }
    const F32x16 rest_f32x16 = load_part(x + whole, rest);
    sum = sum + rest_f32x16 * rest_f32x16;
    const float mean = sum_lanes(sum) / static_cast<float>(n);
    const F32x16 inverse = all(1.0f / std::sqrt(mean + eps));

    for (size_t i = 0; i < whole; i += LANES)
        store(y + i, (load(x + i) * inverse) * load(gain + i));
    store_part(y + whole, rest, (rest_f32x16 * inverse) * load_part(gain + whole, rest));
}

struct I32x16 {
    int32x4_t part[4];
};

inline I32x16 codes_of(F32x16 x, F32x16 a) {
    // vmaxnmq gives the other operand where a product is NaN.
    const auto code = [](float32x4_t x_f32x4, float32x4_t a_f32x4) {
        const float32x4_t product = vmulq_f32(x_f32x4, a_f32x4);
        const float32x4_t raised = vmaxnmq_f32(product, vdupq_n_f32(-128.0f));
        return vcvtnq_s32_f32(vminnmq_f32(raised, vdupq_n_f32(127.0f)));  // half to even
    };
    return {{code(x.part[0], a.part[0]), code(x.part[1], a.part[1]), code(x.part[2], a.part[2]),
             code(x.part[3], a.part[3])}};
}

// 16 int32 in -128 .. 127 as 16 bytes.
inline void store_codes(int8_t* at, I32x16 codes) {
    const int16x8_t low_i16x8 = vmovn_high_s32(vmovn_s32(codes.part[0]), codes.part[1]);
    const int16x8_t high_i16x8 = vmovn_high_s32(vmovn_s32(codes.part[2]), codes.part[3]);
    vst1q_s8(at, vmovn_high_s16(vmovn_s16(low_i16x8), high_i16x8));
}

inline int32x4_t sum_parts(I32x16 x) {
    return vaddq_s32(vaddq_s32(x.part[0], x.part[1]), vaddq_s32(x.part[2], x.part[3]));
}

// Of a new and an old value that of larger magnitude, the old one where the new one is NaN.
inline F32x16 larger(F32x16 fresh, F32x16 old) {
    return each(fresh, old,
                [](float32x4_t x, float32x4_t y) { return vbslq_f32(vcagtq_f32(x, y), x, y); });
}

float quantize(const float* x, size_t n, int8_t* q, int32_t* q_sum) {
    const size_t whole = n - n % LANES, rest = n - whole;
    const F32x16 rest_f32x16 = load_part(x + whole, rest);
    F32x16 largest = larger(rest_f32x16, all(0.0f));
    for (size_t i = 0; i < whole; i += LANES) largest = larger(load(x + i), largest);
    for (float32x4_t& part : largest.part) part = vabsq_f32(part);
    const float absmax = highest_lane(largest);
    const float a = 127.0f / (absmax > 1e-5f ? absmax : 1e-5f);

    const F32x16 a_f32x16 = all(a);
    int32x4_t sum_i32x4 = vdupq_n_s32(0);
    for (size_t i = 0; i < whole; i += LANES) {
        const I32x16 codes = codes_of(load(x + i), a_f32x16);
        sum_i32x4 = vaddq_s32(sum_i32x4, sum_parts(codes));
        store_codes(q + i, codes);
    }
    std::memset(q + whole, 0, padded_columns(n) - whole);
    if (rest) {
        const I32x16 codes = codes_of(rest_f32x16, a_f32x16);
        sum_i32x4 = vaddq_s32(sum_i32x4, sum_parts(codes));
        store_codes(q + whole, codes);  // zeros behind n, within the padding
    }
    *q_sum = vaddvq_s32(sum_i32x4);
    return a;
}

// Calls use.operator()<Stored>() for the way in which values of a type are stored.
template <class Use>
inline void with_stored(ValueType type, Use use) {
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

// out[r] = lane_sum(w[r] * x) for ROWS rows, so that each piece of x is read once for all of them.
template <class Stored, size_t ROWS>
inline void dot_tile(const uint8_t* w, size_t n, const float* x, float* out) {
    const size_t row_bytes = n * Stored::BYTES, whole = n - n % LANES, rest = n - whole;
    F32x16 sums[ROWS];
    for (size_t r = 0; r < ROWS; ++r) sums[r] = all(0.0f);
    for (size_t i = 0; i < whole; i += LANES) {
        const F32x16 x_f32x16 = load(x + i);
        for (size_t r = 0; r < ROWS; ++r)
            sums[r] = sums[r] + Stored::load(w + r * row_bytes + i * Stored::BYTES) * x_f32x16;
    }
    if (rest) {
        const F32x16 x_f32x16 = load_part(x + whole, rest);
        F32x16 products[ROWS];  // apart from the sums, which would not stay in registers above
        for (size_t r = 0; r < ROWS; ++r) {
            const uint8_t* at = w + r * row_bytes + whole * Stored::BYTES;
            products[r] = load_stored_part<Stored>(at, rest) * x_f32x16;
        }
        for (size_t r = 0; r < ROWS; ++r) sums[r] = sums[r] + products[r];
    }
    for (size_t r = 0; r < ROWS; ++r) out[r] = sum_lanes(sums[r]);
}

void dense_matvec(const void* w, ValueType type, size_t rows, size_t n, const float* x,
                  float* out) {
    with_stored(type, [&]<class Stored>() {
        const uint8_t* bytes = static_cast<const uint8_t*>(w);
        const size_t row_bytes = n * Stored::BYTES;
        size_t r = 0;
        for (; r + 4 <= rows; r += 4) dot_tile<Stored, 4>(bytes + r * row_bytes, n, x, out + r);
        for (; r < rows; ++r) dot_tile<Stored, 1>(bytes + r * row_bytes, n, x, out + r);
    });
}

// Both products of attention: sums over t in order of a[q][t] * b[t][column], for QUERIES rows of a
// and 16 columns of b, or the first `count` of them.
template <class Stored, size_t QUERIES, bool PART = false>
inline void product_tile(const float* a, size_t a_stride, size_t begin, size_t end,
                         const uint8_t* b, size_t b_stride, uintptr_t ahead,
                         F32x16 (&sums)[QUERIES], size_t count = LANES) {
    for (size_t q = 0; q < QUERIES; ++q) sums[q] = all(0.0f);
    for (size_t t = begin; t < end; ++t) {
        const uint8_t* at = b + t * b_stride;
        if (ahead) prefetch<Cache::SECOND>(at, ahead);
        const F32x16 b_f32x16 = PART ? load_stored_part<Stored>(at, count) : Stored::load(at);
        for (size_t q = 0; q < QUERIES; ++q)
            sums[q] = sums[q] + all(a[q * a_stride + t]) * b_f32x16;
    }
}

// Calls tile.operator()<Q>(first query) for tiles of Q = 4 queries, and of 1 for those left over.
template <class Tile>
inline void in_tiles(size_t queries, Tile tile) {
    size_t i = 0;
    for (; i + 4 <= queries; i += 4) tile.template operator()<4>(i);
    for (; i < queries; ++i) tile.template operator()<1>(i);
}

void attention_scores(const float* q, size_t queries, const void* keys, ValueType type, size_t n,
                      float scale, uintptr_t ahead, float* out) {
    with_stored(type, [&]<class Stored>() {
        in_tiles(queries, [&]<size_t QUERIES>(size_t first) {
            for (size_t place = 0; place < KV_BLOCK_SIZE; place += LANES) {
                const uint8_t* at = static_cast<const uint8_t*>(keys) + place * Stored::BYTES;
                F32x16 sums[QUERIES];
                product_tile<Stored>(q + first * n, n, 0, n, at, KV_BLOCK_SIZE * Stored::BYTES,
                                     first ? 0 : ahead, sums);
                for (size_t i = 0; i < QUERIES; ++i)
                    store(out + (first + i) * KV_BLOCK_SIZE + place, sums[i] * all(scale));
            }
        });
    });
}

void weighted_values(const float* w, size_t queries, const void* values, ValueType type,
                     size_t begin, size_t end, size_t n, const float* keep, const float* join,
                     uintptr_t ahead, float* out) {
    with_stored(type, [&]<class Stored>() {
        in_tiles(queries, [&]<size_t QUERIES>(size_t first) {
            const float* weights = w + first * KV_BLOCK_SIZE;
            const uint8_t* rows = static_cast<const uint8_t*>(values);
            const auto merge = [&](F32x16 old, F32x16 sum, size_t i) {
                return old * all(keep[first + i]) + sum * all(join[first + i]);
            };
            size_t d = 0;
            for (; d + LANES <= n; d += LANES) {
                F32x16 sums[QUERIES];
                product_tile<Stored>(weights, KV_BLOCK_SIZE, begin, end, rows + d * Stored::BYTES,
                                     n * Stored::BYTES, first ? 0 : ahead, sums);
                for (size_t i = 0; i < QUERIES; ++i) {
                    float* at = out + (first + i) * n + d;
                    store(at, merge(load(at), sums[i], i));
                }
            }
            if (d == n) return;
            F32x16 sums[QUERIES];
            product_tile<Stored, QUERIES, true>(weights, KV_BLOCK_SIZE, begin, end,
                                                rows + d * Stored::BYTES, n * Stored::BYTES,
                                                first ? 0 : ahead, sums, n - d);
            for (size_t i = 0; i < QUERIES; ++i) {
                float* at = out + (first + i) * n + d;
                store_part(at, n - d, merge(load_part(at, n - d), sums[i], i));
            }
        });
    });
}

void widen(const void* values, ValueType type, size_t n, float* out) {
    with_stored(type, [&]<class Stored>() {
        const uint8_t* at = static_cast<const uint8_t*>(values);
        size_t i = 0;
        for (; i + LANES <= n; i += LANES) store(out + i, Stored::load(at + i * Stored::BYTES));
        if (i < n)
            store_part(out + i, n - i, load_stored_part<Stored>(at + i * Stored::BYTES, n - i));
    });
}

// p * 2^n for whole n in -126 .. 127, and 0 where x is below `lowest`.
inline float32x4_t scale_power(float32x4_t p, float32x4_t n, float32x4_t x, float lowest) {
    const int32x4_t exponent_i32x4 = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    const float32x4_t power = vreinterpretq_f32_s32(vshlq_n_s32(exponent_i32x4, 23));
    const uint32x4_t vanishes = vcltq_f32(x, vdupq_n_f32(lowest));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(vmulq_f32(p, power)), vanishes));
}

// exp_f32 of numerics.h; a NaN passes through.
inline F32x16 exp_f32x16(F32x16 x) {
    constexpr float LOWEST = -87.0f;
    const F32x16 clamped = less(all(88.0f), greater(all(LOWEST), x));
    const F32x16 magic = all(12582912.0f);
    const F32x16 n = (clamped * all(1.44269504088896341f) + magic) - magic;
    const F32x16 r = (clamped - n * all(0.693359375f)) - n * all(-2.12194440e-4f);
    constexpr double FACTORIALS[] = {720, 120, 24, 6, 2, 1, 1};
    F32x16 p = all(static_cast<float>(1.0 / 5040));
    for (const double factorial : FACTORIALS) p = p * r + all(static_cast<float>(1.0 / factorial));
    return {{scale_power(p.part[0], n.part[0], x.part[0], LOWEST),
             scale_power(p.part[1], n.part[1], x.part[1], LOWEST),
             scale_power(p.part[2], n.part[2], x.part[2], LOWEST),
             scale_power(p.part[3], n.part[3], x.part[3], LOWEST)}};
}

void exp_shifted(float* x, size_t n, float shift) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, exp_f32x16(load(x + i) - all(shift)));
    if (i < n) store_part(x + i, n - i, exp_f32x16(load_part(x + i, n - i) - all(shift)));
}

// Values where begin <= place < end, `other` elsewhere; the first value is at place `first`.
inline F32x16 inside(F32x16 values, size_t first, size_t begin, size_t end, float other) {
    constexpr uint32_t LANE[REGISTER] = {0, 1, 2, 3};
    const uint32x4_t begin_u32x4 = vdupq_n_u32(static_cast<uint32_t>(begin));
    const uint32x4_t end_u32x4 = vdupq_n_u32(static_cast<uint32_t>(end));
    for (size_t c = 0; c < 4; ++c) {
        const uint32x4_t place_u32x4 =
            vaddq_u32(vld1q_u32(LANE), vdupq_n_u32(static_cast<uint32_t>(first + c * REGISTER)));
        const uint32x4_t is_inside =
            vandq_u32(vcgeq_u32(place_u32x4, begin_u32x4), vcltq_u32(place_u32x4, end_u32x4));
        values.part[c] = vbslq_f32(is_inside, values.part[c], vdupq_n_f32(other));
    }
    return values;
}

float block_weights(float* w, size_t begin, size_t end, float* total) {
    static_assert(KV_BLOCK_SIZE == 2 * LANES);
    const F32x16 low = load(w), high = load(w + LANES);
    const float highest = highest_lane(
        greater(inside(low, 0, begin, end, -INFINITY), inside(high, LANES, begin, end, -INFINITY)));
    const F32x16 low_powers = inside(exp_f32x16(low - all(highest)), 0, begin, end, 0.0f);
    const F32x16 high_powers = inside(exp_f32x16(high - all(highest)), LANES, begin, end, 0.0f);
    store(w, low_powers);
    store(w + LANES, high_powers);
    *total = sum_lanes(low_powers + high_powers);
    return highest;
}

struct Relu2 {
    static F32x16 of(F32x16 x) {
        const F32x16 positive = greater(all(0.0f), x);
        return positive * positive;
    }
};

struct Silu {
    static F32x16 of(F32x16 x) {
        F32x16 negated = x;
        for (float32x4_t& part : negated.part) part = vnegq_f32(part);
        return x / (all(1.0f) + exp_f32x16(negated));
    }
};

struct GeluTanh {
    static F32x16 of(F32x16 x) {
        const F32x16 one = all(1.0f), two = all(2.0f);
        const F32x16 u = all(0.7978845608f) * (x + all(0.044715f) * ((x * x) * x));
        const F32x16 tanh = one - two / (exp_f32x16(two * u) + one);
        return (all(0.5f) * x) * (one + tanh);
    }
};

template <class Activate>
void gate_with(const float* gate, const float* up, size_t n, float* out) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) store(out + i, Activate::of(load(gate + i)) * load(up + i));
    if (i < n)
        store_part(out + i, n - i,
                   Activate::of(load_part(gate + i, n - i)) * load_part(up + i, n - i));
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

inline F32x16 load_as_floats(const int32_t* at) {
    return {{vcvtq_f32_s32(vld1q_s32(at)), vcvtq_f32_s32(vld1q_s32(at + REGISTER)),
             vcvtq_f32_s32(vld1q_s32(at + 2 * REGISTER)),
             vcvtq_f32_s32(vld1q_s32(at + 3 * REGISTER))}};
}

void rescale(const int32_t* acc, size_t n, float a, const float* scale, size_t scale_stride,
             float* y) {
    const F32x16 shared = all(scale_stride ? 0.0f : *scale);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        store(y + i,
              (load_as_floats(acc + i) / all(a)) * (scale_stride ? load(scale + i) : shared));
    for (; i < n; ++i) y[i] = (static_cast<float>(acc[i]) / a) * scale[scale_stride * i];
}

void add(float* x, const float* y, size_t n) {
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) store(x + i, load(x + i) + load(y + i));
    for (; i < n; ++i) x[i] += y[i];
}

}  // namespace

// All sets have the same floats.
static constexpr Kernels kernels_with(const char* name, const IntegerKernels& integer) {
    return {
        .name = name,
        .integer = &integer,
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
}

constinit const Kernels neon_base_kernels = kernels_with("neon-base", neon_base_integer_kernels);
#if defined(BITLLM_NEON_EXTENSIONS)
constinit const Kernels neon_kernels = kernels_with("neon", neon_integer_kernels);
constinit const Kernels neon_i8mm_kernels = kernels_with("neon-i8mm", neon_i8mm_integer_kernels);
#endif

}  // namespace bitllm

#endif
