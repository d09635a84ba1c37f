#include "bandwidth.h"

#include <chrono>
#include <cstdint>
#include <cstring>
#include <vector>

#include "memory.h"
#include "platform.h"
#include "thread_pool.h"

namespace bitllm {
namespace {

// Reads `bytes` bytes, a multiple of 64, eight independent words at a time.
uint64_t read_all(const std::byte* at, size_t bytes) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < bytes; i += sizeof(sums)) {
        uint64_t words[8];
        std::memcpy(words, at + i, sizeof(words));
        for (int j = 0; j < 8; ++j) sums[j] += words[j];
    }
    uint64_t sum = 0;
    for (const uint64_t part : sums) sum += part;
    return sum;
}

}  // namespace

double read_bandwidth(int threads, size_t bytes) {
    using Clock = std::chrono::steady_clock;
    constexpr int PASSES = 5;
    bytes = align_up(bytes ? bytes : 1);
    ThreadPool& pool = shared_pool(threads);
    const Pages pages(bytes, true);
    std::vector<uint64_t> sums(static_cast<size_t>(threads));
    double best = 0;
    for (int pass = 0; pass <= PASSES; ++pass) {
        Clock::time_point start;
        pool.parallel([&](int worker, int workers) {
            const Range part = split(bytes, worker, workers, ALIGNMENT);
            std::byte* const first = pages.data() + part.begin;
            // The first pass writes: pages never written all share one page of zeros.
            if (pass == 0) std::memset(first, worker + 1, part.end - part.begin);
            pool.barrier(worker);
            if (worker == 0) start = Clock::now();
            sums[static_cast<size_t>(worker)] += read_all(first, part.end - part.begin);
        });
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        if (pass > 0 && seconds > 0 && double(bytes) / seconds > best)
            best = double(bytes) / seconds;
    }
    // The sums are looked at, so that the reads cannot be left out.
    uint64_t total = 0;
    for (const uint64_t sum : sums) total += sum;
    return total == 0 ? 0.0 : best;
}

}  // namespace bitllm
