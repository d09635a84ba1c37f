// A rounded copy of the head, a quarter or half of its bytes, and how far its logits can be off.
// docs/screened-head.md derives every bound that is used here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace bitllm {

// A [rows, columns] matrix of floats that somebody else keeps alive: a view of the mapped
// checkpoint.
struct DenseMatrix {
    const std::byte* data = nullptr;
    ValueType type = ValueType::F32;
};

// The probability with which, for one hidden state, any row of a copy in 4 bits is further off than
// its margin.
inline constexpr double FAILURE_PROBABILITY = 1e-12;

class RoundedHead {
  public:
    // 4 bits a weight, rounded up or down at random, with margins by Hoeffding's inequality; or 8
    // bits, rounded to nearest, with margins for the worst case.
    enum class Bits : uint8_t { FOUR, EIGHT };

    // A hidden state as the copy is multiplied with it, and what margins take from it. The arrays
    // are those of take_query().
    struct Query {
        const float* hidden = nullptr;
        int8_t* high = nullptr;  // the state in 16 bits: 256 * high + low
        int8_t* low = nullptr;
        int32_t* offsets = nullptr;  // [groups], as screen_rows takes them
        float* squares = nullptr;    // [groups]
        float unit = 0.0f;           // of the state in 16 bits
        float per_spread = 0.0f;     // margin = per_spread * spread + per_norm * norm + fixed
        float per_norm = 0.0f;
        float fixed = 0.0f;
    };

    // Rounds a head of [vocab, hidden]. The copy is empty if a weight is NaN or beyond 2^40. Throws
    // std::bad_alloc.
    RoundedHead(const Kernels& kernels, Bits bits, DenseMatrix head, size_t vocab, size_t hidden,
                ThreadPool& pool);

    bool empty() const { return codes_.bytes() == 0; }
    size_t bytes() const;
    size_t hidden() const { return hidden_; }

    // The arrays of a query, of an arena; and what they take of one.
    void take_query(Arena& arena, Query& query) const;
    static size_t query_bytes(Bits bits, size_t hidden);

    // Makes a query of a hidden state, float [hidden], which has to stay; false where it is NaN,
    // zero or so large or small that the bounds do not hold.
    bool ask(const float* hidden, Query& query) const;

    // For rows SCREEN_ROWS * group and those that follow: approx[r], and upper[r] = approx[r] +
    // margin, so that |logit - approx[r]| <= upper[r] - approx[r] but for FAILURE_PROBABILITY. The
    // logit is the float that dense_matvec gives for the stored row. Writes SCREEN_ROWS of each.
    void approximate(const Query& query, size_t group, float* approx, float* upper) const;

    // Of a copy in 8 bits: logits of some rows, in place of those of the stored head.
    void logits(const float* hidden, Range rows, float* out) const;

  private:
    // `row` has room for the floats of a padded row, zeros behind hidden_.
    bool round_four(DenseMatrix head, Range row_groups, float* row);
    bool round_eight(DenseMatrix head, Range rows, float* row);
    void round_row_in_four(const float* row, size_t index);
    void bound_four(Query& query) const;
    void bound_eight(Query& query) const;

    const Kernels& kernels_;
    const Bits bits_;
    const size_t vocab_;
    const size_t hidden_;
    const size_t groups_;        // of columns
    Pages codes_;                // as screen_rows takes them, or int8 [vocab][hidden]
    std::vector<float> scales_;  // [vocab] of 8 bits; 4 bits keep theirs beside the codes
    std::vector<float> norms_;   // [vocab]: at least the Euclidean norm of each row
};

}  // namespace bitllm
