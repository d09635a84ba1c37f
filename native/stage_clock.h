// Where the time of a step goes: a clock for each worker, read at the ends of stages. Off, it costs
// a branch.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace bitllm {

enum class Stage : uint8_t {
    EMBED,      // rows of the embedding, angles of RoPE
    QUANTIZE,   // residual additions, norms, rounding to int8
    QKV,        // products q, k and v
    ATTENTION,  // RoPE, the KV cache, scores and values
    O,
    GATE_UP,  // and the activation between them
    DOWN,
    HEAD,      // final norm and logits
    SAMPLING,  // draws and log-probabilities
    WAIT       // for other workers
};
inline constexpr size_t STAGE_COUNT = 10;
inline constexpr const char* STAGE_NAMES[STAGE_COUNT] = {
    "embed", "quantize", "qkv", "attention", "o", "gate_up", "down", "head", "sampling", "wait"};

class alignas(64) StageClock {
  public:
    // Forgets what was measured, and measures from now on or no more.
    void enable(bool on) {
        on_ = on;
        spent_ = {};
    }

    // A step begins.
    void start() {
        if (on_) last_ = Clock::now();
    }

    // What was done since the last call belongs to `stage`.
    void lap(Stage stage) {
        if (!on_) return;
        const Clock::time_point now = Clock::now();
        spent_[static_cast<size_t>(stage)] += std::chrono::duration<double>(now - last_).count();
        last_ = now;
    }

    // Seconds of a stage, indexed by Stage.
    const std::array<double, STAGE_COUNT>& spent() const { return spent_; }

  private:
    using Clock = std::chrono::steady_clock;

    bool on_ = false;
    Clock::time_point last_;
    std::array<double, STAGE_COUNT> spent_{};
};

}  // namespace bitllm
