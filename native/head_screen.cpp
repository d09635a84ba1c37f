#include "head_screen.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "numerics.h"

namespace bitllm {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr size_t PROBES = 8;  // more than one: the best of some is a higher threshold
// More survivors than this part of the vocabulary cost more than the whole head.
constexpr size_t SMALL_PART = 4;
constexpr size_t LARGEST_TOP_K_PART = 16;
// Plans beyond these go to the full head, so that no sum here can overflow.
constexpr float SMALLEST_TEMPERATURE = 1e-6f, LARGEST_BIAS = 1e30f, LARGEST_PENALTY = 1e6f;
// Sums of probabilities here and in the Sampler differ by less than this part of them.
constexpr double UNSURE = 1e-5;

bool limited(const SamplePlan& plan, size_t entry, size_t vocab) {
    return plan.top_k[entry] > 0 && static_cast<size_t>(plan.top_k[entry]) < vocab;
}

bool penalised(const SamplePlan& plan, size_t entry) {
    return plan.repetition_penalty[entry] != 1.0f || plan.frequency_penalty[entry] != 0.0f ||
           plan.presence_penalty[entry] != 0.0f;
}

// Penalties that can make a logit higher.
bool rewarded(const SamplePlan& plan, size_t entry) {
    return plan.repetition_penalty[entry] < 1.0f || plan.frequency_penalty[entry] < 0.0f ||
           plan.presence_penalty[entry] < 0.0f;
}

UniformStream uniforms_of(const SamplePlan& plan, size_t entry) {
    return {plan.seed[entry], static_cast<uint32_t>(plan.choice[entry]),
            static_cast<uint32_t>(plan.position[entry])};
}

}  // namespace

HeadScreen::HeadScreen(const Kernels& kernels, DenseMatrix head, const RoundedHead& rounded,
                       size_t vocab)
    : kernels_(kernels), head_(head), rounded_(rounded), vocab_(vocab) {}

void HeadScreen::take_scratch(Arena& arena, size_t slots) {
    const size_t padded = align_up(vocab_, GRAIN);
    slots_.resize(slots);
    for (Slot& slot : slots_) {
        slot.approx = arena.take<float>(padded);
        slot.upper = arena.take<float>(padded);
        slot.noise = arena.take<float>(padded);
        slot.approx_peaks = arena.take<float>(padded / SCREEN_ROWS);
        slot.upper_peaks = arena.take<float>(padded / SCREEN_ROWS);
        slot.list = arena.take<int32_t>(vocab_);
        rounded_.take_query(arena, slot.query);
    }
}

size_t HeadScreen::scratch_bytes(RoundedHead::Bits bits, size_t vocab, size_t hidden,
                                 size_t slots) {
    const size_t padded = align_up(vocab, GRAIN);
    return slots * (3 * Arena::bytes_for<float>(padded) +
                    2 * Arena::bytes_for<float>(padded / SCREEN_ROWS) +
                    Arena::bytes_for<int32_t>(vocab) + RoundedHead::query_bytes(bits, hidden));
}

void HeadScreen::pass(size_t slot, bool all) {
    slots_[slot].stage = all ? Stage::ALL : Stage::DONE;
    slots_[slot].plan = nullptr;
}

void HeadScreen::begin(size_t index, const SamplePlan& plan, size_t entry, const float* hidden,
                       float* logits) {
    Slot& slot = slots_[index];
    slot.plan = &plan;
    slot.entry = entry;
    slot.logits = logits;
    slot.count = 0;
    slot.stage = Stage::ALL;
    if (!decides(plan, entry) || !rounded_.ask(hidden, slot.query)) return;
    slot.stage = Stage::BOUNDS;
    const float temperature = plan.temperature[entry];
    const bool some = limited(plan, entry, vocab_);
    slot.keep = temperature > 0.0f && some ? static_cast<size_t>(plan.top_k[entry]) : 1;
    slot.noisy = temperature > 0.0f && !some;
    slot.cut = slot.noisy && (plan.top_p[entry] < 1.0f || plan.min_p[entry] > 0.0f);
    slot.inverse = slot.noisy ? 1.0f / temperature : 1.0f;
    screened_.fetch_add(1, std::memory_order_relaxed);
}

// Whether the arguments made here hold for an entry.
bool HeadScreen::decides(const SamplePlan& plan, size_t entry) const {
    if (plan.top_logprobs[entry] >= 0) return false;
    const float temperature = plan.temperature[entry];
    if (temperature > 0.0f) {
        if (temperature < SMALLEST_TEMPERATURE) return false;
        if (plan.typical_p[entry] < 1.0f) return false;  // the likeliest may be cut, the rare kept
        if (limited(plan, entry, vocab_) &&
            static_cast<size_t>(plan.top_k[entry]) > vocab_ / LARGEST_TOP_K_PART)
            return false;
    }
    for (int32_t i = plan.bias_offsets[entry]; i < plan.bias_offsets[entry + 1]; ++i)
        if (!(plan.bias_values[i] <= LARGEST_BIAS)) return false;
    const float repetition = plan.repetition_penalty[entry];
    return repetition >= 1.0f / LARGEST_PENALTY && repetition <= LARGEST_PENALTY &&
           std::fabs(plan.frequency_penalty[entry]) <= LARGEST_PENALTY &&
           std::fabs(plan.presence_penalty[entry]) <= LARGEST_PENALTY;
}

void HeadScreen::approximate(size_t slots, Range rows) {
    uint32_t words[GRAIN];
    for (size_t first = rows.begin; first < rows.end; first += GRAIN) {
        const size_t end = std::min(first + GRAIN, rows.end);
        for (size_t row = first; row < end; row += SCREEN_ROWS)
            for (size_t i = 0; i < slots; ++i)
                if (slots_[i].stage == Stage::BOUNDS)
                    rounded_.approximate(slots_[i].query, row / SCREEN_ROWS, slots_[i].approx + row,
                                         slots_[i].upper + row);
        for (size_t i = 0; i < slots; ++i) {
            const Slot& slot = slots_[i];
            if (slot.stage != Stage::BOUNDS) continue;
            std::fill(slot.logits + first, slot.logits + end, LOWEST);
            if (slot.noisy) {
                uniforms_of(*slot.plan, slot.entry)
                    .many_words(static_cast<uint32_t>(first / 4), words);
                for (size_t id = 0; id < GRAIN; ++id)
                    slot.noise[first + id] = gumbel_bound(words[id]);
            }
            bound_scores(slot, {first, end});
        }
    }
}

void HeadScreen::bound_scores(const Slot& slot, Range rows) const {
    for (size_t first = rows.begin; first < rows.end; first += SCREEN_ROWS) {
        float approx = LOWEST, upper = LOWEST;
        for (size_t id = first; id < std::min(first + SCREEN_ROWS, rows.end); ++id) {
            approx = std::max(approx, slot.score(slot.approx, id));
            upper = std::max(upper, slot.score(slot.upper, id));
        }
        slot.approx_peaks[first / SCREEN_ROWS] = approx;
        slot.upper_peaks[first / SCREEN_ROWS] = upper;
    }
}

void HeadScreen::take_out(Slot& slot, size_t id) { slot.approx[id] = slot.upper[id] = LOWEST; }

void HeadScreen::limit_to_mask(Slot& slot) const {
    const SamplePlan& plan = *slot.plan;
    const int32_t mask_row = plan.mask_rows[slot.entry];
    if (mask_row < 0) return;
    const uint32_t* words = plan.mask + static_cast<size_t>(mask_row) * plan.mask_words;
    for (size_t id = 0; id < vocab_; ++id)
        if (!((words[id / 32] >> (id % 32)) & 1u)) take_out(slot, id);
}

// Ids that bias or penalties change give no threshold. Those that can only become less likely keep
// their upper bound; the others are computed.
void HeadScreen::list_adjusted(Slot& slot) const {
    const SamplePlan& plan = *slot.plan;
    const auto change = [&](int32_t changed, bool higher) {
        const auto id = static_cast<size_t>(changed);
        slot.approx[id] = LOWEST;
        if (!higher || slot.upper[id] == LOWEST) return;
        slot.list[slot.count++] = changed;
        slot.upper[id] = LOWEST;
    };
    for (int32_t i = plan.bias_offsets[slot.entry]; i < plan.bias_offsets[slot.entry + 1]; ++i)
        change(plan.bias_ids[i], plan.bias_values[i] > 0.0f);
    if (!penalised(plan, slot.entry)) return;
    const bool higher = rewarded(plan, slot.entry);
    for (int32_t i = plan.seen_offsets[slot.entry]; i < plan.seen_offsets[slot.entry + 1]; ++i)
        change(plan.seen_ids[i], higher);
}

// The ids that most likely are the best ones.
void HeadScreen::list_probes(Slot& slot) const {
    const auto order = [&](int32_t a, int32_t b) {
        return slot.score(slot.approx, static_cast<size_t>(a)) >
               slot.score(slot.approx, static_cast<size_t>(b));
    };
    int32_t* probes = slot.list + slot.count;
    const size_t wanted = std::min(slot.keep + PROBES, vocab_ - slot.count);
    size_t found = 0;
    float worst = LOWEST;
    for (size_t first = 0; first < vocab_; first += SCREEN_ROWS) {
        if (!(slot.approx_peaks[first / SCREEN_ROWS] > worst)) continue;
        for (size_t id = first; id < std::min(first + SCREEN_ROWS, vocab_); ++id) {
            if (!(slot.score(slot.approx, id) > worst)) continue;
            if (found == wanted) {
                std::pop_heap(probes, probes + found, order);
                --found;
            }
            probes[found++] = static_cast<int32_t>(id);
            std::push_heap(probes, probes + found, order);  // the worst one is on top
            if (found == wanted) worst = slot.score(slot.approx, static_cast<size_t>(probes[0]));
        }
    }
    for (size_t i = 0; i < found; ++i) take_out(slot, static_cast<size_t>(probes[i]));
    slot.forced = slot.count;
    slot.count += found;
}

// What a row must be able to reach: the exact logits of the probes are some of those that it
// competes with.
float HeadScreen::threshold(Slot& slot) const {
    int32_t* probes = slot.list + slot.forced;
    const size_t found = slot.count - slot.forced;
    if (!slot.noisy) {
        if (found < slot.keep) return LOWEST;
        std::nth_element(probes, probes + (slot.keep - 1), probes + found,
                         [&](int32_t a, int32_t b) { return slot.logits[a] > slot.logits[b]; });
        return slot.logits[probes[slot.keep - 1]];
    }
    const SamplePlan& plan = *slot.plan;
    const UniformStream uniforms = uniforms_of(plan, slot.entry);
    const double temperature = plan.temperature[slot.entry];
    double best = LOWEST;
    for (size_t i = 0; i < found; ++i) {
        const auto id = static_cast<uint32_t>(probes[i]);
        const double noise = gumbel_of_word(uniforms.words(id / 4).word[id % 4]);
        best = std::max(best, static_cast<double>(slot.logits[probes[i]]) / temperature + noise);
    }
    // Keys of rows near the threshold are off by some roundings of numbers of its size and of
    // noise.
    return found == 0 ? LOWEST : static_cast<float>(best - 1e-6 * (std::fabs(best) + 64.0));
}

// Lists the ids whose score may reach `lowest`; false if they are too many.
bool HeadScreen::list_above(Slot& slot, float lowest) const {
    const float needed = std::max(lowest, std::numeric_limits<float>::lowest());
    slot.count = 0;
    for (size_t first = 0; first < vocab_; first += SCREEN_ROWS) {
        if (!(slot.upper_peaks[first / SCREEN_ROWS] >= needed)) continue;
        if (slot.count > vocab_ / SMALL_PART) return false;
        for (size_t id = first; id < std::min(first + SCREEN_ROWS, vocab_); ++id)
            if (slot.score(slot.upper, id) >= needed)
                slot.list[slot.count++] = static_cast<int32_t>(id);
    }
    for (size_t i = 0; i < slot.count; ++i) take_out(slot, static_cast<size_t>(slot.list[i]));
    return true;
}

// The same with logits in place of scores.
bool HeadScreen::list_ranked(Slot& slot, float lowest) const {
    slot.count = 0;
    for (size_t id = 0; id < vocab_; ++id) {
        if (!(slot.upper[id] >= lowest)) continue;
        if (slot.count > vocab_ / SMALL_PART) return false;
        slot.list[slot.count++] = static_cast<int32_t>(id);
        take_out(slot, id);
    }
    return true;
}

// At least this is the sum of the probabilities, as the Sampler weighs them, of all ids whose
// logits are not exact.
double HeadScreen::least_rest(const Slot& slot, float shift) const {
    const float temperature = slot.plan->temperature[slot.entry];
    float some[GRAIN];
    double total = 0.0;
    for (size_t first = 0; first < vocab_; first += GRAIN) {
        const size_t count = std::min(GRAIN, vocab_ - first);
        for (size_t i = 0; i < count; ++i) {
            const float approx = slot.approx[first + i], upper = slot.upper[first + i];
            some[i] = approx > LOWEST ? (approx - (upper - approx)) / temperature : LOWEST;
        }
        kernels_.exp_shifted(some, count, shift);
        for (size_t i = 0; i < count; ++i) total += some[i];
    }
    return total;
}

// Whether top-p and min-p keep the drawn token, `row` being the logits after bias, penalties and
// mask, of which all that rank before the token are exact.
bool HeadScreen::surely_kept(const Slot& slot, const float* row) const {
    const float temperature = slot.plan->temperature[slot.entry];
    const float top_p = slot.plan->top_p[slot.entry], min_p = slot.plan->min_p[slot.entry];
    const float shift = *std::max_element(row, row + vocab_) / temperature;
    const float drawn = row[slot.token];
    if (min_p > 0.0f && !(exp_f32(drawn / temperature - shift) >= min_p)) return false;
    double before = 0.0, total = 0.0;
    for (size_t id = 0; id < vocab_; ++id) {
        if (row[id] == LOWEST) continue;
        const double weight = exp_f32(row[id] / temperature - shift);
        total += weight;
        if (row[id] > drawn || (row[id] == drawn && static_cast<int32_t>(id) < slot.token))
            before += weight;
    }
    if (top_p == 1.0f || before == 0.0) return true;
    const double wanted = before * (1.0 + UNSURE) / (top_p * (1.0 - UNSURE));
    return wanted < total || wanted < total + least_rest(slot, shift);
}

void HeadScreen::advance(size_t index, Sampler& sampler) {
    Slot& slot = slots_[index];
    if (slot.stage == Stage::DONE) return;
    const bool whole = slot.stage == Stage::ALL;
    slot.stage = next(slot, sampler);
    if (slot.stage == Stage::ALL) full_.fetch_add(1, std::memory_order_relaxed);
    if (!whole && slot.stage != Stage::ALL && slot.stage != Stage::DONE)
        rescored_.fetch_add(slot.count, std::memory_order_relaxed);
}

HeadScreen::Stage HeadScreen::next(Slot& slot, Sampler& sampler) {
    if (!slot.plan) return Stage::DONE;
    const SamplePlan& plan = *slot.plan;
    switch (slot.stage) {
        case Stage::BOUNDS:
            limit_to_mask(slot);
            list_adjusted(slot);
            list_probes(slot);
            return Stage::PROBES;
        case Stage::PROBES:
            return list_above(slot, threshold(slot)) ? Stage::SURVIVORS : Stage::ALL;
        case Stage::SURVIVORS: {
            if (!slot.cut) break;
            slot.token = sampler.draw_uncut(plan, slot.entry, slot.logits);
            if (slot.token < 0) return Stage::DONE;
            const float drawn = sampler.adjust(plan, slot.entry, slot.logits)[slot.token];
            return list_ranked(slot, drawn) ? Stage::RANKED : Stage::ALL;
        }
        case Stage::RANKED: {
            const float* row = sampler.adjust(plan, slot.entry, slot.logits);
            if (surely_kept(slot, row)) return Stage::DONE;
            if (plan.top_p[slot.entry] < 1.0f) return Stage::ALL;
            // All that min-p may keep, for an exp that is off by some roundings of its argument.
            const float highest = *std::max_element(row, row + vocab_);
            const double width = -std::log(static_cast<double>(plan.min_p[slot.entry])) *
                                 plan.temperature[slot.entry];
            const double slack =
                1e-5 * plan.temperature[slot.entry] + 1e-6 * (2.0 * std::fabs(highest) + width);
            const auto lowest = static_cast<float>(highest - width - slack);
            return list_ranked(slot, lowest) ? Stage::LIKELY : Stage::ALL;
        }
        case Stage::LIKELY:
        case Stage::ALL:
        case Stage::DONE:
            break;
    }
    slot.token = sampler.draw(plan, slot.entry, slot.logits);
    return Stage::DONE;
}

void HeadScreen::rescore(size_t slots, int worker, int workers) {
    const size_t n = rounded_.hidden();
    const size_t row_bytes = n * VALUE_BYTES[static_cast<size_t>(head_.type)];
    for (size_t i = 0; i < slots; ++i) {
        const Slot& slot = slots_[i];
        if (slot.stage == Stage::ALL || slot.stage == Stage::DONE) continue;
        const Range mine = split(slot.count, worker, workers);
        for (size_t k = mine.begin; k < mine.end; ++k) {
            const auto row = static_cast<size_t>(slot.list[k]);
            kernels_.dense_matvec(head_.data + row * row_bytes, head_.type, 1, n, slot.query.hidden,
                                  slot.logits + row);
        }
    }
}

bool HeadScreen::pending(size_t slots) const {
    return std::any_of(slots_.begin(), slots_.begin() + static_cast<ptrdiff_t>(slots),
                       [](const Slot& slot) { return slot.stage != Stage::DONE; });
}

HeadStatistics HeadScreen::statistics() const {
    return {screened_.load(std::memory_order_relaxed), rescored_.load(std::memory_order_relaxed),
            full_.load(std::memory_order_relaxed)};
}

}  // namespace bitllm
