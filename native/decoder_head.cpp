// The end of a step: final norm, head, draws and scores.
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t HEAD_TILE =
    32;  // rows of the head that stay in cache for all rows that want logits

// From this many bytes on a head is screened by itself. Less stays in the caches of one step and
// the next, where the passes over all logits that screening adds cost more than bytes do.
constexpr size_t WORTH_SCREENING = size_t{32} << 20;

}  // namespace

HeadKind Decoder::chosen_head(HeadKind kind, ValueType type) const {
    if (kind != HeadKind::AUTO) return kind;
    const size_t bytes = model_.vocab * model_.hidden * size_of(type);
    return bytes >= WORTH_SCREENING ? HeadKind::SCREENED : HeadKind::FULL;
}

void Decoder::set_head(DenseMatrix head, HeadKind kind) {
    demand_building();
    head_ = head;
    kind = chosen_head(kind, head.type);
    screen_.reset();
    rounded_head_.reset();
    head_kind_ = HeadKind::FULL;
    if (kind == HeadKind::FULL) return;
    const auto bits =
        kind == HeadKind::SCREENED ? RoundedHead::Bits::FOUR : RoundedHead::Bits::EIGHT;
    rounded_head_.emplace(kernels_, bits, head, model_.vocab, model_.hidden, crowd_);
    if (rounded_head_->empty()) {
        rounded_head_.reset();
        return;
    }
    head_kind_ = kind;
    if (kind != HeadKind::INT8) screen_.emplace(kernels_, head, *rounded_head_, model_.vocab);
}

// Final norm, head, draws and scores of the rows that asked, logit_rows_ at a time.
void Decoder::finish(int worker, Workspace& own) {
    const StepInput& input = *input_;
    const size_t requests = input.output_rows.size();
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
        for (size_t i = mine.begin; i < mine.end; ++i)
            begin_request(i, static_cast<size_t>(input.output_rows[base + i]), own.requests[i]);
        end_stage(Stage::HEAD, worker);
        if (screen_)
            screen_->approximate(count,
                                 split(model_.vocab, worker, pool_->size(), HeadScreen::GRAIN));
        head_rows(own.requests, count, split(model_.vocab, worker, pool_->size(), ROW_GRAIN));
        end_stage(Stage::HEAD, worker);
        if (screen_) screen_rows(count, worker, own);
        for (size_t i = static_cast<size_t>(worker); i < count;
             i += static_cast<size_t>(pool_->size()))
            finish_request(i, own.requests[i], own);
        end_stage(Stage::SAMPLING, worker);
    }
}

// The final norm of a request's row, and how its logits are to be found.
void Decoder::begin_request(size_t slot, size_t output, Request& request) {
    const size_t n = model_.hidden;
    float* hidden = final_rows_ + slot * n;
    kernels_.rms_norm(residual_ + output * n, final_norm_.data(), n, model_.norm_eps, hidden);
    if (!screen_) return;
    if (request.kind == OutputKind::SAMPLE)
        screen_->begin(slot, input_->plan, request.index, hidden, request.logits);
    else
        screen_->pass(slot, request.logits != nullptr);
}

// Logits of some rows of the head for all requests that need all of theirs.
void Decoder::head_rows(const Request* requests, size_t count, Range rows) {
    const size_t n = model_.hidden, row_bytes = n * size_of(head_.type);
    for (size_t row = rows.begin; row < rows.end; row += HEAD_TILE) {
        const size_t height = std::min(HEAD_TILE, rows.end - row);
        for (size_t i = 0; i < count; ++i) {
            if (!(screen_ ? screen_->wants_all(i) : requests[i].logits != nullptr)) continue;
            const float* hidden = final_rows_ + i * n;
            float* out = requests[i].logits + row;
            if (head_kind_ == HeadKind::INT8)
                rounded_head_->logits(hidden, {row, row + height}, out);
            else
                kernels_.dense_matvec(head_.data + row * row_bytes, head_.type, height, n, hidden,
                                      out);
        }
    }
}

// Exact logits where they may matter, until every token is decided.
void Decoder::screen_rows(size_t count, int worker, Workspace& own) {
    const int workers = pool_->size();
    for (;;) {
        for (size_t i = static_cast<size_t>(worker); i < count; i += static_cast<size_t>(workers))
            screen_->advance(i, *own.sampler);
        end_stage(Stage::SAMPLING, worker);
        if (!screen_->pending(count)) return;
        screen_->rescore(count, worker, workers);
        head_rows(own.requests, count, split(model_.vocab, worker, workers, ROW_GRAIN));
        end_stage(Stage::HEAD, worker);
    }
}

void Decoder::finish_request(size_t slot, const Request& request, Workspace& own) {
    const size_t index = request.index, samples = input_->plan.count;
    const auto score = [&](size_t row, int32_t target, int32_t top_n) {
        if (top_n < 0) return;
        own.sampler->score(request.logits, target, static_cast<size_t>(top_n),
                           {result_->logprobs + row, result_->top_ids + row * result_->top_width,
                            result_->top_logprobs + row * result_->top_width});
    };
    switch (request.kind) {
        case OutputKind::HIDDEN:
            std::memcpy(result_->hidden + index * model_.hidden, final_rows_ + slot * model_.hidden,
                        model_.hidden * sizeof(float));
            break;
        case OutputKind::LOGITS:
            break;
        case OutputKind::SCORE:
            score(samples + index, input_->score_targets[index], input_->score_top_n[index]);
            break;
        case OutputKind::SAMPLE:
            result_->sampled[index] = screen_
                                          ? screen_->token(slot)
                                          : own.sampler->draw(input_->plan, index, request.logits);
            score(index, result_->sampled[index], input_->plan.top_logprobs[index]);
            break;
    }
}

}  // namespace bitllm
