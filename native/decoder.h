// The decoder step: embedding, all layers, head and sampling for a batch of token runs, in one
// call.
//
// Bit-identical results for any thread count, chunking of a prompt, batch composition and
// instruction set: work is split over threads by rows, tokens and heads only, so no float reduction
// depends on the split; attention sums over KV blocks of 32 absolute positions, merged in order of
// position; keys and values are rounded into the cache before attention reads them. The normative
// text is src/bitllm/backends/reference.
//
// A step allocates nothing: its scratch is an arena sized by prepare().
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "adapter.h"
#include "head_screen.h"
#include "kernels/kernels.h"
#include "linear_name.h"
#include "memory.h"
#include "packing.h"
#include "rounded_head.h"
#include "sampling.h"
#include "stage_clock.h"
#include "thread_pool.h"

namespace bitllm {

inline constexpr size_t size_of(ValueType type) { return VALUE_BYTES[static_cast<size_t>(type)]; }

// A cache line of floats: rows that neighbours write share none.
inline constexpr size_t ROW_GRAIN = 16;
// What a worker can hold of a product, and rows it unpacks together.
inline constexpr size_t ACCUMULATORS = 4096;
inline constexpr size_t ROW_TILE = 32;
inline constexpr size_t LINEARS_OF_A_STAGE = 3;  // that share an input: q, k and v

struct ModelConfig {
    size_t vocab = 0;
    size_t hidden = 0;
    float norm_eps = 0.0f;
    float embedding_scale = 1.0f;
};

// How logits are computed; LoadOptions.head in base.py says what each is.
enum class HeadKind : uint8_t { AUTO, FULL, SCREENED, INT8_SCREENED, INT8 };

struct RuntimeConfig {
    size_t kv_blocks = 0;
    ValueType kv_type = ValueType::BF16;  // BF16, F32 or I8
    int threads = 1;
    size_t max_batch_tokens = 1;
    Packing packing = Packing::TWO_BIT;  // of all ternary matrices
};

// What a linear multiplies its codes with: inputs rounded to 8 bits, or as they are.
enum class InputType : uint8_t { INT8, FLOAT };

// One ternary projection: y = rescale(packed @ quantize(norm(x))) + bias, or with inputs that are
// not quantised y = (packed @ norm(x)) * scale + bias. Empty vectors = not there.
struct Linear {
    size_t out = 0;
    size_t in = 0;
    InputType input = InputType::INT8;
    Packing packing = Packing::TWO_BIT;
    std::span<const std::byte> packed;  // rows as in kernels.h; only those that are not all zero
    std::vector<uint32_t> kept;         // [out + 1]: rows kept before each row; empty = all of them
    std::vector<float> scales;          // 1, `out`, or [out][groups]
    size_t group = 0;                   // columns that share a scale; 0 = all of a row
    std::vector<float> bias;            // [out]
    std::vector<float> norm;            // [in]
    float norm_eps = 0.0f;
};

enum class VectorName : uint8_t {
    ATTN_NORM,
    FFN_NORM,
    ATTN_SUB_NORM,
    FFN_SUB_NORM,
    Q_NORM,
    K_NORM,
    POST_ATTN_NORM,
    POST_FFN_NORM
};
inline constexpr size_t VECTOR_COUNT = 8;

struct LayerConfig {
    size_t heads = 0;
    size_t kv_heads = 0;
    size_t head_dim = 0;
    Activation activation = Activation::RELU2;
    float norm_eps = 0.0f;
    float query_scale = 1.0f;
    size_t window = 0;  // positions a token sees, itself included; 0 = all
    std::vector<float>
        inverse_frequencies;  // of RoPE; turns the first 2 * size() dimensions of a head
};

// The work of one step; base.py says what each array means. Everything is borrowed.
struct StepInput {
    std::span<const int32_t> token_ids;
    std::span<const int32_t> positions;
    std::span<const int32_t> run_offsets;
    std::span<const int32_t> adapter_slots;
    const int32_t* block_tables = nullptr;  // [runs, block_table_width]
    size_t block_table_width = 0;
    std::span<const int32_t> output_rows;
    std::span<const uint8_t> output_kinds;
    std::span<const int32_t> score_targets;
    std::span<const int32_t> score_top_n;
    SamplePlan plan;
};

enum class OutputKind : uint8_t { HIDDEN = 0, LOGITS = 1, SCORE = 2, SAMPLE = 3 };

// Where results go, sized and padded by the caller as base.py says.
struct StepOutput {
    float* hidden = nullptr;
    float* logits = nullptr;
    int32_t* sampled = nullptr;
    float* logprobs = nullptr;
    int32_t* top_ids = nullptr;
    float* top_logprobs = nullptr;
    size_t top_width = 0;
};

// What scratch depends on in a layer, over all of its linears.
struct LayerShape {
    size_t heads = 0;
    size_t kv_heads = 0;
    size_t head_dim = 0;
    size_t ffn = 0;
    bool own_norms = false;  // of some linear
    bool int8_inputs = true;
    bool float_inputs = false;
};

class Decoder {
  public:
    Decoder(const Kernels& kernels, ModelConfig model, RuntimeConfig runtime);

    // The scratch_bytes() of a decoder once it is prepared, without making one or starting threads.
    // `layers`: each shape once is enough. `rope_pairs`: dimensions turned, halved, for each
    // distinct table of frequencies. A head that turns out not to be fit for rounding takes less.
    // Throws std::invalid_argument.
    static size_t planned_scratch(ModelConfig model, RuntimeConfig runtime, HeadKind head,
                                  ValueType head_type, std::span<const LayerShape> layers,
                                  std::span<const size_t> rope_pairs);

    // Building, in any order, before prepare(). All copy but set_embedding and set_head, and throw
    // std::invalid_argument where sizes contradict each other, or after prepare().
    size_t add_layer(LayerConfig config);
    void set_embedding(DenseMatrix embedding);
    // Rounds a copy of the head where its kind needs one.
    void set_head(DenseMatrix head, HeadKind kind = HeadKind::FULL);
    void set_final_norm(std::span<const float> gain);
    void set_vector(size_t layer, VectorName name, std::span<const float> values);
    // Packs a matrix for the kernels, without the rows that are all zero; returns how many others
    // there are. `scales`: 1, `out`, or [out][ceil(in / group)] where `group` > 0 columns, a
    // multiple of 32, share one. Throws std::domain_error for bits that are no ternary code, or for
    // ROW_STRIDED bytes that are all zero, as a hole in a file is.
    size_t set_linear(size_t layer, LinearName name, const StoredCodes& codes,
                      std::span<const float> scales, size_t group = 0,
                      InputType input = InputType::INT8);
    void set_linear_norm(size_t layer, LinearName name, std::span<const float> gain, float eps);
    void set_linear_bias(size_t layer, LinearName name, std::span<const float> bias);

    // Checks that the model is whole and takes scratch and KV storage; once. Throws
    // std::invalid_argument, std::bad_alloc.
    void prepare();

    // Takes an adapter and returns its slot, the lowest that is free. Throws std::invalid_argument
    // where it does not fit the model, std::bad_alloc; then nothing has changed.
    size_t load_adapter(std::shared_ptr<const Adapter> adapter);
    // Throws std::out_of_range where the slot is empty.
    void unload_adapter(size_t slot);
    // Bytes of scratch that adapters of this rank need beside those loaded now.
    size_t more_adapter_scratch(size_t rank);

    // One step. Steps of several threads queue. Throws std::invalid_argument for a batch that
    // contradicts itself or the model; then nothing was written. Throws std::overflow_error, naming
    // the layer, where inputs of linears are NaN or infinite; then outputs and what the batch wrote
    // into its KV blocks mean nothing, and the next step is as good as any.
    void forward(const StepInput& input, const StepOutput& output);

    // Forgets what stages took, and measures them from now on or no more. Then: seconds of each in
    // all steps since, the mean of the workers that took part.
    void measure_stages(bool on);
    std::array<double, STAGE_COUNT> stage_seconds();
    // Seconds of all steps since then; measured always.
    double step_seconds();

    size_t kv_blocks() const { return runtime_.kv_blocks; }
    size_t kv_block_bytes() const { return kv_ ? kv_->block_bytes() : 0; }
    size_t kv_bytes() const { return kv_ ? kv_->bytes() : 0; }
    size_t scratch_bytes() const { return arena_ ? arena_->capacity() : 0; }
    // Bytes of packed matrices, of vectors and of a rounded head; embedding and head as stored are
    // not counted.
    size_t weight_bytes() const;
    // Bytes of one packed matrix, summed over the layers.
    size_t packed_bytes(LinearName name) const;
    // Bytes of the rounded copy of the head that steps read; 0 where there is none.
    size_t rounded_head_bytes() const { return rounded_head_ ? rounded_head_->bytes() : 0; }
    // The kind in use: never AUTO, and FULL for a head that cannot be rounded.
    HeadKind head_kind() const { return head_kind_; }
    HeadStatistics head_statistics() const {
        return screen_ ? screen_->statistics() : HeadStatistics{};
    }

    // pairs: `count` times (source, destination). All three throw std::out_of_range for unknown
    // blocks, and std::invalid_argument before prepare().
    void copy_blocks(const int32_t* pairs, size_t count);
    void read_blocks(std::span<const int32_t> blocks, std::byte* out);
    void write_blocks(std::span<const int32_t> blocks, const std::byte* data);

  private:
    struct Layer {
        LayerConfig config;
        size_t rope_table = 0;    // index of its cosines and sines
        size_t kv_offset = 0;     // of its keys in a block, bytes
        size_t head_bytes = 0;    // of the keys of one KV head in a block
        size_t value_offset = 0;  // of its values behind its keys, bytes
        std::array<Linear, LINEAR_COUNT> linears;
        std::array<std::vector<float>, VECTOR_COUNT> vectors;

        const Linear& linear(LinearName name) const { return linears[static_cast<size_t>(name)]; }
        const float* vector(VectorName name) const {
            const auto& values = vectors[static_cast<size_t>(name)];
            return values.empty() ? nullptr : values.data();
        }
        size_t query_width() const { return config.heads * config.head_dim; }
        size_t kv_width() const { return config.kv_heads * config.head_dim; }
        size_t ffn_width() const { return linear(LinearName::DOWN).in; }
    };
    // Inputs of linears, one vector a token: quantised, as they are, or both where linears differ.
    struct Inputs {
        int8_t* values = nullptr;  // [tokens][padded columns]
        float* scales = nullptr;   // [tokens], the a of kernels.h
        int32_t* sums = nullptr;   // [tokens]
        float* floats = nullptr;   // [tokens][columns]
    };
    struct RopeTable {
        std::vector<float> inverse_frequencies;
        float* cosines;  // [tokens][size of inverse_frequencies]
        float* sines;
    };
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
    // Consecutive tokens of one run that go through attention together.
    struct Tile {
        uint32_t first;
        uint32_t count;
    };
    // Softmax under way over the positions some queries have seen.
    struct Softmax {
        float* highest;  // [queries] score
        float* totals;   // [queries] sums of exp(score - highest)
        float* sums;     // [queries][head_dim] values so weighted
    };
    // Keys and values of one KV head in a block; the scales are there in int8 only.
    struct KvBlock {
        ValueType type;
        const void* keys;
        const void* values;
        const float* key_scales;
        const float* value_scales;
        // What the kernels ask for meanwhile, as a distance in bytes; 0: nothing.
        uintptr_t values_ahead;  // behind the keys
        uintptr_t keys_ahead;    // those of the next block, behind the values
    };
    // An output request: its kind, its index among those of its kind, and where its logits are.
    struct Request {
        OutputKind kind;
        size_t index;
        float* logits;
    };
    // What a worker needs for itself.
    struct Workspace {
        float* row;             // [widest input]
        float* normed;          // [widest input]
        int32_t* accumulators;  // of one tile of a product
        uint8_t* codes;         // unpacked rows of one tile of a product
        int8_t* signed_codes;   // the same as -1, 0, 1, for inputs that are not quantised
        float* queries;         // [TILE_QUERIES][head_dim]
        float* scores;          // [TILE_QUERIES][KV_BLOCK_SIZE]
        float* keep;            // [TILE_QUERIES]
        float* join;            // [TILE_QUERIES]
        float* widened;         // keys and values of a block
        Softmax chunk;
        Softmax whole;
        Request* requests;  // [logit_rows_]
        std::optional<Sampler> sampler;
    };

    // What steps with adapters need besides: as much as the largest rank asks for.
    struct AdapterScratch {
        size_t rank = 0;
        Arena arena{0};
        float* inputs = nullptr;  // [tokens][input_width_]: what the linears of a stage are given
        float* low = nullptr;     // [tokens][LINEARS_OF_A_STAGE][rank]: A x of each of them
    };

    Decoder(const Kernels& kernels, ModelConfig model, RuntimeConfig runtime, ThreadPool& crowd);
    HeadKind chosen_head(HeadKind kind, ValueType type) const;
    void demand_building() const;
    void check_blocks(const int32_t* blocks, size_t count) const;
    Layer& layer_at(size_t index);
    Linear& linear_at(size_t layer, LinearName name);
    std::vector<uint32_t> kept_rows(const StoredCodes& codes);
    void check_layer(size_t index) const;
    void lay_out_kv();
    size_t plan_scratch(Arena* arena);
    size_t plan_adapters(Arena* arena, AdapterScratch& scratch) const;

    void check(const StepInput& input) const;
    bool slot_is_loaded(int32_t slot) const;
    void check_outputs(const StepInput& input, const StepOutput& output) const;
    void check_plan(const SamplePlan& plan) const;

    ThreadPool& pool_for(const StepInput& input) const;
    void run_step(int worker);
    void end_stage(Stage stage, int worker);
    void spoil(const Layer& layer);
    void attention_block(const Layer& layer, int worker, Workspace& own);
    void ffn_block(const Layer& layer, int worker, Workspace& own);
    void finish(int worker, Workspace& own);
    void begin_request(size_t slot, size_t output, Request& request);

    void embed(size_t token);
    void compute_rope(size_t token);
    void add_to_residual(size_t token, const float* post_norm, float eps);
    void prepare_inputs(const Layer& layer, std::span<const LinearName> names, size_t token,
                        const float* x, const float* norm, Workspace& own);
    void store_input(const Layer& layer, const float* x, size_t n, InputType type, size_t token,
                     const Inputs& inputs);
    const Adapter* adapter_of(size_t token) const;
    const LowRank* update_of(const Layer& layer, LinearName name, size_t token) const;
    float* low_of(size_t token, LinearName name) const;
    void read_adapters(const Layer& layer, std::span<const LinearName> names, int worker);
    void add_adapters(const Layer& layer, LinearName name, Range rows, float* out, size_t stride);
    void multiply(const Layer& layer, LinearName name, Range rows, float* out, size_t stride,
                  Workspace& own);
    void multiply_rows(const Linear& linear, const Inputs& input, Range rows, float* out,
                       size_t stride, Workspace& own);
    void multiply_token(const Linear& linear, const Inputs& input, Range rows, float* out,
                        Workspace& own);
    void multiply_tokens(const Linear& linear, const Inputs& input, Range rows, float* out,
                         size_t stride, Workspace& own);
    void multiply_groups(const Linear& linear, const Inputs& input, Range rows, float* out,
                         size_t stride, Workspace& own);
    void multiply_floats(const Linear& linear, const Inputs& input, Range rows, float* out,
                         size_t stride, Workspace& own);
    void sign_codes(const Linear& linear, Range kept, size_t width, Workspace& own) const;
    const PackedKernels& packed_kernels(const Linear& linear) const {
        return kernels_.integer->packed[static_cast<size_t>(linear.packing)];
    }
    size_t unpack_rows(const Linear& linear, Range rows, Workspace& own) const;
    void rescale_rows(const Linear& linear, Range rows, float a, int32_t* accumulators,
                      float* out) const;
    void multiply_all(const Layer& layer, LinearName name, float* out, int worker, Workspace& own);
    void project(const Layer& layer, int worker, Workspace& own);
    void expand(const Layer& layer, int worker, Workspace& own);

    void turn_and_store(const Layer& layer, int worker, Workspace& own);
    void turn(const Layer& layer, size_t token, float* head) const;
    void store(const Layer& layer, size_t token, size_t kv_head, const float* key, Workspace& own);
    static float* scales_of(std::byte* codes, size_t head_dim);
    std::byte* kv_rows(const Layer& layer, size_t run, size_t position, size_t kv_head) const;
    static size_t first_seen(const Layer& layer, size_t position);
    bool plan_chunks();
    size_t chunks_to_share() const;
    void plan_attention(Planner& plan);
    void attend(const Layer& layer, int worker, Workspace& own);
    void attend_whole(const Layer& layer, const Tile& tile, Range heads, Workspace& own);
    void attend_chunks(const Layer& layer, int worker, Workspace& own);
    void attend_chunk(const Layer& layer, const Tile& tile, Range heads, size_t chunk,
                      Workspace& own);
    KvBlock widened(const Layer& layer, std::byte* keys, bool many, Workspace& own);
    void merge_block(const Layer& layer, const KvBlock& kv, Range queries, Range places,
                     Workspace& own);
    static void clear(const Softmax& state, size_t queries, size_t n);
    static void merge_softmax(const Softmax& next, size_t from, const Softmax& state, size_t to,
                              size_t n);
    void finish_softmax(const Layer& layer, const Tile& tile, Range heads, Workspace& own);

    void head_rows(const Request* requests, size_t count, Range rows);
    void screen_rows(size_t count, int worker, Workspace& own);
    void finish_request(size_t slot, const Request& request, Workspace& own);

    const Kernels& kernels_;
    const ModelConfig model_;
    const RuntimeConfig runtime_;
    ThreadPool& crowd_;  // all threads of the configuration
    ThreadPool& solo_;   // the calling thread alone, for steps too small to share
    std::mutex mutex_;

    DenseMatrix embedding_, head_;
    HeadKind head_kind_ = HeadKind::FULL;
    std::optional<RoundedHead> rounded_head_;
    std::optional<HeadScreen> screen_;
    std::vector<float> final_norm_;
    PieceStore packed_;
    std::vector<Layer> layers_;
    std::vector<RopeTable> rope_tables_;
    std::optional<BlockStorage> kv_;
    std::optional<Arena> arena_;
    std::vector<std::shared_ptr<const Adapter>> adapters_;  // by slot; empty ones are null
    AdapterScratch adapter_scratch_;

    // Scratch, taken from arena_ by plan_scratch(); `tokens` is max_batch_tokens.
    size_t input_width_ = 0;  // of the widest input of a linear
    size_t logit_rows_ = 0;
    float* residual_ = nullptr;   // [tokens][hidden]
    float* block_out_ = nullptr;  // [tokens][hidden]: what o and down give
    float* work_ = nullptr;       // [tokens]: q, k, v of a token side by side, or its gate and up
    std::array<Inputs, 4> inputs_{};  // what linears share, then own inputs of up to three of them
    uint32_t* run_of_token_ = nullptr;  // [tokens]
    uint64_t* last_writer_ = nullptr;   // [kv_blocks]: the last step that wrote into each
    Tile* tiles_ = nullptr;             // [tokens]
    uint32_t* first_chunk_ = nullptr;   // [tokens + 1]: of partials_
    Softmax partials_{};                // [chunk_capacity_][heads]
    size_t chunk_capacity_ = 0;
    float* final_rows_ = nullptr;        // [logit_rows_][hidden]
    float* logits_ = nullptr;            // [logit_rows_][vocab]
    std::vector<Workspace> workspaces_;  // one for each worker
    std::vector<StageClock> clocks_;     // one for each worker
    double step_seconds_ = 0;

    // Multiplications and additions of a token in all matrices; of a token and a position in
    // attention.
    size_t matrix_work_ = 0;
    size_t attention_work_ = 0;

    // The step under way.
    uint64_t step_ = 0;
    std::atomic<size_t> spoilt_layer_ = 0;  // the first one, or the number of layers
    ThreadPool* pool_ = nullptr;
    const StepInput* input_ = nullptr;
    const StepOutput* result_ = nullptr;
    size_t tokens_ = 0;
    size_t tile_count_ = 0;
    bool shares_chunks_ = false;
    bool adapts_ = false;  // some run asks for an adapter
};

}  // namespace bitllm
