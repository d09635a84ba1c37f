// A low-rank adapter: y += (B (A x)) * scale behind some projections of a model. adapter.py says
// what x is, backends/reference/layer.py in which order the sums are added.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "linear_name.h"
#include "memory.h"

namespace bitllm {

// What an adapter adds to one projection; rank 0 = nothing.
struct LowRank {
    size_t rank = 0;
    size_t out = 0;
    size_t in = 0;
    float scale = 0.0f;
    ValueType a_type = ValueType::F32;
    ValueType b_type = ValueType::F32;
    std::span<const std::byte> a;  // [rank][in]
    // B by columns, in tiles of ADAPTER_TILE rows (fewer in the last one): [tile][rank][rows].
    std::span<const std::byte> b;
};

// Rows of B whose sums run side by side.
inline constexpr size_t ADAPTER_TILE = 64;

class Adapter {
  public:
    // `bytes`: what its matrices take, each rounded up to ALIGNMENT. Throws std::bad_alloc.
    Adapter(size_t layers, size_t bytes) : layers_(layers), pages_(bytes, bytes >= LARGE) {}

    // Copies A [rank][in] and B [out][rank], rows one after another. Throws std::invalid_argument
    // where sizes contradict each other, or `bytes` is used up.
    void set(size_t layer, LinearName name, size_t out, size_t in, size_t rank, float scale,
             std::span<const std::byte> a, ValueType a_type, std::span<const std::byte> b,
             ValueType b_type);

    const LowRank& at(size_t layer, LinearName name) const {
        return layers_[layer][static_cast<size_t>(name)];
    }
    size_t layers() const { return layers_.size(); }
    size_t largest_rank() const;
    size_t bytes() const { return pages_.bytes(); }

  private:
    static constexpr size_t LARGE = size_t{1} << 21;  // huge pages, from one on

    std::span<std::byte> take(size_t bytes);

    std::vector<std::array<LowRank, LINEAR_COUNT>> layers_;
    Pages pages_;
    size_t used_ = 0;
};

// y[rows] += (B z) * scale for some rows, z = A x [rank].
void add_low_rank(const Kernels& kernels, const LowRank& update, const float* z, size_t begin,
                  size_t end, float* y);

}  // namespace bitllm
