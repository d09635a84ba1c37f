// Kernel sets to test, and data to test them on.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "../dispatch.h"

namespace bitllm {
#if defined(__x86_64__) || defined(_M_X64)
extern const IntegerKernels emulated_avxvnni_integer_kernels;
#endif
#if defined(BITLLM_EMULATE_AVX512)
extern const Kernels emulated_avx512vnni_kernels;
#endif
}  // namespace bitllm

namespace bitllm::testing {

struct Variant {
    std::string label;
    const Kernels* kernels;
};

// Every kernel set that can run here, the scalar one included.
inline std::vector<Variant> variants() {
    std::vector<Variant> all;
    for (const Kernels* set : available_kernels()) all.push_back({set->name, set});
#if defined(__x86_64__) || defined(_M_X64)
    if (const Kernels* avx2 = find_kernels("avx2")) {
        static Kernels emulated = *avx2;
        emulated.integer = &emulated_avxvnni_integer_kernels;
        all.push_back({"avxvnni (emulated)", &emulated});
    }
#endif
#if defined(BITLLM_EMULATE_AVX512)
    all.push_back({"avx512vnni (emulated)", &emulated_avx512vnni_kernels});
#endif
    return all;
}

// Lengths around every boundary of registers, lanes and blocks, and those of a 2B model.
inline const std::vector<size_t> LENGTHS = {1,  3,  7,  8,  9,   15,  16,  17,  31,   33,
                                            63, 64, 65, 97, 255, 256, 257, 640, 2560, 6912};

class Random {
  public:
    explicit Random(uint32_t seed) : engine_(seed) {}

    int integer(int low, int high) {  // both included
        return low + static_cast<int>(engine_() % static_cast<uint32_t>(high - low + 1));
    }

    // Mostly of ordinary size, some tiny, huge, denormal or zero.
    float number() {
        const float ordinary = static_cast<float>(integer(-1000000, 1000000)) * 3e-6f;
        switch (integer(0, 40)) {
            case 0:
                return ordinary * 1e-38f;
            case 1:
                return ordinary * 1e6f;
            case 2:
                return 0.0f;
            case 3:
                return -0.0f;
            default:
                return ordinary;
        }
    }

    std::vector<float> numbers(size_t count) {
        std::vector<float> values(count);
        for (float& value : values) value = number();
        return values;
    }

    // Finite values of a stored type, as bytes.
    std::vector<std::byte> stored(ValueType type, size_t count) {
        std::vector<std::byte> bytes(count * VALUE_BYTES[static_cast<size_t>(type)]);
        for (size_t i = 0; i < count; ++i) {
            if (type == ValueType::I8) {
                bytes[i] = static_cast<std::byte>(integer(-128, 127));
                continue;
            }
            if (type == ValueType::F32) {
                const float value = number();
                std::memcpy(&bytes[4 * i], &value, 4);
                continue;
            }
            // Any bits whose exponent is not all ones.
            const uint16_t infinite = type == ValueType::BF16 ? 0x7f80 : 0x7c00;
            uint16_t bits = static_cast<uint16_t>(engine_());
            if (type == ValueType::BF16) bits = static_cast<uint16_t>((bits & 0x83ff) | 0x3c00);
            if ((bits & infinite) == infinite) bits = static_cast<uint16_t>(bits & ~0x0400);
            std::memcpy(&bytes[2 * i], &bits, 2);
        }
        return bytes;
    }

    std::vector<int8_t> codes(size_t count) {
        std::vector<int8_t> values(count);
        for (int8_t& value : values) value = static_cast<int8_t>(integer(-1, 1));
        return values;
    }

    // `rows` rows of k activations, each padded with zeros.
    std::vector<int8_t> activations(size_t rows, size_t k, int low = -128, int high = 127) {
        std::vector<int8_t> values(rows * padded_columns(k), 0);
        for (size_t r = 0; r < rows; ++r)
            for (size_t i = 0; i < k; ++i)
                values[r * padded_columns(k) + i] = static_cast<int8_t>(integer(low, high));
        return values;
    }

  private:
    std::mt19937 engine_;
};

inline std::vector<int32_t> row_sums(const std::vector<int8_t>& values, size_t rows) {
    std::vector<int32_t> sums(rows, 0);
    const size_t width = values.size() / rows;
    for (size_t i = 0; i < values.size(); ++i) sums[i / width] += values[i];
    return sums;
}

// Codes (rows x k, in -1 .. 1) in a layout of kernels.h.
inline std::vector<uint8_t> pack_rows(const std::vector<int8_t>& codes, size_t rows, size_t k,
                                      Packing packing = Packing::TWO_BIT) {
    const size_t weights = block_weights(packing), bytes = packed_row_bytes(packing, k);
    std::vector<uint8_t> packed(rows * bytes);
    for (size_t i = 0; i < packed.size(); ++i) {
        const size_t row = i / bytes, block = i % bytes / BLOCK_BYTES, b = i % BLOCK_BYTES;
        unsigned byte = 0;
        for (size_t first = 0; first < weights; first += BLOCK_BYTES) {
            const size_t column = block * weights + first + b;
            const auto code = static_cast<unsigned>(column < k ? codes[row * k + column] + 1 : 1);
            byte = packing == Packing::BASE3 ? 3 * byte + code : byte | code << (first / 32);
        }
        if (packing == Packing::BASE3) byte = (256 * byte + 242) / 243;
        packed[i] = static_cast<uint8_t>(byte);
    }
    return packed;
}

}  // namespace bitllm::testing
