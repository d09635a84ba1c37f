// Asking for memory before it is needed.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#endif

namespace bitllm {

// How far ahead streams of weights are asked for.
inline constexpr uintptr_t PREFETCH_BYTES = 4096;

// Which cache the line goes to. The second has room for more that is under way, and is what suits
// work that computes longer on a line than it takes to come.
enum class Cache { FIRST, SECOND };

// Asks for the cache line that lies `distance` bytes behind `at`, which may be behind the buffer.
template <Cache CACHE = Cache::FIRST>
inline void prefetch(const void* at, uintptr_t distance) {
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(at) + distance;
#if defined(__GNUC__)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, CACHE == Cache::FIRST ? 3 : 1);
#elif defined(_M_X64)
    _mm_prefetch(reinterpret_cast<const char*>(ahead),
                 CACHE == Cache::FIRST ? _MM_HINT_T0 : _MM_HINT_T2);
#else
    (void)ahead;
#endif
}

// Rows that are read side by side are several streams, which hardware does not foresee: on Zen 4
// they came at a third of its bandwidth. So while a tile of rows is multiplied, the lines of a
// later tile are asked for one after another; this is how far behind it lies.
constexpr uintptr_t tiles_ahead(size_t tile_bytes) {
    return (PREFETCH_BYTES + tile_bytes - 1) / tile_bytes * tile_bytes;
}

}  // namespace bitllm
