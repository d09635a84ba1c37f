#include "rounded_head.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>

#include "numerics.h"
#include "platform.h"

namespace bitllm {
namespace {

constexpr size_t HUGE_PAGE = size_t{1} << 21;
// Beyond these, float32 sums could overflow or lose what they add.
constexpr float LARGEST_NORM = 0x1p40f;
constexpr float SMALLEST_SCALE = 0x1p-60f;
constexpr double SMALLEST_STATE = 1e-10, LARGEST_STATE = 1e10;
// More than all products and sums of a row can lose to underflow.
constexpr double UNDERFLOW = 0x1p-80;

constexpr int LARGEST_CODE = 7;
constexpr double LARGEST_16_BIT = 32639;  // 256 * 127 + 127
// Of the rounding: how far the expected code is from the weight at most, in steps of the scale.
// 2^-17 is the resolution of the random numbers; the rest covers that of float32.
constexpr double BIAS = 0x1p-16;
constexpr uint64_t ROUNDING_SEED = 0x62697473'68656164;

// Relative error of `count` roundings of float32 in a row (Higham, Accuracy and Stability of
// Numerical Algorithms, lemma 3.1).
double rounding_error(size_t count) {
    const double each = static_cast<double>(count) * 0x1p-24;
    return each / (1.0 - each);
}

// Roundings between the weights and a sum of `n` products in LANES lanes.
size_t roundings_of_lanes(size_t n) { return n / LANES + 8; }

// Largest magnitude, compared as integers, which order as floats do; NaN is above all.
float largest_of(const float* values, size_t n) {
    int32_t largest = 0;
    for (size_t i = 0; i < n; ++i) {
        const int32_t bits = std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF;
        largest = bits > largest ? bits : largest;
    }
    return std::bit_cast<float>(largest);
}

// An upper bound of the Euclidean norm; NaN or infinity where there is one among the values.
float norm_bound(const float* row, size_t n) {
    float lanes[LANES] = {};
    const size_t whole = n - n % LANES;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t lane = 0; lane < LANES; ++lane) lanes[lane] += row[i + lane] * row[i + lane];
    for (size_t i = whole; i < n; ++i) lanes[i - whole] += row[i] * row[i];
    const double root = std::sqrt(static_cast<double>(lane_sum(lanes, LANES)));
    const double grown = root * (1.0 + rounding_error(roundings_of_lanes(n)));
    return static_cast<float>((grown + 0x1p-70 * static_cast<double>(n)) * (1.0 + 0x1p-20));
}

size_t groups_of(size_t hidden) { return (hidden + SCREEN_GROUP - 1) / SCREEN_GROUP; }

// The scale of a group, a bfloat16 with LARGEST_CODE * scale >= the largest magnitude; 0 for zeros.
uint16_t scale_bits(float largest) {
    if (largest == 0.0f) return 0;
    const float wanted = std::max(largest / static_cast<float>(LARGEST_CODE), SMALLEST_SCALE);
    auto bits = static_cast<uint16_t>((std::bit_cast<uint32_t>(wanted) + 0xFFFF) >> 16);
    if (static_cast<float>(LARGEST_CODE) * f32_from_bf16(bits) < largest) ++bits;
    return bits;
}

// The random bits of a row: LANES generators xoshiro128++ (Blackman and Vigna, Scrambled Linear
// Pseudorandom Number Generators, 2021) side by side, their states drawn by Philox. They depend on
// the row alone, so that threads change nothing.
struct RowNoise {
    static constexpr size_t WORDS = SCREEN_GROUP / 2;
    uint32_t words[WORDS];

    explicit RowNoise(size_t row) {
        const UniformStream uniforms{ROUNDING_SEED, 0, static_cast<uint32_t>(row)};
        for (uint32_t lane = 0; lane < LANES; ++lane) {
            const Philox drawn = uniforms.words(lane);
            for (size_t i = 0; i < 4; ++i) state[i][lane] = drawn.word[i];
        }
    }

    // The words of the next group of columns.
    void next() {
        for (size_t first = 0; first < WORDS; first += LANES)
            for (size_t lane = 0; lane < LANES; ++lane) {
                uint32_t s0 = state[0][lane], s1 = state[1][lane];
                uint32_t s2 = state[2][lane], s3 = state[3][lane];
                words[first + lane] = std::rotl(s0 + s3, 7) + s0;
                const uint32_t shifted = s1 << 9;
                s2 ^= s0;
                s3 ^= s1;
                state[1][lane] = s1 ^ s2;
                state[0][lane] = s0 ^ s3;
                state[2][lane] = s2 ^ shifted;
                state[3][lane] = std::rotl(s3, 11);
            }
    }

  private:
    uint32_t state[4][LANES];
};

// Code + 8 of each weight of a group, floor(weight / scale + u) + 8 with u uniform in (0, 1): up or
// down at random, the weight itself in the mean. A float in [8, 9) is made of the random bits:
// 8 + (r + 1/2) / 2^16. Byte b of `packed` holds columns 8 * (b / 4) + b % 4 and 4 further.
void round_group(const float* weights, float inverse, const uint32_t* words, uint8_t* packed) {
    constexpr size_t HALF = SCREEN_GROUP / 2;
    constexpr uint32_t EIGHT_AND_A_HALF_STEP = 0x41000000u | 8u;
    int32_t codes[SCREEN_GROUP], bytes[HALF];
    for (size_t i = 0; i < HALF; ++i) {
        const uint32_t low = (words[i] << 4) & 0xFFFF0u, high = (words[i] >> 12) & 0xFFFF0u;
        const auto noise = std::bit_cast<float>(EIGHT_AND_A_HALF_STEP | low);
        const auto other = std::bit_cast<float>(EIGHT_AND_A_HALF_STEP | high);
        codes[i] = static_cast<int32_t>(weights[i] * inverse + noise);
        codes[HALF + i] = static_cast<int32_t>(weights[HALF + i] * inverse + other);
    }
    for (size_t step = 0; step < HALF / 4; ++step)
        for (size_t j = 0; j < 4; ++j)
            bytes[4 * step + j] = codes[8 * step + j] | codes[8 * step + 4 + j] << 4;
    for (size_t b = 0; b < HALF; ++b) packed[b] = static_cast<uint8_t>(bytes[b]);
}

}  // namespace

RoundedHead::RoundedHead(const Kernels& kernels, Bits bits, DenseMatrix head, size_t vocab,
                         size_t hidden, ThreadPool& pool)
    : kernels_(kernels), bits_(bits), vocab_(vocab), hidden_(hidden), groups_(groups_of(hidden)) {
    const size_t row_groups = (vocab + SCREEN_ROWS - 1) / SCREEN_ROWS;
    const bool four = bits == Bits::FOUR;
    const size_t bytes = four ? row_groups * groups_ * SCREEN_GROUP_BYTES : vocab * hidden;
    codes_ = Pages(bytes, bytes >= 2 * HUGE_PAGE);
    norms_.resize(vocab);
    scales_.resize(four ? 0 : vocab);
    // Taken here: an exception on a worker would end the process.
    const size_t width = groups_ * SCREEN_GROUP;
    std::vector<float> widened(static_cast<size_t>(pool.size()) * width);
    std::atomic<bool> finite = true;
    // The stored head stays in its file: what was read of it is dropped, strip by strip.
    constexpr size_t STRIP_BYTES = size_t{8} << 20;
    const size_t row_bytes = hidden * VALUE_BYTES[static_cast<size_t>(head.type)];
    const size_t strip = std::max<size_t>(1, STRIP_BYTES / (SCREEN_ROWS * row_bytes));
    pool.parallel([&](int worker, int workers) {
        const Range mine = split(row_groups, worker, workers);
        float* const row = widened.data() + static_cast<size_t>(worker) * width;
        for (size_t begin = mine.begin; begin < mine.end && finite; begin += strip) {
            const size_t end = std::min(begin + strip, mine.end);
            const Range rows{begin * SCREEN_ROWS, std::min(end * SCREEN_ROWS, vocab)};
            const bool fine =
                four ? round_four(head, {begin, end}, row) : round_eight(head, rows, row);
            if (!fine) finite = false;
            forget_pages(head.data + rows.begin * row_bytes, (rows.end - rows.begin) * row_bytes);
        }
    });
    if (!finite) codes_ = Pages();
}

size_t RoundedHead::bytes() const {
    return codes_.bytes() + (scales_.size() + norms_.size()) * sizeof(float);
}

bool RoundedHead::round_four(DenseMatrix head, Range row_groups, float* row) {
    const size_t row_bytes = hidden_ * VALUE_BYTES[static_cast<size_t>(head.type)];
    const size_t end = row_groups.end * SCREEN_ROWS;
    for (size_t index = row_groups.begin * SCREEN_ROWS; index < end; ++index) {
        if (index < vocab_) {
            kernels_.widen(head.data + index * row_bytes, head.type, hidden_, row);
            norms_[index] = norm_bound(row, hidden_);
            if (!(norms_[index] <= LARGEST_NORM)) return false;
        } else {
            std::fill_n(row, hidden_, 0.0f);
        }
        round_row_in_four(row, index);
    }
    return true;
}

void RoundedHead::round_row_in_four(const float* row, size_t index) {
    constexpr size_t STEPS = SCREEN_GROUP / 8;
    RowNoise noise(index);
    uint8_t packed[SCREEN_GROUP / 2];
    auto* out = reinterpret_cast<uint8_t*>(codes_.data()) +
                index / SCREEN_ROWS * groups_ * SCREEN_GROUP_BYTES;
    const size_t r = index % SCREEN_ROWS;
    for (size_t g = 0; g < groups_; ++g, row += SCREEN_GROUP, out += SCREEN_GROUP_BYTES) {
        const uint16_t bits = scale_bits(largest_of(row, SCREEN_GROUP));
        noise.next();
        round_group(row, bits ? 1.0f / f32_from_bf16(bits) : 0.0f, noise.words, packed);
        for (size_t step = 0; step < STEPS; ++step)
            std::memcpy(out + step * 4 * SCREEN_ROWS + 4 * r, packed + 4 * step, 4);
        std::memcpy(out + STEPS * 4 * SCREEN_ROWS + 2 * r, &bits, sizeof bits);
    }
}

bool RoundedHead::round_eight(DenseMatrix head, Range rows, float* row) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
    const size_t row_bytes = hidden_ * VALUE_BYTES[static_cast<size_t>(head.type)];
    for (size_t index = rows.begin; index < rows.end; ++index) {
        kernels_.widen(head.data + index * row_bytes, head.type, hidden_, row);
        norms_[index] = norm_bound(row, hidden_);
        if (!(norms_[index] <= LARGEST_NORM)) return false;
        const float scale = std::max(largest_of(row, hidden_) / 127.0f, SMALLEST_SCALE);
        const float inverse = 1.0f / scale;
        scales_[index] = scale;
        const size_t n = hidden_;
        auto* codes = reinterpret_cast<int8_t*>(codes_.data()) + index * n;
        for (size_t i = 0; i < n; ++i)
            codes[i] = static_cast<int8_t>(std::bit_cast<int32_t>(row[i] * inverse + MAGIC));
    }
    return true;
}

void RoundedHead::take_query(Arena& arena, Query& query) const {
    const size_t groups = bits_ == Bits::FOUR ? groups_ : 0;
    query.high = arena.take<int8_t>(groups * SCREEN_GROUP);
    query.low = arena.take<int8_t>(groups * SCREEN_GROUP);
    query.offsets = arena.take<int32_t>(groups);
    query.squares = arena.take<float>(groups);
}

size_t RoundedHead::query_bytes(Bits bits, size_t hidden) {
    const size_t groups = bits == Bits::FOUR ? groups_of(hidden) : 0;
    return 2 * Arena::bytes_for<int8_t>(groups * SCREEN_GROUP) + Arena::bytes_for<int32_t>(groups) +
           Arena::bytes_for<float>(groups);
}

bool RoundedHead::ask(const float* hidden, Query& query) const {
    const double norm = norm_bound(hidden, hidden_);
    if (!(largest_of(hidden, hidden_) >= SMALLEST_STATE && norm <= LARGEST_STATE)) return false;
    query.hidden = hidden;
    if (bits_ == Bits::FOUR)
        bound_four(query);
    else
        bound_eight(query);
    query.fixed = static_cast<float>(UNDERFLOW * static_cast<double>(hidden_));
    return true;
}

void RoundedHead::bound_four(Query& query) const {
    const float* h = query.hidden;
    const double largest = largest_of(h, hidden_);
    const double unit = largest / LARGEST_16_BIT, inverse = LARGEST_16_BIT / largest;
    double h_squares = 0.0, v_squares = 0.0, rest_squares = 0.0;
    for (size_t g = 0; g < groups_; ++g) {
        int32_t sum = 0;
        double squares = 0.0;
        for (size_t i = g * SCREEN_GROUP; i < (g + 1) * SCREEN_GROUP; ++i) {
            const double x = i < hidden_ ? static_cast<double>(h[i]) : 0.0;
            const auto v = static_cast<int32_t>(std::floor(x * inverse + 0.5));
            const int32_t high = (v + 128) >> 8;
            query.high[i] = static_cast<int8_t>(high);
            query.low[i] = static_cast<int8_t>(v - 256 * high);
            sum += v;
            squares += static_cast<double>(v) * v;
            const double rest = v * unit - x;
            h_squares += x * x;
            rest_squares += rest * rest;
        }
        query.offsets[g] = (LARGEST_CODE + 1) * sum;
        query.squares[g] = static_cast<float>(squares);
        v_squares += squares;
    }
    const double rows = static_cast<double>(vocab_);
    const double hoeffding = std::sqrt(0.5 * log_f64(2.0 * rows / FAILURE_PROBABILITY));
    const double h_norm = std::sqrt(h_squares), v_norm = unit * std::sqrt(v_squares);
    const double of_logit = rounding_error(roundings_of_lanes(hidden_));
    const double of_approx = rounding_error(groups_ + 8);
    // sum of s * |v| over a row <= this * sqrt(spread): Cauchy and Schwarz, twice.
    const double absolute = std::sqrt(static_cast<double>(groups_ * SCREEN_GROUP));
    const double grow = 1.0 + 2.0 * rounding_error(groups_ + 16);
    query.unit = static_cast<float>(unit);
    query.per_spread =
        static_cast<float>(grow * unit * (hoeffding + (BIAS + of_approx) * absolute));
    query.per_norm = static_cast<float>(
        grow * (std::sqrt(rest_squares) + of_logit * h_norm + of_approx * v_norm));
}

void RoundedHead::bound_eight(Query& query) const {
    double absolute = 0.0, squares = 0.0;
    for (size_t i = 0; i < hidden_; ++i) {
        const double x = query.hidden[i];
        absolute += std::fabs(x);
        squares += x * x;
    }
    const double roundings = rounding_error(roundings_of_lanes(hidden_));
    const double grow = 1.0 + 0x1p-20;
    query.unit = 1.0f;
    query.per_spread = static_cast<float>(grow * (0.5 + 0x1p-15 + roundings) * absolute);
    query.per_norm = static_cast<float>(grow * 2.0 * roundings * std::sqrt(squares));
}

void RoundedHead::approximate(const Query& query, size_t group, float* approx, float* upper) const {
    const size_t first = group * SCREEN_ROWS, rows = std::min(SCREEN_ROWS, vocab_ - first);
    float spread[SCREEN_ROWS] = {};
    if (bits_ == Bits::FOUR) {
        const auto* codes = reinterpret_cast<const uint8_t*>(codes_.data());
        kernels_.integer->screen_rows(codes + group * groups_ * SCREEN_GROUP_BYTES, 1, groups_,
                                      query.high, query.low, query.offsets, query.squares, approx,
                                      spread);
        for (float& value : spread) value = std::sqrt(value);
    } else {
        const auto* codes = reinterpret_cast<const int8_t*>(codes_.data());
        kernels_.dense_matvec(codes + first * hidden_, ValueType::I8, rows, hidden_, query.hidden,
                              approx);
        for (size_t r = 0; r < rows; ++r) {
            spread[r] = scales_[first + r];
            approx[r] *= spread[r];
        }
    }
    for (size_t r = 0; r < rows; ++r) {
        approx[r] *= query.unit;
        upper[r] = approx[r] + (query.per_spread * spread[r] +
                                (query.per_norm * norms_[first + r] + query.fixed));
    }
}

void RoundedHead::logits(const float* hidden, Range rows, float* out) const {
    const auto* codes = reinterpret_cast<const int8_t*>(codes_.data());
    kernels_.dense_matvec(codes + rows.begin * hidden_, ValueType::I8, rows.end - rows.begin,
                          hidden_, hidden, out);
    for (size_t row = rows.begin; row < rows.end; ++row) out[row - rows.begin] *= scales_[row];
}

}  // namespace bitllm
