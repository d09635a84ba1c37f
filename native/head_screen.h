// Which rows of the head can matter to a token that is to be drawn, and whether that is certain.
//
// A rounded copy of the head (rounded_head.h) gives every logit but for a margin. Rows that cannot
// win for all the error they may have are passed over; the others are multiplied exactly, and the
// Sampler draws among them, with every other logit at -infinity, what it would draw among all. What
// the bounds do not decide, all rows decide. docs/screened-head.md has the arguments.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "rounded_head.h"
#include "sampling.h"

namespace bitllm {

// What screening has done since the decoder was made.
struct HeadStatistics {
    uint64_t screened;  // rows to sample that began with the rounded copy
    uint64_t rescored;  // rows of the head that were then multiplied exactly
    uint64_t full;      // of `screened`: those that read the whole head after all
};

// Some requests at a time, each in a slot. Workers share the rows; what concerns one request is
// done by one of them. Calls in this order, with a barrier between: begin() or pass() for every
// slot; approximate(); then in turns advance() for every slot and rescore(), until nothing is
// pending(). Slots that want_all() need all logits from the caller, before each advance().
class HeadScreen {
  public:
    HeadScreen(const Kernels& kernels, DenseMatrix head, const RoundedHead& rounded, size_t vocab);

    // Takes scratch for that many slots of an arena; and what it takes.
    void take_scratch(Arena& arena, size_t slots);
    static size_t scratch_bytes(RoundedHead::Bits bits, size_t vocab, size_t hidden, size_t slots);

    // Entry `entry` of a plan wants a token. hidden: [hidden], logits: [vocab]; both stay.
    void begin(size_t slot, const SamplePlan& plan, size_t entry, const float* hidden,
               float* logits);
    // A request of another kind, which wants all logits or none.
    void pass(size_t slot, bool all);

    // Bounds of all logits, for rows in a part of the vocabulary that begins at a multiple of
    // GRAIN.
    static constexpr size_t GRAIN = UniformStream::MANY;
    void approximate(size_t slots, Range rows);

    // Decides what a slot needs next, or its token.
    void advance(size_t slot, Sampler& sampler);
    void rescore(size_t slots, int worker, int workers);
    bool wants_all(size_t slot) const { return slots_[slot].stage == Stage::ALL; }
    bool pending(size_t slots) const;
    int32_t token(size_t slot) const { return slots_[slot].token; }

    HeadStatistics statistics() const;

  private:
    // Which exact logits are being computed.
    enum class Stage : uint8_t {
        BOUNDS,     // none yet
        PROBES,     // of rows that give a threshold
        SURVIVORS,  // of all that may reach it
        RANKED,     // of all that may rank before the drawn token
        LIKELY,     // of all that min-p may keep
        ALL,
        DONE
    };
    struct Slot {
        Stage stage = Stage::DONE;
        const SamplePlan* plan = nullptr;
        size_t entry = 0;
        size_t keep = 1;       // of the highest logits, for greedy and top-k
        bool noisy = false;    // the token is a Gumbel argmax over the whole vocabulary, ...
        bool cut = false;      // ... if top-p and min-p keep it
        float inverse = 1.0f;  // of the temperature
        RoundedHead::Query query;
        // Of ids: -infinity in approx where nothing is known from below, and in upper where the id
        // cannot be drawn or its logit is exact already.
        float* approx = nullptr;
        float* upper = nullptr;
        float* noise = nullptr;  // bounds of the Gumbel noise
        // At least the scores by approx and by upper of each SCREEN_ROWS ids.
        float* approx_peaks = nullptr;
        float* upper_peaks = nullptr;
        float* logits = nullptr;
        int32_t* list = nullptr;  // rows to compute
        size_t count = 0;
        size_t forced = 0;  // those at the front of the list that give no threshold
        int32_t token = -1;

        // What ids are compared by: these bounds of logits, or with temperature and noise.
        float score(const float* bounds, size_t id) const {
            return noisy ? bounds[id] * inverse + noise[id] : bounds[id];
        }
    };

    bool decides(const SamplePlan& plan, size_t entry) const;
    static void take_out(Slot& slot, size_t id);
    void limit_to_mask(Slot& slot) const;
    void list_adjusted(Slot& slot) const;
    void list_probes(Slot& slot) const;
    float threshold(Slot& slot) const;
    bool list_above(Slot& slot, float lowest) const;
    bool list_ranked(Slot& slot, float lowest) const;
    void bound_scores(const Slot& slot, Range rows) const;
    bool surely_kept(const Slot& slot, const float* row) const;
    double least_rest(const Slot& slot, float shift) const;
    Stage next(Slot& slot, Sampler& sampler);

    const Kernels& kernels_;
    const DenseMatrix head_;
    const RoundedHead& rounded_;
    const size_t vocab_;
    std::vector<Slot> slots_;
    std::atomic<uint64_t> screened_ = 0, rescored_ = 0, full_ = 0;
};

}  // namespace bitllm
