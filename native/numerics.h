// The elementary functions of the numerics contract; the normative text is
// src/bitllm/backends/numerics.py, and every function here gives the same bits as its
// namesake there. IEEE 754 operations in the written order; compile without fused multiply-add and
// without fast-math.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "kernels/kernels.h"

namespace bitllm {

// Sum of n values in LANES lanes: lane j adds elements j, j + LANES, ... in order, then the upper
// half of the lanes is added to the lower half until one is left.
inline float lane_sum(const float* values, size_t n) {
    float lanes[LANES] = {};
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t lane = 0; lane < LANES; ++lane) lanes[lane] = lanes[lane] + values[i + lane];
    for (size_t i = whole; i < n; ++i) lanes[i - whole] = lanes[i - whole] + values[i];
    for (size_t width = LANES / 2; width > 0; width /= 2)
        for (size_t lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane] + lanes[lane + width];
    return lanes[0];
}

inline constexpr float LARGEST_FLOAT = std::numeric_limits<float>::max();

// Neither NaN nor infinity among them. Quantising passes over NaN, so it has to be asked before.
inline bool all_finite(const float* values, size_t n) {
    int32_t finite = 1;  // as wide as the floats, for the loop to become vector code
    for (size_t i = 0; i < n; ++i) {
        const float size = values[i] < 0.0f ? -values[i] : values[i];
        finite &= size <= LARGEST_FLOAT ? 1 : 0;
    }
    return finite != 0;
}

// e**x; x is clamped to [-87, 88], and below -87 the result is exactly 0.
inline float exp_f32(float x) {
    if (x != x) return x;
    if (x < -87.0f) return 0.0f;
    const float clamped = x > 88.0f ? 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds half to even
    const float n = (clamped * 1.44269504088896341f + magic) - magic;
    const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = static_cast<float>(1.0 / 5040);
    for (double factorial : {720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0})
        p = p * r + static_cast<float>(1.0 / factorial);
    const auto exponent = static_cast<uint32_t>(static_cast<int32_t>(n) + 127);
    return p * std::bit_cast<float>(exponent << 23);
}

// Natural logarithm of a normal x > 0.
inline double log_f64(double x) {
    const auto bits = std::bit_cast<int64_t>(x);
    int64_t exponent = (bits >> 52) - 1023;
    double m = std::bit_cast<double>((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000);
    if (m >= 1.4142135623730951) {
        m = m * 0.5;
        exponent += 1;
    }
    const double s = (m - 1.0) / (m + 1.0);
    const double s2 = s * s;
    double p = 1.0 / 21.0;
    for (double divisor : {19.0, 17.0, 15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0})
        p = p * s2 + 1.0 / divisor;
    return static_cast<double>(exponent) * 0.6931471805599453 + (2.0 * s) * p;
}

struct SinCos {
    double sine;
    double cosine;
};

// Sine and cosine for |x| < 2^24.
inline SinCos sincos_f64(double x) {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52
    const double q = (x * 0.6366197723675814 + magic) - magic;
    const double r =
        ((x - q * 1.5707963109016418) - q * 1.5893254712295857e-08) - q * 6.123233995736766e-17;
    const double r2 = r * r;
    double s = -1.0 / 1307674368000.0;
    for (double c :
         {1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6})
        s = s * r2 + c;
    s = r + (r * r2) * s;
    double c = 1.0 / 20922789888000.0;
    for (double k : {-1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720,
                     1.0 / 24, -1.0 / 2, 1.0})
        c = c * r2 + k;
    switch (static_cast<int64_t>(q) & 3) {
        case 0:
            return {s, c};
        case 1:
            return {c, -s};
        case 2:
            return {-s, -c};
        default:
            return {-c, s};
    }
}

struct Philox {
    uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., SC 2011).
inline Philox philox4x32(Philox counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * counter.word[0];
        const uint64_t p1 = uint64_t{0xCD9E8D57} * counter.word[2];
        counter = {
            {static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
             static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(p0)}};
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    return counter;
}

// The stream of uniforms of one drawn token: a word for each token id.
struct UniformStream {
    uint64_t seed;
    uint32_t choice;
    uint32_t position;

    // The words of token ids 4 * group .. 4 * group + 3.
    Philox words(uint32_t group) const {
        return philox4x32({{group, position, choice, 0}}, static_cast<uint32_t>(seed),
                          static_cast<uint32_t>(seed >> 32));
    }

    // The words of MANY ids from 4 * group on: the same, in loops that become vector code.
    static constexpr size_t MANY = 256;
    void many_words(uint32_t group, uint32_t* words) const {
        constexpr size_t GROUPS = MANY / 4;
        uint32_t c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
        for (size_t i = 0; i < GROUPS; ++i) {
            c0[i] = group + static_cast<uint32_t>(i);
            c1[i] = position;
            c2[i] = choice;
            c3[i] = 0;
        }
        auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            for (size_t i = 0; i < GROUPS; ++i) {
                const uint64_t p0 = uint64_t{0xD2511F53} * c0[i];
                const uint64_t p1 = uint64_t{0xCD9E8D57} * c2[i];
                c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
                c1[i] = static_cast<uint32_t>(p1);
                c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
                c3[i] = static_cast<uint32_t>(p0);
            }
            key0 += 0x9E3779B9;
            key1 += 0xBB67AE85;
        }
        for (size_t i = 0; i < GROUPS; ++i) {
            words[4 * i] = c0[i];
            words[4 * i + 1] = c1[i];
            words[4 * i + 2] = c2[i];
            words[4 * i + 3] = c3[i];
        }
    }
};

// Standard Gumbel noise of a uniform word: -log(-log u), u = (word + 0.5) / 2^32.
inline double gumbel_of_word(uint32_t word) {
    return -log_f64(-log_f64((static_cast<double>(word) + 0.5) * 0x1p-32));
}

// Upper bound of gumbel_of_word, less than 0.07 above it for large words: -log(-log u) <= -log(1 -
// u), and 1 - u >= x / 2^31 with x = floor(~word / 2) + 1/4. log2(1 + f) >= f for f in [0, 1], so
// that the bits of x as an integer are a lower bound of (log2 x + 127) * 2^23. The last term covers
// all rounding.
inline float gumbel_bound(uint32_t word) {
    const float x = static_cast<float>(static_cast<int32_t>(~word >> 1)) + 0.25f;
    const int32_t below = (158 << 23) - std::bit_cast<int32_t>(x);
    return static_cast<float>(below) * static_cast<float>(0.6931471805599453 / (1 << 23)) + 1e-5f;
}

// float32 to the bits of bfloat16, half to even; NaN stays NaN.
inline uint16_t bf16_from_f32(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float f32_from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// IEEE half to float32, exact, denormals and NaN included.
inline float f32_from_f16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u)
        return std::bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    if (magnitude >= 0x400u) return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

}  // namespace bitllm
