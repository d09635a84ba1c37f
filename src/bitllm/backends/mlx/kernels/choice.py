"""Whether our Metal kernels run: they are tried beside MLX's own operations, once a process."""

from __future__ import annotations

import warnings
from functools import cache

import mlx.core as mx
import numpy as np

from bitllm.backends.mlx.kernels.head import head_logits
from bitllm.backends.mlx.kernels.product import MATVEC_TOKENS, ternary_product
from bitllm.backends.mlx.kernels.quantize import quantize_packed
from bitllm.ternary import matmul_int32, pack, quantize_activations

__all__ = ["find_problem", "use_kernels"]

SHAPES = ((1, 17), (65, 288), (130, 2560), (8, 6912))
"""(rows, columns) of the products that are compared."""
TOKENS = (1, MATVEC_TOKENS, MATVEC_TOKENS + 1, 40)
HEAD_ERROR = 1e-5
"""Of logits, as a part of the sum of absolute products: float32 adds some hundred terms a lane."""


@cache
def use_kernels() -> bool:
    """Whether Metal is present and the kernels give what the reference gives; warns if not."""
    if not mx.metal.is_available():
        return False
    try:
        problem = find_problem()
    except RuntimeError as error:  # Metal does not compile them, or does not run them
        problem = str(error)
    if problem is not None:
        warnings.warn(
            f"bitllm's Metal kernels are not used, but MLX's own, which are slower: {problem}",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def find_problem() -> str | None:
    """Compare all kernels with the reference; return the first difference, None = there is none."""
    for rows, columns in SHAPES:
        for tokens in TOKENS:
            problem = _product_problem(rows, columns, tokens)
            if problem is not None:
                return f"{problem} in {rows} x {columns} codes times {tokens}"
    return _head_problem(37, 130, 3)


def _product_problem(rows: int, columns: int, tokens: int) -> str | None:
    random = np.random.default_rng([158, rows, columns, tokens])
    weights = random.integers(-1, 2, (rows, columns), np.int8)
    weights[-1] = 1  # with equal activations, the largest sum there can be
    x = random.standard_normal((tokens, columns), np.float32)
    x[-1] = 1.0
    q, a = quantize_activations(x)
    words = -(-columns // 32) * 2
    padded = np.zeros((rows, 16 * words), np.int8)
    padded[:, :columns] = weights
    codes, factors = quantize_packed(mx.array(x), words)
    found = np.array(codes.view(mx.int8))
    if (np.array(factors)[:, 0] != a).any() or (found[:, :columns] != q).any():
        return "activations are rounded differently"
    products = np.array(ternary_product(mx.array(pack(padded).view("<u4")), codes))
    wrong = products != matmul_int32(weights, q)
    return f"{wrong.sum()} of {wrong.size} sums differ" if wrong.any() else None


def _head_problem(rows: int, columns: int, tokens: int) -> str | None:
    random = np.random.default_rng([158, rows])
    head = mx.array(random.standard_normal((rows, columns), np.float32)).astype(mx.bfloat16)
    hidden = random.standard_normal((tokens, columns), np.float32)
    exact = np.array(head.astype(mx.float32)).astype(np.float64)
    found = np.array(head_logits(head.view(mx.uint32), mx.array(hidden)))
    allowed = HEAD_ERROR * (np.abs(hidden) @ np.abs(exact).T)
    # Written so that NaN counts as wrong.
    wrong = ~(np.abs(found - hidden @ exact.T) <= allowed)
    return f"{wrong.sum()} of {wrong.size} logits differ" if wrong.any() else None
