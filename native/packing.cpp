#include "packing.h"

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"

namespace bitllm {
namespace {

constexpr size_t TWO_BIT_BLOCK = block_weights(Packing::TWO_BIT);
constexpr uint8_t FOUR_ZERO_WEIGHTS = 0x55;
constexpr size_t SEGMENT = BLOCK_BYTES / 4;  // canonical bytes that hold 64 weights

// A 4 x 4 matrix of 2-bit elements, element (r, c) at bit 8 * r + 2 * c, transposed by exchanging
// first within and then between its quarters.
uint32_t transpose(uint32_t bits) {
    uint32_t exchange = (bits ^ (bits >> 6)) & 0x00CC00CCu;
    bits ^= exchange ^ (exchange << 6);
    exchange = (bits ^ (bits >> 12)) & 0x0000F0F0u;
    return bits ^ exchange ^ (exchange << 12);
}

// 256 weights; returns a value with a bit set wherever two bits were 11.
uint32_t repack_block(const uint8_t* canonical, uint8_t* packed) {
    uint32_t wrong = 0;
    for (size_t i = 0; i < SEGMENT; ++i) {
        const uint32_t bits = static_cast<uint32_t>(canonical[i]) |
                              static_cast<uint32_t>(canonical[i + SEGMENT]) << 8 |
                              static_cast<uint32_t>(canonical[i + 2 * SEGMENT]) << 16 |
                              static_cast<uint32_t>(canonical[i + 3 * SEGMENT]) << 24;
        wrong |= bits & (bits >> 1) & 0x55555555u;
        const uint32_t turned = transpose(bits);
        packed[4 * i] = static_cast<uint8_t>(turned);
        packed[4 * i + 1] = static_cast<uint8_t>(turned >> 8);
        packed[4 * i + 2] = static_cast<uint8_t>(turned >> 16);
        packed[4 * i + 3] = static_cast<uint8_t>(turned >> 24);
    }
    return wrong;
}

// The last block of a row, whose missing weights become zeros whatever the padding bits say.
uint32_t repack_last_block(const uint8_t* canonical, size_t columns, uint8_t* packed) {
    uint8_t whole[BLOCK_BYTES];
    std::memset(whole, FOUR_ZERO_WEIGHTS, sizeof whole);
    std::memcpy(whole, canonical, canonical_row_bytes(columns));
    if (columns % 4 != 0) {
        const auto used = static_cast<uint8_t>((1u << (2 * (columns % 4))) - 1);
        uint8_t& last = whole[columns / 4];
        last = static_cast<uint8_t>((last & used) | (FOUR_ZERO_WEIGHTS & ~used));
    }
    return repack_block(whole, packed);
}

}  // namespace

bool pack_rows(const int8_t* codes, size_t rows, size_t columns, uint8_t* canonical) {
    const size_t row_bytes = canonical_row_bytes(columns);
    std::memset(canonical, FOUR_ZERO_WEIGHTS, rows * row_bytes);
    bool valid = true;
    for (size_t row = 0; row < rows; ++row) {
        for (size_t k = 0; k < columns; ++k) {
            const int code = codes[row * columns + k];
            valid = valid && code >= -1 && code <= 1;
            const size_t shift = 2 * (k % 4);
            // The byte holds 01 there: exclusive or with (code + 1) ^ 01 turns it into code + 1.
            const auto change = static_cast<unsigned>(((code + 1) & 3) ^ 1) << shift;
            canonical[row * row_bytes + k / 4] ^= static_cast<uint8_t>(change);
        }
    }
    return valid;
}

bool unpack_rows(const uint8_t* canonical, size_t rows, size_t columns, int8_t* codes) {
    const size_t row_bytes = canonical_row_bytes(columns);
    bool valid = true;
    for (size_t row = 0; row < rows; ++row) {
        for (size_t k = 0; k < columns; ++k) {
            const int bits = (canonical[row * row_bytes + k / 4] >> (2 * (k % 4))) & 3;
            valid = valid && bits != 3;
            codes[row * columns + k] = static_cast<int8_t>(bits - 1);
        }
    }
    return valid;
}

bool repack_rows(const uint8_t* canonical, size_t columns, size_t first_row, size_t last_row,
                 uint8_t* packed) {
    const size_t from_stride = canonical_row_bytes(columns),
                 to_stride = packed_row_bytes(Packing::TWO_BIT, columns);
    const size_t whole_blocks = columns / TWO_BIT_BLOCK, rest = columns % TWO_BIT_BLOCK;
    uint32_t wrong = 0;
    for (size_t row = first_row; row < last_row; ++row) {
        const uint8_t* from = canonical + row * from_stride;
        uint8_t* to = packed + row * to_stride;
        for (size_t block = 0; block < whole_blocks; ++block)
            wrong |= repack_block(from + block * BLOCK_BYTES, to + block * BLOCK_BYTES);
        if (rest != 0)
            wrong |= repack_last_block(from + whole_blocks * BLOCK_BYTES, rest,
                                       to + whole_blocks * BLOCK_BYTES);
    }
    return wrong == 0;
}

}  // namespace bitllm
