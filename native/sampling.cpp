#include "sampling.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace bitllm {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr size_t RADIX_BITS = 11;
constexpr size_t RADIX_PASSES = 3;  // 33 bits cover the 32 of a logit
constexpr size_t RADIX_BUCKETS = size_t{1} << RADIX_BITS;

bool any_nan(const float* values, size_t n) {
    int32_t found = 0;  // as wide as the floats, for the loop to become vector code
    for (size_t i = 0; i < n; ++i) found |= values[i] != values[i] ? 1 : 0;
    return found != 0;
}

// Highest value; NaN is passed over. In lanes, so that the loop becomes maxima of whole registers.
float highest_of(const float* values, size_t n) {
    float lanes[LANES];
    std::fill_n(lanes, LANES, LOWEST);
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t lane = 0; lane < LANES; ++lane)
            lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    for (size_t i = whole; i < n; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
    return *std::max_element(lanes, lanes + LANES);
}

// Sum of all values, in some order.
double sum_in_lanes(const float* values, size_t n) {
    double lanes[8] = {};
    const size_t whole = n - n % 8;
    for (size_t i = 0; i < whole; i += 8)
        for (size_t lane = 0; lane < 8; ++lane) lanes[lane] += values[i + lane];
    for (size_t i = whole; i < n; ++i) lanes[0] += values[i];
    return std::accumulate(lanes, lanes + 8, 0.0);
}

// Lowest id of the highest logit, -1 if no logit is above -infinity or one is NaN.
int32_t first_highest(const float* logits, size_t n) {
    const float highest = highest_of(logits, n);
    if (!(highest > LOWEST) || any_nan(logits, n)) return -1;
    return static_cast<int32_t>(std::find(logits, logits + n, highest) - logits);
}

// The order of all lists: higher logit first, then lower id.
struct MoreLikely {
    const float* logits;
    bool operator()(int32_t a, int32_t b) const {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    }
};

// The `count` most likely ids of `vocab`, most likely first, into `ids`; fewer if fewer are above
// -infinity.
size_t select_top(const float* logits, size_t vocab, size_t count, int32_t* ids) {
    const MoreLikely order{logits};
    size_t size = 0;
    for (size_t i = 0; i < vocab && count > 0; ++i) {
        if (size < count) {
            if (!(logits[i] > LOWEST)) continue;
            ids[size++] = static_cast<int32_t>(i);
            std::push_heap(ids, ids + size, order);  // the least likely one is on top
        } else if (logits[i] > logits[ids[0]]) {
            std::pop_heap(ids, ids + size, order);
            ids[size - 1] = static_cast<int32_t>(i);
            std::push_heap(ids, ids + size, order);
        }
    }
    std::sort_heap(ids, ids + size, order);
    return size;
}

// Bits that sort as unsigned integers from the highest logit to the lowest; -0 sorts as 0.
uint32_t descending_key(float logit) {
    const auto bits = std::bit_cast<uint32_t>(logit + 0.0f);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

}  // namespace

// The Gumbel argmax over ids, which skips the exact noise of every id whose bound shows that it
// cannot win. Bounds are computed with an error in proportion to l / T. `slack` covers it up to a
// few times the highest l / T in size; what lies further below than that loses by far more than its
// error.
struct Sampler::Draw {
    const float* logits;
    double temperature;
    UniformStream uniforms;
    double inverse;  // about 1 / temperature: for bounds only
    double slack;
    float inverse_f32;
    float slack_f32;
    float needed_f32 = LOWEST;  // what l / T and a bound of the noise have to reach
    double best = LOWEST;
    int32_t best_id = -1;

    Draw(const SamplePlan& plan, size_t entry, const float* row, float highest)
        : logits(row),
          temperature(plan.temperature[entry]),
          uniforms{plan.seed[entry], static_cast<uint32_t>(plan.choice[entry]),
                   static_cast<uint32_t>(plan.position[entry])},
          inverse(1.0 / temperature) {
        const double size = std::fabs(highest * inverse) + 64.0;
        slack = 1e-12 * size;
        // Where float32 cannot hold l / T, it decides nothing: every id passes it.
        const bool fits = size < 1e30 && inverse < 1e30;
        inverse_f32 = fits ? static_cast<float>(inverse) : 0.0f;
        slack_f32 = fits ? static_cast<float>(1e-6 * size) : std::numeric_limits<float>::infinity();
    }

    bool may_win(float logit, double noise) const {
        return logit * inverse + noise + slack >= best;
    }

    void offer(int32_t id, uint32_t word) {
        if (!may_win(logits[id], gumbel_bound(word))) return;
        const double value = static_cast<double>(logits[id]) / temperature + gumbel_of_word(word);
        if (value > best || (value == best && id < best_id)) {
            best = value;
            best_id = id;
            needed_f32 = static_cast<float>(best) - slack_f32;
        }
    }

    void offer(int32_t id) {
        const auto bits = static_cast<uint32_t>(id);
        offer(id, uniforms.words(bits / 4).word[bits % 4]);
    }
};

size_t Sampler::scratch_bytes(size_t vocab) {
    return 2 * Arena::bytes_for<float>(vocab) + Arena::bytes_for<int32_t>(vocab) +
           Arena::bytes_for<uint64_t>(2 * vocab);
}

Sampler::Sampler(const Kernels& kernels, size_t vocab, Arena& arena)
    : kernels_(kernels),
      vocab_(vocab),
      adjusted_(arena.take<float>(vocab)),
      probabilities_(arena.take<float>(vocab)),
      kept_(arena.take<int32_t>(vocab)),
      keys_(arena.take<uint64_t>(2 * vocab)) {}

int32_t Sampler::draw(const SamplePlan& plan, size_t entry, const float* logits) {
    const float* row = adjust(plan, entry, logits);
    const float temperature = plan.temperature[entry];
    const int32_t likeliest = first_highest(row, vocab_);
    if (temperature == 0.0f || likeliest < 0) return likeliest;

    Draw draw(plan, entry, row, row[likeliest]);
    if (plan.typical_p[entry] == 1.0f) draw.offer(likeliest);  // all other cuts keep it
    const auto top_k = static_cast<size_t>(plan.top_k[entry]);
    const float top_p = plan.top_p[entry], min_p = plan.min_p[entry];
    const float typical_p = plan.typical_p[entry];
    const bool limited = top_k > 0 && top_k < vocab_;
    if (!limited && top_p == 1.0f && min_p == 0.0f && typical_p == 1.0f) {
        draw_of_all(draw);
        return draw.best_id;
    }
    size_t count = vocab_;
    if (limited) {
        count = select_top(row, vocab_, top_k, kept_);
        weigh_kept(row, count, temperature);
        if (top_p < 1.0f) count = prefix_of(top_p * sum_in_order(count), count);
    } else if (top_p < 1.0f) {
        count = keep_nucleus(row, row[likeliest], temperature, top_p);
    } else if (typical_p < 1.0f) {
        count = sort_above(row, LOWEST);
        weigh_kept(row, count, temperature);
    } else {
        weigh_all(row, row[likeliest], temperature);
        std::iota(kept_, kept_ + vocab_, 0);
    }
    if (min_p > 0.0f) count = drop_unlikely(count, min_p);
    if (typical_p < 1.0f) count = keep_typical(count, typical_p);
    draw_of_kept(draw, count);
    return draw.best_id;
}

int32_t Sampler::draw_uncut(const SamplePlan& plan, size_t entry, const float* logits) {
    const float* row = adjust(plan, entry, logits);
    const int32_t likeliest = first_highest(row, vocab_);
    if (plan.temperature[entry] == 0.0f || likeliest < 0) return likeliest;
    Draw draw(plan, entry, row, row[likeliest]);
    draw.offer(likeliest);
    draw_of_all(draw);
    return draw.best_id;
}

const float* Sampler::adjust(const SamplePlan& plan, size_t entry, const float* logits) {
    const int32_t bias_begin = plan.bias_offsets[entry], bias_end = plan.bias_offsets[entry + 1];
    const int32_t seen_begin = plan.seen_offsets[entry], seen_end = plan.seen_offsets[entry + 1];
    const float repetition = plan.repetition_penalty[entry],
                frequency = plan.frequency_penalty[entry];
    const float presence = plan.presence_penalty[entry];
    const bool penalised =
        seen_begin < seen_end && (repetition != 1.0f || frequency != 0.0f || presence != 0.0f);
    const int32_t mask_row = plan.mask_rows[entry];
    if (bias_begin == bias_end && !penalised && mask_row < 0) return logits;

    std::memcpy(adjusted_, logits, vocab_ * sizeof(float));
    for (int32_t i = bias_begin; i < bias_end; ++i)
        adjusted_[plan.bias_ids[i]] += plan.bias_values[i];
    for (int32_t i = seen_begin; penalised && i < seen_end; ++i) {
        float& logit = adjusted_[plan.seen_ids[i]];
        logit = logit > 0.0f ? logit / repetition : logit * repetition;
        logit = logit - frequency * static_cast<float>(plan.seen_counts[i]);
        if (plan.seen_counts[i] > 0) logit = logit - presence;
    }
    if (mask_row >= 0) {
        const uint32_t* words = plan.mask + static_cast<size_t>(mask_row) * plan.mask_words;
        for (size_t id = 0; id < vocab_; ++id)
            if (!((words[id / 32] >> (id % 32)) & 1u)) adjusted_[id] = LOWEST;
    }
    return adjusted_;
}

// The ids with a logit of at least `lowest`, in order, into kept_: a stable radix sort of (key of
// the logit, id).
size_t Sampler::sort_above(const float* logits, float lowest) {
    uint32_t histogram[RADIX_PASSES][RADIX_BUCKETS] = {};
    uint64_t* from = keys_;
    uint64_t* to = keys_ + vocab_;
    size_t count = 0;
    for (size_t id = 0; id < vocab_; ++id) {
        if (!(logits[id] >= lowest && logits[id] > LOWEST)) continue;
        const uint32_t key = descending_key(logits[id]);
        for (size_t pass = 0; pass < RADIX_PASSES; ++pass)
            ++histogram[pass][(key >> (pass * RADIX_BITS)) % RADIX_BUCKETS];
        from[count++] = uint64_t{key} << 32 | id;
    }
    for (size_t pass = 0; pass < RADIX_PASSES; ++pass) {
        uint32_t start = 0;
        for (uint32_t& bucket : histogram[pass]) start += std::exchange(bucket, start);
        for (size_t i = 0; i < count; ++i)
            to[histogram[pass][(from[i] >> (32 + pass * RADIX_BITS)) % RADIX_BUCKETS]++] = from[i];
        std::swap(from, to);
    }
    for (size_t i = 0; i < count; ++i) kept_[i] = static_cast<int32_t>(from[i] & 0xFFFFFFFFu);
    return count;
}

// probabilities_[i] = exp(l / T - highest) of kept_[i], which are in order.
void Sampler::weigh_kept(const float* logits, size_t count, float temperature) {
    for (size_t i = 0; i < count; ++i) probabilities_[i] = logits[kept_[i]] / temperature;
    kernels_.exp_shifted(probabilities_, count, probabilities_[0]);
}

// The same for all ids.
void Sampler::weigh_all(const float* logits, float highest, float temperature) {
    for (size_t id = 0; id < vocab_; ++id) probabilities_[id] = logits[id] / temperature;
    kernels_.exp_shifted(probabilities_, vocab_, highest / temperature);
}

double Sampler::sum_in_order(size_t count) const {
    double total = 0.0;
    for (size_t i = 0; i < count; ++i) total += probabilities_[i];
    return total;
}

// Length of the smallest prefix of probabilities_ with a sum of at least `wanted`, at least 1.
size_t Sampler::prefix_of(double wanted, size_t count) const {
    double cumulative = 0.0;
    size_t prefix = 0;
    while (prefix < count && cumulative < wanted) cumulative += probabilities_[prefix++];
    return std::max<size_t>(prefix, 1);
}

// Top-p over the whole vocabulary. Ids that together are less likely than what top_p leaves out
// need not be sorted. The total then is a sum in another order, and differs in its last bits; where
// that could matter to the cut, all ids are sorted after all.
size_t Sampler::keep_nucleus(const float* logits, float highest, float temperature, float top_p) {
    constexpr double UNSURE = 1e-9;  // far more than the sum of any vocabulary can be off
    weigh_all(logits, highest, temperature);
    const double total = sum_in_lanes(probabilities_, vocab_);
    const double wanted = top_p * total;
    const double rare = (total - wanted) / static_cast<double>(vocab_);
    const auto lowest = static_cast<float>(highest + std::log(rare) * temperature);
    double mass = 0.0;
    for (size_t id = 0; id < vocab_; ++id) mass += logits[id] >= lowest ? probabilities_[id] : 0.0f;
    if (mass > wanted * (1.0 + UNSURE)) {
        const size_t count = sort_above(logits, lowest);
        weigh_kept(logits, count, temperature);
        const size_t prefix = prefix_of(wanted * (1.0 - UNSURE), count);
        if (prefix == prefix_of(wanted * (1.0 + UNSURE), count)) return prefix;
    }
    const size_t count = sort_above(logits, LOWEST);
    weigh_kept(logits, count, temperature);
    return prefix_of(top_p * sum_in_order(count), count);
}

// min-p: of kept_[0 .. count), those with at least this share of the likeliest's probability.
size_t Sampler::drop_unlikely(size_t count, float min_p) {
    size_t left = 0;
    for (size_t i = 0; i < count; ++i) {
        if (!(probabilities_[i] >= min_p)) continue;
        kept_[left] = kept_[i];
        probabilities_[left++] = probabilities_[i];
    }
    return left;
}

// Locally typical: of kept_[0 .. count), most likely first, the fewest whose surprise is nearest to
// the entropy and that together have this share of the probability. Distances are not negative, so
// their bits sort as they do.
size_t Sampler::keep_typical(size_t count, float typical_p) {
    const auto weight = [&](size_t i) {
        return probabilities_[i] > 0.0f ? static_cast<double>(probabilities_[i]) : 0.0;
    };
    double total = 0.0, entropy = 0.0;
    for (size_t i = 0; i < count; ++i) total += weight(i);
    const double log_total = total > 0.0 ? log_f64(total) : 0.0;
    const auto surprise = [&](size_t i) { return -(log_f64(weight(i)) - log_total); };
    for (size_t i = 0; i < count; ++i)
        if (weight(i) > 0.0) entropy += weight(i) / total * surprise(i);

    uint64_t* distances = keys_;
    uint64_t* order = keys_ + vocab_;
    for (size_t i = 0; i < count; ++i) {
        const double distance = weight(i) > 0.0 ? std::fabs(surprise(i) - entropy)
                                                : std::numeric_limits<double>::infinity();
        distances[i] = std::bit_cast<uint64_t>(distance);
        order[i] = i;
    }
    std::sort(order, order + count, [&](uint64_t a, uint64_t b) {
        return distances[a] != distances[b] ? distances[a] < distances[b] : a < b;
    });
    const double wanted = static_cast<double>(typical_p) * total;
    double cumulative = 0.0;
    size_t left = 0;
    while (left < count && (left == 0 || cumulative < wanted)) cumulative += weight(order[left++]);
    std::sort(order, order + left);
    for (size_t i = 0; i < left; ++i) kept_[i] = kept_[order[i]];
    return left;
}

// Some ids at a time: their words, and which of them may win, are computed together in vector
// registers.
void Sampler::draw_of_all(Draw& draw) const {
    constexpr size_t IDS = UniformStream::MANY;
    const double largest_noise = gumbel_bound(0xFFFFFFFFu);
    uint32_t words[IDS];
    uint8_t may_win[IDS];
    for (size_t first = 0; first < vocab_; first += IDS) {
        const float* logits = draw.logits + first;
        const size_t count = std::min(IDS, vocab_ - first);
        if (!draw.may_win(highest_of(logits, count), largest_noise)) continue;
        draw.uniforms.many_words(static_cast<uint32_t>(first / 4), words);
        for (size_t i = 0; i < count; ++i)
            may_win[i] = logits[i] * draw.inverse_f32 + gumbel_bound(words[i]) >= draw.needed_f32;
        std::fill(may_win + count, may_win + IDS, uint8_t{0});
        for (size_t i = 0; i < IDS; i += 8) {
            uint64_t eight;
            std::memcpy(&eight, may_win + i, sizeof eight);
            for (; eight != 0; eight &= eight - 1) {
                const size_t id = i + static_cast<size_t>(std::countr_zero(eight)) / 8;
                draw.offer(static_cast<int32_t>(first + id), words[id]);
            }
        }
    }
}

void Sampler::draw_of_kept(Draw& draw, size_t count) const {
    const double largest_noise = gumbel_bound(0xFFFFFFFFu);
    for (size_t i = 0; i < count; ++i)
        if (draw.may_win(draw.logits[kept_[i]], largest_noise)) draw.offer(kept_[i]);
}

void Sampler::score(const float* logits, int32_t target, size_t top_n, const ScoreOutput& out) {
    // One NaN makes NaN of all log-probabilities, as it does of a sum.
    const float highest = any_nan(logits, vocab_) ? std::numeric_limits<float>::quiet_NaN()
                                                  : highest_of(logits, vocab_);
    std::memcpy(probabilities_, logits, vocab_ * sizeof(float));
    kernels_.exp_shifted(probabilities_, vocab_, highest);
    const double log_total = log_f64(static_cast<double>(lane_sum(probabilities_, vocab_)));
    const auto logprob = [&](int32_t id) {
        return static_cast<float>((static_cast<double>(logits[id]) - static_cast<double>(highest)) -
                                  log_total);
    };
    *out.logprob = target < 0 ? std::numeric_limits<float>::quiet_NaN() : logprob(target);
    const size_t found = select_top(logits, vocab_, std::min(top_n, vocab_), kept_);
    for (size_t i = 0; i < found; ++i) {
        out.top_ids[i] = kept_[i];
        out.top_logprobs[i] = logprob(kept_[i]);
    }
}

}  // namespace bitllm
