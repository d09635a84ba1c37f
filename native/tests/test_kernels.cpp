// Every kernel of every set that runs here against the scalar one, bit for bit.
#include <limits>

#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

constexpr ValueType TYPES[] = {ValueType::F32, ValueType::BF16, ValueType::F16};

// Values behind the end of an output, which no kernel may touch.
constexpr size_t GUARD = 40;

template <class T>
std::vector<T> guarded(size_t count) {
    return std::vector<T>(count + GUARD, T{77});
}

// Calls check(kernels, label) for each set but the scalar one, and for that too: it has to agree
// with itself.
template <class Check>
void on_each(Check check) {
    for (const Variant& variant : variants()) check(*variant.kernels, variant.label);
}

}  // namespace

TEST(rms_norm_is_the_same_everywhere) {
    Random random(11);
    for (const size_t n : LENGTHS) {
        const std::vector<float> x = random.numbers(n), gain = random.numbers(n);
        std::vector<float> expected = guarded<float>(n);
        scalar_kernels.rms_norm(x.data(), gain.data(), n, 1e-6f, expected.data());
        on_each([&](const Kernels& kernels, const std::string& label) {
            std::vector<float> y = guarded<float>(n), in_place = x;
            kernels.rms_norm(x.data(), gain.data(), n, 1e-6f, y.data());
            CHECK_WITH(same_bits(y, expected), label << " n " << n);
            kernels.rms_norm(in_place.data(), gain.data(), n, 1e-6f, in_place.data());
            expected.resize(n);
            CHECK_WITH(same_bits(in_place, expected), label << " in place, n " << n);
            expected.resize(n + GUARD, 77);
        });
    }
}

TEST(quantize_is_the_same_everywhere) {
    Random random(12);
    auto compare = [](const std::vector<float>& x, const std::string& kind) {
        const size_t n = x.size();
        std::vector<int8_t> expected = guarded<int8_t>(padded_columns(n));
        int32_t expected_sum = 0;
        const float expected_a =
            scalar_kernels.quantize(x.data(), n, expected.data(), &expected_sum);
        on_each([&](const Kernels& kernels, const std::string& label) {
            std::vector<int8_t> q = guarded<int8_t>(padded_columns(n));
            int32_t sum = 1 << 30;
            const float a = kernels.quantize(x.data(), n, q.data(), &sum);
            CHECK_WITH(a == expected_a && sum == expected_sum, label << " " << kind << " n " << n);
            CHECK_WITH(same_bits(q, expected), label << " " << kind << " n " << n);
        });
    };
    for (const size_t n : LENGTHS) {
        compare(random.numbers(n), "mixed");
        compare(std::vector<float>(n, 0.0f), "zeros");
        compare(std::vector<float>(n, std::numeric_limits<float>::denorm_min()), "denormals");
        compare(std::vector<float>(n, -std::numeric_limits<float>::max()), "lowest");
        std::vector<float> halves(n);
        for (size_t i = 0; i < n; ++i) halves[i] = static_cast<float>(i % 254) * 0.5f - 63.5f;
        halves[n / 2] = 127.0f;
        compare(halves, "halves");
        std::vector<float> broken = random.numbers(n);
        broken[n / 2] = std::numeric_limits<float>::quiet_NaN();
        compare(broken, "a NaN");
        broken[n - 1] = std::numeric_limits<float>::infinity();
        compare(broken, "an infinity");
    }
}

TEST(ternary_matvec_is_the_same_everywhere) {
    Random random(13);
    for (const size_t k : LENGTHS) {
        for (const size_t rows : {1, 2, 3, 4, 5, 9}) {
            const std::vector<uint8_t> packed = pack_rows(random.codes(rows * k), rows, k);
            const std::vector<int8_t> q = random.activations(1, k);
            const int32_t q_sum = row_sums(q, 1)[0];
            std::vector<int32_t> expected = guarded<int32_t>(rows);
            scalar_kernels.ternary_matvec(packed.data(), rows, k, q.data(), q_sum, expected.data());
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<int32_t> acc = guarded<int32_t>(rows);
                kernels.ternary_matvec(packed.data(), rows, k, q.data(), q_sum, acc.data());
                CHECK_WITH(same_bits(acc, expected), label << " rows " << rows << " k " << k);
            });
        }
    }
}

TEST(ternary_matmul_is_the_same_everywhere) {
    Random random(14);
    for (const size_t k : LENGTHS) {
        const size_t rows = 3, stride = rows + 4;
        const std::vector<uint8_t> packed = pack_rows(random.codes(rows * k), rows, k);
        for (const size_t tokens : {1, 2, 3, 4, 5, 7, 8, 9, 15, 17}) {
            const std::vector<int8_t> q = random.activations(tokens, k);
            const std::vector<int32_t> sums = row_sums(q, tokens);
            std::vector<int32_t> expected = guarded<int32_t>(tokens * stride);
            scalar_kernels.ternary_matmul(packed.data(), rows, k, q.data(), sums.data(), tokens,
                                          expected.data(), stride);
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<int32_t> acc = guarded<int32_t>(tokens * stride);
                kernels.ternary_matmul(packed.data(), rows, k, q.data(), sums.data(), tokens,
                                       acc.data(), stride);
                CHECK_WITH(same_bits(acc, expected), label << " tokens " << tokens << " k " << k);
            });
        }
    }
}

TEST(ternary_sums_do_not_overflow) {
    // The largest sums there are: all codes and all activations at one end.
    for (const size_t k : {2048, 2304, 6912, 132096}) {
        for (const int code : {-1, 1}) {
            for (const int value : {-128, 127}) {
                const std::vector<uint8_t> packed =
                    pack_rows(std::vector<int8_t>(4 * k, static_cast<int8_t>(code)), 4, k);
                Random random(15);
                const std::vector<int8_t> q = random.activations(2, k, value, value);
                const std::vector<int32_t> sums = row_sums(q, 2);
                const std::vector<int32_t> expected(8, code * value * static_cast<int32_t>(k));
                on_each([&](const Kernels& kernels, const std::string& label) {
                    std::vector<int32_t> acc(8);
                    kernels.ternary_matmul(packed.data(), 4, k, q.data(), sums.data(), 2,
                                           acc.data(), 4);
                    CHECK_WITH(same_bits(acc, expected), label << " k " << k << " code " << code);
                    kernels.ternary_matvec(packed.data(), 4, k, q.data(), sums[0], acc.data());
                    CHECK_WITH(same_bits(acc, expected), label << " k " << k << " code " << code);
                });
            }
        }
    }
}

TEST(dense_products_are_the_same_everywhere) {
    Random random(16);
    for (const ValueType type : TYPES) {
        for (const size_t n : LENGTHS) {
            for (const size_t rows : {1, 3, 4, 9}) {
                // One byte off any alignment.
                std::vector<std::byte> w = random.stored(type, rows * n);
                w.insert(w.begin(), std::byte{});
                const std::vector<float> x = random.numbers(n);
                std::vector<float> expected = guarded<float>(rows), scores = guarded<float>(rows);
                scalar_kernels.dense_matvec(&w[1], type, rows, n, x.data(), expected.data());
                scalar_kernels.attention_scores(x.data(), &w[1], type, rows, n, 0.125f,
                                                scores.data());
                on_each([&](const Kernels& kernels, const std::string& label) {
                    std::vector<float> out = guarded<float>(rows);
                    kernels.dense_matvec(&w[1], type, rows, n, x.data(), out.data());
                    CHECK_WITH(same_bits(out, expected),
                               label << " type " << int(type) << " rows " << rows << " n " << n);
                    out = guarded<float>(rows);
                    kernels.attention_scores(x.data(), &w[1], type, rows, n, 0.125f, out.data());
                    CHECK_WITH(same_bits(out, scores),
                               label << " type " << int(type) << " rows " << rows << " n " << n);
                });
            }
        }
    }
}

TEST(every_half_and_bfloat16_value_is_read_alike) {
    const float one = 1.0f;
    for (const ValueType type : {ValueType::BF16, ValueType::F16}) {
        std::vector<uint16_t> bits(0x10000);
        for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
        on_each([&](const Kernels& kernels, const std::string& label) {
            std::vector<float> values(bits.size()), expected(bits.size());
            scalar_kernels.weighted_sum(&one, bits.data(), type, 1, bits.size(), expected.data());
            kernels.weighted_sum(&one, bits.data(), type, 1, bits.size(), values.data());
            for (size_t i = 0; i < bits.size(); ++i)
                CHECK_WITH(values[i] == expected[i] ||
                               (values[i] != values[i] && expected[i] != expected[i]),
                           label << " type " << int(type) << " bits " << i);
        });
    }
}

TEST(weighted_sum_is_the_same_everywhere) {
    Random random(17);
    for (const ValueType type : TYPES) {
        for (const size_t n : LENGTHS) {
            for (const size_t count : {1, 2, 31, 32}) {
                if (n > 640 && count > 2) continue;
                const std::vector<std::byte> v = random.stored(type, count * n);
                const std::vector<float> p = random.numbers(count);
                std::vector<float> expected = guarded<float>(n);
                scalar_kernels.weighted_sum(p.data(), v.data(), type, count, n, expected.data());
                on_each([&](const Kernels& kernels, const std::string& label) {
                    std::vector<float> out = guarded<float>(n);
                    kernels.weighted_sum(p.data(), v.data(), type, count, n, out.data());
                    CHECK_WITH(same_bits(out, expected),
                               label << " type " << int(type) << " count " << count << " n " << n);
                });
            }
        }
    }
}

TEST(exp_shifted_is_the_same_everywhere) {
    // Every 4099th bit pattern: all exponents, both signs, denormals, infinities; NaN apart.
    std::vector<float> x;
    for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 4099) {
        const uint32_t word = static_cast<uint32_t>(bits);
        float value;
        std::memcpy(&value, &word, 4);
        if (value == value) x.push_back(value);
    }
    for (int i = -8800; i <= 8900; ++i) x.push_back(static_cast<float>(i) * 0.01f);
    std::vector<float> expected = x;
    scalar_kernels.exp_shifted(expected.data(), x.size(), 0.0f);
    on_each([&](const Kernels& kernels, const std::string& label) {
        std::vector<float> y = x;
        kernels.exp_shifted(y.data(), y.size(), 0.0f);
        CHECK_WITH(same_bits(y, expected), label);
        std::vector<float> broken(17, std::numeric_limits<float>::quiet_NaN());
        kernels.exp_shifted(broken.data(), broken.size(), 1.0f);
        for (const float value : broken) CHECK_WITH(value != value, label);
    });
    Random random(18);
    for (const size_t n : LENGTHS) {
        std::vector<float> shifted = random.numbers(n);
        shifted.resize(n + GUARD, 5.0f);
        std::vector<float> expected_shifted = shifted;
        scalar_kernels.exp_shifted(expected_shifted.data(), n, 0.7f);
        on_each([&](const Kernels& kernels, const std::string& label) {
            std::vector<float> y = shifted;
            kernels.exp_shifted(y.data(), n, 0.7f);
            CHECK_WITH(same_bits(y, expected_shifted), label << " n " << n);
        });
    }
}

TEST(gated_is_the_same_everywhere) {
    Random random(19);
    for (const Activation activation :
         {Activation::RELU2, Activation::SILU, Activation::GELU_TANH}) {
        for (const size_t n : LENGTHS) {
            std::vector<float> gate = random.numbers(n), up = random.numbers(n);
            gate[0] = -200.0f;
            gate[n - 1] = 300.0f;
            std::vector<float> expected = guarded<float>(n);
            scalar_kernels.gated(activation, gate.data(), up.data(), n, expected.data());
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<float> out = guarded<float>(n), in_place = gate;
                kernels.gated(activation, gate.data(), up.data(), n, out.data());
                CHECK_WITH(same_bits(out, expected),
                           label << " act " << int(activation) << " n " << n);
                kernels.gated(activation, in_place.data(), up.data(), n, in_place.data());
                out.resize(n);
                CHECK_WITH(same_bits(in_place, out), label << " in place, n " << n);
            });
        }
    }
}

TEST(rescale_and_add_are_the_same_everywhere) {
    Random random(20);
    for (const size_t n : LENGTHS) {
        std::vector<int32_t> acc(n);
        for (int32_t& value : acc) value = random.integer(-80000000, 80000000);
        const std::vector<float> scale = random.numbers(n);
        for (const size_t stride : {0, 1}) {
            const std::vector<float> scales(scale.begin(),
                                            scale.begin() + (stride ? ptrdiff_t(n) : 1));
            std::vector<float> expected = guarded<float>(n), expected_sum = expected;
            scalar_kernels.rescale(acc.data(), n, 33.3f, scales.data(), stride, expected.data());
            scalar_kernels.add(expected_sum.data(), expected.data(), n);
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<float> y = guarded<float>(n), sum = y;
                kernels.rescale(acc.data(), n, 33.3f, scales.data(), stride, y.data());
                CHECK_WITH(same_bits(y, expected), label << " stride " << stride << " n " << n);
                kernels.add(sum.data(), y.data(), n);
                CHECK_WITH(same_bits(sum, expected_sum), label << " n " << n);
            });
        }
    }
}
