"""What `bitllm doctor` tries: does MLX give the integer sums of the reference here?"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from bitllm.backends.mlx.kernels.choice import find_problem
from bitllm.backends.mlx.linear import PackedMatrix, quantize_activations
from bitllm.backends.mlx.tensors import to_host
from bitllm.checkpoint import TernaryMatrix
from bitllm.errors import BackendUnavailableError
from bitllm.ternary import matmul_int32
from bitllm.ternary import quantize_activations as reference_quantize

__all__ = ["check_products"]

PRODUCTS = ((1, 1, 1), (3, 17, 2), (63, 65, 1), (65, 257, 5), (16, 2560, 40), (8, 6912, 1))
"""(rows, columns, tokens) of the products that are compared."""


def check_products() -> str:
    """Compare rounded activations and integer products with the reference, with `==`.

    Returns:
        What was found equal.

    Raises:
        BackendUnavailableError: the first difference.
    """
    for rows, columns, tokens in PRODUCTS:
        random = np.random.default_rng([158, rows, columns])
        codes = random.integers(-1, 2, (rows, columns), np.int8)
        x = random.standard_normal((tokens, columns), np.float32)
        _check(codes, x, f"{rows} x {columns} codes times {tokens}")
    done = f"{len(PRODUCTS)} products"
    if not mx.metal.is_available():
        return f"{done} on the CPU equal the reference"
    problem = find_problem()
    if problem is not None:
        raise _broken(f"our Metal kernels, which are therefore left out: {problem}")
    return f"{done} on Metal and all kernels of bitllm equal the reference"


def _check(codes: npt.NDArray[np.int8], x: npt.NDArray[np.float32], what: str) -> None:
    wanted_q, wanted_a = reference_quantize(x)
    q, a = quantize_activations(mx.array(x))
    if (to_host(q) != wanted_q).any() or (to_host(a)[:, 0] != wanted_a).any():
        raise _broken(f"activations are rounded differently in {what}")
    matrix = PackedMatrix(TernaryMatrix.from_codes(codes, np.ones((), np.float32)), what)
    wrong = to_host(matrix(q)) != matmul_int32(codes, wanted_q)
    if wrong.any():
        raise _broken(f"{wrong.sum()} of {wrong.size} sums differ in {what}")


def _broken(what: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"MLX computes wrongly on this machine: {what}", hint="use device='cpu', and report this"
    )
