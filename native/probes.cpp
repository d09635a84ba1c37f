#include "probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "platform.h"
#include "thread_pool.h"

namespace bitllm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int PASSES = 24;  // short ones: a busy machine leaves no long time undisturbed
constexpr double PASS_SECONDS = 0.002;
constexpr size_t LARGEST_INPUT = (size_t{1} << 24) / 127;  // columns for which products are exact

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// The same random-looking codes in either packing; only 0, 1 and 2 occur.
Pages some_weights(Packing packing, size_t bytes) {
    Pages pages(bytes);
    auto* packed = reinterpret_cast<uint8_t*>(pages.data());
    for (size_t i = 0; i < bytes; ++i) {
        const size_t digits = i * 2654435761u >> 7;
        if (packing == Packing::BASE3) {
            packed[i] = static_cast<uint8_t>((256 * (digits % 243) + 242) / 243);
            continue;
        }
        size_t rest = digits % 81;
        for (unsigned shift = 0; shift < 8; shift += 2, rest /= 3)
            packed[i] |= static_cast<uint8_t>(rest % 3 << shift);
    }
    return pages;
}

// What a thread needs for operations of its own, where a decoder would have it.
struct Operation {
    Operation(size_t rows, size_t columns)
        : scratch(Arena::bytes_for<float>(columns) + Arena::bytes_for<float>(rows) +
                  Arena::bytes_for<int8_t>(padded_columns(columns)) +
                  Arena::bytes_for<int32_t>(rows)),
          x(scratch.take<float>(columns)),
          y(scratch.take<float>(rows)),
          q(scratch.take<int8_t>(padded_columns(columns))),
          sums(scratch.take<int32_t>(rows)) {
        for (size_t i = 0; i < columns; ++i) x[i] = static_cast<float>(i % 97) - 48.0f;
    }

    Arena scratch;
    float *x, *y;
    int8_t* q;
    int32_t* sums;
};

}  // namespace

double peak_multiplications(const Kernels& kernels, int threads) {
    ThreadPool& pool = shared_pool(threads);
    size_t iterations = 1000;
    for (;; iterations *= 2) {  // long enough to be timed, on any machine
        const auto start = Clock::now();
        kernels.integer->peak(iterations);
        if (seconds_since(start) > PASS_SECONDS / 2) break;
    }
    double best = 0;
    for (int pass = 0; pass < PASSES; ++pass) {
        std::atomic<int64_t> done = 0;
        Clock::time_point start;
        pool.parallel([&](int worker, int) {
            pool.barrier(worker);
            if (worker == 0) start = Clock::now();
            done += kernels.integer->peak(2 * iterations);
        });
        best = std::max(best, double(done.load()) / seconds_since(start));
    }
    return best;
}

double quantized_operations(const Kernels& kernels, Packing packing, int threads, size_t rows,
                            size_t columns, double seconds) {
    if (rows == 0 || columns == 0 || columns > LARGEST_INPUT)
        throw std::invalid_argument("a quantised operation needs rows, and 1 .. " +
                                    std::to_string(LARGEST_INPUT) + " columns");
    ThreadPool& pool = shared_pool(threads);
    const Pages weights = some_weights(packing, rows * packed_row_bytes(packing, columns));
    const auto* packed = reinterpret_cast<const uint8_t*>(weights.data());
    const float scale = 0.5f;
    std::vector<Operation> operations;
    for (int worker = 0; worker < threads; ++worker) operations.emplace_back(rows, columns);
    std::atomic<int64_t> done = 0;
    Clock::time_point start;
    pool.parallel([&](int worker, int) {
        Operation& own = operations[static_cast<size_t>(worker)];
        const PackedKernels& products = kernels.integer->packed[static_cast<size_t>(packing)];
        pool.barrier(worker);
        if (worker == 0) start = Clock::now();
        const auto began = Clock::now();
        int64_t count = 0;
        for (; count % 8 != 0 || seconds_since(began) < seconds; ++count) {
            int32_t q_sum;
            const float a = kernels.quantize(own.x, columns, own.q, &q_sum);
            products.matvec(packed, rows, columns, own.q, q_sum, own.sums);
            kernels.rescale(own.sums, rows, a, &scale, 0, own.y);
        }
        done += count;
    });
    return double(done.load()) / seconds_since(start);
}

}  // namespace bitllm
