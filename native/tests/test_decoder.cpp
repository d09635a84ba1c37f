// The whole step without Python: that it allocates nothing, and that neither kernels, threads nor
// the cutting of a prompt change a bit. What it computes is compared with the reference in
// tests/test_decoder_agreement.py.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../decoder.h"
#include "../packing.h"
#include "check.h"
#include "kernel_data.h"

using namespace bitllm;
using namespace bitllm::testing;

// Allocations of all threads, counted while somebody counts: by the hook of a sanitizer's
// allocator, else by functions in front of those of glibc, else by operator new. The latter two can
// refuse one of them.
namespace {
std::atomic<bool> counting{false};
std::atomic<size_t> allocations{0};
std::atomic<size_t> refused{0};  // the number of the allocation to refuse, from 1 on

// Whether this one is to be refused.
bool count_allocation() {
    return counting.load(std::memory_order_relaxed) && ++allocations == refused;
}
}  // namespace

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// The sanitizer's library looks for it, so the executable has to show it.
extern "C" __attribute__((visibility("default"))) void __sanitizer_malloc_hook(const volatile void*,
                                                                               size_t) {
    count_allocation();
}
#elif defined(__GLIBC__)
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) {
    if (count_allocation()) return nullptr;
    return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
    if (count_allocation()) return nullptr;
    return __libc_calloc(count, bytes);
}
void* realloc(void* old, size_t bytes) {
    if (count_allocation()) return nullptr;
    return __libc_realloc(old, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
    if (count_allocation()) return nullptr;
    return __libc_memalign(alignment, bytes);
}
}
#else
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    if (count_allocation()) return nullptr;
    return std::malloc(bytes ? bytes : 1);
}
void* operator new(size_t bytes) {
    if (void* memory = operator new(bytes, std::nothrow)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
#endif

namespace {

constexpr size_t VOCAB = 309, HIDDEN = 300, FFN = 517, HEADS = 6, KV_HEADS = 3, HEAD_DIM = 22,
                 LAYERS = 2;
constexpr size_t BLOCKS = 10, MAX_TOKENS = 96;

// The same random model for each seed, with every optional part.
struct Model {
    std::vector<uint16_t> embedding;
    std::unique_ptr<Decoder> decoder;

    Model(const Kernels& kernels, int threads, ValueType kv_type = ValueType::BF16,
          HeadKind head = HeadKind::FULL, InputType input = InputType::INT8) {
        Random random(11);
        decoder = std::make_unique<Decoder>(kernels, ModelConfig{VOCAB, HIDDEN, 1e-5f, 1.5f},
                                            RuntimeConfig{BLOCKS, kv_type, threads, MAX_TOKENS});
        const auto gains = [&](size_t count) {
            std::vector<float> values(count);
            for (float& value : values)
                value = 1.0f + static_cast<float>(random.integer(-90, 90)) / 128.0f;
            return values;
        };
        for (size_t layer = 0; layer < LAYERS; ++layer) {
            std::vector<float> frequencies;
            for (size_t i = 0; i < HEAD_DIM / 2 - layer; ++i)
                frequencies.push_back(1.0f / static_cast<float>(1 + 3 * i));
            decoder->add_layer({HEADS, KV_HEADS, HEAD_DIM,
                                layer ? Activation::SILU : Activation::RELU2, 1e-5f, 0.2f,
                                layer ? size_t{40} : size_t{0}, frequencies});
            const size_t lengths[VECTOR_COUNT] = {HIDDEN,   HIDDEN,   HEADS * HEAD_DIM, FFN,
                                                  HEAD_DIM, HEAD_DIM, HIDDEN,           HIDDEN};
            for (size_t i = 0; i < VECTOR_COUNT; ++i)
                decoder->set_vector(layer, static_cast<VectorName>(i), gains(lengths[i]));
            const size_t query = HEADS * HEAD_DIM, kv = KV_HEADS * HEAD_DIM;
            const size_t shapes[LINEAR_COUNT][2] = {{query, HIDDEN}, {kv, HIDDEN},  {kv, HIDDEN},
                                                    {HIDDEN, query}, {FFN, HIDDEN}, {FFN, HIDDEN},
                                                    {HIDDEN, FFN}};
            for (size_t i = 0; i < LINEAR_COUNT; ++i) {
                const auto [out, in] = shapes[i];
                const auto name = static_cast<LinearName>(i);
                const auto codes = random.codes(out * in);
                std::vector<uint8_t> packed(out * canonical_row_bytes(in));
                bitllm::pack_rows(codes.data(), out, in, packed.data());
                const size_t group = layer && input == InputType::FLOAT ? 96 : 0;
                const size_t groups = group ? (in + group - 1) / group : 1;
                const std::vector<float> scales(layer ? out * groups : 1, 0.06f);
                decoder->set_linear(layer, name, {packed.data(), Layout::CANONICAL, out, in},
                                    scales, group, input);
                decoder->set_linear_bias(layer, name, gains(out));
                if (i % 2 == layer) decoder->set_linear_norm(layer, name, gains(in), 1e-6f);
            }
        }
        decoder->set_final_norm(gains(HIDDEN));
        embedding.resize(VOCAB * HIDDEN);
        for (uint16_t& value : embedding)
            value = bf16_from_f32(static_cast<float>(random.integer(-99, 99)) / 64.0f);
        const DenseMatrix matrix{reinterpret_cast<const std::byte*>(embedding.data()),
                                 ValueType::BF16};
        decoder->set_embedding(matrix);
        decoder->set_head(matrix, head);
        decoder->prepare();
    }
};

std::vector<int32_t> prompt(size_t count) {
    Random random(12);
    std::vector<int32_t> ids(count);
    for (int32_t& id : ids) id = random.integer(0, VOCAB - 1);
    return ids;
}

// A random adapter of every linear but one, in each type of values.
std::shared_ptr<const Adapter> adapter_of(size_t rank, int seed) {
    Random random(seed);
    constexpr size_t query = HEADS * HEAD_DIM, kv = KV_HEADS * HEAD_DIM;
    const size_t shapes[LINEAR_COUNT][2] = {{query, HIDDEN}, {kv, HIDDEN},  {kv, HIDDEN},
                                            {HIDDEN, query}, {FFN, HIDDEN}, {FFN, HIDDEN},
                                            {HIDDEN, FFN}};
    constexpr ValueType types[] = {ValueType::F32, ValueType::BF16, ValueType::F16};
    auto adapter = std::make_shared<Adapter>(LAYERS, size_t{1} << 22);
    for (size_t layer = 0; layer < LAYERS; ++layer) {
        for (size_t i = 0; i < LINEAR_COUNT - layer; ++i) {
            const auto [out, in] = shapes[i];
            const ValueType a_type = types[i % 3], b_type = types[(i + layer) % 3];
            const auto a = random.stored(a_type, rank * in), b = random.stored(b_type, out * rank);
            adapter->set(layer, static_cast<LinearName>(i), out, in, rank, 0.01f, a, a_type, b,
                         b_type);
        }
    }
    return adapter;
}

// Tokens from..to of a prompt as a batch of one run; every row wants one kind of output.
struct Step {
    std::vector<int32_t> ids, positions, rows, offsets, slots = {-1},
                                                        table = {5, 1, 7, 2, 0, 9, 3, 8, 6, 4};
    std::vector<uint8_t> kinds;
    std::vector<int32_t> targets, top_n;
    StepInput input;

    Step(const std::vector<int32_t>& all, size_t from, size_t to, OutputKind kind)
        : ids(all.begin() + static_cast<ptrdiff_t>(from),
              all.begin() + static_cast<ptrdiff_t>(to)) {
        for (size_t i = from; i < to; ++i) {
            positions.push_back(static_cast<int32_t>(i));
            rows.push_back(static_cast<int32_t>(i - from));
            kinds.push_back(static_cast<uint8_t>(kind));
        }
        offsets = {0, static_cast<int32_t>(to - from)};
        if (kind == OutputKind::SCORE) {
            targets.assign(to - from, 17);
            top_n.assign(to - from, 4);
        }
        input.token_ids = ids;
        input.positions = positions;
        input.run_offsets = offsets;
        input.adapter_slots = slots;
        input.block_tables = table.data();
        input.block_table_width = table.size();
        input.output_rows = rows;
        input.output_kinds = kinds;
        input.score_targets = targets;
        input.score_top_n = top_n;
    }
};

std::vector<float> logits_of(Decoder& decoder, const std::vector<int32_t>& ids,
                             const std::vector<size_t>& cuts, int32_t slot = -1) {
    std::vector<float> logits(ids.size() * VOCAB);
    size_t from = 0;
    for (size_t i = 0; i <= cuts.size(); ++i) {
        const size_t to = i < cuts.size() ? cuts[i] : ids.size();
        Step step(ids, from, to, OutputKind::LOGITS);
        step.slots[0] = slot;
        StepOutput output;
        output.logits = logits.data() + from * VOCAB;
        decoder.forward(step.input, output);
        from = to;
    }
    return logits;
}

// A plan whose entries take each way through the sampler.
struct Draws {
    std::vector<float> temperature = {0.0f, 1.0f, 0.7f, 0.7f, 0.7f}, top_p = {1, 1, 1, 0.9f, 1},
                       min_p = {0, 0, 0, 0, 0.1f}, ones = {1, 1, 1, 1, 1.5f},
                       zeros = {0, 0, 0, 0, 0.5f}, typical_p = {1, 1, 1, 0.8f, 1};
    std::vector<int32_t> top_k = {0, 0, 30, 0, 0}, index = {0, 1, 2, 3, 4},
                         logprobs = {-1, 3, -1, 0, 2};
    std::vector<uint64_t> seed = {1, 2, 3, 4, 5};
    std::vector<int32_t> offsets = {0, 0, 0, 0, 0, 2}, listed = {3, 9}, counts = {1, 0};
    std::vector<float> values = {0.5f, -2.0f};
    std::vector<uint32_t> mask = std::vector<uint32_t>((VOCAB + 31) / 32, 0x5555FFFFu);
    std::vector<int32_t> mask_rows = {0, -1, -1, -1, -1};

    SamplePlan view() const {
        SamplePlan plan;
        plan.count = 5;
        plan.temperature = temperature.data();
        plan.top_k = top_k.data();
        plan.top_p = top_p.data();
        plan.min_p = min_p.data();
        plan.typical_p = typical_p.data();
        plan.seed = seed.data();
        plan.choice = plan.position = index.data();
        plan.top_logprobs = logprobs.data();
        plan.repetition_penalty = ones.data();
        plan.frequency_penalty = plan.presence_penalty = zeros.data();
        plan.seen_offsets = plan.bias_offsets = offsets.data();
        plan.seen_ids = plan.bias_ids = listed.data();
        plan.seen_counts = counts.data();
        plan.bias_values = values.data();
        plan.seen_count = plan.bias_count = 2;
        plan.mask = mask.data();
        plan.mask_count = 1;
        plan.mask_words = mask.size();
        plan.mask_rows = mask_rows.data();
        return plan;
    }
};

// Under ThreadSanitizer, which takes a hundred times as long, the best set stands for all: whether
// threads race does not depend on the kernels.
std::vector<Variant> sets_to_try() {
#if defined(__SANITIZE_THREAD__)
    return {{best_kernels().name, &best_kernels()}};
#else
    return variants();
#endif
}

size_t allocations_during(const std::function<void()>& work) {
    allocations = 0;
    counting = true;
    work();
    counting = false;
    return allocations;
}

}  // namespace

TEST(the_counter_counts) {
    std::vector<int> kept;
    CHECK(allocations_during([&] { kept.resize(10000); }) > 0);
    CHECK(kept.size() == 10000);
}

TEST(a_step_allocates_nothing) {
    const auto ids = prompt(90);
    const Draws draws;
    std::vector<float> hidden(MAX_TOKENS * HIDDEN), logits(MAX_TOKENS * VOCAB),
        logprobs(MAX_TOKENS), top_values(MAX_TOKENS * 4);
    std::vector<int32_t> sampled(5), top_ids(MAX_TOKENS * 4);
    const StepOutput output{hidden.data(),
                            logits.data(),
                            sampled.data(),
                            logprobs.data(),
                            top_ids.data(),
                            top_values.data(),
                            4};
    Step sampling(ids, 85, 90, OutputKind::SAMPLE);
    sampling.input.plan = draws.view();
    const Step prefill(ids, 0, 80, OutputKind::SCORE), middle(ids, 80, 84, OutputKind::HIDDEN),
        one(ids, 84, 85, OutputKind::LOGITS);
    std::vector<int32_t> tokens;
    for (const HeadKind head :
         {HeadKind::FULL, HeadKind::SCREENED, HeadKind::INT8_SCREENED, HeadKind::INT8}) {
        for (const int threads : {1, 2, 3}) {
            const Model model(best_kernels(), threads, ValueType::BF16, head);
            model.decoder->forward(one.input, output);  // the first one may still start threads
            for (const Step* step :
                 {&prefill, &middle, &one, static_cast<const Step*>(&sampling)}) {
                const size_t count =
                    allocations_during([&] { model.decoder->forward(step->input, output); });
                CHECK_WITH(count == 0, count << " allocations, " << threads << " threads");
            }
            if (tokens.empty()) tokens = sampled;
            CHECK_WITH(head == HeadKind::INT8 || sampled == tokens, threads << " threads");
        }
    }
    const Model floats(best_kernels(), 2, ValueType::BF16, HeadKind::FULL, InputType::FLOAT);
    floats.decoder->forward(one.input, output);
    for (const Step* step : {&prefill, &one})
        CHECK(allocations_during([&] { floats.decoder->forward(step->input, output); }) == 0);
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// Whichever allocation is refused, building a model ends with an exception, on no worker.
TEST(a_model_without_memory_is_an_exception) {
    const Model first(best_kernels(), 2);  // starts the threads
    for (const HeadKind head : {HeadKind::SCREENED, HeadKind::INT8_SCREENED}) {
        size_t refusals = 0;
        for (bool refusing = true; refusing; refusals += refusing) {
            refused = refusals + 1;
            refusing = throws<std::bad_alloc>([&] {
                allocations_during([&] { Model(best_kernels(), 2, ValueType::BF16, head); });
            });
            counting = false;
        }
        refused = 0;
        CHECK_WITH(refusals > 50, refusals << " refusals");
    }
}
#endif

TEST(kernels_threads_and_pieces_change_no_bit) {
    const auto ids = prompt(90);
    for (const ValueType kv_type : {ValueType::BF16, ValueType::F32, ValueType::I8}) {
        const Model plain(scalar_kernels, 1, kv_type);
        const auto expected = logits_of(*plain.decoder, ids, {});
        for (const float logit : expected) CHECK(std::isfinite(logit));
        for (const auto& [label, kernels] : sets_to_try()) {
            for (const int threads : {1, 2, 3}) {
                const Model model(*kernels, threads, kv_type);
                CHECK_WITH(same_bits(expected, logits_of(*model.decoder, ids, {})),
                           label << " " << threads);
                CHECK_WITH(same_bits(expected, logits_of(*model.decoder, ids, {1, 2, 34, 64, 89})),
                           label << " " << threads << " in pieces");
            }
        }
    }
}

TEST(kernels_threads_and_pieces_change_no_bit_of_inputs_that_are_not_quantised) {
    const auto ids = prompt(90);
    const auto model_of = [](const Kernels& kernels, int threads) {
        return Model(kernels, threads, ValueType::BF16, HeadKind::FULL, InputType::FLOAT);
    };
    const auto expected = logits_of(*model_of(scalar_kernels, 1).decoder, ids, {});
    for (const float logit : expected) CHECK(std::isfinite(logit));
    const Model rounded(scalar_kernels, 1);
    CHECK(!same_bits(expected, logits_of(*rounded.decoder, ids, {})));
    for (const auto& [label, kernels] : sets_to_try()) {
        for (const int threads : {1, 2, 3}) {
            const Model model = model_of(*kernels, threads);
            CHECK_WITH(same_bits(expected, logits_of(*model.decoder, ids, {})),
                       label << " " << threads);
            CHECK_WITH(same_bits(expected, logits_of(*model.decoder, ids, {1, 2, 34, 64, 89})),
                       label << " " << threads << " in pieces");
        }
    }
}

TEST(adapters_are_the_same_everywhere_and_allocate_nothing) {
    const auto ids = prompt(90);
    const Model plain(scalar_kernels, 1);
    const auto without = logits_of(*plain.decoder, ids, {});
    const size_t small = plain.decoder->load_adapter(adapter_of(3, 5)),
                 large = plain.decoder->load_adapter(adapter_of(40, 6));
    CHECK(small == 0 && large == 1);
    const auto expected = logits_of(*plain.decoder, ids, {}, 1);
    CHECK(!same_bits(expected, without));
    CHECK(!same_bits(expected, logits_of(*plain.decoder, ids, {}, 0)));
    CHECK(same_bits(without, logits_of(*plain.decoder, ids, {})));
    for (const auto& [label, kernels] : sets_to_try()) {
        for (const int threads : {1, 2, 3}) {
            const Model model(*kernels, threads);
            model.decoder->load_adapter(adapter_of(40, 6));
            CHECK_WITH(same_bits(expected, logits_of(*model.decoder, ids, {}, 0)),
                       label << " " << threads);
            CHECK_WITH(same_bits(expected, logits_of(*model.decoder, ids, {1, 2, 34, 64, 89}, 0)),
                       label << " " << threads << " in pieces");
            Step step(ids, 0, 60, OutputKind::LOGITS);
            step.slots[0] = 0;
            std::vector<float> logits(60 * VOCAB);
            StepOutput output;
            output.logits = logits.data();
            CHECK(allocations_during([&] { model.decoder->forward(step.input, output); }) == 0);
        }
    }
}

TEST(adapters_come_and_go) {
    const auto ids = prompt(20);
    const Model model(best_kernels(), 2);
    Decoder& decoder = *model.decoder;
    const auto fails = [&](size_t slot) {
        return throws<std::out_of_range>([&] { decoder.unload_adapter(slot); });
    };
    CHECK(fails(0));
    const size_t needed = decoder.more_adapter_scratch(7);
    CHECK(needed > decoder.more_adapter_scratch(3));
    CHECK(decoder.load_adapter(adapter_of(7, 1)) == 0);
    CHECK(decoder.more_adapter_scratch(7) == 0 && decoder.more_adapter_scratch(3) == 0);
    const auto first = logits_of(decoder, ids, {}, 0);
    CHECK(decoder.load_adapter(adapter_of(3, 2)) == 1);
    CHECK(same_bits(first, logits_of(decoder, ids, {}, 0)));
    decoder.unload_adapter(0);
    CHECK(fails(0) && fails(2));
    CHECK(throws<std::invalid_argument>([&] { logits_of(decoder, ids, {}, 0); }));
    CHECK(throws<std::invalid_argument>([&] { logits_of(decoder, ids, {}, 2); }));
    CHECK(throws<std::invalid_argument>([&] { logits_of(decoder, ids, {}, -2); }));
    CHECK(decoder.load_adapter(adapter_of(7, 1)) == 0);
    CHECK(same_bits(first, logits_of(decoder, ids, {}, 0)));
    decoder.unload_adapter(0);
    decoder.unload_adapter(1);
    CHECK(decoder.more_adapter_scratch(7) == needed);
}

TEST(an_adapter_that_does_not_fit_is_refused) {
    const Model model(scalar_kernels, 1);
    const auto refuses = [&](std::shared_ptr<const Adapter> adapter) {
        return throws<std::invalid_argument>(
            [&] { model.decoder->load_adapter(std::move(adapter)); });
    };
    const std::vector<std::byte> values(4 * 400);
    const auto pair = [&](size_t out, size_t in) {
        auto adapter = std::make_shared<Adapter>(LAYERS, 8 * 400 + 128);
        const std::span<const std::byte> all(values);
        adapter->set(1, LinearName::O, out, in, 1, 1.0f, all.first(4 * in), ValueType::F32,
                     all.first(4 * out), ValueType::F32);
        return adapter;
    };
    CHECK(!refuses(pair(HIDDEN, HEADS * HEAD_DIM)));
    CHECK(refuses(pair(HIDDEN, HEADS * HEAD_DIM + 1)));
    CHECK(refuses(pair(HIDDEN - 1, HEADS * HEAD_DIM)));
    CHECK(refuses(std::make_shared<Adapter>(LAYERS + 1, 0)));
    CHECK(refuses(nullptr));
    Adapter small(1, 4 * 400);
    const auto sets = [&](size_t layer, size_t out, size_t in, size_t rank) {
        return !throws<std::invalid_argument>([&] {
            small.set(layer, LinearName::Q, out, in, rank, 1.0f, values, ValueType::F32, values,
                      ValueType::F32);
        });
    };
    CHECK(!sets(1, 100, 100, 4) && !sets(0, 100, 99, 4) && !sets(0, 99, 100, 4));
    CHECK(!sets(0, 100, 100, 0) && !sets(0, 0, 100, 4));
    CHECK(!sets(0, 100, 100, 4));  // both would fit, but not together
}

TEST(the_golden_hash_is_that_of_every_machine) {
    std::ifstream file(BITLLM_GOLDEN);
    const std::string golden{std::istreambuf_iterator<char>(file), {}};
    CHECK(!golden.empty());
    const auto ids = prompt(270);
    for (const ValueType kv_type : {ValueType::BF16, ValueType::I8}) {
        for (const auto& [label, kernels] : sets_to_try()) {
            const Model model(*kernels, 2, kv_type);
            uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
            for (const float logit : logits_of(*model.decoder, ids, {90, 180, 268, 269}))
                hash = (hash ^ std::bit_cast<uint32_t>(logit)) * 0x100000001b3;
            std::ostringstream hex;
            hex << std::hex << hash;
            CHECK_WITH(golden.find(hex.str()) != std::string::npos,
                       label << " KV " << int(kv_type) << ": " << hex.str());
        }
    }
}

TEST(a_batch_that_contradicts_itself_is_refused) {
    const Model model(scalar_kernels, 1);
    const auto ids = prompt(8);
    std::vector<float> logits(8 * VOCAB);
    StepOutput output;
    output.logits = logits.data();
    const auto refuses = [&](const std::function<void(Step&)>& spoil) {
        Step step(ids, 0, 8, OutputKind::LOGITS);
        spoil(step);
        return throws<std::invalid_argument>([&] { model.decoder->forward(step.input, output); });
    };
    CHECK(!refuses([](Step&) {}));
    CHECK(refuses([](Step& step) { step.ids[3] = VOCAB; }));
    CHECK(refuses([](Step& step) { step.ids[3] = -1; }));
    CHECK(refuses([](Step& step) { step.positions[3] = 7; }));
    CHECK(refuses([](Step& step) { step.positions[0] = -1; }));
    CHECK(refuses([](Step& step) { step.table[0] = BLOCKS; }));
    CHECK(refuses([](Step& step) { step.table[0] = -1; }));
    CHECK(refuses([](Step& step) { step.input.block_table_width = 0; }));
    CHECK(refuses([](Step& step) { step.slots[0] = 0; }));
    CHECK(refuses([](Step& step) { step.rows[7] = 8; }));
    CHECK(refuses([](Step& step) { step.kinds[7] = 4; }));
    CHECK(refuses([](Step& step) { step.kinds[7] = static_cast<uint8_t>(OutputKind::SAMPLE); }));
    CHECK(refuses([](Step& step) { step.kinds[7] = static_cast<uint8_t>(OutputKind::SCORE); }));
    CHECK(refuses([](Step& step) { step.offsets[1] = 7; }));
    CHECK(refuses([](Step& step) { step.input.token_ids = {}; }));
    CHECK(refuses([](Step& step) {  // two runs that write one block
        step.offsets = {0, 4, 8};
        step.slots = {-1, -1};
        for (size_t i = 4; i < 8; ++i) step.positions[i] = static_cast<int32_t>(i) - 4;
        step.table = {5, 5};
        step.input.run_offsets = step.offsets;
        step.input.adapter_slots = step.slots;
        step.input.block_tables = step.table.data();
        step.input.block_table_width = 1;
    }));
    CHECK(!refuses([](Step&) {}));
}

TEST(a_step_of_numbers_that_are_none_is_refused_and_the_next_is_not) {
    const auto ids = prompt(40);
    for (const int threads : {1, 2}) {
        Model model(best_kernels(), threads);
        const auto expected = logits_of(*model.decoder, ids, {});
        uint16_t& value = model.embedding[static_cast<size_t>(ids[33]) * HIDDEN + 299];
        const uint16_t sound = value;
        for (const uint16_t bits : {0x7F80, 0xFF80, 0x7FC0}) {  // +-infinity, NaN
            value = bits;
            CHECK(throws<std::overflow_error>([&] { logits_of(*model.decoder, ids, {}); }));
        }
        value = sound;
        CHECK(same_bits(expected, logits_of(*model.decoder, ids, {})));
    }
}

TEST(a_prepared_model_cannot_be_changed) {
    const Model model(scalar_kernels, 1);
    Decoder& decoder = *model.decoder;
    CHECK(throws<std::invalid_argument>([&] { decoder.set_embedding({}); }));
    CHECK(throws<std::invalid_argument>([&] { decoder.set_head({}); }));
    CHECK(throws<std::invalid_argument>(
        [&] { decoder.set_linear_bias(0, LinearName::Q, std::vector<float>(3)); }));
    CHECK(throws<std::invalid_argument>([&] { decoder.prepare(); }));
}

TEST(an_incomplete_model_is_refused) {
    Decoder decoder(scalar_kernels, {VOCAB, HIDDEN, 1e-5f, 1.0f}, {1, ValueType::BF16, 1, 1});
    CHECK(throws<std::invalid_argument>([&] { decoder.prepare(); }));
    CHECK(throws<std::invalid_argument>([&] { decoder.set_final_norm(std::vector<float>(3)); }));
    CHECK(throws<std::invalid_argument>(
        [&] { decoder.set_vector(0, VectorName::ATTN_NORM, std::vector<float>(HIDDEN)); }));
    decoder.add_layer({2, 1, 4, Activation::RELU2, 1e-5f, 1.0f, 0, {1.0f, 0.5f}});
    constexpr Layout canonical = Layout::CANONICAL;
    const std::vector<uint8_t> packed(8 * canonical_row_bytes(HIDDEN), 0xFF), hole(8 * 32, 0);
    const std::vector<float> scales(1, 1.0f);
    CHECK(throws<std::domain_error>([&] {
        decoder.set_linear(0, LinearName::Q, {packed.data(), canonical, 8, HIDDEN}, scales);
    }));
    CHECK(throws<std::domain_error>([&] {
        decoder.set_linear(0, LinearName::Q, {hole.data(), Layout::ROW_STRIDED, 32, 32}, scales);
    }));
    for (const auto& [count, group] : {std::pair<size_t, size_t>{2, 0}, {8, 31}, {1, 32}, {16, 64}})
        CHECK(throws<std::invalid_argument>([&] {
            decoder.set_linear(0, LinearName::Q, {packed.data(), canonical, 8, HIDDEN},
                               std::vector<float>(count), group);
        }));
    CHECK(throws<std::invalid_argument>(
        [&] { decoder.add_layer({3, 2, 4, Activation::RELU2, 1e-5f, 1.0f, 0, {}}); }));
    const StepInput nothing;
    CHECK(throws<std::invalid_argument>([&] { decoder.forward(nothing, {}); }));
}
