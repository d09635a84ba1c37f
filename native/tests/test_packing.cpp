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

}  // namespace

TEST(packing_and_unpacking_give_the_codes_back) {
    Random random(1);
    for (const size_t k : LENGTHS) {
        const auto codes = random.codes(3 * k);
        const auto packed = canonical_of(codes, 3, k);
        CHECK_WITH(((packed[0] & 3) - 1) == codes[0], "k " << k);
        if (k % 4 != 0) CHECK_WITH((packed.back() >> 6) == 1, "k " << k);  // padding is a zero
        std::vector<int8_t> back(3 * k, 9);
        CHECK(unpack_rows(packed.data(), 3, k, back.data()));
        CHECK_WITH(same_bits(codes, back), "k " << k);
    }
}

TEST(repacking_gives_the_layout_of_the_kernels) {
    Random random(2);
    for (const size_t k : LENGTHS) {
        const size_t rows = 4;
        const auto codes = random.codes(rows * k);
        auto canonical = canonical_of(codes, rows, k);
        if (k % 4 != 0) canonical.back() |= 0xC0;  // whatever stands in the padding is passed over
        std::vector<uint8_t> packed(rows * packed_row_bytes(Packing::TWO_BIT, k), 0);
        CHECK(repack_rows(canonical.data(), k, 0, 1, packed.data()));
        CHECK(repack_rows(canonical.data(), k, 1, rows, packed.data()));
        CHECK_WITH(same_bits(packed, testing::pack_rows(codes, rows, k)), "k " << k);
    }
}

TEST(bits_that_are_no_code_are_found_wherever_they_are) {
    Random random(3);
    for (const size_t k : {1, 4, 7, 255, 256, 257, 640}) {
        const auto good = canonical_of(random.codes(2 * k), 2, k);
        for (size_t i = 0; i < k; ++i) {
            auto bad = good;
            bad[canonical_row_bytes(k) + i / 4] |= static_cast<uint8_t>(3 << (i % 4 * 2));
            std::vector<uint8_t> packed(2 * packed_row_bytes(Packing::TWO_BIT, k));
            std::vector<int8_t> codes(2 * k);
            CHECK_WITH(!repack_rows(bad.data(), k, 0, 2, packed.data()), k << " " << i);
            CHECK_WITH(!unpack_rows(bad.data(), 2, k, codes.data()), k << " " << i);
        }
    }
}

TEST(values_that_are_no_code_are_refused) {
    for (const int8_t wrong : {-128, -2, 2, 127}) {
        const std::vector<int8_t> codes = {0, 1, -1, 0, wrong};
        std::vector<uint8_t> packed(2);
        CHECK_WITH(!bitllm::pack_rows(codes.data(), 1, codes.size(), packed.data()), int{wrong});
    }
}
