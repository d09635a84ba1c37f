// Memory of the decoder: pages from the system, an arena for the scratch of a step, storage of KV
// blocks.
#pragma once

#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace bitllm {

inline constexpr size_t ALIGNMENT = 64;

constexpr size_t align_up(size_t bytes, size_t alignment = ALIGNMENT) {
    return (bytes + alignment - 1) / alignment * alignment;
}

// Zeroed pages that take no memory before they are touched; moves, does not copy. Empty for 0
// bytes.
class Pages {
  public:
    Pages() = default;
    // Throws std::bad_alloc. `huge`: see map_pages.
    explicit Pages(size_t bytes, bool huge = false);
    ~Pages();
    Pages(Pages&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Pages& operator=(Pages&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }

    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
};

// Memory for weights: pieces of any size, given back all together. Small matrices beside each other
// fill huge pages, which are faster to get and to read.
class PieceStore {
  public:
    // Zeroed bytes, aligned to ALIGNMENT, that take no memory before they are touched. Throws
    // std::bad_alloc.
    std::span<std::byte> take(size_t bytes);

  private:
    std::vector<Pages> chunks_;
    std::byte* free_ = nullptr;  // the rest of the last huge chunk
    size_t left_ = 0;
};

// Scratch of one step: taken piece by piece, given back all at once, never more than was planned.
class Arena {
  public:
    explicit Arena(size_t capacity) : pages_(capacity) {}

    // `count` uninitialised values, aligned to ALIGNMENT, valid until reset(). Throws
    // std::length_error when the capacity is used up: the plan that sized the arena is wrong.
    template <class T>
    T* take(size_t count) {
        static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= ALIGNMENT);
        return static_cast<T*>(take_bytes(count, sizeof(T)));
    }

    // Gives everything back.
    void reset() { used_ = 0; }

    size_t capacity() const { return pages_.bytes(); }
    size_t used() const { return used_; }
    // Most that was ever in use.
    size_t peak() const { return peak_; }

    // What `count` values take of a capacity; plans add these up.
    template <class T>
    static constexpr size_t bytes_for(size_t count) {
        return align_up(count * sizeof(T));
    }

  private:
    void* take_bytes(size_t count, size_t size);

    Pages pages_;
    size_t used_ = 0;
    size_t peak_ = 0;
};

// `blocks` blocks of `block_bytes` bytes, each aligned to ALIGNMENT, zero until written; memory is
// taken block by block as they are first touched.
class BlockStorage {
  public:
    // Throws std::bad_alloc, also when the product overflows.
    BlockStorage(size_t blocks, size_t block_bytes);

    size_t blocks() const { return blocks_; }
    size_t block_bytes() const { return block_bytes_; }
    // Address space taken; at most this many bytes become resident.
    size_t bytes() const { return pages_.bytes(); }

    // Block `index` < blocks().
    std::byte* block(size_t index) const { return pages_.data() + index * stride_; }

    // Throws std::out_of_range.
    void copy(size_t source, size_t destination);

  private:
    size_t blocks_;
    size_t block_bytes_;
    size_t stride_;
    Pages pages_;
};

}  // namespace bitllm
