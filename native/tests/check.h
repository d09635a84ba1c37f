// The little that native tests need: TEST defines one, CHECK reports a failure and goes on.
#pragma once

#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace bitllm::testing {

struct Test {
    const char* file;
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& failures() {
    static int count = 0;
    return count;
}

// Prints the first failures of a test only: a broken kernel fails thousands of times.
inline void fail(const char* file, int line, const std::string& what) {
    constexpr int SHOWN = 20;
    if (++failures() <= SHOWN) std::cerr << file << ":" << line << ": " << what << "\n";
}

struct Registration {
    Registration(const char* file, const char* name, void (*run)()) {
        tests().push_back({file, name, run});
    }
};

// Equality of bits: -0 differs from 0, and a NaN equals itself.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() &&
           (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

template <class Exception, class Body>
bool throws(Body body) {
    try {
        body();
    } catch (const Exception&) {
        return true;
    }
    return false;
}

}  // namespace bitllm::testing

#define TEST(name)                                                                             \
    static void name();                                                                        \
    static const bitllm::testing::Registration registration_of_##name(__FILE__, #name, &name); \
    static void name()

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) bitllm::testing::fail(__FILE__, __LINE__, "not true: " #condition); \
    } while (false)

// CHECK with some values to print, as in CHECK_WITH(a == b, "n " << n).
#define CHECK_WITH(condition, values)                              \
    do {                                                           \
        if (!(condition)) {                                        \
            std::ostringstream text;                               \
            text << "not true: " #condition " with " << values;    \
            bitllm::testing::fail(__FILE__, __LINE__, text.str()); \
        }                                                          \
    } while (false)
