// Every draw against one that looks at all ids, sorts them all, and computes all noise.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../sampling.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

// A plan of one entry.
struct Plan {
    float temperature = 1.0f, top_p = 1.0f, min_p = 0.0f, typical_p = 1.0f;
    int32_t top_k = 0;
    uint64_t seed = 1;
    int32_t choice = 0, position = 0;
    std::vector<uint32_t> mask;

    float one = 1.0f, zero = 0.0f;
    int32_t none = -1;
    int32_t offsets[2] = {0, 0};
    int32_t mask_row = -1;

    SamplePlan view() {
        SamplePlan plan;
        plan.count = 1;
        plan.temperature = &temperature;
        plan.top_k = &top_k;
        plan.top_p = &top_p;
        plan.min_p = &min_p;
        plan.typical_p = &typical_p;
        plan.seed = &seed;
        plan.choice = &choice;
        plan.position = &position;
        plan.top_logprobs = &none;
        plan.repetition_penalty = &one;
        plan.frequency_penalty = plan.presence_penalty = &zero;
        plan.seen_offsets = plan.bias_offsets = offsets;
        mask_row = mask.empty() ? -1 : 0;
        plan.mask = mask.data();
        plan.mask_count = mask.empty() ? 0 : 1;
        plan.mask_words = mask.size();
        plan.mask_rows = &mask_row;
        return plan;
    }

    bool allows(size_t id) const { return mask.empty() || (mask[id / 32] >> (id % 32) & 1); }
};

int32_t drawn_by_looking_at_all(const Plan& plan, const std::vector<float>& logits) {
    std::vector<int32_t> ids;
    for (size_t id = 0; id < logits.size(); ++id)
        if (plan.allows(id)) ids.push_back(static_cast<int32_t>(id));
    std::stable_sort(ids.begin(), ids.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    if (plan.temperature == 0.0f || ids.empty()) return ids.empty() ? -1 : ids[0];
    if (plan.top_k > 0 && static_cast<size_t>(plan.top_k) < ids.size()) ids.resize(plan.top_k);
    std::vector<float> p;
    for (const int32_t id : ids)
        p.push_back(exp_f32(logits[id] / plan.temperature - logits[ids[0]] / plan.temperature));
    if (plan.top_p < 1.0f) {
        double cumulative = 0.0;
        const double wanted = plan.top_p * std::accumulate(p.begin(), p.end(), 0.0);
        size_t count = 0;
        do cumulative += p[count++];
        while (cumulative < wanted);
        ids.resize(count);
    }
    double best = 0.0;
    int32_t best_id = -1;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (p[i] < plan.min_p) continue;
        const auto id = static_cast<uint32_t>(ids[i]);
        const Philox words =
            UniformStream{plan.seed, 0, static_cast<uint32_t>(plan.position)}.words(id / 4);
        const double value =
            static_cast<double>(logits[id]) / static_cast<double>(plan.temperature) +
            gumbel_of_word(words.word[id % 4]);
        if (best_id < 0 || value > best || (value == best && ids[i] < best_id)) {
            best = value;
            best_id = ids[i];
        }
    }
    return best_id;
}

// As peaked as the logits of a model, in steps coarse enough for ties.
std::vector<float> some_logits(Random& random, size_t vocab, float spread) {
    std::vector<float> logits(vocab);
    for (float& logit : logits) {
        float sum = 0.0f;
        for (int i = 0; i < 4; ++i) sum += static_cast<float>(random.integer(-64, 64)) / 64.0f;
        logit = sum * spread;
    }
    return logits;
}

void compare(Plan plan, size_t vocab, float spread, int draws) {
    Random random(7);
    Arena arena(Sampler::scratch_bytes(vocab));
    Sampler sampler(best_kernels(), vocab, arena);
    for (int draw = 0; draw < draws; ++draw) {
        plan.seed = plan.seed * 6364136223846793005u + 1442695040888963407u;
        plan.position = draw;
        const auto logits = some_logits(random, vocab, spread);
        const int32_t expected = drawn_by_looking_at_all(plan, logits);
        const int32_t got = sampler.draw(plan.view(), 0, logits.data());
        CHECK_WITH(got == expected, got << " " << expected << " T " << plan.temperature << " k "
                                        << plan.top_k << " p " << plan.top_p << " " << plan.min_p);
    }
}

}  // namespace

TEST(skipping_ids_that_cannot_win_changes_no_draw) {
    for (const float temperature : {0.0f, 1e-30f, 0.2f, 1.0f, 5.0f, 1000.0f, 1e30f})
        for (const float spread : {0.0f, 0.5f, 3.0f, 30.0f})
            compare({.temperature = temperature, .mask = {}}, 4001, spread, 15);
}

TEST(every_cut_keeps_what_sorting_all_keeps) {
    for (const int32_t top_k : {0, 1, 40, 900, 5000})
        for (const float top_p : {0.01f, 0.5f, 0.95f, 1.0f})
            for (const float min_p : {0.0f, 0.05f, 1.0f})
                compare({.temperature = 0.8f,
                         .top_p = top_p,
                         .min_p = min_p,
                         .top_k = top_k,
                         .mask = {}},
                        1003, 2.0f, 4);
}

TEST(a_mask_leaves_only_what_it_allows) {
    Plan plan;
    plan.mask.assign(32, 0x00010800u);
    for (const float temperature : {0.0f, 1.0f}) {
        plan.temperature = temperature;
        compare(plan, 1003, 2.0f, 20);
        plan.top_k = 7;
        compare(plan, 1003, 2.0f, 20);
    }
    plan.mask.assign(32, 0);
    compare(plan, 1003, 2.0f, 1);
}

TEST(the_bound_of_the_noise_is_never_below_it) {
    // The words around each power of two, where the bound changes.
    for (int bit = 0; bit < 32; ++bit) {
        for (int64_t step = -2; step <= 2; ++step) {
            const auto word =
                static_cast<uint32_t>(~((uint64_t{1} << bit) + static_cast<uint64_t>(step)));
            CHECK_WITH(gumbel_of_word(word) <= gumbel_bound(word), word);
        }
    }
    CHECK(gumbel_of_word(0xFFFFFFFFu) <= gumbel_bound(0xFFFFFFFFu));
    CHECK(gumbel_bound(0xFFFFFFFFu) < 22.88f);
    Random random(3);
    for (int i = 0; i < 20000; ++i) {
        const auto word =
            static_cast<uint32_t>(random.integer(0, 1 << 30)) * 4u + static_cast<uint32_t>(i % 4);
        const double noise = gumbel_of_word(word);
        CHECK_WITH(noise <= gumbel_bound(word), word);
        if (noise > 3.0) CHECK_WITH(gumbel_bound(word) < noise + 0.1, word);
    }
}

TEST(the_cut_is_exact_where_sums_are_close_to_it) {
    // Equal probabilities whose prefixes reach the wanted sum to the last bit.
    const size_t vocab = 1024;
    Arena arena(Sampler::scratch_bytes(vocab));
    Sampler sampler(best_kernels(), vocab, arena);
    const std::vector<float> logits(vocab, 1.5f);
    for (const float top_p : {0.25f, 0.5f, 0.75f}) {
        for (int draw = 0; draw < 200; ++draw) {
            Plan plan{.top_p = top_p, .position = draw, .mask = {}};
            const int32_t id = sampler.draw(plan.view(), 0, logits.data());
            CHECK_WITH(id == drawn_by_looking_at_all(plan, logits), top_p << " " << draw);
            CHECK_WITH(id < static_cast<int32_t>(top_p * vocab), top_p << " " << draw);
        }
    }
}

TEST(many_words_are_the_single_ones) {
    const UniformStream uniforms{0x123456789ABCDEF0u, 3, 99};
    uint32_t many[UniformStream::MANY];
    uniforms.many_words(1000, many);
    for (uint32_t i = 0; i < UniformStream::MANY; ++i)
        CHECK_WITH(many[i] == uniforms.words(1000 + i / 4).word[i % 4], i);
}

TEST(scores_list_the_likeliest_ids_in_order) {
    const size_t vocab = 500;
    Random random(9);
    Arena arena(Sampler::scratch_bytes(vocab));
    Sampler sampler(scalar_kernels, vocab, arena);
    const auto logits = some_logits(random, vocab, 2.0f);
    std::vector<int32_t> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    double total = 0.0;
    for (const float logit : logits) total += std::exp(static_cast<double>(logit));
    for (const size_t top_n : {0, 1, 5, 499, 500, 700}) {
        float logprob = 0.0f;
        std::vector<int32_t> ids(top_n, -1);
        std::vector<float> values(top_n, 1.0f);
        sampler.score(logits.data(), 123, top_n, {&logprob, ids.data(), values.data()});
        CHECK(std::fabs(logprob - (logits[123] - std::log(total))) < 1e-5);
        for (size_t i = 0; i < top_n; ++i) {
            CHECK_WITH(ids[i] == (i < vocab ? order[i] : -1), i);
            if (i < vocab) CHECK(std::fabs(values[i] - (logits[ids[i]] - std::log(total))) < 1e-5);
        }
    }
}
