// Low-rank adapters of a decoder: slots, scratch, and their two products in a step.
//
// A stage with adapters has two parts with a barrier between them: A x, whose rows the workers
// share, then the products of the stage, to whose rows each worker adds its rows of B (A x).
#include <algorithm>
#include <stdexcept>

#include "decoder.h"

namespace bitllm {

size_t Decoder::plan_adapters(Arena* arena, AdapterScratch& scratch) const {
    const size_t tokens = runtime_.max_batch_tokens;
    Planner plan{arena};
    scratch.inputs = plan.take<float>(tokens * input_width_);
    scratch.low = plan.take<float>(tokens * LINEARS_OF_A_STAGE * scratch.rank);
    return plan.bytes;
}

size_t Decoder::more_adapter_scratch(size_t rank) {
    const std::lock_guard lock(mutex_);
    AdapterScratch scratch;
    scratch.rank = rank;
    const size_t bytes = plan_adapters(nullptr, scratch), held = adapter_scratch_.arena.capacity();
    return bytes > held ? bytes - held : 0;
}

size_t Decoder::load_adapter(std::shared_ptr<const Adapter> adapter) {
    if (!arena_ || !adapter || adapter->layers() != layers_.size())
        throw std::invalid_argument("the adapter does not have the layers of the model");
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        for (size_t i = 0; i < LINEAR_COUNT; ++i) {
            const LowRank& update = adapter->at(layer, static_cast<LinearName>(i));
            const Linear& linear = layers_[layer].linears[i];
            if (update.rank && (update.out != linear.out || update.in != linear.in))
                throw std::invalid_argument("a matrix of the adapter has the wrong shape");
        }
    }
    AdapterScratch scratch;
    scratch.rank = adapter->largest_rank();
    const std::lock_guard lock(mutex_);
    const bool grows = scratch.rank > adapter_scratch_.rank || !adapter_scratch_.inputs;
    if (grows) {
        scratch.arena = Arena(plan_adapters(nullptr, scratch));
        plan_adapters(&scratch.arena, scratch);
    }
    const auto free = std::find(adapters_.begin(), adapters_.end(), nullptr);
    const auto slot = static_cast<size_t>(free - adapters_.begin());
    if (free == adapters_.end()) adapters_.emplace_back();
    adapters_[slot] = std::move(adapter);
    if (grows) adapter_scratch_ = std::move(scratch);
    return slot;
}

void Decoder::unload_adapter(size_t slot) {
    const std::lock_guard lock(mutex_);
    if (slot >= adapters_.size() || !adapters_[slot])
        throw std::out_of_range("an adapter slot is empty");
    adapters_[slot].reset();
    const auto held = [](const auto& adapter) { return adapter != nullptr; };
    if (std::none_of(adapters_.begin(), adapters_.end(), held)) adapter_scratch_ = {};
}

bool Decoder::slot_is_loaded(int32_t slot) const {
    return slot >= 0 && static_cast<size_t>(slot) < adapters_.size() &&
           adapters_[static_cast<size_t>(slot)];
}

// The adapter of a token's run, or null.
const Adapter* Decoder::adapter_of(size_t token) const {
    const int32_t slot = input_->adapter_slots[run_of_token_[token]];
    return slot < 0 ? nullptr : adapters_[static_cast<size_t>(slot)].get();
}

// What the adapter of a token adds to a linear, or null.
const LowRank* Decoder::update_of(const Layer& layer, LinearName name, size_t token) const {
    const Adapter* adapter = adapter_of(token);
    if (!adapter) return nullptr;
    const LowRank& update = adapter->at(static_cast<size_t>(&layer - layers_.data()), name);
    return update.rank ? &update : nullptr;
}

// Where A x of a token is kept from one part of a stage to the other.
float* Decoder::low_of(size_t token, LinearName name) const {
    size_t place = 0;
    if (name == LinearName::K || name == LinearName::UP) place = 1;
    if (name == LinearName::V) place = 2;
    return adapter_scratch_.low + (token * LINEARS_OF_A_STAGE + place) * adapter_scratch_.rank;
}

// A worker's rows of A x, of all linears that share an input. Which worker has which part changes
// from token to token, so that all of them have work where ranks are small.
void Decoder::read_adapters(const Layer& layer, std::span<const LinearName> names, int worker) {
    const int workers = pool_->size();
    for (size_t token = 0; token < tokens_; ++token) {
        const float* x = adapter_scratch_.inputs + token * input_width_;
        const int part =
            static_cast<int>((static_cast<size_t>(worker) + token) % static_cast<size_t>(workers));
        for (const LinearName name : names) {
            const LowRank* update = update_of(layer, name, token);
            if (!update) continue;
            const Range rows = split(update->rank, part, workers);
            const size_t row_bytes = update->in * size_of(update->a_type);
            kernels_.dense_matvec(update->a.data() + rows.begin * row_bytes, update->a_type,
                                  rows.end - rows.begin, update->in, x,
                                  low_of(token, name) + rows.begin);
        }
    }
}

void Decoder::add_adapters(const Layer& layer, LinearName name, Range rows, float* out,
                           size_t stride) {
    for (size_t token = 0; token < tokens_; ++token)
        if (const LowRank* update = update_of(layer, name, token))
            add_low_rank(kernels_, *update, low_of(token, name), rows.begin, rows.end,
                         out + token * stride);
}

}  // namespace bitllm
