// The scalar kernels against loops that follow the words of kernels.h.
#include <cmath>
#include <limits>

#include "../kernels/kernels.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

const Kernels& scalar = scalar_kernels;

float naive_lane_sum(const std::vector<float>& values) {
    std::vector<float> lanes(16, 0.0f);
    for (size_t lane = 0; lane < 16; ++lane)
        for (size_t i = lane; i < values.size(); i += 16) lanes[lane] = lanes[lane] + values[i];
    while (lanes.size() > 1) {
        const std::vector<float> upper(lanes.begin() + static_cast<ptrdiff_t>(lanes.size() / 2),
                                       lanes.end());
        lanes.resize(lanes.size() / 2);
        for (size_t lane = 0; lane < lanes.size(); ++lane) lanes[lane] = lanes[lane] + upper[lane];
    }
    return lanes[0];
}

// Value of stored bits by the definition of the format.
float naive_value(ValueType type, const std::byte* at) {
    if (type == ValueType::F32) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
    if (type == ValueType::I8) return static_cast<float>(std::to_integer<int8_t>(*at));
    uint16_t bits;
    std::memcpy(&bits, at, 2);
    const int exponent_bits = type == ValueType::BF16 ? 8 : 5, fraction_bits = 15 - exponent_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    const int exponent = (bits & 0x7fff) >> fraction_bits, bias = (1 << (exponent_bits - 1)) - 1;
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == (1 << exponent_bits) - 1)
        return fraction ? std::numeric_limits<float>::quiet_NaN()
                        : sign * std::numeric_limits<float>::infinity();
    const int whole = exponent ? (1 << fraction_bits) + fraction : fraction;
    return sign *
           static_cast<float>(std::ldexp(whole, std::max(exponent, 1) - bias - fraction_bits));
}

size_t size_of(ValueType type) { return VALUE_BYTES[static_cast<size_t>(type)]; }

constexpr ValueType TYPES[] = {ValueType::F32, ValueType::BF16, ValueType::F16, ValueType::I8};

std::vector<float> values_of(ValueType type, const std::vector<std::byte>& bytes) {
    std::vector<float> values;
    for (size_t i = 0; i < bytes.size(); i += size_of(type))
        values.push_back(naive_value(type, &bytes[i]));
    return values;
}

}  // namespace

TEST(rms_norm_follows_its_formula) {
    Random random(1);
    for (const size_t n : LENGTHS) {
        const std::vector<float> x = random.numbers(n), gain = random.numbers(n);
        std::vector<float> squares(n), expected(n), y(n);
        for (size_t i = 0; i < n; ++i) squares[i] = x[i] * x[i];
        const float inverse =
            1.0f / std::sqrt(naive_lane_sum(squares) / static_cast<float>(n) + 1e-5f);
        for (size_t i = 0; i < n; ++i) expected[i] = (x[i] * inverse) * gain[i];
        scalar.rms_norm(x.data(), gain.data(), n, 1e-5f, y.data());
        CHECK_WITH(same_bits(y, expected), "n " << n);
        std::vector<float> in_place = x;
        scalar.rms_norm(in_place.data(), gain.data(), n, 1e-5f, in_place.data());
        CHECK_WITH(same_bits(in_place, expected), "n " << n);
    }
}

TEST(quantize_follows_its_formula) {
    Random random(2);
    for (const size_t n : LENGTHS) {
        const std::vector<float> x = random.numbers(n);
        float absmax = 0;
        for (const float value : x) absmax = std::max(absmax, std::fabs(value));
        const float expected_a = 127.0f / std::max(absmax, 1e-5f);
        std::vector<int8_t> q(padded_columns(n), 99);
        int32_t sum = -1, expected_sum = 0;
        const float a = scalar.quantize(x.data(), n, q.data(), &sum);
        CHECK_WITH(a == expected_a, "n " << n);
        for (size_t i = 0; i < q.size(); ++i) {
            const float rounded = i < n ? std::nearbyint(x[i] * a) : 0.0f;
            const int expected = static_cast<int>(std::min(std::max(rounded, -128.0f), 127.0f));
            CHECK_WITH(q[i] == expected, "n " << n << " i " << i);
            expected_sum += expected;
        }
        CHECK(sum == expected_sum);
    }
}

TEST(quantize_rounds_half_to_even) {
    // a = 127 / 127 = 1, so that the values are their own codes.
    const std::vector<float> x = {127.0f, 0.5f,  1.5f,        2.5f,  -0.5f,
                                  -1.5f,  -2.5f, 0.49999997f, 126.5f};
    std::vector<int8_t> q(padded_columns(9));
    int32_t sum;
    CHECK(scalar.quantize(x.data(), x.size(), q.data(), &sum) == 1.0f);
    const std::vector<int8_t> expected = {127, 0, 2, 2, 0, -2, -2, 0, 126};
    CHECK(same_bits({q.begin(), q.begin() + 9}, expected));
    CHECK(sum == 253);
}

TEST(quantize_of_zeros_is_zero) {
    const std::vector<float> x(5, 0.0f);
    std::vector<int8_t> q(padded_columns(5), 1);
    int32_t sum = 1;
    CHECK(scalar.quantize(x.data(), 5, q.data(), &sum) == 127.0f / 1e-5f);
    CHECK(sum == 0 && same_bits(q, std::vector<int8_t>(q.size(), 0)));
}

TEST(every_half_and_bfloat16_value_is_read_exactly) {
    for (const ValueType type : {ValueType::BF16, ValueType::F16}) {
        const float one = 1.0f;
        for (uint32_t bits = 0; bits < 0x10000; ++bits) {
            const uint16_t word = static_cast<uint16_t>(bits);
            std::byte stored[4] = {};
            std::memcpy(stored, &word, 2);
            float out = 0;
            scalar.dense_matvec(stored, type, 1, 1, &one, &out);
            const float expected = naive_value(type, stored);
            CHECK_WITH(out == expected || (out != out && expected != expected), "bits " << bits);
        }
    }
}

TEST(dense_products_follow_their_formula) {
    Random random(4);
    constexpr size_t ROWS = 3;
    for (const ValueType type : TYPES) {
        for (const size_t n : LENGTHS) {
            const std::vector<std::byte> w = random.stored(type, ROWS * n);
            const std::vector<float> values = values_of(type, w), x = random.numbers(n);
            std::vector<float> expected(ROWS), out(ROWS), widened(ROWS * n);
            for (size_t r = 0; r < ROWS; ++r) {
                std::vector<float> products(n);
                for (size_t i = 0; i < n; ++i) products[i] = values[r * n + i] * x[i];
                expected[r] = naive_lane_sum(products);
            }
            scalar.dense_matvec(w.data(), type, ROWS, n, x.data(), out.data());
            CHECK_WITH(same_bits(out, expected), "type " << int(type) << " n " << n);
            scalar.widen(w.data(), type, ROWS * n, widened.data());
            CHECK_WITH(same_bits(widened, values), "type " << int(type) << " n " << n);
        }
    }
}

TEST(attention_follows_its_formulas) {
    Random random(5);
    constexpr size_t QUERIES = 3, BEGIN = 2, END = 30;
    for (const ValueType type : TYPES) {
        for (const size_t n : {1, 6, 16, 22, 128}) {
            const std::vector<std::byte> stored = random.stored(type, KV_BLOCK_SIZE * n);
            const std::vector<float> b = values_of(type, stored), q = random.numbers(QUERIES * n);
            std::vector<float> expected(QUERIES * KV_BLOCK_SIZE), scores(expected.size());
            for (size_t i = 0; i < QUERIES; ++i) {
                for (size_t j = 0; j < KV_BLOCK_SIZE; ++j) {
                    float sum = 0.0f;
                    for (size_t d = 0; d < n; ++d)
                        sum = sum + q[i * n + d] * b[d * KV_BLOCK_SIZE + j];
                    expected[i * KV_BLOCK_SIZE + j] = sum * 0.3f;
                }
            }
            scalar.attention_scores(q.data(), QUERIES, stored.data(), type, n, 0.3f, 0,
                                    scores.data());
            CHECK_WITH(same_bits(scores, expected), "type " << int(type) << " n " << n);

            const std::vector<float> w = random.numbers(QUERIES * KV_BLOCK_SIZE);
            const std::vector<float> keep = random.numbers(QUERIES), join = random.numbers(QUERIES);
            std::vector<float> merged = random.numbers(QUERIES * n), out = merged;
            for (size_t i = 0; i < QUERIES; ++i) {
                for (size_t d = 0; d < n; ++d) {
                    float sum = 0.0f;
                    for (size_t j = BEGIN; j < END; ++j)
                        sum = sum + w[i * KV_BLOCK_SIZE + j] * b[j * n + d];
                    merged[i * n + d] = merged[i * n + d] * keep[i] + sum * join[i];
                }
            }
            scalar.weighted_values(w.data(), QUERIES, stored.data(), type, BEGIN, END, n,
                                   keep.data(), join.data(), 0, out.data());
            CHECK_WITH(same_bits(out, merged), "type " << int(type) << " n " << n);
        }
    }
}

TEST(block_weights_are_a_softmax_of_what_is_seen) {
    Random random(7);
    constexpr size_t BEGIN = 3, END = 20;
    std::vector<float> w(KV_BLOCK_SIZE), expected(KV_BLOCK_SIZE, 0.0f);
    for (float& score : w) score = static_cast<float>(random.integer(-900, 900)) * 0.01f;
    const std::vector<float> scores = w;
    float highest = scores[BEGIN], total;
    for (size_t j = BEGIN; j < END; ++j) highest = std::max(highest, scores[j]);
    for (size_t j = BEGIN; j < END; ++j) {
        expected[j] = scores[j];
        scalar.exp_shifted(&expected[j], 1, highest);
    }
    CHECK(scalar.block_weights(w.data(), BEGIN, END, &total) == highest);
    CHECK(same_bits(w, expected));
    CHECK(total == naive_lane_sum(expected));
}

TEST(exp_is_accurate_and_ends_where_it_says) {
    std::vector<float> x;
    for (int i = -8700; i <= 8800; ++i) x.push_back(static_cast<float>(i) * 0.01f);
    std::vector<float> y = x;
    scalar.exp_shifted(y.data(), y.size(), 0.0f);
    for (size_t i = 0; i < x.size(); ++i) {
        const double exact = std::exp(static_cast<double>(x[i]));
        CHECK_WITH(std::fabs(y[i] / exact - 1.0) < 2e-7, "x " << x[i] << " y " << y[i]);
    }
    std::vector<float> ends = {0.0f,  -87.00001f, -1e30f, -std::numeric_limits<float>::infinity(),
                               88.0f, 89.0f};
    scalar.exp_shifted(ends.data(), ends.size(), 0.0f);
    CHECK(ends[0] == 1.0f && ends[1] == 0.0f && ends[2] == 0.0f && ends[3] == 0.0f);
    CHECK(ends[4] == ends[5] && ends[4] > 1.6e38f);
    std::vector<float> shifted = {3.0f};
    scalar.exp_shifted(shifted.data(), 1, 3.0f);
    CHECK(shifted[0] == 1.0f);
}

TEST(gated_activations_are_close_to_their_functions) {
    for (int i = -400; i <= 400; ++i) {
        const float x = static_cast<float>(i) * 0.05f, up = 1.5f;
        float out;
        scalar.gated(Activation::RELU2, &x, &up, 1, &out);
        CHECK(out == (x > 0 ? x * x : 0.0f) * up);
        scalar.gated(Activation::SILU, &x, &up, 1, &out);
        const double silu = x / (1.0 + std::exp(-static_cast<double>(x))) * up;
        CHECK_WITH(std::fabs(out - silu) <= 1e-6 * std::fabs(silu) + 1e-9, "x " << x);
        scalar.gated(Activation::GELU_TANH, &x, &up, 1, &out);
        const double xd = x, inner = 0.7978845608 * (xd + 0.044715 * xd * xd * xd);
        const double gelu = 0.5 * xd * (1.0 + std::tanh(inner)) * up;
        CHECK_WITH(std::fabs(out - gelu) <= 1e-6 * std::fabs(xd) * up,
                   "x " << x << " " << out << " " << gelu);
    }
}

TEST(rescale_and_add_follow_their_formulas) {
    Random random(6);
    for (const size_t n : LENGTHS) {
        std::vector<int32_t> acc(n);
        for (int32_t& value : acc) value = random.integer(-1000000, 1000000);
        const std::vector<float> scale = random.numbers(n);
        std::vector<float> y(n), shared(n), expected(n), expected_shared(n), sum = scale,
                                                                             expected_sum(n);
        for (size_t i = 0; i < n; ++i) {
            expected[i] = (static_cast<float>(acc[i]) / 3.7f) * scale[i];
            expected_shared[i] = (static_cast<float>(acc[i]) / 3.7f) * scale[0];
            expected_sum[i] = scale[i] + expected[i];
        }
        scalar.rescale(acc.data(), n, 3.7f, scale.data(), 1, y.data());
        scalar.rescale(acc.data(), n, 3.7f, scale.data(), 0, shared.data());
        scalar.add(sum.data(), y.data(), n);
        CHECK_WITH(same_bits(y, expected) && same_bits(shared, expected_shared), "n " << n);
        CHECK_WITH(same_bits(sum, expected_sum), "n " << n);
    }
}
