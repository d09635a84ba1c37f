// Parallel regions on a fixed set of workers.
//
// The calling thread is worker 0; the others wait between regions, first spinning for some
// microseconds (the regions of a step follow each other closely), then asleep, so that an idle
// process uses no CPU. Regions of several callers queue. After a fork the child's first region
// starts workers of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace bitllm {

class ThreadPool {
  public:
    // Must not throw: there is nobody on the other workers to catch it.
    using Region = void (*)(void* context, int worker, int workers);

    // `threads` >= 1 workers, the caller of each region counted. Throws std::invalid_argument.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return threads_; }

    // Calls region(context, worker, size()) on every worker and returns when all have returned. All
    // run with the default floating point control word. Throws std::logic_error when called from
    // inside a region.
    void run(Region region, void* context);

    // run() for a callable body(worker, workers).
    template <class Body>
    void parallel(Body&& body) {
        using Plain = std::remove_reference_t<Body>;
        run([](void* context, int worker,
               int workers) { (*static_cast<Plain*>(context))(worker, workers); },
            const_cast<std::remove_const_t<Plain>*>(std::addressof(body)));
    }

    // Inside a region: returns when all workers have called it as often as this one; what each
    // wrote before is visible to all after.
    void barrier(int worker);

  private:
    struct Crew;
    Crew& crew();

    const int threads_;
    std::atomic<Crew*> crew_;
};

// The pool of this process for that many threads, made on first use and kept. Forwards that share
// it queue.
ThreadPool& shared_pool(int threads);

// Part `part` of `parts` near-equal parts of 0 .. count, in steps of `grain` (the last may be
// shorter).
struct Range {
    size_t begin;
    size_t end;
};
inline Range split(size_t count, int part, int parts, size_t grain = 1) {
    const size_t steps = (count + grain - 1) / grain;
    const size_t first = steps * static_cast<size_t>(part) / static_cast<size_t>(parts);
    const size_t last = steps * (static_cast<size_t>(part) + 1) / static_cast<size_t>(parts);
    const size_t begin = first * grain, end = last * grain;
    return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace bitllm
