#include "packing.h"

#include <cstring>

namespace bitllm {
namespace {

constexpr uint8_t FOUR_ZERO_WEIGHTS = 0x55;

// Of some bytes: what differs from zero weights, wherever two bits are 11, and all bits that are
// set.
struct Bits {
    uint8_t not_zero = 0;
    uint8_t wrong = 0;
    uint8_t set = 0;

    void add(uint8_t byte) {
        not_zero = static_cast<uint8_t>(not_zero | (byte ^ FOUR_ZERO_WEIGHTS));
        wrong = static_cast<uint8_t>(wrong | (byte & (byte >> 1) & 0x55));
        set = static_cast<uint8_t>(set | byte);
    }
};

Bits bits_of(const uint8_t* bytes, size_t count) {
    Bits bits;
    for (size_t i = 0; i < count; ++i) bits.add(bytes[i]);
    return bits;
}

// The last byte of a canonical row, with zeros for what is behind the row's end.
uint8_t without_padding(uint8_t byte, size_t columns) {
    const unsigned used = columns % 4 == 0 ? 0xFFu : (1u << (2 * (columns % 4))) - 1;
    return static_cast<uint8_t>((byte & used) | (FOUR_ZERO_WEIGHTS & ~used));
}

// Bytes of a packed block from the codes at bits SHIFT of some bytes: byte b from those of bytes b,
// b + LANES, b + 2 * LANES, ...
template <Packing PACKING, unsigned SHIFT, size_t LANES>
void pack_lanes(const uint8_t* bytes, uint8_t* packed) {
    for (size_t b = 0; b < LANES; ++b) {
        const auto code = [&](size_t part) {
            return static_cast<uint8_t>((bytes[part * LANES + b] >> SHIFT) & 3);
        };
        if constexpr (PACKING == Packing::TWO_BIT) {
            packed[b] = static_cast<uint8_t>(code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6);
        } else {
            uint8_t value = code(0);
            for (size_t part = 1; part < 5; ++part)
                value = static_cast<uint8_t>(3 * value + code(part));
            // ceil(256 v / 243) = v + ceil(13 v / 243), the latter in 16 bits for v of 0 .. 242:
            const auto scaled = static_cast<uint16_t>(128 * value + 2390);
            const auto quotient = static_cast<uint16_t>((uint32_t{scaled} * 3506) >> 16);
            packed[b] = static_cast<uint8_t>(value + (quotient >> 7));
        }
    }
}

// A row in canonical bytes: bits 2 * j of its bytes give bytes j, j + 4, j + 8, ... of a block.
template <Packing PACKING>
void pack_canonical(const StoredCodes& codes, size_t row, uint8_t* packed) {
    constexpr size_t BYTES = block_weights(PACKING) / 4, LANES = BLOCK_BYTES / 4;
    const size_t row_bytes = codes.row_bytes();
    const uint8_t* stored = codes.bytes + row * row_bytes;
    for (size_t begin = 0; begin < row_bytes; begin += BYTES, packed += BLOCK_BYTES) {
        const uint8_t* block = stored + begin;
        uint8_t padded[BYTES];
        if (codes.in < 4 * (begin + BYTES)) {
            const size_t rest = row_bytes - begin;
            std::memset(padded, FOUR_ZERO_WEIGHTS, BYTES);
            std::memcpy(padded, block, rest);
            padded[rest - 1] = without_padding(padded[rest - 1], codes.in);
            block = padded;
        }
        uint8_t parts[4][LANES];
        pack_lanes<PACKING, 0, LANES>(block, parts[0]);
        pack_lanes<PACKING, 2, LANES>(block, parts[1]);
        pack_lanes<PACKING, 4, LANES>(block, parts[2]);
        pack_lanes<PACKING, 6, LANES>(block, parts[3]);
        for (size_t i = 0; i < LANES; ++i)
            for (size_t j = 0; j < 4; ++j) packed[4 * i + j] = parts[j][i];
    }
}

// One of the four rows that share the bytes of a stored row.
template <Packing PACKING, unsigned SHIFT>
void pack_strided(const uint8_t* stored, size_t columns, uint8_t* packed) {
    constexpr size_t WEIGHTS = block_weights(PACKING);
    for (size_t begin = 0; begin < columns; begin += WEIGHTS, packed += BLOCK_BYTES) {
        const uint8_t* block = stored + begin;
        uint8_t padded[WEIGHTS];
        if (columns < begin + WEIGHTS) {
            std::memset(padded, FOUR_ZERO_WEIGHTS, WEIGHTS);
            std::memcpy(padded, block, columns - begin);
            block = padded;
        }
        pack_lanes<PACKING, SHIFT, BLOCK_BYTES>(block, packed);
    }
}

template <Packing PACKING>
void pack_stored_row(const StoredCodes& codes, size_t stored, const uint32_t* kept,
                     uint8_t* packed) {
    const size_t row_bytes = packed_row_bytes(PACKING, codes.in);
    const auto place = [&](size_t row) -> uint8_t* {
        if (row >= codes.out || (kept && kept[row] == kept[row + 1])) return nullptr;
        return packed + (kept ? kept[row] : row) * row_bytes;
    };
    if (codes.layout == Layout::CANONICAL) {
        if (uint8_t* to = place(stored)) pack_canonical<PACKING>(codes, stored, to);
        return;
    }
    const uint8_t* from = codes.bytes + stored * codes.in;
    const size_t stride = codes.rows();
    if (uint8_t* to = place(stored)) pack_strided<PACKING, 0>(from, codes.in, to);
    if (uint8_t* to = place(stored + stride)) pack_strided<PACKING, 2>(from, codes.in, to);
    if (uint8_t* to = place(stored + 2 * stride)) pack_strided<PACKING, 4>(from, codes.in, to);
    if (uint8_t* to = place(stored + 3 * stride)) pack_strided<PACKING, 6>(from, codes.in, to);
}

}  // namespace

StoredRows examine(const StoredCodes& codes, size_t first, size_t last, uint8_t* zero) {
    const size_t row_bytes = codes.row_bytes(), stride = codes.rows();
    uint8_t wrong = 0, set = 0;
    for (size_t row = first; row < last; ++row) {
        const uint8_t* bytes = codes.bytes + row * row_bytes;
        if (codes.layout == Layout::CANONICAL) {
            Bits bits = bits_of(bytes, row_bytes - 1);
            bits.add(without_padding(bytes[row_bytes - 1], codes.in));
            wrong |= bits.wrong;
            set |= bits.set;
            zero[row] = bits.not_zero == 0;
            continue;
        }
        const Bits bits = bits_of(bytes, row_bytes);
        set |= bits.set;
        for (size_t i = 0; i < 4 && row + i * stride < codes.out; ++i) {
            const auto own = static_cast<uint8_t>(3u << (2 * i));
            wrong |= bits.wrong & own;
            zero[row + i * stride] = (bits.not_zero & own) == 0;
        }
    }
    return {.codes_only = wrong == 0, .all_bits_0 = set == 0};
}

void pack(const StoredCodes& codes, Packing packing, size_t first, size_t last,
          const uint32_t* kept, uint8_t* packed) {
    for (size_t row = first; row < last; ++row) {
        if (packing == Packing::TWO_BIT)
            pack_stored_row<Packing::TWO_BIT>(codes, row, kept, packed);
        else
            pack_stored_row<Packing::BASE3>(codes, row, kept, packed);
    }
}

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

}  // namespace bitllm
