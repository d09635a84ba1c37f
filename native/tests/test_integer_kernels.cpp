// The integer kernels of every set that runs here against plain loops over the numbers: products
// are compared with ==.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "../numerics.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

constexpr Packing PACKINGS[] = {Packing::TWO_BIT, Packing::BASE3};
// Beyond it int32 sums are no longer exact as float32.
constexpr size_t LARGEST_K = 132096;

// Values around an output, which no kernel may touch.
constexpr size_t GUARD = 40;

template <class T>
std::vector<T> guarded(size_t count) {
    return std::vector<T>(count + GUARD, T{77});
}

// Rows of `count` values, `stride` apart, in guards.
template <class T>
std::vector<T> guarded_rows(const std::vector<T>& rows, size_t count, size_t stride) {
    std::vector<T> all = guarded<T>(rows.size() / count * stride);
    for (size_t i = 0; i < rows.size(); ++i) all[i / count * stride + i % count] = rows[i];
    return all;
}

// The same values behind one more, so that they are aligned to nothing.
template <class T>
std::vector<T> shifted(const std::vector<T>& values) {
    std::vector<T> moved(values.size() + 1);
    std::copy(values.begin(), values.end(), moved.begin() + 1);
    return moved;
}

// Calls check(kernels, label) for each set.
template <class Check>
void on_each(Check check) {
    for (const Variant& variant : variants()) check(*variant.kernels->integer, variant.label);
}

// Lengths around what kernels sum in int16 before they widen, besides LENGTHS.
std::vector<size_t> lengths() {
    std::vector<size_t> all = LENGTHS;
    for (const size_t k : {319, 320, 321, 1023, 1024, 1025, 1919, 1920, 1921, 2047, 2048, 2049})
        all.push_back(k);
    return all;
}

// Sums over columns of code * q, [tokens][rows].
std::vector<int32_t> products(const std::vector<int8_t>& codes, size_t rows, size_t k,
                              const std::vector<int8_t>& q, size_t tokens) {
    const size_t q_stride = q.size() / tokens;
    std::vector<int32_t> sums(tokens * rows);
    for (size_t t = 0; t < tokens; ++t)
        for (size_t r = 0; r < rows; ++r)
            for (size_t i = 0; i < k; ++i)
                sums[t * rows + r] += codes[r * k + i] * q[t * q_stride + i];
    return sums;
}

void check_matvec(const std::vector<int8_t>& codes, size_t rows, size_t k,
                  const std::vector<int8_t>& q) {
    std::vector<int32_t> expected = products(codes, rows, k, q, 1);
    expected.resize(rows + GUARD, 77);
    const std::vector<int8_t> moved_q = shifted(q);
    for (const Packing packing : PACKINGS) {
        const std::vector<uint8_t> packed = shifted(pack_rows(codes, rows, k, packing));
        on_each([&](const IntegerKernels& kernels, const std::string& label) {
            std::vector<int32_t> acc = guarded<int32_t>(rows);
            kernels.packed[static_cast<size_t>(packing)].matvec(
                packed.data() + 1, rows, k, moved_q.data() + 1, row_sums(q, 1)[0], acc.data());
            CHECK_WITH(same_bits(acc, expected),
                       label << " packing " << int(packing) << " rows " << rows << " k " << k);
        });
    }
}

// For the sets that multiply packed rows with some tokens.
void check_packed_matmul(const std::vector<int8_t>& codes, size_t rows, size_t k,
                         const std::vector<int8_t>& q, size_t tokens) {
    const size_t acc_stride = rows + 3;
    const std::vector<int32_t> sums = row_sums(q, tokens);
    const std::vector<int32_t> expected =
        guarded_rows(products(codes, rows, k, q, tokens), rows, acc_stride);
    for (const Packing packing : PACKINGS) {
        const std::vector<uint8_t> packed = shifted(pack_rows(codes, rows, k, packing));
        on_each([&](const IntegerKernels& kernels, const std::string& label) {
            const PackedKernels& own = kernels.packed[static_cast<size_t>(packing)];
            CHECK_WITH((own.matmul != nullptr) == (own.few_tokens > 0), label);
            if (!own.matmul) return;
            std::vector<int32_t> acc = guarded<int32_t>(tokens * acc_stride);
            own.matmul(packed.data() + 1, rows, k, q.data(), sums.data(), tokens, acc.data(),
                       acc_stride);
            CHECK_WITH(same_bits(acc, expected), label << " packing " << int(packing) << " rows "
                                                       << rows << " k " << k << " tokens "
                                                       << tokens);
        });
    }
}

// Codes of rows padded with zero weights, as code + 1.
std::vector<uint8_t> unpacked(const std::vector<int8_t>& codes, size_t rows, size_t k,
                              size_t stride) {
    std::vector<uint8_t> all(rows * stride, 1);
    for (size_t i = 0; i < codes.size(); ++i)
        all[i / k * stride + i % k] = static_cast<uint8_t>(codes[i] + 1);
    return all;
}

void check_matmul(const std::vector<int8_t>& codes, size_t rows, size_t k,
                  const std::vector<int8_t>& q, size_t tokens) {
    const size_t codes_stride = k + 45, q_stride = k + 77, acc_stride = rows + 3;
    const std::vector<uint8_t> rows_u8 = unpacked(codes, rows, k, codes_stride);
    const std::vector<int8_t> rows_q = guarded_rows(q, k, q_stride);
    const std::vector<int32_t> sums = row_sums(q, tokens);
    const std::vector<int32_t> expected =
        guarded_rows(products(codes, rows, k, q, tokens), rows, acc_stride);
    on_each([&](const IntegerKernels& kernels, const std::string& label) {
        std::vector<int32_t> acc = guarded<int32_t>(tokens * acc_stride);
        kernels.codes_matmul(rows_u8.data(), codes_stride, rows, k, rows_q.data(), q_stride,
                             sums.data(), tokens, acc.data(), acc_stride);
        CHECK_WITH(same_bits(acc, expected),
                   label << " rows " << rows << " k " << k << " tokens " << tokens);
    });
}

// A screened matrix as kernels.h says, and its numbers beside it.
struct Screen {
    size_t row_groups, groups;
    std::vector<uint8_t> bytes;
    std::vector<int> u;         // [rows][columns], code + 8
    std::vector<float> scales;  // [rows][groups]

    Screen(size_t row_groups, size_t groups, auto number)
        : row_groups(row_groups),
          groups(groups),
          bytes(row_groups * groups * SCREEN_GROUP_BYTES),
          u(row_groups * SCREEN_ROWS * groups * SCREEN_GROUP),
          scales(row_groups * SCREEN_ROWS * groups) {
        for (size_t row = 0; row < row_groups * SCREEN_ROWS; ++row) {
            for (size_t column = 0; column < groups * SCREEN_GROUP; ++column) {
                const int code = number(1, 15);
                u[row * groups * SCREEN_GROUP + column] = code;
                const size_t step = column % SCREEN_GROUP / 8, j = column % 4;
                uint8_t& byte = group(row, column / SCREEN_GROUP)[64 * step + 4 * (row % 16) + j];
                byte = static_cast<uint8_t>(byte | code << (column % 8 < 4 ? 0 : 4));
            }
            for (size_t g = 0; g < groups; ++g) {
                const uint16_t bits = bf16_from_f32(static_cast<float>(number(0, 999)) * 0.01f);
                std::memcpy(group(row, g) + 512 + 2 * (row % 16), &bits, 2);
                scales[row * groups + g] = f32_from_bf16(bits);
            }
        }
    }

    uint8_t* group(size_t row, size_t g) {
        return bytes.data() + (row / SCREEN_ROWS * groups + g) * SCREEN_GROUP_BYTES;
    }
};

void check_screen(const Screen& screen, const std::vector<int8_t>& high,
                  const std::vector<int8_t>& low, Random& random) {
    const size_t groups = screen.groups, rows = screen.row_groups * SCREEN_ROWS;
    std::vector<int32_t> offsets(groups);
    std::vector<float> squares(groups);
    for (size_t g = 0; g < groups; ++g) {
        offsets[g] = random.integer(-1000000, 1000000);
        squares[g] = static_cast<float>(random.integer(0, 1000000)) * 0.37f;
    }
    std::vector<float> approx(rows, 0.0f), spread(rows, 0.0f);
    for (size_t row = 0; row < rows; ++row) {
        for (size_t g = 0; g < groups; ++g) {
            int64_t exact = -int64_t{offsets[g]};
            for (size_t i = g * SCREEN_GROUP; i < (g + 1) * SCREEN_GROUP; ++i)
                exact += screen.u[row * groups * SCREEN_GROUP + i] * (256 * high[i] + low[i]);
            const float scale = screen.scales[row * groups + g];
            approx[row] = approx[row] + scale * static_cast<float>(exact);
            spread[row] = spread[row] + (scale * scale) * squares[g];
        }
    }
    approx.resize(rows + GUARD, 77.0f);
    spread.resize(rows + GUARD, 77.0f);
    const std::vector<uint8_t> bytes = shifted(screen.bytes);
    const std::vector<int8_t> moved_high = shifted(high), moved_low = shifted(low);
    on_each([&](const IntegerKernels& kernels, const std::string& label) {
        std::vector<float> a = guarded<float>(rows), s = guarded<float>(rows);
        kernels.screen_rows(bytes.data() + 1, screen.row_groups, groups, moved_high.data() + 1,
                            moved_low.data() + 1, offsets.data(), squares.data(), a.data(),
                            s.data());
        CHECK_WITH(same_bits(a, approx), label << " rows " << rows << " groups " << groups);
        CHECK_WITH(same_bits(s, spread), label << " rows " << rows << " groups " << groups);
    });
}

}  // namespace

TEST(matvec_is_exact) {
    Random random(31);
    for (const size_t k : lengths())
        for (const size_t rows : {1, 2, 3, 4, 5, 7, 8, 9})
            check_matvec(random.codes(rows * k), rows, k, random.activations(1, k));
}

TEST(unpack_gives_the_codes_and_pads_with_ones) {
    Random random(32);
    for (const size_t k : lengths()) {
        for (const size_t rows : {1, 3}) {
            const std::vector<int8_t> codes = random.codes(rows * k);
            std::vector<uint8_t> expected = unpacked(codes, rows, k, padded_columns(k));
            expected.resize(expected.size() + GUARD, 77);
            for (const Packing packing : PACKINGS) {
                const std::vector<uint8_t> packed = shifted(pack_rows(codes, rows, k, packing));
                on_each([&](const IntegerKernels& kernels, const std::string& label) {
                    std::vector<uint8_t> out = guarded<uint8_t>(rows * padded_columns(k));
                    kernels.packed[static_cast<size_t>(packing)].unpack(packed.data() + 1, rows, k,
                                                                        out.data());
                    CHECK_WITH(same_bits(out, expected),
                               label << " packing " << int(packing) << " k " << k);
                });
            }
        }
    }
}

// Each of them in each byte of a block.
TEST(base3_unpacks_all_243_bytes) {
    for (unsigned v = 0; v < 243; ++v) {
        const std::vector<uint8_t> packed(BLOCK_BYTES, static_cast<uint8_t>((256 * v + 242) / 243));
        std::vector<uint8_t> expected;
        for (const unsigned power : {81, 27, 9, 3, 1})
            expected.insert(expected.end(), BLOCK_BYTES, static_cast<uint8_t>(v / power % 3));
        on_each([&](const IntegerKernels& kernels, const std::string& label) {
            std::vector<uint8_t> codes(padded_columns(320));
            kernels.packed[1].unpack(packed.data(), 1, 320, codes.data());
            codes.resize(320);
            CHECK_WITH(same_bits(codes, expected), label << " value " << v);
        });
    }
}

TEST(matvec_does_not_overflow) {
    constexpr size_t ROWS = 5;
    for (const size_t k : {size_t{512}, size_t{2048}, size_t{7680}, LARGEST_K}) {
        for (const int weight : {-1, 1}) {
            for (const int extreme : {-128, 127}) {
                std::vector<int8_t> codes(ROWS * k, static_cast<int8_t>(weight));
                std::fill_n(codes.begin(), k / 2, int8_t{0});  // of one row
                std::vector<int8_t> q(padded_columns(k));
                std::fill_n(q.begin(), k, static_cast<int8_t>(extreme));
                check_matvec(codes, ROWS, k, q);
            }
        }
    }
}

TEST(matmul_of_packed_rows_is_exact) {
    Random random(36);
    for (size_t tokens = 1; tokens <= 17; ++tokens)
        for (const size_t k : {1, 257, 320, 2049})
            check_packed_matmul(random.codes(3 * k), 3, k, random.activations(tokens, k), tokens);
    for (const size_t k : lengths())
        check_packed_matmul(random.codes(2 * k), 2, k, random.activations(5, k), 5);
}

TEST(matmul_of_packed_rows_does_not_overflow) {
    constexpr size_t ROWS = 2, TOKENS = 9;
    for (const size_t k : {size_t{1920}, size_t{2048}, LARGEST_K}) {
        for (const int weight : {-1, 1}) {
            for (const int extreme : {-128, 127}) {
                std::vector<int8_t> q(TOKENS * padded_columns(k));
                for (size_t t = 0; t < TOKENS; ++t)
                    std::fill_n(q.begin() + static_cast<ptrdiff_t>(t * padded_columns(k)), k,
                                static_cast<int8_t>(extreme));
                check_packed_matmul(std::vector<int8_t>(ROWS * k, static_cast<int8_t>(weight)),
                                    ROWS, k, q, TOKENS);
            }
        }
    }
}

TEST(matmul_is_exact) {
    Random random(33);
    const auto check = [&](size_t rows, size_t k, size_t tokens) {
        std::vector<int8_t> q(tokens * k);
        for (int8_t& value : q) value = static_cast<int8_t>(random.integer(-128, 127));
        check_matmul(random.codes(rows * k), rows, k, q, tokens);
    };
    for (size_t rows = 1; rows <= 9; ++rows)
        for (size_t tokens = 1; tokens <= 17; ++tokens) check(rows, 96, tokens);
    for (const size_t k : {32, 64, 2016, 2048, 2080, 2560, 4096, 4128})
        for (const size_t tokens : {1, 2, 3, 4, 5, 64}) check(5, k, tokens);
}

TEST(matmul_does_not_overflow) {
    constexpr size_t ROWS = 3, TOKENS = 5;
    for (const size_t k : {size_t{2048}, size_t{4096}, LARGEST_K})
        for (const int weight : {-1, 1})
            for (const int extreme : {-128, 127})
                check_matmul(std::vector<int8_t>(ROWS * k, static_cast<int8_t>(weight)), ROWS, k,
                             std::vector<int8_t>(TOKENS * k, static_cast<int8_t>(extreme)), TOKENS);
}

TEST(screening_follows_its_formula) {
    Random random(34);
    for (const size_t groups : {1, 2, 3, 40}) {
        for (const size_t row_groups : {1, 2, 3}) {
            const Screen screen(row_groups, groups,
                                [&](int low, int high) { return random.integer(low, high); });
            std::vector<int8_t> high(groups * SCREEN_GROUP), low(high.size());
            for (int8_t& value : high) value = static_cast<int8_t>(random.integer(-128, 127));
            for (int8_t& value : low) value = static_cast<int8_t>(random.integer(-128, 127));
            check_screen(screen, high, low, random);
        }
    }
}

TEST(screening_does_not_overflow) {
    Random random(35);
    const Screen screen(1, 5, [](int, int high) { return high; });
    for (const int8_t extreme : {int8_t{-128}, int8_t{127}}) {
        const std::vector<int8_t> all(screen.groups * SCREEN_GROUP, extreme);
        check_screen(screen, all, all, random);
    }
}
