#include "memory.h"

#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "platform.h"

namespace bitllm {

Pages::Pages(size_t bytes, bool huge) : bytes_(bytes) {
    if (bytes) data_ = static_cast<std::byte*>(map_pages(bytes, huge));
}

Pages::~Pages() {
    if (data_) unmap_pages(data_, bytes_);
}

std::span<std::byte> PieceStore::take(size_t bytes) {
    // Below the first, a small model would pay for huge pages that it does not fill.
    constexpr size_t SMALL = size_t{1} << 18, CHUNK = size_t{1} << 26;
    if (bytes < SMALL) {
        const Pages& own = chunks_.emplace_back(bytes);
        return {own.data(), bytes};
    }
    const size_t taken = align_up(bytes);
    if (taken > left_) {
        const Pages& chunk = chunks_.emplace_back(taken > CHUNK ? taken : CHUNK, true);
        free_ = chunk.data();
        left_ = chunk.bytes();
    }
    std::byte* piece = free_;
    free_ += taken;
    left_ -= taken;
    return {piece, bytes};
}

void* Arena::take_bytes(size_t count, size_t size) {
    const size_t left = capacity() - used_;
    if (count > left / size || align_up(count * size) > left)
        throw std::length_error("step scratch: " + std::to_string(count) + " values of " +
                                std::to_string(size) + " bytes do not fit, " +
                                std::to_string(left) + " of " + std::to_string(capacity()) +
                                " bytes are left");
    std::byte* piece = pages_.data() + used_;
    used_ += align_up(count * size);
    if (used_ > peak_) peak_ = used_;
    return piece;
}

BlockStorage::BlockStorage(size_t blocks, size_t block_bytes)
    : blocks_(blocks), block_bytes_(block_bytes), stride_(align_up(block_bytes)) {
    if (stride_ < block_bytes || (stride_ && blocks > std::numeric_limits<size_t>::max() / stride_))
        throw std::bad_alloc();
    // Blocks as large as huge pages lie on them: a reader jumps from block to block.
    constexpr size_t LARGE = size_t{1} << 20;
    pages_ = Pages(blocks * stride_, stride_ >= LARGE);
}

void BlockStorage::copy(size_t source, size_t destination) {
    if (source >= blocks_ || destination >= blocks_)
        throw std::out_of_range("KV block copy " + std::to_string(source) + " -> " +
                                std::to_string(destination) + ": there are " +
                                std::to_string(blocks_) + " blocks");
    if (source != destination) std::memcpy(block(destination), block(source), block_bytes_);
}

}  // namespace bitllm
