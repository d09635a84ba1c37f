#include <cfenv>
#include <chrono>
#include <ctime>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>

#include "../thread_pool.h"
#include "check.h"

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace bitllm;
using namespace bitllm::testing;

TEST(every_worker_runs_once_a_region) {
    for (const int threads : {1, 2, 3, 8}) {
        ThreadPool pool(threads);
        CHECK(pool.size() == threads);
        std::vector<int> calls(static_cast<size_t>(threads), 0);
        for (int region = 0; region < 2000; ++region)
            pool.parallel([&](int worker, int workers) {
                CHECK(workers == threads);
                ++calls[static_cast<size_t>(worker)];
            });
        CHECK(calls == std::vector<int>(static_cast<size_t>(threads), 2000));
    }
}

TEST(barriers_separate_phases) {
    for (const int threads : {1, 2, 3, 5}) {
        ThreadPool pool(threads);
        const size_t count = static_cast<size_t>(threads);
        std::vector<int> value(count, 0);
        int wrong = 0;
        for (int region = 0; region < 20; ++region) {
            pool.parallel([&](int worker, int workers) {
                const size_t own = static_cast<size_t>(worker);
                const size_t neighbour = (own + 1) % static_cast<size_t>(workers);
                for (int phase = 0; phase < 200; ++phase) {
                    value[own] = region * 1000 + phase;
                    pool.barrier(worker);
                    // Written by another worker before the barrier; no other word protects it.
                    if (value[neighbour] != region * 1000 + phase && worker == 0) ++wrong;
                    pool.barrier(worker);
                }
            });
        }
        CHECK_WITH(wrong == 0, "threads " << threads);
    }
}

TEST(workers_wake_after_they_went_to_sleep) {
    ThreadPool pool(3);
    for (int region = 0; region < 5; ++region) {
        std::atomic<int> calls{0};
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        pool.parallel([&](int worker, int) {
            if (worker == 1) std::this_thread::sleep_for(std::chrono::milliseconds(10));
            pool.barrier(worker);
            ++calls;
        });
        CHECK(calls == 3);
    }
}

TEST(an_idle_pool_uses_no_cpu) {
    ThreadPool pool(2);
    pool.parallel([](int, int) {});
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const std::clock_t before = std::clock();  // CPU time of all threads
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    const double used = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
    CHECK_WITH(used < 0.1, "CPU seconds " << used);
}

TEST(regions_of_several_callers_queue) {
    ThreadPool& pool = shared_pool(2);
    CHECK(&pool == &shared_pool(2));
    CHECK(&pool != &shared_pool(3) && shared_pool(3).size() == 3);
    long sum = 0;  // guarded by the queue alone
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller)
        callers.emplace_back([&] {
            for (int region = 0; region < 500; ++region)
                pool.parallel([&](int worker, int) {
                    if (worker == 0) ++sum;
                    pool.barrier(worker);
                    if (worker == 1) ++sum;
                });
        });
    for (std::thread& caller : callers) caller.join();
    CHECK_WITH(sum == 4000, "sum " << sum);
}

TEST(shared_pools_are_made_once) {
    std::vector<ThreadPool*> found(6);
    std::vector<std::thread> callers;
    for (size_t caller = 0; caller < found.size(); ++caller)
        callers.emplace_back([&found, caller] { found[caller] = &shared_pool(4); });
    for (std::thread& caller : callers) caller.join();
    for (ThreadPool* pool : found) CHECK(pool == found[0]);
}

TEST(regions_do_not_nest) {
    ThreadPool pool(2), other(2);
    std::atomic<int> refused{0};
    pool.parallel([&](int, int) {
        if (throws<std::logic_error>([&] { other.parallel([](int, int) {}); })) ++refused;
    });
    CHECK(refused == 2);
    std::atomic<int> calls{0};
    other.parallel([&](int, int) { ++calls; });
    CHECK(calls == 2);
}

TEST(a_single_worker_may_throw_and_go_on) {
    ThreadPool pool(1);
    const auto fail = [](int, int) { throw std::bad_alloc(); };
    CHECK(throws<std::bad_alloc>([&] { pool.parallel(fail); }));
    int calls = 0;
    pool.parallel([&](int, int) { ++calls; });
    CHECK(calls == 1);
}

TEST(a_pool_needs_a_thread) {
    CHECK(throws<std::invalid_argument>([] { ThreadPool pool(0); }));
    CHECK(throws<std::invalid_argument>([] { shared_pool(-1); }));
}

TEST(workers_compute_with_the_default_float_control) {
    std::fesetround(FE_UPWARD);
    ThreadPool pool(3);
    std::vector<float> sums(3);
    pool.parallel([&](int worker, int) {
        volatile float one = 1.0f, small = 1e-10f;
        sums[static_cast<size_t>(worker)] = one + small;
    });
    CHECK(std::fegetround() == FE_UPWARD);
    std::fesetround(FE_TONEAREST);
    CHECK(sums == std::vector<float>(3, 1.0f));
}

TEST(split_covers_everything_once) {
    for (const size_t count : {0, 1, 5, 16, 17, 640, 6912}) {
        for (const int parts : {1, 2, 3, 8}) {
            for (const size_t grain : {1, 4, 64}) {
                size_t next = 0;
                for (int part = 0; part < parts; ++part) {
                    const Range range = split(count, part, parts, grain);
                    CHECK(range.begin == next && range.end >= range.begin);
                    CHECK(range.begin % grain == 0 || range.begin == count);
                    next = range.end;
                }
                CHECK(next == count);
            }
        }
    }
}

// The thread sanitizer does not run threads in the child of a process that has threads.
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__) && !defined(BITLLM_NO_FORK)
TEST(the_child_of_a_fork_gets_workers_of_its_own) {
    ThreadPool& pool = shared_pool(2);
    int calls = 0;
    pool.parallel([&](int worker, int) { calls += worker; });
    // Forked while another thread is inside a region: its locks stay locked in the child.
    std::atomic<bool> inside{false}, leave{false};
    std::thread busy([&] {
        pool.parallel([&](int, int) {
            inside = true;
            while (!leave) std::this_thread::yield();
        });
    });
    while (!inside) std::this_thread::yield();
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);  // a deadlock ends as a failure
        std::atomic<int> ran{0};
        for (int region = 0; region < 100; ++region)
            pool.parallel([&](int worker, int) {
                pool.barrier(worker);
                ++ran;
            });
        shared_pool(5).parallel([&](int, int) { ++ran; });
        _exit(ran == 205 ? 0 : 1);
    }
    leave = true;
    busy.join();
    int status = -1;
    waitpid(child, &status, 0);
    CHECK_WITH(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status " << status);
    pool.parallel([&](int worker, int) { calls += worker; });
    CHECK(calls == 2);
}
#endif
