// The computation of one step. All workers run run_step() together; a barrier ends each stage, and
// within a stage workers take disjoint tokens, heads or rows of a matrix.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t ROW_GRAIN = 16;   // a cache line of floats: neighbours on other workers share none
constexpr size_t ROW_TILE = 64;    // rows that are unpacked once for ...
constexpr size_t TOKEN_TILE = 64;  // ... this many tokens
constexpr size_t ACCUMULATORS = ROW_TILE * TOKEN_TILE;
constexpr size_t HEAD_TILE =
    32;  // rows of the head that stay in cache for all rows that want logits
constexpr size_t TILE_TOKENS = 8;    // tokens that go through a KV block together
constexpr size_t TILE_QUERIES = 64;  // and their heads: sums kept while walking the blocks
constexpr size_t LOGIT_ROWS = 8;     // at least this many rows of logits at a time

constexpr float LARGEST_FLOAT = std::numeric_limits<float>::max();

// A layer has nine barriers. Other threads are asked for help from this many multiplications
// between two barriers on (some 10 us of one core): below, waiting for each other would cost more
// than it saves.
constexpr size_t BARRIERS = 9;
constexpr size_t WORTH_SHARING = 100'000;

constexpr LinearName QKV[] = {LinearName::Q, LinearName::K, LinearName::V};
constexpr LinearName OUT[] = {LinearName::O};
constexpr LinearName GATE_UP[] = {LinearName::GATE, LinearName::UP};
constexpr LinearName DOWN[] = {LinearName::DOWN};

// Which of the quantised inputs belongs to a linear that has a norm of its own.
constexpr size_t own_input(LinearName name) {
    if (name == LinearName::K || name == LinearName::UP) return 2;
    return name == LinearName::V ? 3 : 1;
}

constexpr size_t size_of(FloatType type) { return type == FloatType::F32 ? 4 : 2; }

void widen(const std::byte* values, FloatType type, size_t n, float* out) {
    if (type == FloatType::F32) {
        std::memcpy(out, values, n * sizeof(float));
        return;
    }
    for (size_t i = 0; i < n; ++i) {
        uint16_t bits;
        std::memcpy(&bits, values + 2 * i, sizeof bits);  // views of a file need not be aligned
        out[i] = type == FloatType::BF16 ? f32_from_bf16(bits) : f32_from_f16(bits);
    }
}

void narrow(const float* values, FloatType type, size_t n, std::byte* out) {
    if (type == FloatType::F32) {
        std::memcpy(out, values, n * sizeof(float));
        return;
    }
    auto* bits = reinterpret_cast<uint16_t*>(out);
    for (size_t i = 0; i < n; ++i) bits[i] = bf16_from_f32(values[i]);
}

// Neither NaN nor infinity among them. Quantising passes over NaN, so it has to be asked before.
bool all_finite(const float* values, size_t n) {
    int32_t finite = 1;  // as wide as the floats, for the loop to become vector code
    for (size_t i = 0; i < n; ++i) finite &= std::fabs(values[i]) <= LARGEST_FLOAT ? 1 : 0;
    return finite != 0;
}

// Takes from an arena, or only adds up what it would take.
struct Planner {
    Arena* arena;
    size_t bytes = 0;

    template <class T>
    T* take(size_t count) {
        bytes += Arena::bytes_for<T>(count);
        return arena ? arena->take<T>(count) : nullptr;
    }
};

}  // namespace

size_t Decoder::plan_scratch(Arena* arena) {
    size_t work_width = 0, input_width = model_.hidden, widest_head = 0;
    bool own_norms = false;
    for (const Layer& layer : layers_) {
        work_width = std::max(
            {work_width, layer.query_width() + 2 * layer.kv_width(), 2 * layer.ffn_width()});
        input_width = std::max({input_width, layer.query_width(), layer.ffn_width()});
        widest_head = std::max(widest_head, layer.config.head_dim);
        for (const Linear& linear : layer.linears) own_norms = own_norms || !linear.norm.empty();
    }
    const size_t tokens = runtime_.max_batch_tokens;
    logit_rows_ =
        std::min(tokens, std::max<size_t>(LOGIT_ROWS, static_cast<size_t>(runtime_.threads)));

    Planner plan{arena};
    residual_ = plan.take<float>(tokens * model_.hidden);
    block_out_ = plan.take<float>(tokens * model_.hidden);
    work_ = plan.take<float>(tokens * work_width);
    for (size_t i = 0; i < (own_norms ? quantized_.size() : 1); ++i) {
        Quantized& input = quantized_[i];
        input.values = plan.take<int8_t>(tokens * padded_columns(input_width));
        input.scales = plan.take<float>(tokens);
        input.sums = plan.take<int32_t>(tokens);
    }
    for (RopeTable& table : rope_tables_) {
        table.cosines = plan.take<float>(tokens * table.inverse_frequencies.size());
        table.sines = plan.take<float>(tokens * table.inverse_frequencies.size());
    }
    run_of_token_ = plan.take<uint32_t>(tokens);
    last_writer_ = plan.take<uint64_t>(runtime_.kv_blocks);
    tiles_ = plan.take<Tile>(tokens);
    final_rows_ = plan.take<float>(logit_rows_ * model_.hidden);
    logits_ = plan.take<float>(logit_rows_ * model_.vocab);

    workspaces_.resize(static_cast<size_t>(runtime_.threads));
    for (Workspace& own : workspaces_) {
        own.row = plan.take<float>(input_width);
        own.normed = plan.take<float>(own_norms ? input_width : 0);
        own.accumulators = plan.take<int32_t>(ACCUMULATORS);
        own.tile_sums = plan.take<float>(TILE_QUERIES * widest_head);
        own.tile_highest = plan.take<float>(TILE_QUERIES);
        own.tile_totals = plan.take<float>(TILE_QUERIES);
        own.block_sums = plan.take<float>(widest_head);
        own.requests = plan.take<Request>(logit_rows_);
        if (arena) own.sampler.emplace(kernels_, model_.vocab, *arena);
        plan.bytes += Sampler::scratch_bytes(model_.vocab);
    }
    return plan.bytes;
}

void Decoder::forward(const StepInput& input, const StepOutput& output) {
    const std::lock_guard lock(mutex_);
    ++step_;
    check(input);
    check_outputs(input, output);
    input_ = &input;
    result_ = &output;
    tokens_ = input.token_ids.size();
    tile_count_ = 0;
    for (uint32_t run = 0; run + 1 < input.run_offsets.size(); ++run) {
        const auto begin = static_cast<size_t>(input.run_offsets[run]);
        const auto end = static_cast<size_t>(input.run_offsets[run + 1]);
        std::fill(run_of_token_ + begin, run_of_token_ + end, run);
        for (size_t first = begin; first < end; first += TILE_TOKENS)
            tiles_[tile_count_++] = {static_cast<uint32_t>(first),
                                     static_cast<uint32_t>(std::min(TILE_TOKENS, end - first))};
    }
    pool_ = &pool_for(input);
    spoilt_layer_.store(layers_.size(), std::memory_order_relaxed);
    pool_->parallel([this](int worker, int) { run_step(worker); });
    const size_t spoilt = spoilt_layer_.load(std::memory_order_relaxed);
    if (spoilt < layers_.size())
        throw std::overflow_error("layer " + std::to_string(spoilt) +
                                  ": activations hold NaN or infinity");
}

// Remembers the first layer that was given, or made, numbers that cannot be quantised. The step
// goes on, so that all workers come to its barriers.
void Decoder::spoil(const Layer& layer) {
    const auto index = static_cast<size_t>(&layer - layers_.data());
    size_t first = spoilt_layer_.load(std::memory_order_relaxed);
    while (index < first && !spoilt_layer_.compare_exchange_weak(first, index)) {
    }
}

ThreadPool& Decoder::pool_for(const StepInput& input) const {
    size_t work = tokens_ * matrix_work_ + input.output_rows.size() * model_.vocab * model_.hidden;
    for (size_t run = 0; run + 1 < input.run_offsets.size(); ++run) {
        const auto begin = static_cast<size_t>(input.run_offsets[run]);
        const auto end = static_cast<size_t>(input.run_offsets[run + 1]);
        work += (end - begin) * static_cast<size_t>(input.positions[end - 1]) * attention_work_;
    }
    return work / (layers_.size() * BARRIERS) < WORTH_SHARING ? solo_ : crowd_;
}

void Decoder::run_step(int worker) {
    Workspace& own = workspaces_[static_cast<size_t>(worker)];
    const Range mine = split(tokens_, worker, pool_->size());
    for (size_t token = mine.begin; token < mine.end; ++token) {
        embed(token);
        compute_rope(token);
    }
    for (const Layer& layer : layers_) {
        attention_block(layer, worker, own);
        ffn_block(layer, worker, own);
    }
    pool_->barrier(worker);
    finish(worker, own);
}

// h += post_attn_norm(o(attn_sub_norm(attention(q, k, v of attn_norm(h)))))
void Decoder::attention_block(const Layer& layer, int worker, Workspace& own) {
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    const Range mine = split(tokens_, worker, pool_->size());
    for (size_t token = mine.begin; token < mine.end; ++token)
        quantize_inputs(layer, QKV, token, residual_ + token * model_.hidden,
                        layer.vector(VectorName::ATTN_NORM), own);
    pool_->barrier(worker);
    project(layer, worker, own);
    pool_->barrier(worker);
    turn_and_store(layer, worker);
    pool_->barrier(worker);
    attend(layer, worker, own);  // replaces q
    pool_->barrier(worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        quantize_inputs(layer, OUT, token, work_ + token * stride,
                        layer.vector(VectorName::ATTN_SUB_NORM), own);
    pool_->barrier(worker);
    multiply_all(layer, LinearName::O, block_out_, worker, own);
    pool_->barrier(worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        add_to_residual(token, layer.vector(VectorName::POST_ATTN_NORM), layer.config.norm_eps);
}

// h += post_ffn_norm(down(ffn_sub_norm(act(gate(x)) * up(x)))), x = ffn_norm(h)
void Decoder::ffn_block(const Layer& layer, int worker, Workspace& own) {
    const size_t stride = 2 * layer.ffn_width();
    const Range mine = split(tokens_, worker, pool_->size());
    for (size_t token = mine.begin; token < mine.end; ++token)
        quantize_inputs(layer, GATE_UP, token, residual_ + token * model_.hidden,
                        layer.vector(VectorName::FFN_NORM), own);
    pool_->barrier(worker);
    expand(layer, worker, own);
    pool_->barrier(worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        quantize_inputs(layer, DOWN, token, work_ + token * stride,
                        layer.vector(VectorName::FFN_SUB_NORM), own);
    pool_->barrier(worker);
    multiply_all(layer, LinearName::DOWN, block_out_, worker, own);
    pool_->barrier(worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        add_to_residual(token, layer.vector(VectorName::POST_FFN_NORM), layer.config.norm_eps);
}

void Decoder::embed(size_t token) {
    const size_t n = model_.hidden;
    float* h = residual_ + token * n;
    const size_t row_bytes = n * size_of(embedding_.type);
    widen(embedding_.data + static_cast<size_t>(input_->token_ids[token]) * row_bytes,
          embedding_.type, n, h);
    for (size_t i = 0; i < n; ++i) h[i] = h[i] * model_.embedding_scale;
}

void Decoder::compute_rope(size_t token) {
    const auto position = static_cast<float>(input_->positions[token]);
    for (const RopeTable& table : rope_tables_) {
        const size_t n = table.inverse_frequencies.size();
        for (size_t i = 0; i < n; ++i) {
            const float angle = position * table.inverse_frequencies[i];
            const SinCos turn = sincos_f64(static_cast<double>(angle));
            table.cosines[token * n + i] = static_cast<float>(turn.cosine);
            table.sines[token * n + i] = static_cast<float>(turn.sine);
        }
    }
}

void Decoder::add_to_residual(size_t token, const float* post_norm, float eps) {
    const size_t n = model_.hidden;
    float* y = block_out_ + token * n;
    if (post_norm) kernels_.rms_norm(y, post_norm, n, eps, y);
    kernels_.add(residual_ + token * n, y, n);
}

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
    const size_t row_bytes = ternary_row_bytes(linear.in), columns = padded_columns(linear.in);
    const size_t scale_stride = linear.scales.size() == 1 ? 0 : 1;
    const size_t row_tile = tokens_ == 1 ? ACCUMULATORS : ROW_TILE;
    for (size_t row = rows.begin; row < rows.end; row += row_tile) {
        const size_t height = std::min(row_tile, rows.end - row);
        const uint8_t* tile = packed + row * row_bytes;
        for (size_t token = 0; token < tokens_; token += TOKEN_TILE) {
            const size_t width = std::min(TOKEN_TILE, tokens_ - token);
            const int8_t* q = input.values + token * columns;
            if (width == 1)
                kernels_.ternary_matvec(tile, height, linear.in, q, input.sums[token],
                                        own.accumulators);
            else
                kernels_.ternary_matmul(tile, height, linear.in, q, input.sums + token, width,
                                        own.accumulators, height);
            for (size_t i = 0; i < width; ++i) {
                float* y = out + (token + i) * stride + row;
                kernels_.rescale(own.accumulators + i * height, height, input.scales[token + i],
                                 linear.scales.data() + scale_stride * row, scale_stride, y);
                if (!linear.bias.empty()) kernels_.add(y, linear.bias.data() + row, height);
            }
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

// Normalises and turns each head of q and k; rounds k and v into the cache.
void Decoder::turn_and_store(const Layer& layer, int worker) {
    const LayerConfig& config = layer.config;
    const size_t n = config.head_dim, heads = config.heads + config.kv_heads;
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    const float* query_norm = layer.vector(VectorName::Q_NORM);
    const float* key_norm = layer.vector(VectorName::K_NORM);
    const Range mine = split(tokens_ * heads, worker, pool_->size());
    for (size_t unit = mine.begin; unit < mine.end; ++unit) {
        const size_t token = unit / heads, index = unit % heads;
        float* head = work_ + token * stride + index * n;  // the heads of k follow those of q
        const bool is_key = index >= config.heads;
        const float* norm = is_key ? key_norm : query_norm;
        if (norm) kernels_.rms_norm(head, norm, n, config.norm_eps, head);
        turn(layer, token, head);
        if (!is_key) continue;
        const size_t place = static_cast<size_t>(input_->positions[token]) % KV_BLOCK_SIZE;
        std::byte* keys =
            kv_rows(layer, run_of_token_[token], static_cast<size_t>(input_->positions[token]),
                    index - config.heads);
        const size_t offset = place * n * size_of(runtime_.kv_type);
        narrow(head, runtime_.kv_type, n, keys + offset);
        narrow(head + layer.kv_width(), runtime_.kv_type, n, keys + layer.value_offset + offset);
    }
}

// RoPE, rotate-half: (x1, x2) become (x1 cos - x2 sin, x2 cos + x1 sin).
void Decoder::turn(const Layer& layer, size_t token, float* head) const {
    const RopeTable& table = rope_tables_[layer.rope_table];
    const size_t half = table.inverse_frequencies.size();
    const float* cosines = table.cosines + token * half;
    const float* sines = table.sines + token * half;
    for (size_t i = 0; i < half; ++i) {
        const float x1 = head[i], x2 = head[half + i];
        head[i] = x1 * cosines[i] - x2 * sines[i];
        head[half + i] = x2 * cosines[i] + x1 * sines[i];
    }
}

// The keys of one KV head in the block of a position; its values are value_offset behind.
std::byte* Decoder::kv_rows(const Layer& layer, size_t run, size_t position, size_t kv_head) const {
    const int32_t block =
        input_->block_tables[run * input_->block_table_width + position / KV_BLOCK_SIZE];
    const size_t head_bytes = KV_BLOCK_SIZE * layer.config.head_dim * size_of(runtime_.kv_type);
    return kv_->block(static_cast<size_t>(block)) + layer.kv_offset + kv_head * head_bytes;
}

// A single token splits by heads; otherwise workers take turns at (tile, KV head), because later
// tiles of a run have more to read.
void Decoder::attend(const Layer& layer, int worker, Workspace& own) {
    const size_t heads = layer.config.heads, group = heads / layer.config.kv_heads;
    const auto workers = static_cast<size_t>(pool_->size());
    if (tile_count_ == 1 && tiles_[0].count == 1) {
        const Range mine = split(heads, worker, pool_->size());
        attend_tile(layer, tiles_[0], mine, own);
        return;
    }
    const size_t units = tile_count_ * layer.config.kv_heads;
    for (size_t unit = static_cast<size_t>(worker); unit < units; unit += workers) {
        const size_t first = unit % layer.config.kv_heads * group;
        attend_tile(layer, tiles_[unit / layer.config.kv_heads], {first, first + group}, own);
    }
}

void Decoder::attend_tile(const Layer& layer, const Tile& tile, Range heads, Workspace& own) {
    const size_t at_once = TILE_QUERIES / tile.count;
    for (size_t head = heads.begin; head < heads.end; head += at_once)
        attend_heads(layer, tile, {head, std::min(head + at_once, heads.end)}, own);
}

// Walks the KV blocks once for all tokens of the tile and these heads, keeping for each the highest
// score so far, the sum of exp(score - highest) and the sum of values so weighted. The result
// replaces q.
void Decoder::attend_heads(const Layer& layer, const Tile& tile, Range heads, Workspace& own) {
    const LayerConfig& config = layer.config;
    const size_t n = config.head_dim, group = config.heads / config.kv_heads;
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    const size_t row_bytes = n * size_of(runtime_.kv_type), count = heads.end - heads.begin;
    const auto position = static_cast<size_t>(input_->positions[tile.first]);
    const size_t run = run_of_token_[tile.first], last = position + tile.count - 1;
    const auto first_seen = [&](size_t from) {
        return config.window == 0 || from < config.window ? 0 : from + 1 - config.window;
    };
    std::fill_n(own.tile_highest, tile.count * count, -std::numeric_limits<float>::infinity());
    std::fill_n(own.tile_totals, tile.count * count, 0.0f);
    std::fill_n(own.tile_sums, tile.count * count * n, 0.0f);

    for (size_t block = first_seen(position) / KV_BLOCK_SIZE; block <= last / KV_BLOCK_SIZE;
         ++block) {
        const size_t start = block * KV_BLOCK_SIZE;
        for (size_t head = heads.begin; head < heads.end; ++head) {
            const std::byte* keys = kv_rows(layer, run, start, head / group);
            for (size_t i = 0; i < tile.count; ++i) {
                const size_t seen_from = std::max(first_seen(position + i), start);
                const size_t seen_to = std::min(position + i + 1, start + KV_BLOCK_SIZE);
                if (seen_from >= seen_to) continue;
                const std::byte* rows = keys + (seen_from - start) * row_bytes;
                const float* query = work_ + (tile.first + i) * stride + head * n;
                const size_t state = i * count + (head - heads.begin);
                const Scored scored{query, rows, rows + layer.value_offset, seen_to - seen_from};
                merge_block(layer, scored, state, own);
            }
        }
    }
    for (size_t i = 0; i < tile.count; ++i) {
        for (size_t head = heads.begin; head < heads.end; ++head) {
            const size_t state = i * count + (head - heads.begin);
            float* out = work_ + (tile.first + i) * stride + head * n;
            for (size_t d = 0; d < n; ++d)
                out[d] = own.tile_sums[state * n + d] / own.tile_totals[state];
        }
    }
}

void Decoder::merge_block(const Layer& layer, const Scored& block, size_t state, Workspace& own) {
    const LayerConfig& config = layer.config;
    const size_t n = config.head_dim;
    const FloatType type = runtime_.kv_type;
    float weights[KV_BLOCK_SIZE];
    kernels_.attention_scores(block.query, block.keys, type, block.count, n, config.query_scale,
                              weights);
    const float block_highest = *std::max_element(weights, weights + block.count);
    // The softmax of NaN or of infinity is NaN, which exp may pass over; that of a score of
    // -infinity is 0 unless there is no other.
    int32_t fits = block_highest >= -LARGEST_FLOAT ? 1 : 0;
    for (size_t j = 0; j < block.count; ++j) fits &= weights[j] <= LARGEST_FLOAT ? 1 : 0;
    if (!fits) spoil(layer);
    kernels_.exp_shifted(weights, block.count, block_highest);
    float block_total = 0.0f;
    for (size_t j = 0; j < block.count; ++j) block_total = block_total + weights[j];
    kernels_.weighted_sum(weights, block.values, type, block.count, n, own.block_sums);

    float& highest = own.tile_highest[state];
    float& total = own.tile_totals[state];
    float* sums = own.tile_sums + state * n;
    const float merged = std::max(highest, block_highest);
    const float keep = exp_f32(highest - merged), join = exp_f32(block_highest - merged);
    total = total * keep + block_total * join;
    for (size_t d = 0; d < n; ++d) sums[d] = sums[d] * keep + own.block_sums[d] * join;
    highest = merged;
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

// Final norm, head, draws and scores of the rows that asked, logit_rows_ at a time.
void Decoder::finish(int worker, Workspace& own) {
    const StepInput& input = *input_;
    const size_t requests = input.output_rows.size(), n = model_.hidden;
    size_t seen[4] = {};  // requests of each kind so far
    for (size_t base = 0; base < requests; base += logit_rows_) {
        const size_t count = std::min(logit_rows_, requests - base);
        for (size_t i = 0; i < count; ++i) {
            const auto kind = static_cast<OutputKind>(input.output_kinds[base + i]);
            const size_t index = seen[input.output_kinds[base + i]]++;
            float* logits = kind == OutputKind::LOGITS ? result_->logits + index * model_.vocab
                                                       : logits_ + i * model_.vocab;
            own.requests[i] = {kind, index, kind == OutputKind::HIDDEN ? nullptr : logits};
        }
        const Range mine = split(count, worker, pool_->size());
        for (size_t i = mine.begin; i < mine.end; ++i) {
            const float* h = residual_ + static_cast<size_t>(input.output_rows[base + i]) * n;
            kernels_.rms_norm(h, final_norm_.data(), n, model_.norm_eps, final_rows_ + i * n);
        }
        pool_->barrier(worker);
        head_rows(own.requests, count, split(model_.vocab, worker, pool_->size(), ROW_GRAIN));
        pool_->barrier(worker);
        for (size_t i = static_cast<size_t>(worker); i < count;
             i += static_cast<size_t>(pool_->size()))
            finish_request(own.requests[i], final_rows_ + i * n, own);
        pool_->barrier(worker);
    }
}

// Logits of some rows of the head for all requests that need them.
void Decoder::head_rows(const Request* requests, size_t count, Range rows) {
    const size_t n = model_.hidden, row_bytes = n * size_of(head_.type);
    for (size_t row = rows.begin; row < rows.end; row += HEAD_TILE) {
        const size_t height = std::min(HEAD_TILE, rows.end - row);
        for (size_t i = 0; i < count; ++i)
            if (requests[i].logits)
                kernels_.dense_matvec(head_.data + row * row_bytes, head_.type, height, n,
                                      final_rows_ + i * n, requests[i].logits + row);
    }
}

void Decoder::finish_request(const Request& request, const float* hidden, Workspace& own) {
    const size_t index = request.index, samples = input_->plan.count;
    const auto score = [&](size_t row, int32_t target, int32_t top_n) {
        if (top_n < 0) return;
        own.sampler->score(request.logits, target, static_cast<size_t>(top_n),
                           {result_->logprobs + row, result_->top_ids + row * result_->top_width,
                            result_->top_logprobs + row * result_->top_width});
    };
    switch (request.kind) {
        case OutputKind::HIDDEN:
            std::memcpy(result_->hidden + index * model_.hidden, hidden,
                        model_.hidden * sizeof(float));
            break;
        case OutputKind::LOGITS:
            break;
        case OutputKind::SCORE:
            score(samples + index, input_->score_targets[index], input_->score_top_n[index]);
            break;
        case OutputKind::SAMPLE:
            result_->sampled[index] = own.sampler->draw(input_->plan, index, request.logits);
            score(index, result_->sampled[index], input_->plan.top_logprobs[index]);
            break;
    }
}

}  // namespace bitllm
