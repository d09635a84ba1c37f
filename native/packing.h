// The layouts in which files hold ternary codes, and the way from them to the packings of the
// kernels (kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace bitllm {

// Both layouts hold four codes of 2 bits, as code + 1, in a byte.
//   CANONICAL, that of checkpoint.py: element k of a row is bits 2 * (k % 4) of byte k / 4; rows of
//     ceil(in / 4) bytes, padded with 1.
//   ROW_STRIDED, that of transformers: ceil(out / 4) rows of `in` bytes; bits 2 * i of byte k of
//     row r are element k of the matrix's row r + i * ceil(out / 4).
enum class Layout : uint8_t { CANONICAL, ROW_STRIDED };

constexpr size_t canonical_row_bytes(size_t columns) { return (columns + 3) / 4; }

// A matrix [out, in] as a file holds it.
struct StoredCodes {
    const uint8_t* bytes = nullptr;
    Layout layout = Layout::CANONICAL;
    size_t out = 0;
    size_t in = 0;

    size_t rows() const { return layout == Layout::CANONICAL ? out : (out + 3) / 4; }
    size_t row_bytes() const { return layout == Layout::CANONICAL ? canonical_row_bytes(in) : in; }
};

// What stands in some stored rows.
struct StoredRows {
    bool codes_only = true;  // nowhere the bits 11, which are no code
    bool all_bits_0 = true;  // not one bit is set, as in a hole of a file
};

// Looks through stored rows first .. last - 1, and sets zero[r] to whether row r of the matrix has
// no weight but zeros, for each row in them. Whatever stands in padding is passed over.
StoredRows examine(const StoredCodes& codes, size_t first, size_t last, uint8_t* zero);

// Packs what stored rows first .. last - 1 hold. Row r of the matrix becomes row kept[r] of
// `packed`, and is left out where kept[r + 1] is the same number; with no `kept` it becomes row r.
// The bits 11 give codes that mean nothing.
void pack(const StoredCodes& codes, Packing packing, size_t first, size_t last,
          const uint32_t* kept, uint8_t* packed);

// Codes int8 [rows, columns] to canonical rows; false if a code is not -1, 0 or 1.
bool pack_rows(const int8_t* codes, size_t rows, size_t columns, uint8_t* canonical);

// Canonical rows to codes int8 [rows, columns]; false if two bits are 11.
bool unpack_rows(const uint8_t* canonical, size_t rows, size_t columns, int8_t* codes);

}  // namespace bitllm
