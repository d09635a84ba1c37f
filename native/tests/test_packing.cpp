#include <vector>

#include "../packing.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

std::vector<uint8_t> canonical_of(const std::vector<int8_t>& codes, size_t rows, size_t k) {
    std::vector<uint8_t> packed(rows * canonical_row_bytes(k));
    CHECK(bitllm::pack_rows(codes.data(), rows, k, packed.data()));
    return packed;
}

// Codes in either layout, with `padding` wherever a layout has more room than codes.
std::vector<uint8_t> stored_as(Layout layout, const std::vector<int8_t>& codes, size_t rows,
                               size_t k, unsigned padding) {
    const StoredCodes shape{nullptr, layout, rows, k};
    const size_t stride = shape.rows(), places = 4 * shape.rows() * shape.row_bytes();
    std::vector<uint8_t> bytes(places / 4);
    for (size_t place = 0; place < places; ++place) {
        const size_t byte = place / 4, part = place % 4;
        const size_t row = byte / shape.row_bytes(), column = byte % shape.row_bytes();
        const size_t r = layout == Layout::CANONICAL ? row : row + part * stride;
        const size_t i = layout == Layout::CANONICAL ? 4 * column + part : column;
        const unsigned code =
            r < rows && i < k ? static_cast<unsigned>(codes[r * k + i] + 1) : padding;
        bytes[byte] = static_cast<uint8_t>(bytes[byte] | code << (2 * part));
    }
    return bytes;
}

// Digits of a packed block, by the definition in kernels.h.
unsigned digit_of(Packing packing, unsigned byte, size_t part) {
    if (packing == Packing::TWO_BIT) return (byte >> (2 * part)) & 3;
    for (size_t i = 0; i < part; ++i) byte = 3 * byte & 255;
    return 3 * byte >> 8;
}

std::vector<int8_t> unpacked(Packing packing, const std::vector<uint8_t>& packed, size_t rows,
                             size_t k) {
    const size_t row_bytes = packed_row_bytes(packing, k), weights = block_weights(packing);
    std::vector<int8_t> codes(rows * k);
    for (size_t r = 0; r < rows; ++r) {
        for (size_t i = 0; i < row_blocks(packing, k) * weights; ++i) {
            const size_t byte = i / weights * BLOCK_BYTES + i % BLOCK_BYTES;
            const int code = static_cast<int>(digit_of(packing, packed[r * row_bytes + byte],
                                                       i % weights / BLOCK_BYTES)) -
                             1;
            if (i < k)
                codes[r * k + i] = static_cast<int8_t>(code);
            else
                CHECK_WITH(code == 0, "padding of row " << r << " at " << i);
        }
    }
    return codes;
}

constexpr Layout LAYOUTS[] = {Layout::CANONICAL, Layout::ROW_STRIDED};
constexpr Packing PACKINGS[] = {Packing::TWO_BIT, Packing::BASE3};

}  // namespace

TEST(packing_and_unpacking_give_the_codes_back) {
    Random random(1);
    for (const size_t k : LENGTHS) {
        const auto codes = random.codes(3 * k);
        const auto packed = canonical_of(codes, 3, k);
        CHECK_WITH(same_bits(packed, stored_as(Layout::CANONICAL, codes, 3, k, 1)), "k " << k);
        std::vector<int8_t> back(3 * k, 9);
        CHECK(unpack_rows(packed.data(), 3, k, back.data()));
        CHECK_WITH(same_bits(codes, back), "k " << k);
    }
}

TEST(every_layout_becomes_every_packing) {
    Random random(2);
    for (const Layout layout : LAYOUTS) {
        for (const Packing packing : PACKINGS) {
            for (const size_t k : {1, 4, 7, 63, 64, 65, 255, 256, 257, 319, 320, 321, 640, 2560}) {
                for (const size_t rows : {1, 2, 4, 5, 7, 12}) {
                    const auto codes = random.codes(rows * k);
                    const auto bytes = stored_as(layout, codes, rows, k, 3);
                    const StoredCodes stored{bytes.data(), layout, rows, k};
                    std::vector<uint8_t> packed(rows * packed_row_bytes(packing, k), 0xEE);
                    const size_t middle = stored.rows() / 2;
                    pack(stored, packing, 0, middle, nullptr, packed.data());
                    pack(stored, packing, middle, stored.rows(), nullptr, packed.data());
                    CHECK_WITH(same_bits(unpacked(packing, packed, rows, k), codes),
                               "layout " << int(layout) << " packing " << int(packing) << " k " << k
                                         << " rows " << rows);
                }
            }
        }
    }
}

TEST(five_digits_become_the_smallest_fraction_that_holds_them) {
    for (unsigned value = 0; value < 243; ++value) {
        std::vector<int8_t> codes(320, 0);
        unsigned rest = value;
        for (size_t part = 5; part-- > 0; rest /= 3)
            codes[part * 64] = static_cast<int8_t>(static_cast<int>(rest % 3) - 1);
        const auto bytes = canonical_of(codes, 1, 320);
        std::vector<uint8_t> packed(BLOCK_BYTES);
        pack({bytes.data(), Layout::CANONICAL, 1, 320}, Packing::BASE3, 0, 1, nullptr,
             packed.data());
        CHECK_WITH(packed[0] == (256 * value + 242) / 243, "value " << value);
    }
}

TEST(rows_of_zeros_are_found_and_left_out) {
    Random random(3);
    for (const Layout layout : LAYOUTS) {
        for (const Packing packing : PACKINGS) {
            for (const size_t k : {1, 5, 64, 321}) {
                constexpr size_t ROWS = 11;
                auto codes = random.codes(ROWS * k);
                for (size_t r = 0; r < ROWS; ++r) codes[r * k + k - 1] = r % 2 ? 1 : -1;
                for (const size_t r : {0, 3, 4, 10})
                    std::fill_n(codes.begin() + static_cast<ptrdiff_t>(r * k), k, int8_t{0});
                const auto bytes = stored_as(layout, codes, ROWS, k, 2);
                const StoredCodes stored{bytes.data(), layout, ROWS, k};
                std::vector<uint8_t> zero(ROWS, 9);
                CHECK(examine(stored, 0, 1, zero.data()).codes_only);
                CHECK(!examine(stored, 1, stored.rows(), zero.data()).all_bits_0);
                std::vector<uint32_t> kept = {0};
                std::vector<int8_t> others;
                for (size_t r = 0; r < ROWS; ++r) {
                    const bool empty = r == 0 || r == 3 || r == 4 || r == 10;
                    CHECK_WITH(zero[r] == (empty ? 1 : 0), "k " << k << " row " << r);
                    kept.push_back(kept.back() + (empty ? 0 : 1));
                    if (!empty)
                        others.insert(others.end(), codes.begin() + static_cast<ptrdiff_t>(r * k),
                                      codes.begin() + static_cast<ptrdiff_t>((r + 1) * k));
                }
                std::vector<uint8_t> packed(kept.back() * packed_row_bytes(packing, k));
                pack(stored, packing, 0, stored.rows(), kept.data(), packed.data());
                CHECK_WITH(same_bits(unpacked(packing, packed, kept.back(), k), others), "k " << k);
            }
        }
    }
}

TEST(bits_that_are_no_code_are_found_wherever_they_are) {
    Random random(4);
    constexpr size_t ROWS = 6;
    for (const Layout layout : LAYOUTS) {
        for (const size_t k : {1, 4, 7, 33, 65}) {
            const auto codes = random.codes(ROWS * k);
            for (size_t i = 0; i < ROWS * k; ++i) {
                auto bad = codes;
                bad[i] = 2;  // stored as 3
                const auto bytes = stored_as(layout, bad, ROWS, k, 3);
                const StoredCodes stored{bytes.data(), layout, ROWS, k};
                std::vector<uint8_t> zero(ROWS);
                CHECK_WITH(!examine(stored, 0, stored.rows(), zero.data()).codes_only,
                           "layout " << int(layout) << " k " << k << " at " << i);
            }
            const auto good = stored_as(layout, codes, ROWS, k, 3);
            std::vector<uint8_t> zero(ROWS);
            const StoredCodes stored{good.data(), layout, ROWS, k};
            CHECK_WITH(examine(stored, 0, stored.rows(), zero.data()).codes_only, "k " << k);
        }
    }
    const std::vector<int8_t> wrong = {0, 1, 2, 0};
    std::vector<int8_t> codes(4);
    const auto bytes = stored_as(Layout::CANONICAL, wrong, 1, 4, 1);
    CHECK(!unpack_rows(bytes.data(), 1, 4, codes.data()));
}

TEST(a_hole_is_found) {
    for (const Layout layout : LAYOUTS) {
        std::vector<uint8_t> bytes(64, 0), zero(64);
        const StoredCodes stored{bytes.data(), layout, 16, 16};
        CHECK(examine(stored, 0, stored.rows(), zero.data()).all_bits_0);
        bytes[17] = 1;
        CHECK(!examine(stored, 0, stored.rows(), zero.data()).all_bits_0);
    }
}

TEST(values_that_are_no_code_are_refused) {
    for (const int8_t wrong : {-128, -2, 2, 127}) {
        const std::vector<int8_t> codes = {0, 1, -1, 0, wrong};
        std::vector<uint8_t> packed(2);
        CHECK_WITH(!bitllm::pack_rows(codes.data(), 1, codes.size(), packed.data()), int{wrong});
    }
}
