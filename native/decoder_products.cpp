// The ternary products of a step: quantised inputs, and the rows of each matrix.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t ROW_TILE = 32;    // rows that are unpacked together, for ...
constexpr size_t TOKEN_TILE = 64;  // ... so many tokens at a time

constexpr LinearName QKV[] = {LinearName::Q, LinearName::K, LinearName::V};

// Which of the quantised inputs belongs to a linear that has a norm of its own.
constexpr size_t own_input(LinearName name) {
    if (name == LinearName::K || name == LinearName::UP) return 2;
    return name == LinearName::V ? 3 : 1;
}

}  // namespace

// Input vectors of linears that read x: one that is shared, and one for each linear with a norm of
// its own.
void Decoder::quantize_inputs(const Layer& layer, std::span<const LinearName> names, size_t token,
                              const float* x, const float* norm, Workspace& own) {
    const size_t n = layer.linear(names[0]).in;
    const auto quantize = [&](const float* values, Quantized& input) {
        if (!all_finite(values, n)) spoil(layer);
        input.scales[token] = kernels_.quantize(values, n, input.values + token * padded_columns(n),
                                                input.sums + token);
    };
    if (norm) {
        kernels_.rms_norm(x, norm, n, layer.config.norm_eps, own.row);
        x = own.row;
    }
    const auto shares = [&](LinearName name) { return layer.linear(name).norm.empty(); };
    if (std::any_of(names.begin(), names.end(), shares)) quantize(x, quantized_[0]);
    for (const LinearName name : names) {
        if (shares(name)) continue;
        const Linear& linear = layer.linear(name);
        kernels_.rms_norm(x, linear.norm.data(), n, linear.norm_eps, own.normed);
        quantize(own.normed, quantized_[own_input(name)]);
    }
}

// Rows of y = rescale(packed @ q) + bias for all tokens; out has one row of `stride` values a
// token.
void Decoder::multiply(const Layer& layer, LinearName name, Range rows, float* out, size_t stride,
                       Workspace& own) {
    const Linear& linear = layer.linear(name);
    const Quantized& input = quantized_[linear.norm.empty() ? 0 : own_input(name)];
    const auto* packed = reinterpret_cast<const uint8_t*>(linear.packed.data());
    const size_t row_bytes = packed_row_bytes(Packing::TWO_BIT, linear.in);
    const size_t columns = padded_columns(linear.in);
    const IntegerKernels& integer = *kernels_.integer;
    const PackedKernels& kernels = integer.packed[0];
    const auto store = [&](size_t token, size_t row, size_t height, const int32_t* accumulators) {
        float* y = out + token * stride + row;
        const bool one = linear.scales.size() == 1;
        kernels_.rescale(accumulators, height, input.scales[token],
                         linear.scales.data() + (one ? 0 : row), one ? 0 : 1, y);
        if (!linear.bias.empty()) kernels_.add(y, linear.bias.data() + row, height);
    };
    const size_t row_tile = tokens_ == 1 ? ACCUMULATORS : ROW_TILE;
    for (size_t row = rows.begin; row < rows.end; row += row_tile) {
        const size_t height = std::min(row_tile, rows.end - row);
        const uint8_t* tile = packed + row * row_bytes;
        if (tokens_ == 1) {
            kernels.matvec(tile, height, linear.in, input.values, input.sums[0], own.accumulators);
            store(0, row, height, own.accumulators);
            continue;
        }
        kernels.unpack(tile, height, linear.in, own.codes);
        for (size_t token = 0; token < tokens_; token += TOKEN_TILE) {
            const size_t width = std::min(TOKEN_TILE, tokens_ - token);
            integer.codes_matmul(own.codes, columns, height, columns,
                                 input.values + token * columns, columns, input.sums + token, width,
                                 own.accumulators, height);
            for (size_t i = 0; i < width; ++i)
                store(token + i, row, height, own.accumulators + i * height);
        }
    }
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
