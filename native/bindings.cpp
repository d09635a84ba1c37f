// The extension module bitllm._native: checks arrays, releases the GIL, calls the core. Nothing
// else.
//
// Every array argument is .noconvert(): a converted copy of an output would leave the caller's
// array untouched. C++ exceptions become ValueError (invalid_argument, domain_error), IndexError
// (out_of_range), OverflowError (overflow_error) and MemoryError (bad_alloc); bitllm.backends.cpu
// and bitllm.ops turn these into bitllm's own.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bandwidth.h"
#include "decoder.h"
#include "dispatch.h"
#include "numerics.h"
#include "packing.h"
#include "platform.h"
#include "prepared_matrix.h"
#include "probes.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bitllm {
namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& text) {
    if (!holds) throw std::invalid_argument(text);
}

template <class T>
std::span<const T> span_of(const Vector<const T>& array) {
    return {array.data(), array.shape(0)};
}

const Kernels& kernels_named(const std::string& name) {
    const Kernels* kernels = find_kernels(name);
    require(kernels != nullptr, "this machine has no kernel set '" + name + "'");
    return *kernels;
}

// The index of `text` among `names`, as an enumerator.
template <class Enum>
Enum enumerator(const std::string& text, std::initializer_list<const char*> names,
                const char* what) {
    int index = 0;
    for (const char* name : names) {
        if (text == name) return static_cast<Enum>(index);
        ++index;
    }
    throw std::invalid_argument("unknown " + std::string(what) + " '" + text + "'");
}

// In the order of HeadKind.
constexpr std::initializer_list<const char*> HEAD_KINDS = {"auto", "full", "screened",
                                                           "int8-screened", "int8"};

ValueType float_type(const std::string& text) {
    return enumerator<ValueType>(text, {"f32", "bf16", "f16", "i8"}, "dtype");
}

Packing packing_named(const std::string& text) {
    return enumerator<Packing>(text, {"2bit", "base3"}, "packing");
}

Layout layout_named(const std::string& text) {
    return enumerator<Layout>(text, {"canonical", "row_strided"}, "layout");
}
constexpr const char* LINEAR_NAMES[LINEAR_COUNT] = {"q", "k", "v", "o", "gate", "up", "down"};

LinearName linear_name(const std::string& text) {
    for (size_t i = 0; i < LINEAR_COUNT; ++i)
        if (text == LINEAR_NAMES[i]) return static_cast<LinearName>(i);
    throw std::invalid_argument("unknown linear '" + text + "'");
}

VectorName vector_name(const std::string& text) {
    return enumerator<VectorName>(text,
                                  {"attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm",
                                   "q_norm", "k_norm", "post_attn_norm", "post_ffn_norm"},
                                  "vector");
}

// A decoder and the arrays it borrows.
class BoundDecoder {
  public:
    BoundDecoder(const std::string& isa, ModelConfig model, RuntimeConfig runtime)
        : model_(model), core_(kernels_named(isa), model, runtime) {}

    // `rows` are the bytes of a [vocab, hidden] matrix.
    DenseMatrix borrow(const Matrix<const uint8_t>& rows, const std::string& dtype) {
        const ValueType type = float_type(dtype);
        require(type != ValueType::I8, "embedding and head must be floats");
        const size_t row_bytes = model_.hidden * size_of(type);
        require(rows.shape(0) == model_.vocab && rows.shape(1) == row_bytes,
                "embedding and head must be [vocabulary, hidden] of " + dtype);
        borrowed_.push_back(rows);
        return {reinterpret_cast<const std::byte*>(rows.data()), type};
    }

    Decoder& core() { return core_; }
    const ModelConfig& model() const { return model_; }

  private:
    ModelConfig model_;
    std::vector<Matrix<const uint8_t>> borrowed_;
    Decoder core_;
};

// An adapter, which decoders keep alive.
struct BoundAdapter {
    std::shared_ptr<Adapter> core;
};

using I32 = Vector<const int32_t>;
using F32 = Vector<const float>;

SamplePlan plan_of(const F32& temperature, const I32& top_k, const F32& top_p, const F32& min_p,
                   const F32& typical_p, const Vector<const uint64_t>& seed, const I32& choice,
                   const I32& position, const I32& top_logprobs, const F32& repetition_penalty,
                   const F32& frequency_penalty, const F32& presence_penalty,
                   const I32& seen_offsets, const I32& seen_ids, const I32& seen_counts,
                   const I32& bias_offsets, const I32& bias_ids, const F32& bias_values,
                   const Matrix<const uint32_t>& mask, const I32& mask_rows) {
    const size_t n = temperature.shape(0);
    for (const size_t length :
         {top_k.shape(0), top_p.shape(0), min_p.shape(0), typical_p.shape(0), seed.shape(0),
          choice.shape(0), position.shape(0), top_logprobs.shape(0), repetition_penalty.shape(0),
          frequency_penalty.shape(0), presence_penalty.shape(0), mask_rows.shape(0),
          seen_offsets.shape(0) - 1, bias_offsets.shape(0) - 1})
        require(length == n,
                "the arrays of a plan must have one entry for each row, offsets one more");
    require(seen_ids.shape(0) == seen_counts.shape(0), "seen_ids and seen_counts differ in length");
    require(bias_ids.shape(0) == bias_values.shape(0), "bias_ids and bias_values differ in length");
    SamplePlan plan;
    plan.count = n;
    plan.temperature = temperature.data();
    plan.top_k = top_k.data();
    plan.top_p = top_p.data();
    plan.min_p = min_p.data();
    plan.typical_p = typical_p.data();
    plan.seed = seed.data();
    plan.choice = choice.data();
    plan.position = position.data();
    plan.top_logprobs = top_logprobs.data();
    plan.repetition_penalty = repetition_penalty.data();
    plan.frequency_penalty = frequency_penalty.data();
    plan.presence_penalty = presence_penalty.data();
    plan.seen_offsets = seen_offsets.data();
    plan.seen_ids = seen_ids.data();
    plan.seen_counts = seen_counts.data();
    plan.seen_count = seen_ids.shape(0);
    plan.bias_offsets = bias_offsets.data();
    plan.bias_ids = bias_ids.data();
    plan.bias_values = bias_values.data();
    plan.bias_count = bias_ids.shape(0);
    plan.mask = mask.data();
    plan.mask_count = mask.shape(0);
    plan.mask_words = mask.shape(1);
    plan.mask_rows = mask_rows.data();
    return plan;
}

void forward(BoundDecoder& decoder, const I32& token_ids, const I32& positions,
             const I32& run_offsets, const Matrix<const int32_t>& block_tables,
             const I32& adapter_slots, const I32& output_rows,
             const Vector<const uint8_t>& output_kinds, const I32& score_targets,
             const I32& score_top_n, const F32& temperature, const I32& top_k, const F32& top_p,
             const F32& min_p, const F32& typical_p, const Vector<const uint64_t>& seed,
             const I32& choice, const I32& position, const I32& top_logprobs,
             const F32& repetition_penalty, const F32& frequency_penalty,
             const F32& presence_penalty, const I32& seen_offsets, const I32& seen_ids,
             const I32& seen_counts, const I32& bias_offsets, const I32& bias_ids,
             const F32& bias_values, const Matrix<const uint32_t>& mask, const I32& mask_rows,
             const Matrix<float>& hidden, const Matrix<float>& logits,
             const Vector<int32_t>& sampled, const Vector<float>& logprobs,
             const Matrix<int32_t>& top_ids, const Matrix<float>& top_values) {
    require(block_tables.shape(0) + 1 == run_offsets.shape(0),
            "block_tables must have one row for each run");
    StepInput input;
    input.token_ids = span_of(token_ids);
    input.positions = span_of(positions);
    input.run_offsets = span_of(run_offsets);
    input.block_tables = block_tables.data();
    input.block_table_width = block_tables.shape(1);
    input.adapter_slots = span_of(adapter_slots);
    input.output_rows = span_of(output_rows);
    input.output_kinds = span_of(output_kinds);
    input.score_targets = span_of(score_targets);
    input.score_top_n = span_of(score_top_n);
    input.plan =
        plan_of(temperature, top_k, top_p, min_p, typical_p, seed, choice, position, top_logprobs,
                repetition_penalty, frequency_penalty, presence_penalty, seen_offsets, seen_ids,
                seen_counts, bias_offsets, bias_ids, bias_values, mask, mask_rows);

    size_t counts[4] = {};
    for (const uint8_t kind : input.output_kinds)
        ++counts[kind % 4];  // the core refuses other kinds
    const size_t scored = counts[2] + counts[3];
    const ModelConfig& model = decoder.model();
    require(hidden.shape(0) == counts[0] && hidden.shape(1) == model.hidden,
            "hidden has the wrong shape");
    require(logits.shape(0) == counts[1] && logits.shape(1) == model.vocab,
            "logits have the wrong shape");
    require(sampled.shape(0) == counts[3] && logprobs.shape(0) == scored,
            "sampled or logprobs: wrong length");
    require(top_ids.shape(0) == scored && top_values.shape(0) == scored &&
                top_ids.shape(1) == top_values.shape(1),
            "top_ids or top_logprobs have the wrong shape");
    const StepOutput output{hidden.data(),  logits.data(),     sampled.data(),  logprobs.data(),
                            top_ids.data(), top_values.data(), top_ids.shape(1)};
    const nb::gil_scoped_release released;
    decoder.core().forward(input, output);
}

std::span<const std::byte> bytes_of(const Matrix<const uint8_t>& matrix) {
    return {reinterpret_cast<const std::byte*>(matrix.data()), matrix.shape(0) * matrix.shape(1)};
}

void bind_adapter(nb::module_& module) {
    nb::class_<BoundAdapter>(module, "Adapter", "Low-rank matrices, copied one pair at a time.")
        .def(
            "__init__",
            [](BoundAdapter* self, size_t layers, size_t nbytes) {
                new (self) BoundAdapter{std::make_shared<Adapter>(layers, nbytes)};
            },
            "layers"_a, "nbytes"_a, "nbytes: what all matrices take, each rounded up to 64 bytes.")
        .def(
            "set",
            [](BoundAdapter& self, size_t layer, const std::string& name,
               const Matrix<const uint8_t>& a, const std::string& a_dtype,
               const Matrix<const uint8_t>& b, const std::string& b_dtype, float scale) {
                const LinearName which = linear_name(name);
                const ValueType a_type = float_type(a_dtype), b_type = float_type(b_dtype);
                const size_t rank = a.shape(0), in = a.shape(1) / size_of(a_type);
                const nb::gil_scoped_release released;
                self.core->set(layer, which, b.shape(0), in, rank, scale, bytes_of(a), a_type,
                               bytes_of(b), b_type);
            },
            "layer"_a, "name"_a, "a"_a.noconvert(), "a_dtype"_a, "b"_a.noconvert(), "b_dtype"_a,
            "scale"_a, "Copy the bytes of A [rank, in] and B [out, rank]; dtypes as in set_head.");
}

void bind_decoder(nb::module_& module) {
    nb::class_<BoundDecoder>(module, "Decoder",
                             "A model on the CPU: built piece by piece, then prepare()d.")
        .def(
            "__init__",
            [](BoundDecoder* self, const std::string& isa, size_t vocab, size_t hidden,
               float norm_eps, float embedding_scale, size_t kv_blocks, const std::string& kv_dtype,
               int threads, size_t max_batch_tokens, const std::string& packing) {
                new (self) BoundDecoder(isa, {vocab, hidden, norm_eps, embedding_scale},
                                        {kv_blocks, float_type(kv_dtype), threads, max_batch_tokens,
                                         packing_named(packing)});
            },
            nb::kw_only(), "isa"_a, "vocab"_a, "hidden"_a, "norm_eps"_a, "embedding_scale"_a,
            "kv_blocks"_a, "kv_dtype"_a, "threads"_a, "max_batch_tokens"_a, "packing"_a)
        .def(
            "add_layer",
            [](BoundDecoder& self, size_t heads, size_t kv_heads, size_t head_dim,
               const std::string& activation, float norm_eps, float query_scale, size_t window,
               const F32& inverse_frequencies) {
                const auto span = span_of(inverse_frequencies);
                const auto act = enumerator<Activation>(activation, {"relu2", "silu", "gelu_tanh"},
                                                        "activation");
                return self.core().add_layer({heads, kv_heads, head_dim, act, norm_eps, query_scale,
                                              window,
                                              std::vector<float>(span.begin(), span.end())});
            },
            nb::kw_only(), "heads"_a, "kv_heads"_a, "head_dim"_a, "activation"_a, "norm_eps"_a,
            "query_scale"_a, "window"_a, "inverse_frequencies"_a.noconvert(),
            "Append a layer and return its index.")
        .def(
            "set_embedding",
            [](BoundDecoder& self, const Matrix<const uint8_t>& rows, const std::string& dtype) {
                self.core().set_embedding(self.borrow(rows, dtype));
            },
            "rows"_a.noconvert(), "dtype"_a,
            "Borrow the bytes of [vocab, hidden]; dtype is f32, bf16 or f16.")
        .def(
            "set_head",
            [](BoundDecoder& self, const Matrix<const uint8_t>& rows, const std::string& dtype,
               const std::string& kind) {
                const DenseMatrix head = self.borrow(rows, dtype);
                const HeadKind wanted = enumerator<HeadKind>(kind, HEAD_KINDS, "head");
                const nb::gil_scoped_release released;
                self.core().set_head(head, wanted);
            },
            "rows"_a.noconvert(), "dtype"_a, "kind"_a = "full",
            "Borrow the bytes of [vocab, hidden]; dtype is f32, bf16 or f16, kind as in "
            "LoadOptions.head.")
        .def(
            "set_final_norm",
            [](BoundDecoder& self, const F32& gain) { self.core().set_final_norm(span_of(gain)); },
            "gain"_a.noconvert())
        .def(
            "set_vector",
            [](BoundDecoder& self, size_t layer, const std::string& name, const F32& values) {
                self.core().set_vector(layer, vector_name(name), span_of(values));
            },
            "layer"_a, "name"_a, "values"_a.noconvert(),
            "Copy a norm of a layer, by its canonical name.")
        .def(
            "set_linear",
            [](BoundDecoder& self, size_t layer, const std::string& name,
               const Matrix<const uint8_t>& stored, const std::string& layout, size_t out_features,
               size_t in_features, const F32& scales, size_t group, const std::string& input) {
                const LinearName which = linear_name(name);
                const auto type = enumerator<InputType>(input, {"int8", "float"}, "input");
                const StoredCodes codes{stored.data(), layout_named(layout), out_features,
                                        in_features};
                require(stored.shape(0) == codes.rows() && stored.shape(1) == codes.row_bytes(),
                        "stored rows do not have the shape of their layout");
                const nb::gil_scoped_release released;
                return self.core().set_linear(layer, which, codes, span_of(scales), group, type);
            },
            "layer"_a, "name"_a, "stored"_a.noconvert(), "layout"_a, "out_features"_a,
            "in_features"_a, "scales"_a.noconvert(), "group"_a, "input"_a = "int8",
            "Pack a matrix for the kernels; returns how many rows are not all zero. Its inputs are "
            "rounded to int8, or stay float.")
        .def(
            "set_linear_norm",
            [](BoundDecoder& self, size_t layer, const std::string& name, const F32& gain,
               float eps) {
                self.core().set_linear_norm(layer, linear_name(name), span_of(gain), eps);
            },
            "layer"_a, "name"_a, "gain"_a.noconvert(), "eps"_a)
        .def(
            "set_linear_bias",
            [](BoundDecoder& self, size_t layer, const std::string& name, const F32& bias) {
                self.core().set_linear_bias(layer, linear_name(name), span_of(bias));
            },
            "layer"_a, "name"_a, "bias"_a.noconvert())
        .def(
            "prepare", [](BoundDecoder& self) { self.core().prepare(); },
            "Check that the model is whole; take KV storage and scratch.")
        .def(
            "load_adapter",
            [](BoundDecoder& self, const BoundAdapter& adapter) {
                const nb::gil_scoped_release released;
                return self.core().load_adapter(adapter.core);
            },
            "adapter"_a, "Return the slot of the adapter, for adapter_slots of forward.")
        .def(
            "unload_adapter",
            [](BoundDecoder& self, size_t slot) {
                const nb::gil_scoped_release released;
                self.core().unload_adapter(slot);
            },
            "slot"_a)
        .def(
            "more_adapter_scratch",
            [](BoundDecoder& self, size_t rank) {
                const nb::gil_scoped_release released;
                return self.core().more_adapter_scratch(rank);
            },
            "rank"_a, "Bytes of scratch that adapters of this rank need beside those loaded now.")
        .def("forward", &forward, "token_ids"_a.noconvert(), "positions"_a.noconvert(),
             "run_offsets"_a.noconvert(), "block_tables"_a.noconvert(),
             "adapter_slots"_a.noconvert(), "output_rows"_a.noconvert(),
             "output_kinds"_a.noconvert(), "score_targets"_a.noconvert(),
             "score_top_n"_a.noconvert(), "temperature"_a.noconvert(), "top_k"_a.noconvert(),
             "top_p"_a.noconvert(), "min_p"_a.noconvert(), "typical_p"_a.noconvert(),
             "seed"_a.noconvert(), "choice"_a.noconvert(), "position"_a.noconvert(),
             "top_logprobs"_a.noconvert(), "repetition_penalty"_a.noconvert(),
             "frequency_penalty"_a.noconvert(), "presence_penalty"_a.noconvert(),
             "seen_offsets"_a.noconvert(), "seen_ids"_a.noconvert(), "seen_counts"_a.noconvert(),
             "bias_offsets"_a.noconvert(), "bias_ids"_a.noconvert(), "bias_values"_a.noconvert(),
             "mask"_a.noconvert(), "mask_rows"_a.noconvert(), "hidden"_a.noconvert(),
             "logits"_a.noconvert(), "sampled"_a.noconvert(), "logprobs"_a.noconvert(),
             "top_ids"_a.noconvert(), "top_values"_a.noconvert(),
             "One step: Batch, SamplePlan, then the arrays of StepOutput to fill.")
        .def(
            "measure_stages", [](BoundDecoder& self, bool on) { self.core().measure_stages(on); },
            "on"_a, "Forget what the stages of steps took; measure them from now on or no more.")
        .def_prop_ro(
            "stage_seconds",
            [](BoundDecoder& self) {
                const auto seconds = self.core().stage_seconds();
                nb::typed<nb::dict, nb::str, float> stages;
                for (size_t i = 0; i < STAGE_COUNT; ++i) stages[STAGE_NAMES[i]] = seconds[i];
                return stages;
            },
            "Seconds of each stage since measure_stages(True), the mean of the workers.")
        .def_prop_ro(
            "step_seconds", [](BoundDecoder& self) { return self.core().step_seconds(); },
            "Seconds of all steps since measure_stages(), or since loading.")
        .def_prop_ro(
            "packed_bytes",
            [](BoundDecoder& self) {
                nb::typed<nb::dict, nb::str, size_t> bytes;
                for (size_t i = 0; i < LINEAR_COUNT; ++i)
                    bytes[LINEAR_NAMES[i]] = self.core().packed_bytes(static_cast<LinearName>(i));
                return bytes;
            },
            "Bytes of packed ternary weights, by linear, over all layers.")
        .def(
            "copy_blocks",
            [](BoundDecoder& self, const Matrix<const int32_t>& pairs) {
                require(pairs.shape(1) == 2, "pairs must be [n, 2]");
                const nb::gil_scoped_release released;
                self.core().copy_blocks(pairs.data(), pairs.shape(0));
            },
            "pairs"_a.noconvert())
        .def(
            "read_blocks",
            [](BoundDecoder& self, const I32& blocks, const Matrix<uint8_t>& out) {
                require(
                    out.shape(0) == blocks.shape(0) && out.shape(1) == self.core().kv_block_bytes(),
                    "out must be [blocks, bytes per block]");
                const nb::gil_scoped_release released;
                self.core().read_blocks(span_of(blocks), reinterpret_cast<std::byte*>(out.data()));
            },
            "blocks"_a.noconvert(), "out"_a.noconvert())
        .def(
            "write_blocks",
            [](BoundDecoder& self, const I32& blocks, const Matrix<const uint8_t>& data) {
                require(data.shape(0) == blocks.shape(0) &&
                            data.shape(1) == self.core().kv_block_bytes(),
                        "data must be [blocks, bytes per block]");
                const nb::gil_scoped_release released;
                self.core().write_blocks(span_of(blocks),
                                         reinterpret_cast<const std::byte*>(data.data()));
            },
            "blocks"_a.noconvert(), "data"_a.noconvert())
        .def_prop_ro("kv_blocks", [](BoundDecoder& self) { return self.core().kv_blocks(); })
        .def_prop_ro("kv_block_bytes",
                     [](BoundDecoder& self) { return self.core().kv_block_bytes(); })
        .def_prop_ro("kv_bytes", [](BoundDecoder& self) { return self.core().kv_bytes(); })
        .def_prop_ro("scratch_bytes",
                     [](BoundDecoder& self) { return self.core().scratch_bytes(); })
        .def_prop_ro("weight_bytes", [](BoundDecoder& self) { return self.core().weight_bytes(); })
        .def_prop_ro("rounded_head_bytes",
                     [](BoundDecoder& self) { return self.core().rounded_head_bytes(); })
        .def_prop_ro("head",
                     [](BoundDecoder& self) {
                         return HEAD_KINDS.begin()[static_cast<size_t>(self.core().head_kind())];
                     })
        .def_prop_ro(
            "head_statistics",
            [](BoundDecoder& self) {
                const HeadStatistics found = self.core().head_statistics();
                nb::typed<nb::dict, nb::str, nb::int_> counts;
                counts["screened"] = found.screened;
                counts["rescored"] = found.rescored;
                counts["full"] = found.full;
                return counts;
            },
            "Rows screened so far; rows of the head computed exactly for them; how many of them "
            "read the whole head after all.");
}

size_t scratch_bytes(size_t vocab, size_t hidden, size_t kv_blocks, int threads,
                     size_t max_batch_tokens, const std::string& head,
                     const std::string& head_dtype, const Matrix<const int64_t>& layers,
                     const Vector<const int64_t>& rope_pairs) {
    constexpr size_t FIELDS = 7;
    require(layers.shape(1) == FIELDS, "layers must be [n, 7]");
    std::vector<LayerShape> shapes;
    for (size_t i = 0; i < layers.shape(0); ++i) {
        const int64_t* row = layers.data() + i * FIELDS;
        for (size_t field = 0; field < FIELDS; ++field)
            require(row[field] >= 0, "a shape is negative");
        const auto size = [row](size_t field) { return static_cast<size_t>(row[field]); };
        shapes.push_back(
            {size(0), size(1), size(2), size(3), row[4] != 0, row[5] != 0, row[6] != 0});
    }
    std::vector<size_t> pairs;
    for (const int64_t count : span_of(rope_pairs)) {
        require(count >= 0, "a shape is negative");
        pairs.push_back(static_cast<size_t>(count));
    }
    RuntimeConfig runtime;
    runtime.kv_blocks = kv_blocks;
    runtime.threads = threads;
    runtime.max_batch_tokens = max_batch_tokens;
    return Decoder::planned_scratch({vocab, hidden}, runtime,
                                    enumerator<HeadKind>(head, HEAD_KINDS, "head"),
                                    float_type(head_dtype), shapes, pairs);
}

void bind_plan(nb::module_& module) {
    module.def(
        "scratch_bytes", &scratch_bytes, nb::kw_only(), "vocab"_a, "hidden"_a, "kv_blocks"_a,
        "threads"_a, "max_batch_tokens"_a, "head"_a, "head_dtype"_a, "layers"_a.noconvert(),
        "rope_pairs"_a.noconvert(),
        "Decoder.scratch_bytes before there is one. Each row of layers: heads, kv_heads, "
        "head_dim, ffn, and whether there are linears with norms of their own, with int8 and "
        "with float inputs; rope_pairs: of each distinct table of frequencies.");
}

// A matrix that is packed once, and the kernels that multiply it.
struct BoundMatrix {
    const Kernels& kernels;
    PreparedMatrix core;
};

void bind_prepared(nb::module_& module) {
    nb::class_<BoundMatrix>(module, "PreparedMatrix", "A ternary matrix packed for the kernels.")
        .def(
            "__init__",
            [](BoundMatrix* self, const Matrix<const uint8_t>& packed, size_t in_features,
               const std::string& packing, const std::string& isa) {
                const Kernels& kernels = kernels_named(isa);
                const Packing how = packing_named(packing);
                require(packed.shape(1) == canonical_row_bytes(in_features),
                        "packed must be [rows, columns / 4]");
                const StoredCodes codes{packed.data(), Layout::CANONICAL, packed.shape(0),
                                        in_features};
                const nb::gil_scoped_release released;
                new (self) BoundMatrix{kernels, PreparedMatrix(codes, how)};
            },
            "packed"_a.noconvert(), "in_features"_a, "packing"_a, "isa"_a)
        .def(
            "multiply",
            [](const BoundMatrix& self, const Matrix<const int8_t>& q, const Matrix<int32_t>& out) {
                require(q.shape(1) == self.core.in_features() && out.shape(0) == q.shape(0) &&
                            out.shape(1) == self.core.out_features(),
                        "q and out do not fit the matrix");
                const nb::gil_scoped_release released;
                self.core.multiply(*self.kernels.integer, q.data(), q.shape(0), out.data());
            },
            "q"_a.noconvert(), "out"_a.noconvert())
        .def_prop_ro("nbytes", [](const BoundMatrix& self) { return self.core.bytes(); });
}

void bind_ops(nb::module_& module) {
    module.def(
        "quantize_activations",
        [](const Matrix<const float>& x, const Matrix<int8_t>& q, const Vector<float>& a,
           const std::string& isa) {
            const Kernels& kernels = kernels_named(isa);
            const size_t rows = x.shape(0), n = x.shape(1);
            require(q.shape(0) == rows && q.shape(1) == n && a.shape(0) == rows,
                    "q and a must fit x");
            const nb::gil_scoped_release released;
            const FloatControlScope control;
            if (!all_finite(x.data(), rows * n))
                throw std::domain_error("activations hold NaN or infinity");
            std::vector<int8_t> padded(padded_columns(n));
            int32_t sum;
            for (size_t row = 0; row < rows; ++row) {
                a.data()[row] = kernels.quantize(x.data() + row * n, n, padded.data(), &sum);
                std::memcpy(q.data() + row * n, padded.data(), n);
            }
        },
        "x"_a.noconvert(), "q"_a.noconvert(), "a"_a.noconvert(), "isa"_a);
    module.def(
        "pack",
        [](const Matrix<const int8_t>& codes, const Matrix<uint8_t>& packed) {
            const size_t rows = codes.shape(0), columns = codes.shape(1);
            require(packed.shape(0) == rows && packed.shape(1) == canonical_row_bytes(columns),
                    "packed must be [rows, columns / 4]");
            const nb::gil_scoped_release released;
            if (!pack_rows(codes.data(), rows, columns, packed.data()))
                throw std::domain_error("codes must be -1, 0 or 1");
        },
        "codes"_a.noconvert(), "packed"_a.noconvert());
    module.def(
        "unpack",
        [](const Matrix<const uint8_t>& packed, const Matrix<int8_t>& codes) {
            const size_t rows = codes.shape(0), columns = codes.shape(1);
            require(packed.shape(0) == rows && packed.shape(1) == canonical_row_bytes(columns),
                    "packed must be [rows, columns / 4]");
            const nb::gil_scoped_release released;
            if (!unpack_rows(packed.data(), rows, columns, codes.data()))
                throw std::domain_error(
                    "packed weights hold the bits 11, which are no ternary code");
        },
        "packed"_a.noconvert(), "codes"_a.noconvert());
}

// The functions of the numerics contract, for the tests that compare them with numerics.py.
void bind_numerics(nb::module_& module) {
    module.def(
        "exp_f32",
        [](const F32& x, const Vector<float>& out) {
            require(x.shape(0) == out.shape(0), "x and out differ in length");
            for (size_t i = 0; i < x.shape(0); ++i) out.data()[i] = exp_f32(x.data()[i]);
        },
        "x"_a.noconvert(), "out"_a.noconvert());
    module.def(
        "log_f64",
        [](const Vector<const double>& x, const Vector<double>& out) {
            require(x.shape(0) == out.shape(0), "x and out differ in length");
            for (size_t i = 0; i < x.shape(0); ++i) out.data()[i] = log_f64(x.data()[i]);
        },
        "x"_a.noconvert(), "out"_a.noconvert());
    module.def(
        "sincos_f64",
        [](const Vector<const double>& x, const Vector<double>& sines,
           const Vector<double>& cosines) {
            require(x.shape(0) == sines.shape(0) && x.shape(0) == cosines.shape(0),
                    "lengths differ");
            for (size_t i = 0; i < x.shape(0); ++i) {
                const SinCos turn = sincos_f64(x.data()[i]);
                sines.data()[i] = turn.sine;
                cosines.data()[i] = turn.cosine;
            }
        },
        "x"_a.noconvert(), "sines"_a.noconvert(), "cosines"_a.noconvert());
    module.def(
        "gumbel_noise",
        [](uint64_t seed, uint32_t choice, uint32_t position, const Vector<const int32_t>& ids,
           const Vector<double>& out) {
            require(ids.shape(0) == out.shape(0), "ids and out differ in length");
            const UniformStream uniforms{seed, choice, position};
            for (size_t i = 0; i < ids.shape(0); ++i) {
                const auto id = static_cast<uint32_t>(ids.data()[i]);
                out.data()[i] = gumbel_of_word(uniforms.words(id / 4).word[id % 4]);
            }
        },
        "seed"_a, "choice"_a, "position"_a, "ids"_a.noconvert(), "out"_a.noconvert());
    module.def(
        "lane_sum", [](const F32& values) { return lane_sum(values.data(), values.shape(0)); },
        "values"_a.noconvert());
}

void bind_machine(nb::module_& module) {
    module.def(
        "cpu_info",
        [] {
            const CpuFeatures features = cpu_features();
            nb::dict flags;
            flags["avx2"] = features.avx2;
            flags["f16c"] = features.f16c;
            flags["avxvnni"] = features.avxvnni;
            flags["avx512f"] = features.avx512f;
            flags["avx512bw"] = features.avx512bw;
            flags["avx512dq"] = features.avx512dq;
            flags["avx512vl"] = features.avx512vl;
            flags["avx512vnni"] = features.avx512vnni;
            flags["dotprod"] = features.dotprod;
            flags["i8mm"] = features.i8mm;
            nb::typed<nb::dict, nb::str, nb::any> info;
            info["name"] = cpu_name();
            info["physical_cores"] = physical_cores();
            info["usable_cpus"] = usable_cpus();
            info["features"] = flags;
            return info;
        },
        "Name, cores and features of this CPU.");
    module.def(
        "kernel_names",
        [] {
            std::vector<std::string> names;
            for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
            return names;
        },
        "The kernel sets this machine runs, best first.");
    module.def("available_memory", &available_memory,
               "Bytes that can still be allocated; 0 = unknown.");
    module.def("trim_heap", &trim_heap,
               "Give memory that the heap has free back to the system, where it can.");
    module.def("resident_bytes", &resident_bytes, "Bytes of this process in RAM; 0 = unknown.");
    module.def("resident_file_bytes", &resident_file_bytes,
               "Those of them that are pages of files.");
    module.def(
        "read_bandwidth",
        [](int threads, size_t nbytes) {
            const nb::gil_scoped_release released;
            return read_bandwidth(threads, nbytes);
        },
        "threads"_a, "nbytes"_a,
        "Bytes a second at which the threads together read a buffer again and again.");
    module.def(
        "peak_multiplications",
        [](const std::string& isa, int threads) {
            const Kernels& kernels = kernels_named(isa);
            const nb::gil_scoped_release released;
            return peak_multiplications(kernels, threads);
        },
        "isa"_a, "threads"_a,
        "8-bit multiplications a second in the densest loop of a kernel set.");
    module.def(
        "quantized_operations",
        [](const std::string& isa, const std::string& packing, int threads, size_t rows,
           size_t columns, double seconds) {
            const Kernels& kernels = kernels_named(isa);
            const auto how = enumerator<Packing>(packing, {"2bit", "base3"}, "packing");
            const nb::gil_scoped_release released;
            return quantized_operations(kernels, how, threads, rows, columns, seconds);
        },
        "isa"_a, "packing"_a, "threads"_a, "rows"_a, "columns"_a, "seconds"_a,
        "Operations (quantise, multiply, rescale) a second that the threads do.");
}

}  // namespace
}  // namespace bitllm

NB_MODULE(_native, module) {
    module.doc() = "The native core of bitllm; private: use bitllm.backends.cpu and bitllm.ops.";
    bitllm::bind_adapter(module);
    bitllm::bind_decoder(module);
    bitllm::bind_plan(module);
    bitllm::bind_prepared(module);
    bitllm::bind_ops(module);
    bitllm::bind_numerics(module);
    bitllm::bind_machine(module);
}
