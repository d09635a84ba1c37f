// Attention of a step: RoPE, the KV cache, and softmax over its blocks.
//
// A block holds KV_BLOCK_SIZE positions: for each KV head the keys by dimension, [head_dim][32],
// and behind all keys the values by position, [32][head_dim]. In int8, each head's keys, and
// values, are followed by one scale a position.
//
// For each query the blocks of a chunk of CHUNK positions are merged in order, then the chunks in
// order: whoever computes the chunks, the result has the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "decoder.h"
#include "numerics.h"

namespace bitllm {
namespace {

constexpr size_t CHUNK = 256;        // positions that one worker takes at least
constexpr size_t TILE_QUERIES = 64;  // tokens of a tile times heads that share keys
constexpr size_t WIDEN_FROM = 8;     // queries from which on keys and values are widened only once
constexpr size_t UNITS_PER_WORKER = 4;  // fewer pieces of work than that are cut into chunks

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Stores n values `stride` elements apart.
void narrow(const float* values, ValueType type, size_t n, std::byte* out, size_t stride) {
    if (type == ValueType::F32) {
        auto* floats = reinterpret_cast<float*>(out);
        for (size_t i = 0; i < n; ++i) floats[i * stride] = values[i];
    } else {
        auto* bits = reinterpret_cast<uint16_t*>(out);
        for (size_t i = 0; i < n; ++i) bits[i * stride] = bf16_from_f32(values[i]);
    }
}

uintptr_t distance(const void* from, const void* to) {
    return reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from);
}

// Merges the highest score and the sum of weights of later positions into those of earlier ones;
// `keep` and `join` are what sums of values have to be multiplied with.
void merge(float& highest, float& total, float next_highest, float next_total, float& keep,
           float& join) {
    const float merged = std::max(highest, next_highest);
    keep = merged == highest ? 1.0f : exp_f32(highest - merged);
    join = merged == next_highest ? 1.0f : exp_f32(next_highest - merged);
    total = total * keep + next_total * join;
    highest = merged;
}

}  // namespace

// Normalises and turns each head of q and k; rounds k and v into the cache.
void Decoder::turn_and_store(const Layer& layer, int worker, Workspace& own) {
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
        if (is_key) store(layer, token, index - config.heads, head, own);
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

// Rounds the key, and the value kv_width behind it, of a token into the cache.
void Decoder::store(const Layer& layer, size_t token, size_t kv_head, const float* key,
                    Workspace& own) {
    const size_t n = layer.config.head_dim;
    const auto position = static_cast<size_t>(input_->positions[token]);
    const size_t place = position % KV_BLOCK_SIZE;
    const float* value = key + layer.kv_width();
    std::byte* keys = kv_rows(layer, run_of_token_[token], position, kv_head);
    std::byte* values = keys + layer.value_offset;
    const ValueType type = runtime_.kv_type;
    if (type != ValueType::I8) {
        narrow(key, type, n, keys + place * size_of(type), KV_BLOCK_SIZE);
        narrow(value, type, n, values + place * n * size_of(type), 1);
        return;
    }
    if (!all_finite(key, n) || !all_finite(value, n)) spoil(layer);
    auto* codes = reinterpret_cast<int8_t*>(own.codes);
    int32_t sum;
    scales_of(keys, n)[place] = 1.0f / kernels_.quantize(key, n, codes, &sum);
    for (size_t d = 0; d < n; ++d)
        keys[d * KV_BLOCK_SIZE + place] = static_cast<std::byte>(codes[d]);
    scales_of(values, n)[place] = 1.0f / kernels_.quantize(value, n, codes, &sum);
    std::memcpy(values + place * n, codes, n);
}

// The scales behind the int8 keys or values of a head.
float* Decoder::scales_of(std::byte* codes, size_t head_dim) {
    return reinterpret_cast<float*>(codes + KV_BLOCK_SIZE * head_dim);
}

// The keys of one KV head in the block of a position; its values are value_offset behind.
std::byte* Decoder::kv_rows(const Layer& layer, size_t run, size_t position, size_t kv_head) const {
    const int32_t block =
        input_->block_tables[run * input_->block_table_width + position / KV_BLOCK_SIZE];
    return kv_->block(static_cast<size_t>(block)) + layer.kv_offset + kv_head * layer.head_bytes;
}

size_t Decoder::first_seen(const Layer& layer, size_t position) {
    const size_t window = layer.config.window;
    return window == 0 || position < window ? 0 : position + 1 - window;
}

// Where the chunks of each token go, if the step has so few tokens that workers share the chunks of
// one: false if they do not.
bool Decoder::plan_chunks() {
    if (tile_count_ != tokens_) return false;
    size_t chunks = 0;
    for (size_t token = 0; token < tokens_; ++token) {
        first_chunk_[token] = static_cast<uint32_t>(chunks);
        chunks += static_cast<size_t>(input_->positions[token]) / CHUNK + 1;
    }
    first_chunk_[tokens_] = static_cast<uint32_t>(chunks);
    return chunks > tokens_ && chunks <= chunk_capacity_;
}

size_t Decoder::chunks_to_share() const {
    const auto workers = static_cast<size_t>(runtime_.threads);
    return (runtime_.kv_blocks * KV_BLOCK_SIZE + CHUNK - 1) / CHUNK + UNITS_PER_WORKER * workers;
}

// Replaces q by what attention gives. Workers take turns at (tile, KV head), because later tiles of
// a run have more to read; at chunks of it where those are too few; and if there is only one token
// and chunk, they split its heads.
void Decoder::attend(const Layer& layer, int worker, Workspace& own) {
    const LayerConfig& config = layer.config;
    const size_t kv_heads = config.kv_heads, group = config.heads / kv_heads;
    const auto workers = static_cast<size_t>(pool_->size());
    if (shares_chunks_ && tile_count_ * kv_heads < UNITS_PER_WORKER * workers) {
        attend_chunks(layer, worker, own);
        return;
    }
    if (tile_count_ == 1 && tiles_[0].count == 1) {
        const Range mine = split(config.heads, worker, pool_->size());
        for (size_t head = mine.begin; head < mine.end;) {
            const size_t end = std::min(mine.end, (head / group + 1) * group);
            attend_whole(layer, tiles_[0], {head, end}, own);
            head = end;
        }
        return;
    }
    for (size_t unit = static_cast<size_t>(worker); unit < tile_count_ * kv_heads;
         unit += workers) {
        const size_t first = unit % kv_heads * group;
        attend_whole(layer, tiles_[unit / kv_heads], {first, first + group}, own);
    }
}

// All chunks of a tile for heads that share a KV head.
void Decoder::attend_whole(const Layer& layer, const Tile& tile, Range heads, Workspace& own) {
    const size_t n = layer.config.head_dim, count = heads.end - heads.begin;
    const size_t at_once = std::max<size_t>(TILE_QUERIES / count, 1);
    if (tile.count > at_once) {  // more heads to a KV head than a tile has room for
        for (uint32_t i = 0; i < tile.count; ++i)
            attend_whole(layer, {tile.first + i, 1}, heads, own);
        return;
    }
    if (count > TILE_QUERIES) {
        attend_whole(layer, tile, {heads.begin, heads.begin + TILE_QUERIES}, own);
        attend_whole(layer, tile, {heads.begin + TILE_QUERIES, heads.end}, own);
        return;
    }
    const size_t queries = tile.count * count;
    const auto position = static_cast<size_t>(input_->positions[tile.first]);
    const size_t last = position + tile.count - 1;
    clear(own.whole, queries, n);
    for (size_t chunk = first_seen(layer, position) / CHUNK; chunk <= last / CHUNK; ++chunk) {
        attend_chunk(layer, tile, heads, chunk, own);
        for (size_t i = 0; i < queries; ++i) merge_softmax(own.chunk, i, own.whole, i, n);
    }
    finish_softmax(layer, tile, heads, own);
}

// Few tokens with long contexts: workers take turns at chunks, then merge them.
void Decoder::attend_chunks(const Layer& layer, int worker, Workspace& own) {
    const LayerConfig& config = layer.config;
    const size_t n = config.head_dim, group = config.heads / config.kv_heads;
    const auto workers = static_cast<size_t>(pool_->size());
    const size_t chunks = first_chunk_[tokens_];
    size_t token = 0;
    for (size_t unit = static_cast<size_t>(worker); unit < chunks * config.kv_heads;
         unit += workers) {
        const size_t slot = unit / config.kv_heads, first = unit % config.kv_heads * group;
        while (first_chunk_[token + 1] <= slot) ++token;
        const auto position = static_cast<size_t>(input_->positions[token]);
        const size_t chunk = slot - first_chunk_[token];
        if (chunk < first_seen(layer, position) / CHUNK) continue;
        for (size_t head = first; head < first + group; head += TILE_QUERIES) {
            const size_t end = std::min(first + group, head + TILE_QUERIES);
            attend_chunk(layer, {static_cast<uint32_t>(token), 1}, {head, end}, chunk, own);
            for (size_t i = head; i < end; ++i) {
                const size_t place = slot * config.heads + i;
                partials_.highest[place] = own.chunk.highest[i - head];
                partials_.totals[place] = own.chunk.totals[i - head];
                std::copy_n(own.chunk.sums + (i - head) * n, n, partials_.sums + place * n);
            }
        }
    }
    end_stage(Stage::ATTENTION, worker);
    const Range mine = split(tokens_ * config.heads, worker, pool_->size());
    for (size_t unit = mine.begin; unit < mine.end; ++unit) {
        const size_t row = unit / config.heads, head = unit % config.heads;
        const auto position = static_cast<size_t>(input_->positions[row]);
        clear(own.whole, 1, n);
        for (size_t chunk = first_seen(layer, position) / CHUNK; chunk <= position / CHUNK; ++chunk)
            merge_softmax(partials_, (first_chunk_[row] + chunk) * config.heads + head, own.whole,
                          0, n);
        finish_softmax(layer, {static_cast<uint32_t>(row), 1}, {head, head + 1}, own);
    }
}

void Decoder::clear(const Softmax& state, size_t queries, size_t n) {
    std::fill_n(state.highest, queries, LOWEST);
    std::fill_n(state.totals, queries, 0.0f);
    std::fill_n(state.sums, queries * n, 0.0f);
}

// Merges one query of `next`, which saw later positions, into one of `state`.
void Decoder::merge_softmax(const Softmax& next, size_t from, const Softmax& state, size_t to,
                            size_t n) {
    if (next.highest[from] == LOWEST) return;  // saw nothing
    float keep, join;
    merge(state.highest[to], state.totals[to], next.highest[from], next.totals[from], keep, join);
    float* sums = state.sums + to * n;
    const float* more = next.sums + from * n;
    for (size_t d = 0; d < n; ++d) sums[d] = sums[d] * keep + more[d] * join;
}

void Decoder::finish_softmax(const Layer& layer, const Tile& tile, Range heads, Workspace& own) {
    const size_t n = layer.config.head_dim, count = heads.end - heads.begin;
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    for (size_t i = 0; i < tile.count; ++i) {
        for (size_t j = 0; j < count; ++j) {
            float* out = work_ + (tile.first + i) * stride + (heads.begin + j) * n;
            const size_t state = i * count + j;
            for (size_t d = 0; d < n; ++d)
                out[d] = own.whole.sums[state * n + d] / own.whole.totals[state];
        }
    }
}

// Walks the blocks of a chunk once for all tokens of the tile and heads that share a KV head, into
// own.chunk.
void Decoder::attend_chunk(const Layer& layer, const Tile& tile, Range heads, size_t chunk,
                           Workspace& own) {
    const LayerConfig& config = layer.config;
    const size_t n = config.head_dim, count = heads.end - heads.begin;
    const size_t stride = layer.query_width() + 2 * layer.kv_width();
    const size_t run = run_of_token_[tile.first], queries = tile.count * count;
    const size_t kv_head = heads.begin / (config.heads / config.kv_heads);
    const auto position = static_cast<size_t>(input_->positions[tile.first]);
    const size_t last = position + tile.count - 1;
    for (size_t i = 0; i < tile.count; ++i)
        std::copy_n(work_ + (tile.first + i) * stride + heads.begin * n, count * n,
                    own.queries + i * count * n);
    clear(own.chunk, queries, n);

    const size_t begin = std::max(chunk * CHUNK, first_seen(layer, position));
    const size_t end = std::min((chunk + 1) * CHUNK, last + 1);
    for (size_t block = begin / KV_BLOCK_SIZE; block * KV_BLOCK_SIZE < end; ++block) {
        const size_t start = block * KV_BLOCK_SIZE;
        KvBlock kv =
            widened(layer, kv_rows(layer, run, start, kv_head), queries >= WIDEN_FROM, own);
        if (kv.values_ahead && start + KV_BLOCK_SIZE < end)
            kv.keys_ahead =
                distance(kv.values, kv_rows(layer, run, start + KV_BLOCK_SIZE, kv_head));
        if (first_seen(layer, last) <= start && start + KV_BLOCK_SIZE <= position + 1) {
            merge_block(layer, kv, {0, queries}, {0, KV_BLOCK_SIZE}, own);
            continue;
        }
        for (size_t i = 0; i < tile.count; ++i) {
            const size_t from = std::max(first_seen(layer, position + i), start) - start;
            const size_t to = std::min(position + i + 1, start + KV_BLOCK_SIZE);
            if (start + from < to)
                merge_block(layer, kv, {i * count, (i + 1) * count}, {from, to - start}, own);
        }
    }
}

// Keys and values of a block, as floats where so many queries read them that this pays.
Decoder::KvBlock Decoder::widened(const Layer& layer, std::byte* keys, bool many, Workspace& own) {
    const size_t n = layer.config.head_dim, size = KV_BLOCK_SIZE * n;
    const ValueType type = runtime_.kv_type;
    std::byte* values = keys + layer.value_offset;
    KvBlock kv{type, keys, values, nullptr, nullptr, layer.value_offset, 0};
    if (type == ValueType::I8) {
        kv.key_scales = scales_of(keys, n);
        kv.value_scales = scales_of(values, n);
    }
    if (many && type != ValueType::F32) {
        kernels_.widen(keys, type, size, own.widened);
        kernels_.widen(values, type, size, own.widened + size);
        kv.type = ValueType::F32;
        kv.keys = own.widened;
        kv.values = own.widened + size;
        kv.values_ahead = 0;
    }
    return kv;
}

// Merges the places of a block that these queries see into own.chunk.
void Decoder::merge_block(const Layer& layer, const KvBlock& kv, Range queries, Range places,
                          Workspace& own) {
    const LayerConfig& config = layer.config;
    const size_t n = config.head_dim, count = queries.end - queries.begin;
    kernels_.attention_scores(own.queries + queries.begin * n, count, kv.keys, kv.type, n,
                              config.query_scale, kv.values_ahead, own.scores);
    int32_t fits = 1;
    for (size_t i = 0; i < count; ++i) {
        float* scores = own.scores + i * KV_BLOCK_SIZE;
        if (kv.key_scales)
            for (size_t j = 0; j < KV_BLOCK_SIZE; ++j) scores[j] = scores[j] * kv.key_scales[j];
        // The softmax of NaN or of infinity is NaN, which exp may pass over; that of a score of
        // -infinity is 0 unless there is no other.
        for (size_t j = places.begin; j < places.end; ++j)
            fits &= scores[j] <= LARGEST_FLOAT ? 1 : 0;
        float total;
        const float highest = kernels_.block_weights(scores, places.begin, places.end, &total);
        fits &= highest >= -LARGEST_FLOAT ? 1 : 0;
        merge(own.chunk.highest[queries.begin + i], own.chunk.totals[queries.begin + i], highest,
              total, own.keep[i], own.join[i]);
        if (kv.value_scales)
            for (size_t j = 0; j < KV_BLOCK_SIZE; ++j) scores[j] = scores[j] * kv.value_scales[j];
    }
    if (!fits) spoil(layer);
    kernels_.weighted_values(own.scores, count, kv.values, kv.type, places.begin, places.end, n,
                             own.keep, own.join, kv.keys_ahead, own.chunk.sums + queries.begin * n);
}

void Decoder::plan_attention(Planner& plan) {
    size_t widest_head = 0, heads = 0;
    for (const Layer& layer : layers_) {
        widest_head = std::max(widest_head, layer.config.head_dim);
        heads = std::max(heads, layer.config.heads);
    }
    const auto take_softmax = [&](size_t queries) {
        return Softmax{plan.take<float>(queries), plan.take<float>(queries),
                       plan.take<float>(queries * widest_head)};
    };
    chunk_capacity_ = chunks_to_share();
    partials_ = take_softmax(chunk_capacity_ * heads);
    first_chunk_ = plan.take<uint32_t>(runtime_.max_batch_tokens + 1);
    for (Workspace& own : workspaces_) {
        own.queries = plan.take<float>(TILE_QUERIES * widest_head);
        own.scores = plan.take<float>(TILE_QUERIES * KV_BLOCK_SIZE);
        own.keep = plan.take<float>(TILE_QUERIES);
        own.join = plan.take<float>(TILE_QUERIES);
        own.widened = plan.take<float>(2 * KV_BLOCK_SIZE * widest_head);
        own.chunk = take_softmax(TILE_QUERIES);
        own.whole = take_softmax(TILE_QUERIES);
    }
}

}  // namespace bitllm
