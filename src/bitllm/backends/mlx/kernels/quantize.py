"""Activations to int8 codes, four to a word: one thread group a row, one pass over it in cache."""

from __future__ import annotations

import mlx.core as mx

from bitllm.backends.mlx.kernels.launch import MetalKernel

__all__ = ["quantize_packed"]

_SOURCE = """
threadgroup float largest_of[8];
threadgroup float check_of[8];
uint row = threadgroup_position_in_grid.x;
uint thread_index = thread_position_in_threadgroup.x;
float largest = 0.0f;
float check = 0.0f;  // becomes NaN with a NaN or an infinity: max would pass over NaN
for (uint column = thread_index; column < uint(COLUMNS); column += 256) {
    float value = x[row * COLUMNS + column];
    largest = max(largest, fabs(value));
    check += value * 0.0f;
}
largest = simd_max(largest);
check = simd_sum(check);
if (thread_index_in_simdgroup == 0) {
    largest_of[simdgroup_index_in_threadgroup] = largest;
    check_of[simdgroup_index_in_threadgroup] = check;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint group = 0; group < 8; ++group) {
    largest = max(largest, largest_of[group]);
    check += check_of[group];
}
float a = 127.0f / max(largest, 1e-5f);
if (thread_index == 0) {
    factors[row] = a + check;
}
for (uint word = thread_index; word < uint(WORDS) * 4; word += 256) {
    uint four = 0;
    for (uint part = 0; part < 4; ++part) {
        uint column = word * 4 + part;
        float value = column < uint(COLUMNS) ? x[row * COLUMNS + column] : 0.0f;
        int code = int(min(max(rint(value * a), -128.0f), 127.0f));
        four |= (uint(code) & 255u) << (8 * part);
    }
    codes[row * WORDS * 4 + word] = four;
}
"""

QUANTIZE = MetalKernel("quantize", ("x",), ("codes", "factors"), _SOURCE, threads=256)


def quantize_packed(x: mx.array, words: int) -> tuple[mx.array, mx.array]:
    """Round each row to int8 codes: a = 127 / max(absmax, 1e-5), q = round_half_even(x * a).

    Args:
        x: float32 [tokens, in].
        words: of 16 weights that a row of the matrix has; codes behind the end are 0.

    Returns:
        The codes, four a word, low byte first, uint32 [tokens, 4 * words]; and a, float32
        [tokens, 1], NaN where a row holds NaN or infinity.
    """
    tokens, columns = x.shape
    codes, factors = QUANTIZE(
        [x],
        constants={"COLUMNS": columns, "WORDS": words},
        groups=(tokens, 1),
        results=[((tokens, 4 * words), mx.uint32), ((tokens, 1), mx.float32)],
    )
    return codes, factors
