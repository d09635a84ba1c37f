// The integer kernels of the x86 sets that have VNNI, for registers of 64 or of 32 bytes. A kernel
// file describes its registers by a class `V` and includes this behind its target pragma: the same
// text is then compiled for its instructions.
//
// VNNI's dpbusd multiplies unsigned bytes with signed ones and adds groups of four to int32,
// without an int16 step that could overflow.
#pragma once

namespace bitllm {
namespace {

// Before a loop over registers of an array: GCC 12 keeps them in memory unless such loops are
// unrolled early. Emulated instructions are too long for that.
#if defined(BITLLM_EMULATE_AVX512)
#define BITLLM_UNROLL
#elif defined(__clang__)
#define BITLLM_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define BITLLM_UNROLL _Pragma("GCC unroll 8")
#else
#define BITLLM_UNROLL
#endif

constexpr size_t ROWS_OF_TILE = 4;

// Says, by assembly that is empty, that a value is in a register, and stays in this one.
template <class Integers>
inline void keep_in_register(Integers& value) {
#if defined(__GNUC__) && !defined(BITLLM_EMULATE_AVX512)
    __asm__("" : "+v"(value));
#else
    (void)value;
#endif
}

// sum plus the sums of groups of four products u * i. GCC 12 would copy the sum to and fro.
template <class V>
inline void add_products(typename V::Integers& sum_i32, typename V::Integers u8,
                         typename V::Integers i8) {
    sum_i32 = V::add_products(sum_i32, u8, i8);
    keep_in_register(sum_i32);
}

// acc[r] = the sum over the lanes of sums[r], less q_sum.
template <class V, size_t ROWS>
inline void store_sums(const typename V::Integers (&sums)[ROWS], int32_t q_sum, int32_t* acc) {
    static_assert(ROWS == ROWS_OF_TILE || ROWS == 1);
    if constexpr (ROWS == 1) {
        *acc = V::sum_i32(sums[0]) - q_sum;
    } else {
        const __m128i sum_i32x4 = V::sum_lanes(sums[0], sums[1], sums[2], sums[3]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(acc),
                         _mm_sub_epi32(sum_i32x4, _mm_set1_epi32(q_sum)));
    }
}

// Four weights in 2 bits
// ----------------------
// Shifts of bytes are words that are shifted and masked. A code that is masked where it is, in bits
// 2 and 3, counts four times; so one shift is enough for four codes, and the sums of fourfold codes
// are kept apart and divided at the end, exactly. A lane gets less than 2^14 from each block.
struct TwoBit {
    static constexpr Packing PACKING = Packing::TWO_BIT;
    static constexpr size_t DIGITS = 4;

    template <class V, size_t ROWS>
    static void sum(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                    typename V::Integers (&sums)[ROWS]) {
        using Integers = typename V::Integers;
        const Integers bits01 = V::all_i8(3), bits23 = V::all_i8(12);
        Integers fourfold[ROWS];
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[r] = fourfold[r] = V::all_i32(0);
        const uintptr_t ahead = tiles_ahead(ROWS * stride);
        for (size_t block = 0; block < blocks; ++block, q += block_weights(PACKING)) {
            for (size_t part = 0; part < BLOCK_BYTES; part += V::BYTES) {
                const Integers q0 = V::load(q + part), q1 = V::load(q + BLOCK_BYTES + part);
                const Integers q2 = V::load(q + 2 * BLOCK_BYTES + part);
                const Integers q3 = V::load(q + 3 * BLOCK_BYTES + part);
                BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
                    const uint8_t* at = packed + r * stride + block * BLOCK_BYTES + part;
                    if (part == 0) prefetch(packed + (block * ROWS + r) * BLOCK_BYTES, ahead);
                    const Integers lower = V::load(at), upper = V::template words_right<4>(lower);
                    add_products<V>(sums[r], V::bits_of_both(lower, bits01), q0);
                    add_products<V>(fourfold[r], V::bits_of_both(lower, bits23), q1);
                    add_products<V>(sums[r], V::bits_of_both(upper, bits01), q2);
                    add_products<V>(fourfold[r], V::bits_of_both(upper, bits23), q3);
                }
            }
        }
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
            sums[r] = V::add_i32(sums[r], V::template right<2>(fourfold[r]));
        }
    }

    // Takes the first digit of each byte off `bytes`, as a code.
    template <class V>
    static typename V::Integers next_code(typename V::Integers& bytes) {
        const typename V::Integers code = V::bits_of_both(bytes, V::all_i8(3));
        bytes = V::template words_right<2>(bytes);  // what a neighbour leaves here, the mask drops
        return code;
    }
};

// Five weights in 8 bits
// ----------------------
// A byte v is a fraction of 256. Its first digit is d = (3 v - v') / 256, where v' = 3 v mod 256
// holds the digits behind it. So a product needs no digit: with sums of v q and of v' q over all of
// them, sum(d q) = (3 sum(v q) - sum(v' q)) / 256, exactly. A lane gets at most 5 * 8 * 255 * 128
// from a block of 320 weights in registers of 32 bytes, and k <= 2^24 / 127 has 413 blocks: 3 sum(v
// q) may leave int32, but wraps; the difference is 256 sum(d q), of at most 5 * 8 * 2 * 128 * 413 *
// 256 = 1.1e9.
struct Base3 {
    static constexpr Packing PACKING = Packing::BASE3;
    static constexpr size_t DIGITS = 5;

    template <class V>
    static typename V::Integers tripled(typename V::Integers v) {
        return V::add_i8(V::add_i8(v, v), v);
    }

    template <class V, size_t ROWS>
    static void sum(const uint8_t* packed, size_t stride, size_t blocks, const int8_t* q,
                    typename V::Integers (&sums)[ROWS]) {
        using Integers = typename V::Integers;
        Integers next_sums[ROWS];
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[r] = next_sums[r] = V::all_i32(0);
        const uintptr_t ahead = tiles_ahead(ROWS * stride);
        for (size_t block = 0; block < blocks; ++block, q += block_weights(PACKING)) {
            for (size_t part = 0; part < BLOCK_BYTES; part += V::BYTES) {
                BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
                    const uint8_t* at = packed + r * stride + block * BLOCK_BYTES + part;
                    if (part == 0) prefetch(packed + (block * ROWS + r) * BLOCK_BYTES, ahead);
                    Integers v = V::load(at);
                    BITLLM_UNROLL for (size_t d = 0; d < DIGITS; ++d) {
                        const Integers q_i8 = V::load(q + d * BLOCK_BYTES + part);
                        add_products<V>(sums[r], v, q_i8);
                        v = tripled<V>(v);
                        add_products<V>(next_sums[r], v, q_i8);
                    }
                }
            }
        }
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
            const Integers thrice = V::add_i32(V::template left<1>(sums[r]), sums[r]);
            sums[r] = V::template right<8>(V::subtract_i32(thrice, next_sums[r]));
        }
    }

    template <class V>
    static typename V::Integers next_code(typename V::Integers& bytes) {
        const typename V::Integers code = V::first_digit(bytes);
        bytes = tripled<V>(bytes);
        return code;
    }
};

template <class V, class Packed>
void matvec(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, int32_t q_sum,
            int32_t* acc) {
    const size_t blocks = row_blocks(Packed::PACKING, k), stride = blocks * BLOCK_BYTES;
    const auto tile = [&]<size_t ROWS>(size_t r) {
        typename V::Integers sums[ROWS];
        Packed::template sum<V>(packed + r * stride, stride, blocks, q, sums);
        store_sums<V>(sums, q_sum, acc + r);
    };
    size_t r = 0;
    for (; r + ROWS_OF_TILE <= rows; r += ROWS_OF_TILE) tile.template operator()<ROWS_OF_TILE>(r);
    for (; r < rows; ++r) tile.template operator()<1>(r);
}

template <class V, class Packed>
void unpack(const uint8_t* packed, size_t rows, size_t k, uint8_t* codes) {
    const size_t blocks = row_blocks(Packed::PACKING, k);
    const size_t whole = blocks * block_weights(Packed::PACKING), columns = padded_columns(k);
    for (size_t r = 0; r < rows; ++r, codes += columns) {
        uint8_t* at = codes;
        for (size_t block = 0; block < blocks; ++block, packed += BLOCK_BYTES) {
            for (size_t part = 0; part < BLOCK_BYTES; part += V::BYTES) {
                typename V::Integers bytes = V::load(packed + part);
                for (size_t d = 0; d < Packed::DIGITS; ++d)
                    V::store(at + d * BLOCK_BYTES + part, Packed::template next_code<V>(bytes));
            }
            at += block_weights(Packed::PACKING);
        }
        std::memset(codes + whole, 1, columns - whole);
    }
}

// Few tokens
// ----------
// Rows are unpacked in registers, a digit of each byte at a time, and used for all tokens.
template <class V, class Packed, size_t ROWS, size_t TOKENS>
inline void few_tile(const uint8_t* packed, size_t k, const int8_t* q, const int32_t* q_sums,
                     int32_t* acc, size_t acc_stride) {
    using Integers = typename V::Integers;
    const size_t blocks = row_blocks(Packed::PACKING, k), stride = blocks * BLOCK_BYTES;
    const size_t q_stride = padded_columns(k);
    const uintptr_t ahead = tiles_ahead(ROWS * stride);
    Integers sums[TOKENS][ROWS];
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) {
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[t][r] = V::all_i32(0);
    }
    for (size_t block = 0; block < blocks; ++block, q += block_weights(Packed::PACKING)) {
        for (size_t part = 0; part < BLOCK_BYTES; part += V::BYTES) {
            Integers bytes[ROWS], codes_u8[ROWS];
            BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
                if (part == 0) prefetch(packed + (block * ROWS + r) * BLOCK_BYTES, ahead);
                bytes[r] = V::load(packed + r * stride + block * BLOCK_BYTES + part);
            }
            BITLLM_UNROLL for (size_t d = 0; d < Packed::DIGITS; ++d) {
                BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
                    codes_u8[r] = Packed::template next_code<V>(bytes[r]);
                }
                BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) {
                    Integers q_i8 = V::load(q + t * q_stride + d * BLOCK_BYTES + part);
                    keep_in_register(q_i8);  // or each product would load it
                    BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
                        add_products<V>(sums[t][r], codes_u8[r], q_i8);
                    }
                }
            }
        }
    }
    // Four sums over lanes cost little more than one.
    BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
        BITLLM_UNROLL for (size_t t = 0; t < TOKENS; t += 4) {
            constexpr size_t LAST = TOKENS - 1;
            int32_t four[4];
            _mm_storeu_si128(reinterpret_cast<__m128i*>(four),
                             V::sum_lanes(sums[t][r], sums[t + 1 < TOKENS ? t + 1 : LAST][r],
                                          sums[t + 2 < TOKENS ? t + 2 : LAST][r],
                                          sums[t + 3 < TOKENS ? t + 3 : LAST][r]));
            for (size_t i = t; i < TOKENS && i < t + 4; ++i)
                acc[i * acc_stride + r] = four[i - t] - q_sums[i];
        }
    }
}

// All rows by `count` <= TOKENS tokens.
template <class V, class Packed, size_t TOKENS>
void few_rows(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, const int32_t* q_sums,
              size_t count, int32_t* acc, size_t acc_stride) {
    if constexpr (TOKENS > 1)
        if (count < TOKENS)
            return few_rows<V, Packed, TOKENS - 1>(packed, rows, k, q, q_sums, count, acc,
                                                   acc_stride);
    constexpr size_t ROWS = V::FEW_ROWS;
    const size_t stride = packed_row_bytes(Packed::PACKING, k);
    size_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        few_tile<V, Packed, ROWS, TOKENS>(packed + r * stride, k, q, q_sums, acc + r, acc_stride);
    for (; r < rows; ++r)
        few_tile<V, Packed, 1, TOKENS>(packed + r * stride, k, q, q_sums, acc + r, acc_stride);
}

template <class V, class Packed>
void matmul(const uint8_t* packed, size_t rows, size_t k, const int8_t* q, const int32_t* q_sums,
            size_t tokens, int32_t* acc, size_t acc_stride) {
    for (size_t tiles = (tokens + V::FEW_TOKENS - 1) / V::FEW_TOKENS; tiles > 0; --tiles) {
        const size_t count = (tokens + tiles - 1) / tiles;
        few_rows<V, Packed, V::FEW_TOKENS>(packed, rows, k, q, q_sums, count, acc, acc_stride);
        q += count * padded_columns(k);
        q_sums += count;
        acc += count * acc_stride;
        tokens -= count;
    }
}

// Codes by tokens
// ---------------
struct CodesProduct {
    const uint8_t* codes;
    size_t codes_stride, rows, k;
    const int8_t* q;
    size_t q_stride;
    const int32_t* q_sums;
    int32_t* acc;
    size_t acc_stride;
};

// sums[t][r] += codes[r] * q[t] for the columns of one register from `i` on.
template <class V, size_t ROWS, size_t TOKENS, typename V::Integers LOAD(const void*)>
inline void add_columns(typename V::Integers (&sums)[TOKENS][ROWS], const CodesProduct& p,
                        const uint8_t* codes, size_t i) {
    typename V::Integers q_i8[TOKENS];
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) q_i8[t] = LOAD(p.q + t * p.q_stride + i);
    BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) {
        const typename V::Integers codes_u8 = LOAD(codes + r * p.codes_stride + i);
        BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) {
            add_products<V>(sums[t][r], codes_u8, q_i8[t]);
        }
    }
}

// ROWS rows from `row` on by TOKENS tokens. Sums and tokens fill the registers but for one, and
// loads are fewer than products: all ports that multiply are busy.
template <class V, size_t ROWS, size_t TOKENS>
inline void codes_tile(const CodesProduct& p, size_t row) {
    typename V::Integers sums[TOKENS][ROWS];
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) {
        BITLLM_UNROLL for (size_t r = 0; r < ROWS; ++r) sums[t][r] = V::all_i32(0);
    }
    const uint8_t* codes = p.codes + row * p.codes_stride;
    size_t i = 0;
    for (; i + V::BYTES <= p.k; i += V::BYTES)
        add_columns<V, ROWS, TOKENS, V::load>(sums, p, codes, i);
    if (i < p.k) add_columns<V, ROWS, TOKENS, V::load_32>(sums, p, codes, i);
    BITLLM_UNROLL for (size_t t = 0; t < TOKENS; ++t) {
        store_sums<V>(sums[t], p.q_sums[t], p.acc + t * p.acc_stride + row);
    }
}

// All rows by `count` <= TOKENS tokens, which stay in the nearest cache while the rows pass by.
template <class V, size_t TOKENS>
void codes_rows(const CodesProduct& p, size_t count) {
    if constexpr (TOKENS > 1)
        if (count < TOKENS) return codes_rows<V, TOKENS - 1>(p, count);
    size_t r = 0;
    for (; r + ROWS_OF_TILE <= p.rows; r += ROWS_OF_TILE) codes_tile<V, ROWS_OF_TILE, TOKENS>(p, r);
    for (; r < p.rows; ++r) codes_tile<V, 1, TOKENS>(p, r);
}

// Tiles of at most V::TOKENS tokens and of nearly the same size: small ones leave the multipliers
// waiting.
template <class V>
void codes_matmul(const uint8_t* codes, size_t codes_stride, size_t rows, size_t k, const int8_t* q,
                  size_t q_stride, const int32_t* q_sums, size_t tokens, int32_t* acc,
                  size_t acc_stride) {
    CodesProduct p = {codes, codes_stride, rows, k, q, q_stride, q_sums, acc, acc_stride};
    for (size_t tiles = (tokens + V::TOKENS - 1) / V::TOKENS; tiles > 0; --tiles) {
        const size_t count = (tokens + tiles - 1) / tiles;
        codes_rows<V, V::TOKENS>(p, count);
        p.q += count * q_stride;
        p.q_sums += count;
        p.acc += count * acc_stride;
        tokens -= count;
    }
}

// Screening
// ---------
// Four bytes of each row lie side by side. The upper halves of bytes are used where they are, 16
// times too large: their sums are below 2^15 * 2^4.
template <class V>
inline typename V::Integers four_columns(const int8_t* at) {
    int32_t bits;
    std::memcpy(&bits, at, sizeof bits);
    return V::all_i32(bits);
}

// sum(u * q) of V::BYTES / 4 rows over one group, for q = high or low.
template <class V>
struct ScreenSums {
    typename V::Integers single_i32, sixteenfold_i32;

    void add_step(typename V::Integers bytes, const int8_t* q) {
        const auto lower = V::bits_of_both(bytes, V::all_i8(15));
        const auto upper = V::bits_of_both(bytes, V::all_i8(-16));
        add_products<V>(single_i32, lower, four_columns<V>(q));
        add_products<V>(sixteenfold_i32, upper, four_columns<V>(q + 4));
    }
    typename V::Integers total() const {
        return V::add_i32(single_i32, V::template right<4>(sixteenfold_i32));
    }
};

template <class V>
void screen_rows(const uint8_t* screen, size_t row_groups, size_t groups, const int8_t* high,
                 const int8_t* low, const int32_t* offsets, const float* squares, float* approx,
                 float* spread) {
    constexpr size_t STEPS = SCREEN_GROUP / 8, STEP_BYTES = 4 * SCREEN_ROWS;
    constexpr size_t REGISTERS = STEP_BYTES / V::BYTES, ROWS = V::BYTES / 4;
    const typename V::Integers zero = V::all_i32(0);
    for (size_t i = 0; i < row_groups; ++i, approx += SCREEN_ROWS, spread += SCREEN_ROWS) {
        typename V::Floats approx_f32[REGISTERS], spread_f32[REGISTERS];
        BITLLM_UNROLL for (size_t c = 0; c < REGISTERS; ++c) {
            approx_f32[c] = spread_f32[c] = V::all_f32(0.0f);
        }
        for (size_t g = 0; g < groups; ++g, screen += SCREEN_GROUP_BYTES) {
            ScreenSums<V> high_sums[REGISTERS], low_sums[REGISTERS];
            BITLLM_UNROLL for (size_t c = 0; c < REGISTERS; ++c) {
                high_sums[c] = low_sums[c] = {zero, zero};
            }
            for (size_t step = 0; step < STEPS; ++step) {
                const uint8_t* at = screen + step * STEP_BYTES;
                const size_t column = g * SCREEN_GROUP + 8 * step;
                prefetch(at, PREFETCH_BYTES);
                BITLLM_UNROLL for (size_t c = 0; c < REGISTERS; ++c) {
                    const typename V::Integers bytes = V::load(at + c * V::BYTES);
                    high_sums[c].add_step(bytes, high + column);
                    low_sums[c].add_step(bytes, low + column);
                }
            }
            BITLLM_UNROLL for (size_t c = 0; c < REGISTERS; ++c) {
                const typename V::Integers exact_i32 = V::subtract_i32(
                    V::add_i32(V::template left<8>(high_sums[c].total()), low_sums[c].total()),
                    V::all_i32(offsets[g]));
                const typename V::Floats scale_f32 =
                    V::load_bf16(screen + STEPS * STEP_BYTES + 2 * c * ROWS);
                approx_f32[c] = V::add_f32(approx_f32[c],
                                           V::multiply_f32(scale_f32, V::convert_i32(exact_i32)));
                spread_f32[c] = V::add_f32(
                    spread_f32[c],
                    V::multiply_f32(V::multiply_f32(scale_f32, scale_f32), V::all_f32(squares[g])));
            }
        }
        BITLLM_UNROLL for (size_t c = 0; c < REGISTERS; ++c) {
            V::store_f32(approx + c * ROWS, approx_f32[c]);
            V::store_f32(spread + c * ROWS, spread_f32[c]);
        }
    }
}

// As many sums as a tile of codes has.
template <class V>
int64_t peak(size_t iterations) {
    constexpr size_t ROUNDS = 2;
    const typename V::Integers one = V::all_i8(1);
    typename V::Integers sums[V::TOKENS][ROWS_OF_TILE];
    BITLLM_UNROLL for (size_t t = 0; t < V::TOKENS; ++t) {
        BITLLM_UNROLL for (size_t r = 0; r < ROWS_OF_TILE; ++r) sums[t][r] = one;
    }
    for (size_t i = 0; i < ROUNDS * iterations; ++i) {
        BITLLM_UNROLL for (size_t t = 0; t < V::TOKENS; ++t) {
            BITLLM_UNROLL for (size_t r = 0; r < ROWS_OF_TILE; ++r) {
                add_products<V>(sums[t][r], one, one);
            }
        }
    }
    int32_t totals[ROWS_OF_TILE];
    BITLLM_UNROLL for (size_t t = 0; t < V::TOKENS; ++t) {
        store_sums<V>(sums[t], 0, totals);
        volatile int32_t sink = totals[0];  // has to be computed
        (void)sink;
    }
    return static_cast<int64_t>(ROUNDS * iterations * V::TOKENS * ROWS_OF_TILE * V::BYTES);
}

template <class V>
constexpr IntegerKernels KERNELS = {
    .packed = {{.matvec = matvec<V, TwoBit>,
                .unpack = unpack<V, TwoBit>,
                .matmul = matmul<V, TwoBit>,
                .few_tokens = 16},
               {.matvec = matvec<V, Base3>,
                .unpack = unpack<V, Base3>,
                .matmul = matmul<V, Base3>,
                .few_tokens = 16}},
    .codes_matmul = codes_matmul<V>,
    .screen_rows = screen_rows<V>,
    .peak = peak<V>,
};

}  // namespace
}  // namespace bitllm
