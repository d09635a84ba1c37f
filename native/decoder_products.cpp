// The ternary products of a step: inputs, quantised or not, and the rows of each matrix.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t TOKEN_TILE = 64;   // tokens that meet unpacked rows at a time
constexpr size_t SUM_COLUMNS = 32;  // groups of columns are multiples of it
static_assert(ROW_TILE * TOKEN_TILE <= ACCUMULATORS);

constexpr LinearName QKV[] = {LinearName::Q, LinearName::K, LinearName::V};

// Which of the quantised inputs belongs to a linear that has a norm of its own.
constexpr size_t own_input(LinearName name) {
    if (name == LinearName::K || name == LinearName::UP) return 2;
    return name == LinearName::V ? 3 : 1;
}

int32_t sum_of(const int8_t* values, size_t n) {
    int32_t sum = 0;
    for (size_t i = 0; i < n; ++i) sum += values[i];
    return sum;
}

// The rows of `linear.packed` that some of its rows are.
Range kept_of(const Linear& linear, Range rows) {
    if (linear.kept.empty()) return rows;
    return {linear.kept[rows.begin], linear.kept[rows.end]};
}

const uint8_t* packed_row(const Linear& linear, size_t index) {
    return reinterpret_cast<const uint8_t*>(linear.packed.data()) +
           index * packed_row_bytes(linear.packing, linear.in);
}

// Accumulators of the rows kept become those of all rows, in place: 0 for a row of zeros.
void spread(const Linear& linear, Range rows, int32_t* accumulators) {
    if (linear.kept.empty()) return;
    const uint32_t* kept = linear.kept.data();
    for (size_t row = rows.end; row-- > rows.begin;)
        accumulators[row - rows.begin] =
            kept[row] < kept[row + 1] ? accumulators[kept[row] - kept[rows.begin]] : 0;
}

}  // namespace

// Input vectors of linears that read x: one that is shared, and one for each linear with a norm of
// its own.
void Decoder::prepare_inputs(const Layer& layer, std::span<const LinearName> names, size_t token,
                             const float* x, const float* norm, Workspace& own) {
    const size_t n = layer.linear(names[0]).in;
    if (norm) {
        kernels_.rms_norm(x, norm, n, layer.config.norm_eps, own.row);
        x = own.row;
    }
    if (adapts_ && adapter_of(token))
        std::copy_n(x, n, adapter_scratch_.inputs + token * input_width_);
    for (const InputType type : {InputType::INT8, InputType::FLOAT}) {
        const auto shares = [&](LinearName name) {
            return layer.linear(name).norm.empty() && layer.linear(name).input == type;
        };
        if (std::any_of(names.begin(), names.end(), shares))
            store_input(layer, x, n, type, token, inputs_[0]);
    }
    for (const LinearName name : names) {
        const Linear& linear = layer.linear(name);
        if (linear.norm.empty()) continue;
        kernels_.rms_norm(x, linear.norm.data(), n, linear.norm_eps, own.normed);
        store_input(layer, own.normed, n, linear.input, token, inputs_[own_input(name)]);
    }
}

void Decoder::store_input(const Layer& layer, const float* x, size_t n, InputType type,
                          size_t token, const Inputs& inputs) {
    if (!all_finite(x, n)) spoil(layer);
    if (type == InputType::INT8)
        inputs.scales[token] =
            kernels_.quantize(x, n, inputs.values + token * padded_columns(n), inputs.sums + token);
    else
        std::copy_n(x, n, inputs.floats + token * n);
}

// Rows of y = product + bias + what adapters add, for all tokens; out has one row of `stride`
// values a token.
void Decoder::multiply(const Layer& layer, LinearName name, Range rows, float* out, size_t stride,
                       Workspace& own) {
    const Linear& linear = layer.linear(name);
    multiply_rows(linear, inputs_[linear.norm.empty() ? 0 : own_input(name)], rows, out, stride,
                  own);
    if (adapts_) add_adapters(layer, name, rows, out, stride);
}

void Decoder::multiply_rows(const Linear& linear, const Inputs& input, Range rows, float* out,
                            size_t stride, Workspace& own) {
    const bool floats = linear.input == InputType::FLOAT;
    const bool whole_rows = linear.group == 0 && !floats;
    const size_t row_tile = tokens_ == 1 && whole_rows ? ACCUMULATORS : ROW_TILE;
    for (size_t row = rows.begin; row < rows.end; row += row_tile) {
        const Range tile = {row, std::min(row + row_tile, rows.end)};
        if (tokens_ == 1 && whole_rows)
            multiply_token(linear, input, tile, out, own);
        else if (whole_rows)
            multiply_tokens(linear, input, tile, out, stride, own);
        else if (floats)
            multiply_floats(linear, input, tile, out, stride, own);
        else
            multiply_groups(linear, input, tile, out, stride, own);
        if (linear.bias.empty()) continue;
        for (size_t token = 0; token < tokens_; ++token)
            kernels_.add(out + token * stride + tile.begin, linear.bias.data() + tile.begin,
                         tile.end - tile.begin);
    }
}

void Decoder::multiply_token(const Linear& linear, const Inputs& input, Range rows, float* out,
                             Workspace& own) {
    const Range kept = kept_of(linear, rows);
    packed_kernels(linear).matvec(packed_row(linear, kept.begin), kept.end - kept.begin, linear.in,
                                  input.values, input.sums[0], own.accumulators);
    rescale_rows(linear, rows, input.scales[0], own.accumulators, out);
}

// TOKEN_TILE tokens at a time, so that their accumulators stay in the first cache. Few tokens take
// rows as they are; for many, rows are unpacked once, and the codes stay in the second cache.
void Decoder::multiply_tokens(const Linear& linear, const Inputs& input, Range rows, float* out,
                              size_t stride, Workspace& own) {
    const size_t height = rows.end - rows.begin, columns = padded_columns(linear.in);
    const Range kept = kept_of(linear, rows);
    const PackedKernels& kernels = packed_kernels(linear);
    const bool few = tokens_ <= kernels.few_tokens;
    if (!few) unpack_rows(linear, rows, own);
    for (size_t token = 0; token < tokens_; token += TOKEN_TILE) {
        const size_t width = std::min(TOKEN_TILE, tokens_ - token);
        const int8_t* q = input.values + token * columns;
        if (few)
            kernels.matmul(packed_row(linear, kept.begin), kept.end - kept.begin, linear.in, q,
                           input.sums + token, width, own.accumulators, height);
        else
            kernels_.integer->codes_matmul(own.codes, columns, kept.end - kept.begin, columns, q,
                                           columns, input.sums + token, width, own.accumulators,
                                           height);
        for (size_t i = 0; i < width; ++i)
            rescale_rows(linear, rows, input.scales[token + i], own.accumulators + i * height,
                         out + (token + i) * stride);
    }
}

// y = 0 + product of the first group + product of the second + ...
void Decoder::multiply_groups(const Linear& linear, const Inputs& input, Range rows, float* out,
                              size_t stride, Workspace& own) {
    const size_t height = rows.end - rows.begin, columns = padded_columns(linear.in);
    const size_t groups = (linear.in + linear.group - 1) / linear.group;
    const size_t unpacked = unpack_rows(linear, rows, own);
    for (size_t token = 0; token < tokens_; ++token)
        std::fill_n(out + token * stride + rows.begin, height, 0.0f);
    for (size_t group = 0; group < groups; ++group) {
        // Padding lets the last group end at a multiple of SUM_COLUMNS.
        const size_t first = group * linear.group;
        const size_t parts =
            (std::min(linear.group, linear.in - first) + SUM_COLUMNS - 1) / SUM_COLUMNS;
        float scales[ROW_TILE], products[ROW_TILE];
        for (size_t i = 0; i < height; ++i)
            scales[i] = linear.scales[(rows.begin + i) * groups + group];
        for (size_t token = 0; token < tokens_; token += TOKEN_TILE) {
            const size_t width = std::min(TOKEN_TILE, tokens_ - token);
            const int8_t* q = input.values + token * columns + first;
            int32_t sums[TOKEN_TILE];
            for (size_t i = 0; i < width; ++i)
                sums[i] = sum_of(q + i * columns, parts * SUM_COLUMNS);
            kernels_.integer->codes_matmul(own.codes + first, columns, unpacked,
                                           parts * SUM_COLUMNS, q, columns, sums, width,
                                           own.accumulators, height);
            for (size_t i = 0; i < width; ++i) {
                int32_t* accumulators = own.accumulators + i * height;
                spread(linear, rows, accumulators);
                kernels_.rescale(accumulators, height, input.scales[token + i], scales, 1,
                                 products);
                kernels_.add(out + (token + i) * stride + rows.begin, products, height);
            }
        }
    }
}

// y = 0 + lane_sum(codes * x) * scale of the first group + the same of the second + ...; a row
// with one scale is one group. Codes are unpacked once for all tokens, and multiplied as a dense
// matrix of bytes is.
void Decoder::multiply_floats(const Linear& linear, const Inputs& input, Range rows, float* out,
                              size_t stride, Workspace& own) {
    const Range kept = kept_of(linear, rows);
    const size_t height = kept.end - kept.begin, width = linear.group ? linear.group : linear.in;
    const size_t groups = (linear.in + width - 1) / width;
    sign_codes(linear, kept, width, own);
    for (size_t token = 0; token < tokens_; ++token) {
        float* y = out + token * stride;
        std::fill(y + rows.begin, y + rows.end, 0.0f);
        for (size_t group = 0; group < groups; ++group) {
            const size_t first = group * width, columns = std::min(width, linear.in - first);
            float sums[ROW_TILE];
            kernels_.dense_matvec(own.signed_codes + height * first, ValueType::I8, height, columns,
                                  input.floats + token * linear.in + first, sums);
            const float* sum = sums;
            for (size_t row = rows.begin; row < rows.end; ++row) {
                const bool zero = !linear.kept.empty() && linear.kept[row] == linear.kept[row + 1];
                const size_t scale = linear.scales.size() == 1 ? 0 : row * groups + group;
                y[row] = y[row] + (zero ? 0.0f : *sum++) * linear.scales[scale];
            }
        }
    }
}

// The codes of some rows, group after group of `width` columns, in each group row after row.
void Decoder::sign_codes(const Linear& linear, Range kept, size_t width, Workspace& own) const {
    const size_t height = kept.end - kept.begin;
    for (size_t i = 0; i < height; ++i) {
        packed_kernels(linear).unpack(packed_row(linear, kept.begin + i), 1, linear.in, own.codes);
        for (size_t first = 0; first < linear.in; first += width) {
            const size_t columns = std::min(width, linear.in - first);
            const uint8_t* codes = own.codes + first;
            int8_t* to = own.signed_codes + height * first + i * columns;
            for (size_t k = 0; k < columns; ++k) to[k] = static_cast<int8_t>(codes[k] - 1);
        }
    }
}

// The rows of a tile that are there, into own.codes; their number.
size_t Decoder::unpack_rows(const Linear& linear, Range rows, Workspace& own) const {
    const Range kept = kept_of(linear, rows);
    packed_kernels(linear).unpack(packed_row(linear, kept.begin), kept.end - kept.begin, linear.in,
                                  own.codes);
    return kept.end - kept.begin;
}

// Accumulators of the rows kept become y of all rows, out[rows].
void Decoder::rescale_rows(const Linear& linear, Range rows, float a, int32_t* accumulators,
                           float* out) const {
    const bool one = linear.scales.size() == 1;
    spread(linear, rows, accumulators);
    kernels_.rescale(accumulators, rows.end - rows.begin, a,
                     linear.scales.data() + (one ? 0 : rows.begin), one ? 0 : 1, out + rows.begin);
}

void Decoder::multiply_all(const Layer& layer, LinearName name, float* out, int worker,
                           Workspace& own) {
    const size_t rows = layer.linear(name).out;
    multiply(layer, name, split(rows, worker, pool_->size(), ROW_GRAIN), out, rows, own);
}

// q, k and v of each token side by side in work_; a worker's share is a range of their rows taken
// together.
void Decoder::project(const Layer& layer, int worker, Workspace& own) {
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    const Range mine = split(stride, worker, pool_->size(), ROW_GRAIN);
    size_t first = 0;
    for (const LinearName name : QKV) {
        const size_t end = first + layer.linear(name).out;
        const size_t from = std::max(mine.begin, first), to = std::min(mine.end, end);
        if (from < to)
            multiply(layer, name, {from - first, to - first}, work_ + first, stride, own);
        first = end;
    }
}

// gate and up of each token side by side in work_; a worker has the same rows of both, so that it
// can apply the activation itself. The result replaces the gate.
void Decoder::expand(const Layer& layer, int worker, Workspace& own) {
    const size_t width = layer.ffn_width(), stride = 2 * width;
    const Range mine = split(width, worker, pool_->size(), ROW_GRAIN);
    multiply(layer, LinearName::GATE, mine, work_, stride, own);
    multiply(layer, LinearName::UP, mine, work_ + width, stride, own);
    for (size_t token = 0; token < tokens_; ++token) {
        float* gate = work_ + token * stride + mine.begin;
        kernels_.gated(layer.config.activation, gate, gate + width, mine.end - mine.begin, gate);
    }
}

}  // namespace bitllm
