// The rounded copies of the head: that logits lie within their margins, that the margins are not
// idle, and that rounding at random is what the derivation takes it for. What is drawn with them is
// compared with the full head in tests/test_screened_head.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "../numerics.h"
#include "../rounded_head.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

constexpr size_t VOCAB = 323, HIDDEN = 300;
using Bits = RoundedHead::Bits;

// Standard normal, roughly.
float bell(Random& random) {
    int sum = 0;
    for (int i = 0; i < 12; ++i) sum += random.integer(-1000, 1000);
    return static_cast<float>(sum) / 2000.0f;
}

// A head in bf16 whose rows differ in size by a factor of 2^20, some of them zero, some with a
// single large weight.
struct Head {
    std::vector<uint16_t> weights;
    size_t vocab, hidden;

    Head(size_t vocab, size_t hidden, uint32_t seed)
        : weights(vocab * hidden), vocab(vocab), hidden(hidden) {
        Random random(seed);
        for (size_t row = 0; row < vocab; ++row) {
            const float size = std::ldexp(1.0f, random.integer(-10, 10));
            const int kind = random.integer(0, 9);
            for (size_t i = 0; i < hidden; ++i)
                weights[row * hidden + i] = bf16_from_f32(kind == 0 ? 0.0f : size * bell(random));
            if (kind == 1) weights[row * hidden + row % hidden] = bf16_from_f32(300.0f * size);
        }
    }

    DenseMatrix matrix() const {
        return {reinterpret_cast<const std::byte*>(weights.data()), ValueType::BF16};
    }
};

struct Bounds {
    std::vector<float> approx, upper;
};

// A rounded head and room for a query.
struct Copy {
    RoundedHead rounded;
    size_t vocab;
    Arena arena;
    RoundedHead::Query query;

    Copy(const Kernels& kernels, Bits bits, const Head& head, int threads = 1)
        : rounded(kernels, bits, head.matrix(), head.vocab, head.hidden, shared_pool(threads)),
          vocab(head.vocab),
          arena(RoundedHead::query_bytes(bits, head.hidden)) {
        rounded.take_query(arena, query);
    }

    bool bounds(const std::vector<float>& hidden, Bounds& found) {
        const size_t groups = (vocab + SCREEN_ROWS - 1) / SCREEN_ROWS;
        found.approx.assign(groups * SCREEN_ROWS, 0.0f);
        found.upper.assign(groups * SCREEN_ROWS, 0.0f);
        if (!rounded.ask(hidden.data(), query)) return false;
        for (size_t group = 0; group < groups; ++group)
            rounded.approximate(query, group, found.approx.data() + group * SCREEN_ROWS,
                                found.upper.data() + group * SCREEN_ROWS);
        found.approx.resize(vocab);
        found.upper.resize(vocab);
        return true;
    }
};

// Hidden states of every kind: plain, with some outliers, almost empty, of any size.
std::vector<float> state(Random& random, size_t n) {
    std::vector<float> hidden(n);
    const int kind = random.integer(0, 3);
    const float size = std::ldexp(1.0f, random.integer(-15, 15));
    for (float& value : hidden) {
        value = size * bell(random);
        if (kind == 1 && random.integer(0, 30) == 0) value *= 100.0f;
        if (kind == 2 && random.integer(0, 30) != 0) value = 0.0f;
    }
    hidden[0] = size;
    return hidden;
}

// The largest |logit - approx| / margin over rows and hidden states.
double largest_share(const Kernels& kernels, Bits bits, const Head& head, int states) {
    Copy copy(kernels, bits, head);
    Random random(5);
    std::vector<float> logits(head.vocab);
    Bounds bounds;
    double largest = 0.0;
    for (int i = 0; i < states; ++i) {
        const std::vector<float> hidden = state(random, head.hidden);
        CHECK(copy.bounds(hidden, bounds));
        kernels.dense_matvec(head.weights.data(), ValueType::BF16, head.vocab, head.hidden,
                             hidden.data(), logits.data());
        for (size_t row = 0; row < head.vocab; ++row) {
            const double margin = static_cast<double>(bounds.upper[row]) - bounds.approx[row];
            const double error = static_cast<double>(logits[row]) - bounds.approx[row];
            largest = std::max(largest, std::fabs(error) / margin);
        }
    }
    return largest;
}

}  // namespace

// A tenth of the margin would fail: the lower bounds keep this test from passing with margins that
// are far too wide, or errors that are none.
TEST(logits_lie_within_their_margins) {
    const Head head(VOCAB, HIDDEN, 1);
    for (const Variant& variant : variants()) {
        const double four = largest_share(*variant.kernels, Bits::FOUR, head, 200);
        const double eight = largest_share(*variant.kernels, Bits::EIGHT, head, 200);
        CHECK_WITH(four < 0.7 && four > 0.3, variant.label << ", 4 bits: " << four);
        CHECK_WITH(eight <= 1.0 && eight > 0.5, variant.label << ", 8 bits: " << eight);
    }
}

TEST(bounds_are_the_same_on_every_machine) {
    const Head head(VOCAB, HIDDEN, 2);
    Random random(6);
    const std::vector<float> hidden = state(random, HIDDEN);
    for (const Bits bits : {Bits::FOUR, Bits::EIGHT}) {
        Bounds expected;
        CHECK(Copy(scalar_kernels, bits, head).bounds(hidden, expected));
        for (const Variant& variant : variants()) {
            for (const int threads : {1, 3}) {
                Bounds found;
                CHECK(Copy(*variant.kernels, bits, head, threads).bounds(hidden, found));
                CHECK_WITH(same_bits(found.approx, expected.approx), variant.label);
                CHECK_WITH(same_bits(found.upper, expected.upper), variant.label);
            }
        }
    }
}

// One hidden dimension at a time gives the rounded weights back: at most a step away, and in the
// mean over rows the weight itself, whatever its neighbour did.
TEST(rounding_at_random_has_no_bias_and_no_memory) {
    constexpr size_t ROWS = 4000, COLUMNS = 64;
    Head head(ROWS, COLUMNS, 3);
    const float pattern[] = {7.0f, 0.3f, -0.3f, 2.5f, -5.9f, 1.0f / 64, 6.99f, 0.0f};
    for (size_t i = 0; i < head.weights.size(); ++i)
        head.weights[i] = bf16_from_f32(pattern[i % 8]);
    Copy copy(scalar_kernels, Bits::FOUR, head);
    std::vector<std::vector<float>> errors(COLUMNS);
    for (size_t column = 0; column < COLUMNS; ++column) {
        std::vector<float> hidden(COLUMNS, 0.0f);
        hidden[column] = 1.0f;
        Bounds bounds;
        CHECK(copy.bounds(hidden, bounds));
        const float weight = f32_from_bf16(head.weights[column]);
        double sum = 0.0;
        for (size_t row = 0; row < ROWS; ++row) {
            errors[column].push_back(bounds.approx[row] - weight);
            sum += errors[column].back();
            CHECK_WITH(std::fabs(errors[column].back()) < 1.001f, "column " << column);
        }
        const double part = std::fabs(weight - std::floor(weight));
        const double deviation = std::sqrt(part * (1.0 - part) * ROWS);
        CHECK_WITH(std::fabs(sum) <= 5.0 * deviation + 0.01, "column " << column << ": " << sum);
    }
    for (size_t column = 1; column < COLUMNS; ++column) {
        double product = 0.0;
        for (size_t row = 0; row < ROWS; ++row)
            product += errors[column][row] * errors[column - 1][row];
        CHECK_WITH(std::fabs(product) < 5.0 * 0.25 * std::sqrt(ROWS), "column " << column);
    }
}

TEST(a_head_or_state_without_bounds_is_refused) {
    constexpr float INFINITE = std::numeric_limits<float>::infinity();
    for (const float broken : {INFINITE, std::nanf(""), 1e20f}) {
        for (const Bits bits : {Bits::FOUR, Bits::EIGHT}) {
            Head head(VOCAB, HIDDEN, 4);
            CHECK(!Copy(scalar_kernels, bits, head).rounded.empty());
            head.weights[77] = bf16_from_f32(broken);
            CHECK(Copy(scalar_kernels, bits, head).rounded.empty());
        }
    }
    const Head head(VOCAB, HIDDEN, 4);
    for (const Bits bits : {Bits::FOUR, Bits::EIGHT}) {
        Copy copy(scalar_kernels, bits, head);
        std::vector<float> hidden(HIDDEN, 0.0f);
        Bounds bounds;
        CHECK(!copy.bounds(hidden, bounds));
        hidden[3] = 1.0f;
        CHECK(copy.bounds(hidden, bounds));
        for (const float broken : {INFINITE, std::nanf(""), 1e20f}) {
            hidden[9] = broken;
            CHECK(!copy.bounds(hidden, bounds));
        }
    }
}

TEST(logits_of_eight_bits_are_those_of_the_rounded_rows) {
    const Head head(VOCAB, HIDDEN, 7);
    Copy copy(scalar_kernels, Bits::EIGHT, head);
    Random random(8);
    const std::vector<float> hidden = state(random, HIDDEN);
    Bounds bounds;
    CHECK(copy.bounds(hidden, bounds));
    std::vector<float> logits(VOCAB);
    copy.rounded.logits(hidden.data(), {0, 100}, logits.data());
    copy.rounded.logits(hidden.data(), {100, VOCAB}, logits.data() + 100);
    CHECK(same_bits(logits, bounds.approx));
}
