#include "adapter.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace bitllm {

void Adapter::set(size_t layer, LinearName name, size_t out, size_t in, size_t rank, float scale,
                  std::span<const std::byte> a, ValueType a_type, std::span<const std::byte> b,
                  ValueType b_type) {
    const size_t a_bytes = VALUE_BYTES[static_cast<size_t>(a_type)];
    const size_t b_bytes = VALUE_BYTES[static_cast<size_t>(b_type)];
    if (layer >= layers_.size() || rank == 0 || out == 0 || in == 0 ||
        a.size() != rank * in * a_bytes || b.size() != out * rank * b_bytes)
        throw std::invalid_argument("the matrices of an adapter have the wrong shape");
    const std::span<std::byte> a_copy = take(a.size());
    std::memcpy(a_copy.data(), a.data(), a.size());
    const std::span<std::byte> b_copy = take(b.size());
    std::byte* to = b_copy.data();
    for (size_t first = 0; first < out; first += ADAPTER_TILE) {
        const size_t rows = std::min(ADAPTER_TILE, out - first);
        for (size_t column = 0; column < rank; ++column)
            for (size_t row = first; row < first + rows; ++row, to += b_bytes)
                std::memcpy(to, b.data() + (row * rank + column) * b_bytes, b_bytes);
    }
    layers_[layer][static_cast<size_t>(name)] = {rank,   out,    in,     scale,
                                                 a_type, b_type, a_copy, b_copy};
}

size_t Adapter::largest_rank() const {
    size_t rank = 0;
    for (const auto& layer : layers_)
        for (const LowRank& update : layer) rank = std::max(rank, update.rank);
    return rank;
}

std::span<std::byte> Adapter::take(size_t bytes) {
    if (align_up(bytes) > pages_.bytes() - used_)
        throw std::invalid_argument("the matrices of an adapter are more than it was made for");
    std::byte* piece = pages_.data() + used_;
    used_ += align_up(bytes);
    return {piece, bytes};
}

void add_low_rank(const Kernels& kernels, const LowRank& update, const float* z, size_t begin,
                  size_t end, float* y) {
    const size_t column_bytes = update.rank * VALUE_BYTES[static_cast<size_t>(update.b_type)];
    const float one = 1.0f;
    // Merging into running sums is just that: y * 1 + sum * scale.
    const auto add_tile = [&](size_t first, size_t rows, float* to) {
        kernels.weighted_values(z, 1, update.b.data() + first * column_bytes, update.b_type, 0,
                                update.rank, rows, &one, &update.scale, 0, to);
    };
    for (size_t first = begin - begin % ADAPTER_TILE; first < end; first += ADAPTER_TILE) {
        const size_t rows = std::min(ADAPTER_TILE, update.out - first);
        const size_t from = std::max(begin, first), to = std::min(end, first + rows);
        if (to - from == rows) {
            add_tile(first, rows, y + first);
            continue;
        }
        float part[ADAPTER_TILE] = {};  // rows of others are computed too, and left out
        std::copy(y + from, y + to, part + (from - first));
        add_tile(first, rows, part);
        std::copy(part + (from - first), part + (to - first), y + from);
    }
}

}  // namespace bitllm
