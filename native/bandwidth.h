// Measured read bandwidth: the yardstick of every decode speed.
#pragma once

#include <cstddef>

namespace bitllm {

// Bytes a second at which `threads` threads together read a buffer of `bytes` bytes again and
// again, the best of some passes. Of main memory, if the buffer is several times the last-level
// cache; of the cache that holds it, if it is small. 0 threads is not allowed
// (std::invalid_argument).
double read_bandwidth(int threads, size_t bytes);

}  // namespace bitllm
