// Every kernel of every set that runs here against the scalar one, bit for bit.
#include <limits>
#include <utility>

#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

constexpr ValueType TYPES[] = {ValueType::F32, ValueType::BF16, ValueType::F16, ValueType::I8};

// Around the registers, and those of real models.
constexpr size_t HEAD_DIMS[] = {1, 2, 7, 8, 9, 15, 16, 17, 22, 44, 64, 80, 128};

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

TEST(dense_products_are_the_same_everywhere) {
    Random random(16);
    for (const ValueType type : TYPES) {
        for (const size_t n : LENGTHS) {
            for (const size_t rows : {1, 3, 4, 9}) {
                // One byte off any alignment.
                std::vector<std::byte> w = random.stored(type, rows * n);
                w.insert(w.begin(), std::byte{});
                const std::vector<float> x = random.numbers(n);
                std::vector<float> expected = guarded<float>(rows);
                scalar_kernels.dense_matvec(&w[1], type, rows, n, x.data(), expected.data());
                on_each([&](const Kernels& kernels, const std::string& label) {
                    std::vector<float> out = guarded<float>(rows);
                    kernels.dense_matvec(&w[1], type, rows, n, x.data(), out.data());
                    CHECK_WITH(same_bits(out, expected),
                               label << " type " << int(type) << " rows " << rows << " n " << n);
                });
            }
        }
    }
}

TEST(every_half_and_bfloat16_value_is_read_alike) {
    for (const ValueType type : {ValueType::BF16, ValueType::F16}) {
        std::vector<uint16_t> bits(0x10000);
        for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
        on_each([&](const Kernels& kernels, const std::string& label) {
            std::vector<float> values(bits.size()), expected(bits.size());
            scalar_kernels.widen(bits.data(), type, bits.size(), expected.data());
            kernels.widen(bits.data(), type, bits.size(), values.data());
            for (size_t i = 0; i < bits.size(); ++i)
                CHECK_WITH(values[i] == expected[i] ||
                               (values[i] != values[i] && expected[i] != expected[i]),
                           label << " type " << int(type) << " bits " << i);
        });
    }
}

TEST(widening_is_the_same_everywhere) {
    Random random(21);
    for (const ValueType type : TYPES) {
        for (const size_t n : LENGTHS) {
            const std::vector<std::byte> values = random.stored(type, n);
            std::vector<float> expected = guarded<float>(n);
            scalar_kernels.widen(values.data(), type, n, expected.data());
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<float> out = guarded<float>(n);
                kernels.widen(values.data(), type, n, out.data());
                CHECK_WITH(same_bits(out, expected), label << " type " << int(type) << " n " << n);
            });
        }
    }
}

// What the kernels ask for ahead may lie anywhere.
constexpr uintptr_t ahead = uintptr_t{1} << 40;

TEST(attention_scores_are_the_same_everywhere) {
    Random random(22);
    for (const ValueType type : TYPES) {
        for (const size_t n : HEAD_DIMS) {
            for (const size_t queries : {1, 2, 3, 4, 5, 8, 9}) {
                const std::vector<std::byte> keys = random.stored(type, KV_BLOCK_SIZE * n);
                const std::vector<float> q = random.numbers(queries * n);
                std::vector<float> expected = guarded<float>(queries * KV_BLOCK_SIZE);
                scalar_kernels.attention_scores(q.data(), queries, keys.data(), type, n, 0.125f, 0,
                                                expected.data());
                on_each([&](const Kernels& kernels, const std::string& label) {
                    std::vector<float> out = guarded<float>(queries * KV_BLOCK_SIZE);
                    kernels.attention_scores(q.data(), queries, keys.data(), type, n, 0.125f, ahead,
                                             out.data());
                    CHECK_WITH(same_bits(out, expected), label << " type " << int(type) << " n "
                                                               << n << " queries " << queries);
                });
            }
        }
    }
}

TEST(block_weights_are_the_same_everywhere) {
    Random random(23);
    for (size_t begin = 0; begin < KV_BLOCK_SIZE; ++begin) {
        for (size_t end = begin + 1; end <= KV_BLOCK_SIZE; ++end) {
            std::vector<float> scores = random.numbers(KV_BLOCK_SIZE);
            if (end % 3 == 0) scores[begin] = -std::numeric_limits<float>::infinity();
            // What lies outside is not looked at.
            if (begin > 0) scores[begin - 1] = std::numeric_limits<float>::infinity();
            if (end < KV_BLOCK_SIZE) scores[end] = std::numeric_limits<float>::quiet_NaN();
            if (end == begin + 1) scores[begin] = 3.0f;
            scores.resize(KV_BLOCK_SIZE + GUARD, 77.0f);
            std::vector<float> expected = scores;
            float expected_total;
            const float expected_highest =
                scalar_kernels.block_weights(expected.data(), begin, end, &expected_total);
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<float> w = scores;
                float total = -1.0f;
                const float highest = kernels.block_weights(w.data(), begin, end, &total);
                CHECK_WITH(highest == expected_highest && total == expected_total,
                           label << " " << begin << " .. " << end);
                CHECK_WITH(same_bits(w, expected), label << " " << begin << " .. " << end);
            });
        }
    }
}

TEST(weighted_values_are_the_same_everywhere) {
    Random random(17);
    for (const ValueType type : TYPES) {
        for (const size_t n : HEAD_DIMS) {
            for (const size_t queries : {1, 2, 4, 5, 9}) {
                const std::vector<std::byte> values = random.stored(type, KV_BLOCK_SIZE * n);
                const std::vector<float> w = random.numbers(queries * KV_BLOCK_SIZE);
                const std::vector<float> keep = random.numbers(queries),
                                         join = random.numbers(queries);
                std::vector<float> before = random.numbers(queries * n);
                before.resize(queries * n + GUARD, 77.0f);
                for (const auto& [begin, end] :
                     {std::pair<size_t, size_t>{0, 32}, {0, 1}, {3, 31}, {31, 32}}) {
                    std::vector<float> expected = before;
                    scalar_kernels.weighted_values(w.data(), queries, values.data(), type, begin,
                                                   end, n, keep.data(), join.data(), 0,
                                                   expected.data());
                    on_each([&](const Kernels& kernels, const std::string& label) {
                        std::vector<float> out = before;
                        kernels.weighted_values(w.data(), queries, values.data(), type, begin, end,
                                                n, keep.data(), join.data(), ahead, out.data());
                        CHECK_WITH(same_bits(out, expected), label << " type " << int(type) << " n "
                                                                   << n << " queries " << queries);
                    });
                }
            }
        }
    }
}

TEST(weighted_values_of_one_query_may_be_many) {
    Random random(18);
    for (const ValueType type : TYPES) {
        for (const size_t n : {size_t{1}, size_t{23}, size_t{64}}) {
            constexpr size_t COUNT = 97;
            const std::vector<std::byte> values = random.stored(type, COUNT * n);
            const std::vector<float> w = random.numbers(COUNT), before = random.numbers(n);
            const float keep = 1.0f, join = 0.3f;
            std::vector<float> expected = before;
            scalar_kernels.weighted_values(w.data(), 1, values.data(), type, 0, COUNT, n, &keep,
                                           &join, 0, expected.data());
            CHECK(!same_bits(expected, before));
            on_each([&](const Kernels& kernels, const std::string& label) {
                std::vector<float> out = before;
                kernels.weighted_values(w.data(), 1, values.data(), type, 0, COUNT, n, &keep, &join,
                                        0, out.data());
                CHECK_WITH(same_bits(out, expected), label << " type " << int(type) << " n " << n);
            });
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
