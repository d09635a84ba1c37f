#include "bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "memory.h"
#include "platform.h"
#include "prefetch.h"
#include "thread_pool.h"

namespace bitllm {
namespace {

constexpr int PASSES = 12;
constexpr size_t LEAST_BYTES = size_t{1} << 26;  // read in a pass, so that starting it is no cost

// Returns `sum` and what `count` words, a multiple of 8, add to it, in four independent vectors;
// asks for memory AHEAD bytes early.
template <size_t AHEAD>
uint64_t read_all(const uint64_t* words, size_t count, uint64_t sum) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < count; i += 8) {
        if constexpr (AHEAD > 0) prefetch(words + i, AHEAD);
        for (size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
    }
    for (const uint64_t part : sums) sum += part;
    return sum;
}

}  // namespace

double read_bandwidth(int threads, size_t bytes) {
    using Clock = std::chrono::steady_clock;
    bytes = align_up(bytes ? bytes : 1);
    const size_t rounds = (LEAST_BYTES + bytes - 1) / bytes;
    ThreadPool& pool = shared_pool(threads);
    const Pages pages(bytes, true);
    std::vector<uint64_t> sums(static_cast<size_t>(threads));
    double best = 0;
    for (int pass = 0; pass <= PASSES; ++pass) {
        Clock::time_point start;
        pool.parallel([&](int worker, int workers) {
            const Range part = split(bytes, worker, workers, ALIGNMENT);
            auto* const first = reinterpret_cast<uint64_t*>(pages.data() + part.begin);
            const size_t count = (part.end - part.begin) / sizeof(uint64_t);
            // The first pass writes: pages never written all share one page of zeros.
            if (pass == 0) std::fill_n(first, count, static_cast<uint64_t>(worker) + 1);
            pool.barrier(worker);
            if (worker == 0) start = Clock::now();
            uint64_t sum = 0;
            for (size_t round = 0; round < rounds; ++round)
                sum = pass % 2 ? read_all<PREFETCH_BYTES>(first, count, sum)
                               : read_all<0>(first, count, sum);
            sums[static_cast<size_t>(worker)] += sum;
        });
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        const double read = double(bytes) * double(rounds);
        if (pass > 0 && seconds > 0) best = std::max(best, read / seconds);
    }
    // The sums are looked at, so that the reads cannot be left out.
    uint64_t total = 0;
    for (const uint64_t sum : sums) total += sum;
    return total == 0 ? 0.0 : best;
}

}  // namespace bitllm
