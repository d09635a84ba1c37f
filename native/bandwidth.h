// Measured read bandwidth of main memory: the yardstick of every decode speed.
#pragma once

#include <cstddef>

namespace bitllm {

// Bytes a second at which `threads` threads together read a buffer of `bytes` bytes, the best of
// some passes. `bytes` should be several times the last-level cache; 0 threads is not allowed
// (std::invalid_argument).
double read_bandwidth(int threads, size_t bytes);

}  // namespace bitllm
