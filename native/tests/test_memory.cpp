#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

#include "../memory.h"
#include "../platform.h"
#include "check.h"

using namespace bitllm;
using namespace bitllm::testing;

namespace {

bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % ALIGNMENT == 0; }

}  // namespace

TEST(pages_are_zero_and_move) {
    Pages pages(10000, true);
    CHECK(pages.bytes() == 10000 && aligned(pages.data()));
    for (size_t i = 0; i < pages.bytes(); ++i) CHECK(pages.data()[i] == std::byte{});
    std::byte* const data = pages.data();
    Pages moved(std::move(pages));
    CHECK(moved.data() == data && pages.data() == nullptr && pages.bytes() == 0);
    Pages assigned(4096);
    assigned = std::move(moved);
    CHECK(assigned.data() == data && assigned.bytes() == 10000);
    CHECK(Pages().data() == nullptr && Pages(0).data() == nullptr);
    CHECK(throws<std::bad_alloc>([] { Pages(size_t{1} << 62); }));
}

TEST(arena_gives_aligned_pieces_that_do_not_overlap) {
    Arena arena(1024);
    float* first = arena.take<float>(3);
    int8_t* second = arena.take<int8_t>(1);
    double* third = arena.take<double>(9);
    CHECK(aligned(first) && aligned(second) && aligned(third));
    CHECK(reinterpret_cast<std::byte*>(second) - reinterpret_cast<std::byte*>(first) == 64);
    CHECK(reinterpret_cast<std::byte*>(third) - reinterpret_cast<std::byte*>(second) == 64);
    CHECK(arena.used() == 64 + 64 + 128);
    CHECK(arena.used() ==
          Arena::bytes_for<float>(3) + Arena::bytes_for<int8_t>(1) + Arena::bytes_for<double>(9));
    arena.reset();
    CHECK(arena.used() == 0 && arena.peak() == 256);
    CHECK(arena.take<float>(3) == first);
    CHECK(arena.take<float>(0) != nullptr && arena.used() == 64);
}

TEST(arena_never_gives_more_than_it_has) {
    Arena arena(256);
    arena.take<float>(48);
    CHECK(throws<std::length_error>([&] { arena.take<int8_t>(65); }));
    CHECK(
        throws<std::length_error>([&] { arena.take<double>(std::numeric_limits<size_t>::max()); }));
    CHECK(
        throws<std::length_error>([&] { arena.take<int8_t>(std::numeric_limits<size_t>::max()); }));
    arena.take<int8_t>(64);
    CHECK(arena.used() == arena.capacity());
    CHECK(throws<std::length_error>([&] { arena.take<int8_t>(1); }));
    // 50 bytes would fit, the 64 they take would not.
    Arena odd(250);
    odd.take<float>(48);
    CHECK(throws<std::length_error>([&] { odd.take<int8_t>(50); }));
}

TEST(block_storage_keeps_blocks_apart) {
    BlockStorage storage(7, 100);
    CHECK(storage.blocks() == 7 && storage.block_bytes() == 100 && storage.bytes() == 7 * 128);
    for (size_t i = 0; i < 7; ++i) {
        CHECK(aligned(storage.block(i)) && storage.block(i)[99] == std::byte{});
        std::memset(storage.block(i), static_cast<int>(i + 1), 100);
    }
    for (size_t i = 0; i < 7; ++i)
        CHECK(storage.block(i)[0] == std::byte(i + 1) && storage.block(i)[99] == std::byte(i + 1));
    storage.copy(2, 5);
    storage.copy(3, 3);
    CHECK(storage.block(5)[0] == std::byte{3} && storage.block(5)[99] == std::byte{3});
    CHECK(storage.block(4)[99] == std::byte{5} && storage.block(6)[0] == std::byte{7});
    CHECK(throws<std::out_of_range>([&] { storage.copy(0, 7); }));
    CHECK(throws<std::out_of_range>([&] { storage.copy(7, 0); }));
}

TEST(block_storage_of_a_context_costs_nothing_before_it_is_used) {
    // Far more than this machine has; only two blocks are touched.
    BlockStorage storage(size_t{1} << 20, size_t{1} << 18);
    std::memset(storage.block(0), 1, 10);
    std::memset(storage.block((size_t{1} << 20) - 1), 1, 10);
    CHECK(storage.bytes() == size_t{1} << 38);
    CHECK(
        throws<std::bad_alloc>([] { BlockStorage(std::numeric_limits<size_t>::max() / 64, 128); }));
    CHECK(throws<std::bad_alloc>([] { BlockStorage(1, std::numeric_limits<size_t>::max()); }));
}

TEST(pieces_are_apart_zero_and_take_memory_when_they_are_used) {
    const size_t before = resident_bytes();
    PieceStore store;
    CHECK(store.take(0).empty());
    std::vector<std::span<std::byte>> pieces;
    for (const size_t bytes : {size_t{1}, size_t{100}, size_t{1} << 18, size_t{300001},
                               size_t{30} << 20, size_t{40} << 20, size_t{70} << 20}) {
        const std::span<std::byte> piece = store.take(bytes);
        CHECK(piece.size() == bytes && aligned(piece.data()));
        CHECK(piece.front() == std::byte{0} && piece.back() == std::byte{0});
        piece.front() = piece.back() = std::byte{1};
        for (const std::span<std::byte> other : pieces)
            CHECK(other.data() + other.size() <= piece.data() ||
                  piece.data() + piece.size() <= other.data());
        pieces.push_back(piece);
    }
    CHECK(resident_bytes() < before + (size_t{32} << 20));
    CHECK(throws<std::bad_alloc>([&] { store.take(std::numeric_limits<size_t>::max() / 2); }));
}
