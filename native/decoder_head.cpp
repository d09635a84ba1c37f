// The end of a step: final norm, head, draws and scores.
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t HEAD_TILE =
    32;  // rows of the head that stay in cache for all rows that want logits
}  // namespace

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
        end_stage(Stage::HEAD, worker);
        head_rows(own.requests, count, split(model_.vocab, worker, pool_->size(), ROW_GRAIN));
        end_stage(Stage::HEAD, worker);
        for (size_t i = static_cast<size_t>(worker); i < count;
             i += static_cast<size_t>(pool_->size()))
            finish_request(own.requests[i], final_rows_ + i * n, own);
        end_stage(Stage::SAMPLING, worker);
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
