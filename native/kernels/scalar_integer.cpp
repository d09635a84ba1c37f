// Integer products in plain C++: what the other instruction sets have to match, and what machines
// without a set of their own run.
#include <cstring>

#include "../numerics.h"
#include "kernels.h"

namespace bitllm {
namespace {

template <Packing PACKING>
void unpack_block(const uint8_t* packed, uint8_t* codes) {
    for (size_t b = 0; b < BLOCK_BYTES; ++b) {
        unsigned bits = packed[b];
        for (size_t part = 0; part < block_weights(PACKING) / BLOCK_BYTES; ++part) {
            if constexpr (PACKING == Packing::TWO_BIT) {
                codes[part * BLOCK_BYTES + b] = bits & 3;
                bits >>= 2;
            } else {
                codes[part * BLOCK_BYTES + b] = static_cast<uint8_t>((bits * 3) >> 8);
                bits = (bits * 3) & 255;
            }
        }
    }
}

int32_t dot(const uint8_t* codes, const int8_t* q, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; ++i) sum += codes[i] * q[i];
    return sum;
}

template <Packing PACKING>
void matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
            int32_t* acc) {
    constexpr size_t WEIGHTS = block_weights(PACKING);
    uint8_t codes[WEIGHTS];
    for (size_t r = 0; r < rows; ++r) {
        int32_t sum = 0;
        for (size_t block = 0; block < row_blocks(PACKING, k); ++block, packed += BLOCK_BYTES) {
            unpack_block<PACKING>(packed, codes);
            sum += dot(codes, q + block * WEIGHTS, WEIGHTS);
        }
        acc[r] = sum - q_sum;
    }
}

template <Packing PACKING>
void unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    const size_t blocks = row_blocks(PACKING, k), columns = padded_columns(k);
    for (size_t r = 0; r < rows; ++r, codes += columns) {
        for (size_t block = 0; block < blocks; ++block, packed += BLOCK_BYTES)
            unpack_block<PACKING>(packed, codes + block * block_weights(PACKING));
        std::memset(codes + blocks * block_weights(PACKING), 1,
                    columns - blocks * block_weights(PACKING));
    }
}

void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    for (size_t t = 0; t < tokens; ++t)
        for (size_t r = 0; r < rows; ++r)
            acc[t * acc_stride + r] =
                dot(codes + r * codes_stride, q + t * q_stride, k) - q_sums[t];
}

void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    constexpr size_t STEPS = SCREEN_GROUP / 8, STEP_BYTES = 4 * SCREEN_ROWS;
    for (size_t i = 0; i < row_groups; ++i, approx += SCREEN_ROWS, spread += SCREEN_ROWS) {
        for (size_t r = 0; r < SCREEN_ROWS; ++r) approx[r] = spread[r] = 0.0f;
        for (size_t g = 0; g < groups; ++g, screen += SCREEN_GROUP_BYTES) {
            for (size_t r = 0; r < SCREEN_ROWS; ++r) {
                int32_t high_sum = 0, low_sum = 0;
                for (size_t step = 0; step < STEPS; ++step) {
                    for (size_t j = 0; j < 4; ++j) {
                        const int byte = screen[step * STEP_BYTES + 4 * r + j];
                        const size_t column = g * SCREEN_GROUP + 8 * step + j;
                        high_sum += (byte & 15) * high[column] + (byte >> 4) * high[column + 4];
                        low_sum += (byte & 15) * low[column] + (byte >> 4) * low[column + 4];
                    }
                }
                uint16_t bits;
                std::memcpy(&bits, screen + STEPS * STEP_BYTES + 2 * r, sizeof bits);
                const float scale = f32_from_bf16(bits);
                const int32_t exact = (256 * high_sum + low_sum) - offsets[g];
                approx[r] += scale * static_cast<float>(exact);
                spread[r] += (scale * scale) * squares[g];
            }
        }
    }
}

// What the compiler makes of dot() is the densest loop there is in plain C++, over vectors that
// stay in the cache.
int64_t peak(size_t iterations) {
    constexpr size_t WIDTH = 1024;
    uint8_t codes[WIDTH + 16];
    int8_t q[WIDTH];
    for (size_t i = 0; i < WIDTH + 16; ++i) codes[i] = static_cast<uint8_t>(i % 3);
    for (size_t i = 0; i < WIDTH; ++i) q[i] = static_cast<int8_t>(i % 251);
    size_t sum = 0;
    for (size_t i = 0; i < iterations; ++i)
        sum += static_cast<size_t>(dot(codes + sum % 16, q, WIDTH));
    volatile size_t sink = sum;  // has to be computed
    (void)sink;
    return static_cast<int64_t>(iterations * WIDTH);
}

}  // namespace

const IntegerKernels scalar_integer_kernels = {
    .packed = {{.matvec = matvec<Packing::TWO_BIT>, .unpack = unpack<Packing::TWO_BIT>},
               {.matvec = matvec<Packing::BASE3>, .unpack = unpack<Packing::BASE3>}},
    .codes_matmul = codes_matmul,
    .screen_rows = screen_rows,
    .peak = peak,
};

}  // namespace bitllm
