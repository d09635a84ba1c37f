// Building a decoder, its KV storage, and the checks of a batch; the step itself is in
// decoder_step.cpp.
#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "platform.h"

namespace bitllm {
namespace {

constexpr const char* LINEAR_TEXT[LINEAR_COUNT] = {"q", "k", "v", "o", "gate", "up", "down"};
// Accumulators are int32 and pass through float32: beyond this they would not be exact.
constexpr size_t LARGEST_INPUT = (size_t{1} << 24) / 127;
constexpr size_t GROUP_GRAIN = 32;  // columns the kernels multiply at once
// So many bytes are believed to be one weight (-1) again and again; more are a hole in a file.
constexpr size_t SUSPICIOUS_ZERO_BYTES = 256;

[[noreturn]] void refuse(const std::string& text) { throw std::invalid_argument(text); }

void demand(bool holds, const char* text) {
    if (!holds) refuse(text);
}

bool rises_to(std::span<const int32_t> offsets, size_t end) {
    return !offsets.empty() && offsets.front() == 0 &&
           std::is_sorted(offsets.begin(), offsets.end()) &&
           static_cast<size_t>(offsets.back()) == end;
}

bool all_below(const int32_t* values, size_t count, size_t bound) {
    return std::all_of(values, values + count, [bound](int32_t value) {
        return value >= 0 && static_cast<size_t>(value) < bound;
    });
}

}  // namespace

Decoder::Decoder(const Kernels& kernels, ModelConfig model, RuntimeConfig runtime)
    : Decoder(kernels, model, runtime, shared_pool(runtime.threads)) {}

Decoder::Decoder(const Kernels& kernels, ModelConfig model, RuntimeConfig runtime,
                 ThreadPool& crowd)
    : kernels_(kernels),
      model_(model),
      runtime_(runtime),
      crowd_(crowd),
      solo_(shared_pool(1)),
      clocks_(static_cast<size_t>(runtime.threads)) {
    demand(model.vocab > 0 && model.hidden > 0, "vocabulary and hidden size must be positive");
    demand(runtime.kv_blocks > 0 && runtime.max_batch_tokens > 0,
           "KV blocks and token rows must be positive");
    demand(runtime.kv_type != ValueType::F16, "KV storage is bf16, fp32 or int8");
}

// What prepare() has measured must stay as it is.
void Decoder::demand_building() const {
    demand(!arena_, "the decoder is prepared; its model cannot be changed any more");
}

void Decoder::set_embedding(DenseMatrix embedding) {
    demand_building();
    embedding_ = embedding;
}

size_t Decoder::add_layer(LayerConfig config) {
    demand_building();
    demand(config.heads > 0 && config.kv_heads > 0 && config.head_dim > 0 &&
               config.heads % config.kv_heads == 0,
           "attention heads cannot share these KV heads");
    demand(2 * config.inverse_frequencies.size() <= config.head_dim,
           "RoPE turns more than a head has");
    Layer layer;
    while (layer.rope_table < rope_tables_.size() &&
           rope_tables_[layer.rope_table].inverse_frequencies != config.inverse_frequencies)
        ++layer.rope_table;
    if (layer.rope_table == rope_tables_.size())
        rope_tables_.push_back({config.inverse_frequencies, nullptr, nullptr});
    layer.config = std::move(config);
    layers_.push_back(std::move(layer));
    return layers_.size() - 1;
}

Decoder::Layer& Decoder::layer_at(size_t index) {
    demand_building();
    if (index >= layers_.size()) refuse("there is no layer " + std::to_string(index));
    return layers_[index];
}

Linear& Decoder::linear_at(size_t layer, LinearName name) {
    return layer_at(layer).linears[static_cast<size_t>(name)];
}

void Decoder::set_final_norm(std::span<const float> gain) {
    demand_building();
    demand(gain.size() == model_.hidden,
           "the final norm must have one gain for each hidden dimension");
    final_norm_.assign(gain.begin(), gain.end());
}

void Decoder::set_vector(size_t layer, VectorName name, std::span<const float> values) {
    layer_at(layer).vectors[static_cast<size_t>(name)].assign(values.begin(), values.end());
}

size_t Decoder::set_linear(size_t layer, LinearName name, const StoredCodes& codes,
                           std::span<const float> scales, size_t group, InputType input) {
    Linear& linear = linear_at(layer, name);
    const size_t out = codes.out, in = codes.in;
    demand(out > 0 && in > 0 && in <= LARGEST_INPUT,
           "a ternary matrix is empty or has too many columns");
    demand(group % GROUP_GRAIN == 0, "groups of columns must be multiples of 32");
    const size_t groups = group ? (in + group - 1) / group : 1;
    demand(scales.size() == out * groups || (group == 0 && scales.size() == 1),
           "a ternary matrix needs one scale, one a row, or one for each group of columns");
    linear.out = out;
    linear.in = in;
    linear.input = input;
    linear.packing = runtime_.packing;
    linear.scales.assign(scales.begin(), scales.end());
    linear.group = group;
    linear.kept = kept_rows(codes);
    const size_t rows = linear.kept.empty() ? out : linear.kept.back();
    const std::span<std::byte> packed = packed_.take(rows * packed_row_bytes(linear.packing, in));
    linear.packed = packed;
    crowd_.parallel([&](int worker, int workers) {
        const Range mine = split(codes.rows(), worker, workers);
        pack(codes, linear.packing, mine.begin, mine.end,
             linear.kept.empty() ? nullptr : linear.kept.data(),
             reinterpret_cast<uint8_t*>(packed.data()));
    });
    return rows;
}

// Linear::kept of a matrix, once its bits are known to be codes.
std::vector<uint32_t> Decoder::kept_rows(const StoredCodes& codes) {
    std::vector<uint8_t> zero(codes.out);
    std::atomic<bool> codes_only = true, all_bits_0 = true;
    crowd_.parallel([&](int worker, int workers) {
        const Range mine = split(codes.rows(), worker, workers);
        const StoredRows found = examine(codes, mine.begin, mine.end, zero.data());
        if (!found.codes_only) codes_only = false;
        if (!found.all_bits_0) all_bits_0 = false;
    });
    if (!codes_only)
        throw std::domain_error("packed weights hold the bits 11, which are no ternary code");
    if (codes.layout == Layout::ROW_STRIDED && all_bits_0 &&
        codes.rows() * codes.row_bytes() >= SUSPICIOUS_ZERO_BYTES)
        throw std::domain_error("all bytes are zero, so every weight would be -1");
    std::vector<uint32_t> kept;
    if (std::find(zero.begin(), zero.end(), 1) == zero.end()) return kept;
    kept.reserve(codes.out + 1);
    kept.push_back(0);
    for (const uint8_t all_zero : zero) kept.push_back(kept.back() + (all_zero ? 0 : 1));
    return kept;
}

void Decoder::set_linear_norm(size_t layer, LinearName name, std::span<const float> gain,
                              float eps) {
    Linear& linear = linear_at(layer, name);
    linear.norm.assign(gain.begin(), gain.end());
    linear.norm_eps = eps;
}

void Decoder::set_linear_bias(size_t layer, LinearName name, std::span<const float> bias) {
    linear_at(layer, name).bias.assign(bias.begin(), bias.end());
}

void Decoder::check_layer(size_t index) const {
    const Layer& layer = layers_[index];
    const std::string place = "layer " + std::to_string(index) + ": ";
    const size_t hidden = model_.hidden, ffn = layer.ffn_width();
    const size_t query = layer.query_width(), kv = layer.kv_width();
    const size_t shapes[LINEAR_COUNT][2] = {{query, hidden}, {kv, hidden},  {kv, hidden},
                                            {hidden, query}, {ffn, hidden}, {ffn, hidden},
                                            {hidden, ffn}};
    for (size_t i = 0; i < LINEAR_COUNT; ++i) {
        const Linear& linear = layer.linears[i];
        if (linear.out == 0 || linear.out != shapes[i][0] || linear.in != shapes[i][1])
            refuse(place + LINEAR_TEXT[i] + " is missing or has the wrong shape");
        if (!linear.norm.empty() && linear.norm.size() != linear.in)
            refuse(place + LINEAR_TEXT[i] + ".norm has the wrong length");
        if (!linear.bias.empty() && linear.bias.size() != linear.out)
            refuse(place + LINEAR_TEXT[i] + ".bias has the wrong length");
    }
    const size_t head = layer.config.head_dim;
    const size_t lengths[VECTOR_COUNT] = {hidden, hidden, query, ffn, head, head, hidden, hidden};
    for (size_t i = 0; i < VECTOR_COUNT; ++i)
        if (!layer.vectors[i].empty() && layer.vectors[i].size() != lengths[i])
            refuse(place + "a norm has the wrong length");
}

void Decoder::lay_out_kv() {
    const size_t scale_bytes =
        runtime_.kv_type == ValueType::I8 ? KV_BLOCK_SIZE * sizeof(float) : 0;
    size_t block_bytes = 0;
    for (Layer& layer : layers_) {
        layer.head_bytes = align_up(
            KV_BLOCK_SIZE * layer.config.head_dim * size_of(runtime_.kv_type) + scale_bytes);
        layer.kv_offset = block_bytes;
        layer.value_offset = layer.config.kv_heads * layer.head_bytes;
        block_bytes += 2 * layer.value_offset;
    }
    kv_.emplace(runtime_.kv_blocks, block_bytes);
}

void Decoder::prepare() {
    demand_building();
    demand(embedding_.data && head_.data && !final_norm_.empty(),
           "embedding, head or final norm is missing");
    demand(!layers_.empty(), "a model needs at least one layer");
    for (size_t index = 0; index < layers_.size(); ++index) check_layer(index);
    matrix_work_ = attention_work_ = 0;
    for (const Layer& layer : layers_) {
        for (const Linear& linear : layer.linears) matrix_work_ += linear.out * linear.in;
        attention_work_ += 2 * layer.query_width();
    }
    lay_out_kv();
    arena_.emplace(plan_scratch(nullptr));
    plan_scratch(&*arena_);
    std::fill_n(last_writer_, runtime_.kv_blocks, uint64_t{0});
}

size_t Decoder::planned_scratch(ModelConfig model, RuntimeConfig runtime, HeadKind head,
                                ValueType head_type, std::span<const LayerShape> layers,
                                std::span<const size_t> rope_pairs) {
    demand(runtime.threads > 0 && !layers.empty(), "threads and layers must be positive");
    Decoder decoder(best_kernels(), model, runtime, shared_pool(1));
    decoder.head_kind_ = decoder.chosen_head(head, head_type);
    for (const LayerShape& shape : layers) {
        demand(shape.int8_inputs || shape.float_inputs, "a layer has inputs of no type");
        LayerConfig config;
        config.heads = shape.heads;
        config.kv_heads = shape.kv_heads;
        config.head_dim = shape.head_dim;
        Layer& layer = decoder.layers_[decoder.add_layer(std::move(config))];
        for (Linear& linear : layer.linears)
            linear.input = shape.int8_inputs ? InputType::INT8 : InputType::FLOAT;
        if (shape.float_inputs) layer.linears[0].input = InputType::FLOAT;
        if (shape.own_norms) layer.linears[0].norm.resize(1);
        layer.linears[static_cast<size_t>(LinearName::DOWN)].in = shape.ffn;
    }
    decoder.rope_tables_.clear();
    for (const size_t pairs : rope_pairs)
        decoder.rope_tables_.push_back({std::vector<float>(pairs), nullptr, nullptr});
    return decoder.plan_scratch(nullptr);
}

size_t Decoder::packed_bytes(LinearName name) const {
    size_t bytes = 0;
    for (const Layer& layer : layers_) bytes += layer.linear(name).packed.size();
    return bytes;
}

size_t Decoder::weight_bytes() const {
    size_t floats = final_norm_.size(), bytes = 0;
    for (const Layer& layer : layers_) {
        for (const auto& vector : layer.vectors) floats += vector.size();
        for (const Linear& linear : layer.linears) {
            floats += linear.scales.size() + linear.bias.size() + linear.norm.size();
            bytes += linear.packed.size() + linear.kept.size() * sizeof(uint32_t);
        }
    }
    if (rounded_head_) bytes += rounded_head_->bytes();
    return bytes + floats * sizeof(float);
}

void Decoder::check(const StepInput& input) const {
    demand(arena_.has_value(), "prepare() was not called");
    const size_t tokens = input.token_ids.size();
    demand(tokens > 0 && tokens <= runtime_.max_batch_tokens,
           "a step has no token rows, or too many");
    demand(input.positions.size() == tokens, "positions must have one entry for each token");
    demand(rises_to(input.run_offsets, tokens),
           "run_offsets must rise from 0 to the number of tokens");
    demand(input.adapter_slots.size() + 1 == input.run_offsets.size() &&
               std::all_of(input.adapter_slots.begin(), input.adapter_slots.end(),
                           [this](int32_t slot) { return slot == -1 || slot_is_loaded(slot); }),
           "adapter_slots must be -1, or a slot in use, for each run");
    demand(all_below(input.token_ids.data(), tokens, model_.vocab),
           "a token id is outside the vocabulary");
    for (size_t run = 0; run + 1 < input.run_offsets.size(); ++run) {
        const auto begin = static_cast<size_t>(input.run_offsets[run]);
        const auto end = static_cast<size_t>(input.run_offsets[run + 1]);
        demand(begin < end, "a run is empty");
        for (size_t token = begin; token < end; ++token)
            demand(input.positions[token] >= 0 &&
                       static_cast<size_t>(input.positions[token] - input.positions[begin]) ==
                           token - begin,
                   "positions of a run must be consecutive and not negative");
        const size_t blocks = static_cast<size_t>(input.positions[end - 1]) / KV_BLOCK_SIZE + 1;
        demand(blocks <= input.block_table_width &&
                   all_below(input.block_tables + run * input.block_table_width, blocks,
                             runtime_.kv_blocks),
               "a block table does not name every block up to the last position of its run");
        const int32_t* table = input.block_tables + run * input.block_table_width;
        for (size_t i = static_cast<size_t>(input.positions[begin]) / KV_BLOCK_SIZE; i < blocks;
             ++i) {
            uint64_t& writer = last_writer_[table[i]];
            demand(writer != step_, "a KV block would be written in two places at once");
            writer = step_;
        }
    }
}

void Decoder::check_outputs(const StepInput& input, const StepOutput& output) const {
    demand(input.output_rows.size() == input.output_kinds.size(),
           "output rows and kinds differ in number");
    demand(all_below(input.output_rows.data(), input.output_rows.size(), input.token_ids.size()),
           "an output row is no token row");
    size_t counts[4] = {};
    for (const uint8_t kind : input.output_kinds) {
        demand(kind < 4, "an output kind is unknown");
        ++counts[kind];
    }
    const size_t scores = counts[static_cast<size_t>(OutputKind::SCORE)];
    demand(input.score_targets.size() == scores && input.score_top_n.size() == scores,
           "score_targets and score_top_n must have one entry for each SCORE request");
    demand(input.plan.count == counts[static_cast<size_t>(OutputKind::SAMPLE)],
           "the plan must have one entry for each SAMPLE request");
    demand(all_below(input.score_targets.data(), scores, model_.vocab),
           "a score target is outside the vocabulary");
    demand(all_below(input.score_top_n.data(), scores, output.top_width + 1),
           "score_top_n is negative or exceeds the output's width");
    for (size_t i = 0; i < input.plan.count; ++i)
        demand(input.plan.top_logprobs[i] <= static_cast<int64_t>(output.top_width),
               "top_logprobs exceeds the output's width");
    check_plan(input.plan);
}

void Decoder::check_plan(const SamplePlan& plan) const {
    if (plan.count == 0) return;
    for (size_t i = 0; i < plan.count; ++i) {
        demand(std::isfinite(plan.temperature[i]) && plan.temperature[i] >= 0.0f,
               "temperature must be finite and not negative");
        demand(plan.top_k[i] >= 0, "top_k must not be negative");
        demand(plan.top_p[i] > 0.0f && plan.top_p[i] <= 1.0f, "top_p must lie in (0, 1]");
        demand(plan.min_p[i] >= 0.0f && plan.min_p[i] <= 1.0f, "min_p must lie in [0, 1]");
        demand(plan.typical_p[i] > 0.0f && plan.typical_p[i] <= 1.0f,
               "typical_p must lie in (0, 1]");
        demand(plan.repetition_penalty[i] > 0.0f, "repetition_penalty must be positive");
        demand(plan.choice[i] >= 0 && plan.position[i] >= 0,
               "choice and position must not be negative");
        demand(plan.mask_rows[i] >= -1 && plan.mask_rows[i] < static_cast<int64_t>(plan.mask_count),
               "mask_rows names a row that is not there");
    }
    demand(rises_to({plan.seen_offsets, plan.count + 1}, plan.seen_count) &&
               all_below(plan.seen_ids, plan.seen_count, model_.vocab),
           "seen_offsets or seen_ids of the plan are out of bounds");
    demand(rises_to({plan.bias_offsets, plan.count + 1}, plan.bias_count) &&
               all_below(plan.bias_ids, plan.bias_count, model_.vocab),
           "bias_offsets or bias_ids of the plan are out of bounds");
    demand(plan.mask_count == 0 || plan.mask_words == (model_.vocab + 31) / 32,
           "a mask row must have a bit for each id of the vocabulary");
}

void Decoder::check_blocks(const int32_t* blocks, size_t count) const {
    demand(arena_.has_value(), "prepare() was not called");
    if (!all_below(blocks, count, kv_->blocks()))
        throw std::out_of_range("a KV block is not there");
}

void Decoder::copy_blocks(const int32_t* pairs, size_t count) {
    const std::lock_guard lock(mutex_);
    check_blocks(pairs, 2 * count);
    for (size_t i = 0; i < count; ++i)
        kv_->copy(static_cast<size_t>(pairs[2 * i]), static_cast<size_t>(pairs[2 * i + 1]));
}

void Decoder::read_blocks(std::span<const int32_t> blocks, std::byte* out) {
    const std::lock_guard lock(mutex_);
    check_blocks(blocks.data(), blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i)
        std::memcpy(out + i * kv_->block_bytes(), kv_->block(static_cast<size_t>(blocks[i])),
                    kv_->block_bytes());
}

void Decoder::write_blocks(std::span<const int32_t> blocks, const std::byte* data) {
    const std::lock_guard lock(mutex_);
    check_blocks(blocks.data(), blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i)
        std::memcpy(kv_->block(static_cast<size_t>(blocks[i])), data + i * kv_->block_bytes(),
                    kv_->block_bytes());
}

}  // namespace bitllm
