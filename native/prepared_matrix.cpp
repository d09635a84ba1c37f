#include "prepared_matrix.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

namespace bitllm {
namespace {

// Sums beyond this many columns could pass 2^24, which kernels.h promises to be exact up to.
constexpr size_t LARGEST_INPUT = (size_t{1} << 24) / 127;
constexpr size_t HUGE_PAGE = size_t{1} << 21;
constexpr size_t ROWS = 32;  // that are unpacked together, and stay in the second cache

size_t matrix_bytes(size_t rows, size_t row_bytes) {
    if (rows > std::numeric_limits<size_t>::max() / row_bytes) throw std::bad_alloc();
    return rows * row_bytes;
}

}  // namespace

PreparedMatrix::PreparedMatrix(const StoredCodes& codes, Packing packing)
    : out_(codes.out), in_(codes.in), packing_(packing) {
    if (in_ == 0 || in_ > LARGEST_INPUT)
        throw std::invalid_argument("a ternary matrix has no columns or too many");
    std::vector<uint8_t> zero(out_);
    if (!examine(codes, 0, codes.rows(), zero.data()).codes_only)
        throw std::domain_error("packed weights hold the bits 11, which are no ternary code");
    const size_t bytes = matrix_bytes(out_, packed_row_bytes(packing, in_));
    rows_ = Pages(bytes, bytes >= 2 * HUGE_PAGE);
    pack(codes, packing, 0, codes.rows(), nullptr, reinterpret_cast<uint8_t*>(rows_.data()));
}

void PreparedMatrix::multiply(const IntegerKernels& kernels, const int8_t* q, size_t tokens,
                              int32_t* out) const {
    if (tokens == 0) return;
    const size_t columns = padded_columns(in_);
    const PackedKernels& packed = kernels.packed[static_cast<size_t>(packing_)];
    std::vector<int8_t> padded(tokens * columns);
    std::vector<int32_t> sums(tokens);
    for (size_t t = 0; t < tokens; ++t) {
        std::memcpy(padded.data() + t * columns, q + t * in_, in_);
        for (size_t i = 0; i < in_; ++i) sums[t] += q[t * in_ + i];
    }
    if (tokens == 1)
        packed.matvec(row(0), out_, in_, padded.data(), sums[0], out);
    else if (tokens <= packed.few_tokens)
        packed.matmul(row(0), out_, in_, padded.data(), sums.data(), tokens, out, out_);
    else
        multiply_unpacked(kernels, padded.data(), sums.data(), tokens, out);
}

void PreparedMatrix::multiply_unpacked(const IntegerKernels& kernels, const int8_t* q,
                                       const int32_t* q_sums, size_t tokens, int32_t* out) const {
    const size_t columns = padded_columns(in_);
    std::vector<uint8_t> codes(ROWS * columns);
    for (size_t first = 0; first < out_; first += ROWS) {
        const size_t height = std::min(ROWS, out_ - first);
        kernels.packed[static_cast<size_t>(packing_)].unpack(row(first), height, in_, codes.data());
        kernels.codes_matmul(codes.data(), columns, height, columns, q, columns, q_sums, tokens,
                             out + first, out_);
    }
}

}  // namespace bitllm
