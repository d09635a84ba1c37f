// The computation of one step. All workers run run_step() together; a barrier ends each stage, and
// within a stage workers take disjoint tokens, heads or rows of a matrix.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t TILE_TOKENS = 16;  // tokens that go through a KV block together
constexpr size_t LOGIT_ROWS = 8;    // at least this many rows of logits at a time

// A layer has nine barriers. Other threads are asked for help from this many multiplications
// between two barriers on (some 10 us of one core): below, waiting for each other would cost more
// than it saves.
constexpr size_t BARRIERS = 9;
constexpr size_t WORTH_SHARING = 100'000;

constexpr LinearName QKV[] = {LinearName::Q, LinearName::K, LinearName::V};
constexpr LinearName OUT[] = {LinearName::O};
constexpr LinearName GATE_UP[] = {LinearName::GATE, LinearName::UP};
constexpr LinearName DOWN[] = {LinearName::DOWN};

}  // namespace

size_t Decoder::plan_scratch(Arena* arena) {
    size_t work_width = 0, input_width = model_.hidden;
    bool own_norms = false, quantized = false, floats = false;
    for (const Layer& layer : layers_) {
        work_width = std::max(
            {work_width, layer.query_width() + 2 * layer.kv_width(), 2 * layer.ffn_width()});
        input_width = std::max({input_width, layer.query_width(), layer.ffn_width()});
        for (const Linear& linear : layer.linears) {
            own_norms = own_norms || !linear.norm.empty();
            (linear.input == InputType::INT8 ? quantized : floats) = true;
        }
    }
    const size_t tokens = runtime_.max_batch_tokens;
    input_width_ = input_width;
    logit_rows_ =
        std::min(tokens, std::max<size_t>(LOGIT_ROWS, static_cast<size_t>(runtime_.threads)));

    Planner plan{arena};
    residual_ = plan.take<float>(tokens * model_.hidden);
    block_out_ = plan.take<float>(tokens * model_.hidden);
    work_ = plan.take<float>(tokens * work_width);
    for (size_t i = 0; i < (own_norms ? inputs_.size() : 1); ++i) {
        Inputs& input = inputs_[i];
        input.values = plan.take<int8_t>(quantized ? tokens * padded_columns(input_width) : 0);
        input.scales = plan.take<float>(quantized ? tokens : 0);
        input.sums = plan.take<int32_t>(quantized ? tokens : 0);
        input.floats = plan.take<float>(floats ? tokens * input_width : 0);
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
    for (size_t worker = 0; worker < workspaces_.size(); ++worker) {
        Workspace& own = workspaces_[worker];
        own.row = plan.take<float>(input_width);
        own.normed = plan.take<float>(own_norms ? input_width : 0);
        own.accumulators = plan.take<int32_t>(ACCUMULATORS);
        own.codes = plan.take<uint8_t>((quantized ? ROW_TILE : 1) * padded_columns(input_width));
        own.signed_codes = plan.take<int8_t>(floats ? ROW_TILE * input_width : 0);
        own.requests = plan.take<Request>(logit_rows_);
        // More workers than rows of logits never draw at once.
        if (worker >= logit_rows_) continue;
        if (arena) own.sampler.emplace(kernels_, model_.vocab, *arena);
        plan.bytes += Sampler::scratch_bytes(model_.vocab);
    }
    if (head_kind_ == HeadKind::SCREENED || head_kind_ == HeadKind::INT8_SCREENED) {
        const auto bits =
            head_kind_ == HeadKind::SCREENED ? RoundedHead::Bits::FOUR : RoundedHead::Bits::EIGHT;
        plan.bytes += HeadScreen::scratch_bytes(bits, model_.vocab, model_.hidden, logit_rows_);
        if (arena) screen_->take_scratch(*arena, logit_rows_);
    }
    plan_attention(plan);
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
    adapts_ = std::any_of(input.adapter_slots.begin(), input.adapter_slots.end(),
                          [](int32_t slot) { return slot >= 0; });
    shares_chunks_ = plan_chunks();
    pool_ = &pool_for(input);
    spoilt_layer_.store(layers_.size(), std::memory_order_relaxed);
    const auto start = std::chrono::steady_clock::now();
    pool_->parallel([this](int worker, int) { run_step(worker); });
    step_seconds_ +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const size_t spoilt = spoilt_layer_.load(std::memory_order_relaxed);
    if (spoilt < layers_.size())
        throw std::overflow_error("layer " + std::to_string(spoilt) +
                                  ": activations hold NaN or infinity");
}

// Remembers the first layer that was given, or made, numbers that are none. The step goes on, so
// that all workers come to its barriers.
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
    StageClock& clock = clocks_[static_cast<size_t>(worker)];
    clock.start();
    const Range mine = split(tokens_, worker, pool_->size());
    for (size_t token = mine.begin; token < mine.end; ++token) {
        embed(token);
        compute_rope(token);
    }
    clock.lap(Stage::EMBED);
    for (const Layer& layer : layers_) {
        attention_block(layer, worker, own);
        ffn_block(layer, worker, own);
    }
    end_stage(Stage::QUANTIZE, worker);
    finish(worker, own);
}

// What was done since the last stage ended belongs to `stage`; then all workers meet.
void Decoder::end_stage(Stage stage, int worker) {
    StageClock& clock = clocks_[static_cast<size_t>(worker)];
    clock.lap(stage);
    pool_->barrier(worker);
    clock.lap(Stage::WAIT);
}

void Decoder::measure_stages(bool on) {
    const std::lock_guard lock(mutex_);
    for (StageClock& clock : clocks_) clock.enable(on);
    step_seconds_ = 0;
}

double Decoder::step_seconds() {
    const std::lock_guard lock(mutex_);
    return step_seconds_;
}

std::array<double, STAGE_COUNT> Decoder::stage_seconds() {
    const std::lock_guard lock(mutex_);
    std::array<double, STAGE_COUNT> seconds{};
    double workers = 0;
    for (const StageClock& clock : clocks_) {
        double all = 0;
        for (size_t stage = 0; stage < STAGE_COUNT; ++stage) {
            seconds[stage] += clock.spent()[stage];
            all += clock.spent()[stage];
        }
        workers += all > 0 ? 1 : 0;
    }
    for (double& stage : seconds) stage /= std::max(workers, 1.0);
    return seconds;
}

// h += post_attn_norm(o(attn_sub_norm(attention(q, k, v of attn_norm(h)))))
void Decoder::attention_block(const Layer& layer, int worker, Workspace& own) {
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    const Range mine = split(tokens_, worker, pool_->size());
    for (size_t token = mine.begin; token < mine.end; ++token)
        prepare_inputs(layer, QKV, token, residual_ + token * model_.hidden,
                       layer.vector(VectorName::ATTN_NORM), own);
    end_stage(Stage::QUANTIZE, worker);
    if (adapts_) {
        read_adapters(layer, QKV, worker);
        end_stage(Stage::QKV, worker);
    }
    project(layer, worker, own);
    end_stage(Stage::QKV, worker);
    turn_and_store(layer, worker, own);
    end_stage(Stage::ATTENTION, worker);
    attend(layer, worker, own);  // replaces q
    end_stage(Stage::ATTENTION, worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        prepare_inputs(layer, OUT, token, work_ + token * stride,
                       layer.vector(VectorName::ATTN_SUB_NORM), own);
    end_stage(Stage::QUANTIZE, worker);
    if (adapts_) {
        read_adapters(layer, OUT, worker);
        end_stage(Stage::O, worker);
    }
    multiply_all(layer, LinearName::O, block_out_, worker, own);
    end_stage(Stage::O, worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        add_to_residual(token, layer.vector(VectorName::POST_ATTN_NORM), layer.config.norm_eps);
}

// h += post_ffn_norm(down(ffn_sub_norm(act(gate(x)) * up(x)))), x = ffn_norm(h)
void Decoder::ffn_block(const Layer& layer, int worker, Workspace& own) {
    const size_t stride = 2 * layer.ffn_width();
    const Range mine = split(tokens_, worker, pool_->size());
    for (size_t token = mine.begin; token < mine.end; ++token)
        prepare_inputs(layer, GATE_UP, token, residual_ + token * model_.hidden,
                       layer.vector(VectorName::FFN_NORM), own);
    end_stage(Stage::QUANTIZE, worker);
    if (adapts_) {
        read_adapters(layer, GATE_UP, worker);
        end_stage(Stage::GATE_UP, worker);
    }
    expand(layer, worker, own);
    end_stage(Stage::GATE_UP, worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        prepare_inputs(layer, DOWN, token, work_ + token * stride,
                       layer.vector(VectorName::FFN_SUB_NORM), own);
    end_stage(Stage::QUANTIZE, worker);
    if (adapts_) {
        read_adapters(layer, DOWN, worker);
        end_stage(Stage::DOWN, worker);
    }
    multiply_all(layer, LinearName::DOWN, block_out_, worker, own);
    end_stage(Stage::DOWN, worker);
    for (size_t token = mine.begin; token < mine.end; ++token)
        add_to_residual(token, layer.vector(VectorName::POST_FFN_NORM), layer.config.norm_eps);
}

void Decoder::embed(size_t token) {
    const size_t n = model_.hidden;
    float* h = residual_ + token * n;
    const size_t row_bytes = n * size_of(embedding_.type);
    kernels_.widen(embedding_.data + static_cast<size_t>(input_->token_ids[token]) * row_bytes,
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

}  // namespace bitllm
