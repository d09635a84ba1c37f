"""Logits of a bfloat16 head and float32 hidden states, without a float32 copy of the head."""

from __future__ import annotations

import mlx.core as mx

from bitllm.backends.mlx.kernels.launch import MetalKernel

__all__ = ["HEAD_TOKENS", "head_logits"]

HEAD_TOKENS = 8
"""Up to so many rows: for more, MLX's own product over a widened part of the head is the better."""

_ROWS = 8  # of a thread group: 2 SIMD groups of 4

# A word holds two bfloat16, which are the upper halves of float32.
_SOURCE = """
uint lane = thread_index_in_simdgroup;
uint rows = head_shape[0];
uint first = (threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup) * 4;
uint token = threadgroup_position_in_grid.y;
float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
for (uint word = lane; word < uint(WORDS); word += 32) {
    float low = hidden[(token * WORDS + word) * 2];
    float high = hidden[(token * WORDS + word) * 2 + 1];
    for (uint index = 0; index < 4; ++index) {
        uint pair = head[min(first + index, rows - 1) * WORDS + word];
        sums[index] += low * as_type<float>(pair << 16) + high * as_type<float>(pair & 0xffff0000u);
    }
}
for (uint index = 0; index < 4; ++index) {
    float sum = simd_sum(sums[index]);
    if (lane == 0 && first + index < rows) {
        logits[token * rows + first + index] = sum;
    }
}
"""

HEAD = MetalKernel("head", ("head", "hidden"), ("logits",), _SOURCE, threads=64)


def head_logits(head: mx.array, hidden: mx.array) -> mx.array:
    """Return the logits of a few rows, float32 [tokens, vocab].

    Args:
        head: two bfloat16 a word, uint32 [vocab, hidden / 2].
        hidden: float32 [tokens, hidden].
    """
    tokens, (rows, words) = len(hidden), head.shape
    (logits,) = HEAD(
        [head, hidden],
        constants={"WORDS": words},
        groups=(-(-rows // _ROWS), tokens),
        results=[((tokens, rows), mx.float32)],
    )
    return logits
