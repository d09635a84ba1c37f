// As much of Metal's language as the kernels of backends/mlx use, for a CPU: the threads of a thread
// group are coroutines that take turns from one barrier to the next. Threads that do not meet at the
// same barriers, and halves that would round, end the program.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ucontext.h>
#include <vector>

using uint = unsigned;
using std::fabs;
using std::rint;

#define threadgroup static

template <class T> T max(T a, T b) { return a < b ? b : a; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class To, class From> To as_type(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}
struct uint3 { uint x, y, z; };
struct ulong2 { unsigned long x, y; ulong2(unsigned long x, unsigned long y) : x(x), y(y) {} };

inline void fail(const char* what) {
    std::fprintf(stderr, "metal_on_cpu: %s\n", what);
    std::abort();
}

struct half {  // whole numbers only: those that float16 holds
    float value = 0;
    half() = default;
    explicit half(int number) : value(float(number)) {
        if (std::abs(number) > 2048) fail("a half does not hold this number");
    }
    operator float() const { return value; }
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int barriers = 0;
    bool done = false;
};
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<float> slots;  // what each thread brings to a SIMD group's operation
inline uint current;
inline std::function<void(uint)> body;

inline void meet() {
    ++fibers[current].barriers;
    const uint mine = current;
    swapcontext(&fibers[mine].context, &scheduler);
}
enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { meet(); }

template <class Combine> float simd_combine(float value, Combine combine) {
    slots[current] = value;
    meet();
    const uint first = current / 32 * 32;
    float result = slots[first];
    for (uint lane = 1; lane < 32; ++lane) result = combine(result, slots[first + lane]);
    meet();
    return result;
}
inline float simd_sum(float value) {
    return simd_combine(value, [](float a, float b) { return a + b; });
}
inline float simd_max(float value) {
    return simd_combine(value, [](float a, float b) { return max(a, b); });
}

// A matrix is spread over the threads of a SIMD group there; here the first of them holds it whole.
inline bool holds_none() { return current % 32 != 0; }
template <class T> struct simdgroup_matrix { T at[8][8]; };
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
template <class T, int, int> simdgroup_matrix<T> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T> result;
    for (auto& row : result.at)
        for (T& item : row) item = value;
    return result;
}
template <class T>
void simdgroup_load(simdgroup_matrix<T>& to, const T* from, uint stride, ulong2 = {0, 0},
                    bool transpose = false) {
    if (holds_none()) return;
    for (uint row = 0; row < 8; ++row)
        for (uint column = 0; column < 8; ++column)
            (transpose ? to.at[column][row] : to.at[row][column]) = from[row * stride + column];
}
template <class T> void simdgroup_store(const simdgroup_matrix<T>& from, T* to, uint stride) {
    if (holds_none()) return;
    for (uint row = 0; row < 8; ++row)
        for (uint column = 0; column < 8; ++column)
            to[row * stride + column] = from.at[row][column];
}
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, const simdgroup_half8x8& a,
                                          const simdgroup_half8x8& b,
                                          const simdgroup_float8x8& c) {
    if (holds_none()) return;
    simdgroup_float8x8 result = c;
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j)
            for (int k = 0; k < 8; ++k)
                result.at[i][j] += float(a.at[i][k]) * float(b.at[k][j]);
    d = result;
}

inline void enter(int thread) {
    body(uint(thread));
    fibers[thread].done = true;
    while (true) swapcontext(&fibers[thread].context, &scheduler);
}

// Run one thread group: every thread up to its next barrier, until all have ended.
inline void run_group(uint threads, const std::function<void(uint)>& work) {
    constexpr size_t stack_bytes = 1 << 16;
    body = work;
    fibers.clear();
    fibers.resize(threads);
    slots.assign(threads, 0.0f);
    for (uint thread = 0; thread < threads; ++thread) {
        Fiber& fiber = fibers[thread];
        fiber.stack.reset(new char[stack_bytes]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 1, int(thread));
    }
    for (bool running = true; running;) {
        for (current = 0; current < threads; ++current)
            swapcontext(&scheduler, &fibers[current].context);
        running = !fibers[0].done;
        for (const Fiber& fiber : fibers)
            if (fiber.done == running || fiber.barriers != fibers[0].barriers)
                fail("threads of a group part at a barrier");
    }
}
