// Single products of a prepared matrix against sums of products, one by one.
#include <stdexcept>
#include <vector>

#include "../prepared_matrix.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

TEST(prepared_products_are_exact_in_every_set) {
    Random random(31);
    for (const size_t in : {1, 5, 256, 321, 700}) {
        for (const size_t out : {1, 31, 65}) {
            const auto codes = random.codes(out * in);
            std::vector<uint8_t> canonical(out * canonical_row_bytes(in));
            CHECK(pack_rows(codes.data(), out, in, canonical.data()));
            for (const size_t tokens : {0, 1, 2, 16, 40}) {
                std::vector<int8_t> q(tokens * in + 1);
                for (int8_t& value : q) value = static_cast<int8_t>(random.integer(-128, 127));
                std::vector<int32_t> expected(tokens * out + 1, 77);  // one behind the end
                for (size_t t = 0; t < tokens; ++t)
                    for (size_t r = 0; r < out; ++r) {
                        int32_t sum = 0;
                        for (size_t i = 0; i < in; ++i) sum += codes[r * in + i] * q[t * in + i];
                        expected[t * out + r] = sum;
                    }
                for (const Packing packing : {Packing::TWO_BIT, Packing::BASE3}) {
                    const PreparedMatrix matrix({canonical.data(), Layout::CANONICAL, out, in},
                                                packing);
                    CHECK(matrix.bytes() == out * packed_row_bytes(packing, in));
                    for (const auto& [label, kernels] : variants()) {
                        std::vector<int32_t> found(tokens * out + 1, 77);
                        matrix.multiply(*kernels->integer, q.data(), tokens, found.data());
                        CHECK_WITH(same_bits(found, expected),
                                   label << " in " << in << " out " << out << " tokens " << tokens);
                    }
                }
            }
        }
    }
}

TEST(what_is_no_matrix_is_not_prepared) {
    const std::vector<uint8_t> wrong(8, 0xFF);
    const auto prepare = [&](size_t in) {
        PreparedMatrix({wrong.data(), Layout::CANONICAL, 1, in}, Packing::TWO_BIT);
    };
    CHECK(throws<std::domain_error>([&] { prepare(9); }));
    CHECK(throws<std::invalid_argument>([&] { prepare(0); }));
    CHECK(throws<std::invalid_argument>([&] { prepare(size_t{1} << 20); }));
}
