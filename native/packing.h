// The canonical packing of checkpoint.py (element k of a row is bits 2 * (k % 4) of byte k / 4, as
// code + 1, rows of ceil(columns / 4) bytes, padded with 1) and the way from it to the packing of
// the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bitllm {

constexpr size_t canonical_row_bytes(size_t columns) { return (columns + 3) / 4; }

// Codes int8 [rows, columns] to canonical rows; false if a code is not -1, 0 or 1.
bool pack_rows(const int8_t* codes, size_t rows, size_t columns, uint8_t* canonical);

// Canonical rows to codes int8 [rows, columns]; false if two bits are 11.
bool unpack_rows(const uint8_t* canonical, size_t rows, size_t columns, int8_t* codes);

// Rows first_row .. last_row - 1 of a canonical matrix to the same rows of one in the packing of
// kernels.h; false if two bits are 11. Both pointers are those of row 0.
bool repack_rows(const uint8_t* canonical, size_t columns, size_t first_row, size_t last_row,
                 uint8_t* packed);

}  // namespace bitllm
