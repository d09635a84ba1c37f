// From a row of logits to a token, or to log-probabilities: the SamplePlan of
// src/bitllm/backends/base.py.
//
// Stateless: the uniforms are a function of (seed, choice, position, token id) alone, so that
// batch, order and preemption cannot change what is drawn.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"
#include "memory.h"
#include "numerics.h"

namespace bitllm {

// Parallel arrays, one entry for each row to sample; base.py says what each means.
struct SamplePlan {
    size_t count = 0;
    const float* temperature = nullptr;
    const int32_t* top_k = nullptr;
    const float* top_p = nullptr;
    const float* min_p = nullptr;
    const float* typical_p = nullptr;
    const uint64_t* seed = nullptr;
    const int32_t* choice = nullptr;
    const int32_t* position = nullptr;
    const int32_t* top_logprobs = nullptr;
    const float* repetition_penalty = nullptr;
    const float* frequency_penalty = nullptr;
    const float* presence_penalty = nullptr;
    const int32_t* seen_offsets = nullptr;
    const int32_t* seen_ids = nullptr;
    const int32_t* seen_counts = nullptr;
    size_t seen_count = 0;  // entries of seen_ids and seen_counts
    const int32_t* bias_offsets = nullptr;
    const int32_t* bias_ids = nullptr;
    const float* bias_values = nullptr;
    size_t bias_count = 0;  // entries of bias_ids and bias_values
    const uint32_t* mask = nullptr;
    size_t mask_count = 0;  // rows of `mask`
    size_t mask_words = 0;  // uint32 words of each
    const int32_t* mask_rows = nullptr;
};

// Where log-probabilities of one row go; `top_ids` and `top_logprobs` hold `width` values, padded
// by the caller.
struct ScoreOutput {
    float* logprob;
    int32_t* top_ids;
    float* top_logprobs;
};

// Draws and scores rows of `vocab` logits with scratch of its own; one for each worker.
class Sampler {
  public:
    // What the constructor takes of an arena.
    static size_t scratch_bytes(size_t vocab);

    Sampler(const Kernels& kernels, size_t vocab, Arena& arena);

    // The token of entry `entry`: the lowest id of the highest logit at temperature 0, else the
    // Gumbel argmax over the ids that the cuts keep. -1 if the mask allows no id, or every logit is
    // NaN or -infinity.
    int32_t draw(const SamplePlan& plan, size_t entry, const float* logits);

    // The same without cuts.
    int32_t draw_uncut(const SamplePlan& plan, size_t entry, const float* logits);

    // The logits after bias, penalties and mask: in scratch, or `logits` themselves where the entry
    // changes nothing.
    const float* adjust(const SamplePlan& plan, size_t entry, const float* logits);

    // Log-probability of `target` (NaN for -1) under softmax(logits), and of the `top_n` most
    // likely ids, most likely first, ties by lowest id.
    void score(const float* logits, int32_t target, size_t top_n, const ScoreOutput& out);

  private:
    struct Draw;

    size_t sort_above(const float* logits, float lowest);
    void weigh_kept(const float* logits, size_t count, float temperature);
    void weigh_all(const float* logits, float highest, float temperature);
    double sum_in_order(size_t count) const;
    size_t prefix_of(double wanted, size_t count) const;
    size_t keep_nucleus(const float* logits, float highest, float temperature, float top_p);
    size_t drop_unlikely(size_t count, float min_p);
    size_t keep_typical(size_t count, float typical_p);
    void draw_of_all(Draw& draw) const;
    void draw_of_kept(Draw& draw, size_t count) const;

    const Kernels& kernels_;
    const size_t vocab_;
    float* adjusted_;       // [vocab] logits after bias, penalties and mask
    float* probabilities_;  // [vocab] of the ids in kept_, or of all; not normalised
    int32_t* kept_;         // [vocab] ids that the cuts keep, most likely first
    uint64_t* keys_;        // [2 * vocab] of the radix sort
};

}  // namespace bitllm
