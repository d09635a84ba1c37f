// Measured speeds of arithmetic: what this machine can do at most, and what single operations do.
#pragma once

#include <cstddef>

#include "kernels/kernels.h"

namespace bitllm {

// Multiplications (each with its addition) of 8-bit integers a second, that `threads` threads reach
// together in the densest loop of a kernel set; the best of some passes. Throws
// std::invalid_argument for 0 threads.
double peak_multiplications(const Kernels& kernels, int threads);

// Quantised operations a second: each of `threads` threads quantises a vector of `columns` floats,
// multiplies it with one ternary matrix of `rows` rows and rescales the result, again and again for
// about `seconds`. Throws std::invalid_argument for 0 threads, rows or columns, and for more
// columns than products are exact for.
double quantized_operations(const Kernels& kernels, Packing packing, int threads, size_t rows,
                            size_t columns, double seconds);

}  // namespace bitllm
