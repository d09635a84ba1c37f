#include "thread_pool.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "platform.h"

namespace bitllm {
namespace {

// Some 50 us of pauses: longer than the gap between two regions of a step, shorter than anybody
// notices.
constexpr int SPINS = 2000;

thread_local bool inside_region = false;

struct InsideRegion {
    InsideRegion() { inside_region = true; }
    ~InsideRegion() { inside_region = false; }
};

// Waits until `word` is no longer `old`.
void wait_for_change(const std::atomic<uint32_t>& word, uint32_t old, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (word.load(std::memory_order_acquire) != old) return;
        spin_pause();
    }
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

// The threads of a pool and what they meet at. Each counter has a cache line of its own.
struct ThreadPool::Crew {
    explicit Crew(int workers)
        : workers(workers), spins(workers <= usable_cpus() ? SPINS : 0), forks(fork_generation()) {
        try {
            for (int worker = 1; worker < workers; ++worker)
                threads.emplace_back([this, worker] { work(worker); });
        } catch (...) {
            dismiss();
            throw;
        }
    }
    ~Crew() { dismiss(); }

    void run(Region called, void* with) {
        std::lock_guard queue(callers);
        FloatControlScope float_control;
        const InsideRegion inside;
        if (workers == 1) {
            called(with, 0, 1);
            return;
        }
        region = called;
        context = with;
        epoch.fetch_add(1, std::memory_order_release);
        epoch.notify_all();
        called(with, 0, workers);
        meet();
    }

    // The barrier: the last to arrive opens it for all.
    void meet() {
        if (workers == 1) return;
        const uint32_t round = rounds.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == workers) {
            arrived.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
            rounds.notify_all();
        } else {
            wait_for_change(rounds, round, spins);
        }
    }

    void work(int worker) {
        prepare_worker_thread(worker);
        FloatControlScope float_control;
        inside_region = true;
        for (uint32_t seen = 0;; ++seen) {
            wait_for_change(epoch, seen, spins);
            if (stopping.load(std::memory_order_acquire)) return;
            region(context, worker, workers);
            meet();
        }
    }

    void dismiss() {
        stopping.store(true, std::memory_order_release);
        epoch.fetch_add(1, std::memory_order_release);
        epoch.notify_all();
        for (std::thread& thread : threads) thread.join();
    }

    const int workers;
    const int spins;
    const uint64_t forks;
    std::mutex callers;
    Region region = nullptr;
    void* context = nullptr;
    std::atomic<bool> stopping{false};
    alignas(64) std::atomic<uint32_t> epoch{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint32_t> rounds{0};
    std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(int threads) : threads_(threads), crew_(nullptr) {
    if (threads < 1)
        throw std::invalid_argument("a thread pool needs at least 1 thread, got " +
                                    std::to_string(threads));
    crew_.store(new Crew(threads));
}

ThreadPool::~ThreadPool() {
    Crew* crew = crew_.load();
    // Threads of the parent of a fork are not here to be joined; their crew is left as it was.
    if (crew->forks == fork_generation()) delete crew;
}

ThreadPool::Crew& ThreadPool::crew() {
    Crew* present = crew_.load(std::memory_order_acquire);
    if (present->forks == fork_generation()) return *present;
    // After a fork: the threads are gone, and a mutex may be locked by one of them for ever. The
    // old crew cannot be used nor destroyed, so it is dropped.
    auto remade = std::make_unique<Crew>(threads_);
    if (crew_.compare_exchange_strong(present, remade.get(), std::memory_order_acq_rel))
        return *remade.release();
    return *present;
}

void ThreadPool::run(Region region, void* context) {
    if (inside_region) throw std::logic_error("a parallel region was started inside another one");
    crew().run(region, context);
}

void ThreadPool::barrier(int) { crew_.load(std::memory_order_acquire)->meet(); }

ThreadPool& shared_pool(int threads) {
    // A list that only grows, and no lock: the child of a fork must be able to search it whatever
    // the other threads were doing. Never destroyed: at exit some thread may still be in a region.
    struct Node {
        ThreadPool pool;
        Node* next;
    };
    static std::atomic<Node*> first{nullptr};
    Node* head = first.load(std::memory_order_acquire);
    auto search = [threads](Node* node) {
        while (node && node->pool.size() != threads) node = node->next;
        return node;
    };
    if (Node* found = search(head)) return found->pool;
    Node* made = new Node{ThreadPool(threads), head};
    while (!first.compare_exchange_weak(made->next, made, std::memory_order_acq_rel)) {
        if (Node* found = search(made->next)) {
            delete made;
            return found->pool;
        }
    }
    return made->pool;
}

}  // namespace bitllm
