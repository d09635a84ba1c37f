// The ternary projections of a layer, in the order of LINEAR_NAMES in checkpoint.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitllm {

enum class LinearName : uint8_t { Q, K, V, O, GATE, UP, DOWN };
inline constexpr size_t LINEAR_COUNT = 7;

}  // namespace bitllm
