// A ternary matrix packed for the kernels once, for single products outside a decoder.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"
#include "packing.h"

namespace bitllm {

class PreparedMatrix {
  public:
    // Packs a copy of `codes`. Throws std::invalid_argument for no columns or too many,
    // std::domain_error for bits that are no ternary code, std::bad_alloc.
    PreparedMatrix(const StoredCodes& codes, Packing packing);

    size_t out_features() const { return out_; }
    size_t in_features() const { return in_; }
    Packing packing() const { return packing_; }
    size_t bytes() const { return rows_.bytes(); }

    // out[t][r] = sum over i of code[r][i] * q[t][i], exact; q: int8 [tokens][in], out: int32
    // [tokens][out]. Several threads may call it at once. Throws std::bad_alloc.
    void multiply(const IntegerKernels& kernels, const int8_t* q, size_t tokens,
                  int32_t* out) const;

  private:
    const uint8_t* row(size_t index) const {
        return reinterpret_cast<const uint8_t*>(rows_.data()) +
               index * packed_row_bytes(packing_, in_);
    }
    void multiply_unpacked(const IntegerKernels& kernels, const int8_t* q, const int32_t* q_sums,
                           size_t tokens, int32_t* out) const;

    size_t out_, in_;
    Packing packing_;
    Pages rows_;
};

}  // namespace bitllm
