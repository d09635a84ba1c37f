"""What has to be right before `gpu.py` times anything: kernels and models beside the reference.

Integer products are compared with `==`, on the device that computes them. Whole models are held
to the rules of tests/test_gpu_backends.py: the sum of squared differences of logits against that of
the logits, and greedy tokens equal but where the two best logits are nearer than the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_model import decode_batch, prompt_batch, random_model

from bitllm.backends.base import LoadOptions, OutputKind
from bitllm.backends.cuda import CudaBackend
from bitllm.backends.cuda.kernels.product import (
    gated_product,
    grouped_product,
    pack_rows,
    ternary_product,
)
from bitllm.backends.cuda.kernels.quantize import norm_quantize
from bitllm.backends.cuda.layer import gated
from bitllm.backends.reference import ReferenceBackend
from bitllm.config import KvDtype
from bitllm.ternary import matmul_int32, pack, quantize_activations

__all__ = ["Check", "check_kernels", "check_model"]

F32 = npt.NDArray[np.float32]
_LARGEST_ERROR = 1e-3


@dataclass(frozen=True)
class Check:
    """One comparison: whether it held, and the figures it is judged by."""

    name: str
    passed: bool
    detail: str


def check_kernels(
    shapes: list[tuple[int, int]], tokens: list[int], device: torch.device
) -> list[Check]:
    """Compare rounding, products, and gated products of some shapes with the reference."""
    checks = [_check_rounding(columns, device) for columns in sorted({k for _, k in shapes})]
    for shape in shapes:
        checks += [_check_product(shape, count, device) for count in tokens]
        checks.append(_check_gated(shape, tokens[0], device))
        checks += [_check_grouped(shape, count, device) for count in tokens]
    return checks


def _check_rounding(columns: int, device: torch.device) -> Check:
    x = _normal(1, (33, columns))
    x[0] = np.arange(columns) % 255 / 254  # ties
    x[1] = 0
    q, a = quantize_activations(x)
    found = norm_quantize(torch.from_numpy(x).to(device))
    codes, factors = found.codes.cpu().numpy()[:, :columns], found.factors.cpu().numpy()
    wrong = int((codes != q).sum()) + int((factors != a).sum())
    return Check(f"rounding {columns}", wrong == 0, f"{wrong} of {q.size} differ")


def _check_product(shape: tuple[int, int], tokens: int, device: torch.device) -> Check:
    codes, x, scales = _codes(2, shape), _normal(3, (tokens, shape[1])), _scales(shape[0])
    q, a = quantize_activations(x)
    wanted = (matmul_int32(codes, q).astype(np.float32) / a[:, None]) * scales
    weights = torch.from_numpy(pack_rows(pack(codes), shape[1])).to(device)
    rounded = norm_quantize(torch.from_numpy(x).to(device))
    found = ternary_product(rounded, weights, torch.from_numpy(scales).to(device))
    wrong = int((found.cpu().numpy() != wanted).sum())
    name = f"product {shape[0]} x {shape[1]}, {tokens} tokens"
    return Check(name, wrong == 0, f"{wrong} of {wanted.size} differ")


def _check_gated(shape: tuple[int, int], tokens: int, device: torch.device) -> Check:
    out = shape[0] // 2
    weights = torch.from_numpy(pack_rows(pack(_codes(4, (2 * out, shape[1]))), shape[1])).to(device)
    scales = torch.from_numpy(_scales(2 * out)).to(device)
    rounded = norm_quantize(torch.from_numpy(_normal(5, (tokens, shape[1]))).to(device))
    both = ternary_product(rounded, weights, scales)
    wanted = gated("relu2", both[:, :out], both[:, out:])
    found = gated_product(rounded, weights, scales, None, "relu2")
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    return Check(f"gated {shape[0]} x {shape[1]}", error < 1e-6, f"largest error {error:.1e}")


def _check_grouped(shape: tuple[int, int], tokens: int, device: torch.device) -> Check:
    """Compare the product with scales of groups of 128 columns, each group added in order."""
    groups = [slice(start, start + 128) for start in range(0, shape[1], 128)]
    codes, x = _codes(8, shape), _normal(9, (tokens, shape[1]))
    scales = _scales(shape[0] * len(groups)).reshape(shape[0], len(groups))
    q, a = quantize_activations(x)
    wanted = np.zeros((tokens, shape[0]), np.float32)
    for index, columns in enumerate(groups):
        sums = matmul_int32(codes[:, columns], q[:, columns]).astype(np.float32)
        wanted += (sums / a[:, None]) * scales[:, index]
    weights = torch.from_numpy(pack_rows(pack(codes), shape[1])).to(device)
    rounded = norm_quantize(torch.from_numpy(x).to(device))
    scales_there = torch.from_numpy(scales).to(device)
    found = grouped_product(rounded, weights, scales_there, shape[1], 128)
    wrong = int((found.cpu().numpy() != wanted).sum())
    name = f"groups {shape[0]} x {shape[1]}, {tokens} tokens"
    return Check(name, wrong == 0, f"{wrong} of {wanted.size} differ")


def check_model(
    name: str,
    device: torch.device,
    kv_dtype: KvDtype,
    text: tuple[int, int],
    *,
    against: str = "reference",
) -> list[Check]:
    """Compare logits and greedy tokens of a random model with another implementation.

    Args:
        name: of the architecture.
        device: that the kernels run on.
        kv_dtype: of the KV cache of both.
        text: tokens of the prompt, and tokens that are written.
        against: "reference" for NumPy, or "torch" for the layers without kernels, on the device.
    """
    checkpoint, options = random_model(name), LoadOptions(kv_tokens=128, kv_dtype=kv_dtype)
    other: Any = ReferenceBackend()
    if against == "torch":
        other = CudaBackend(device, kernels=False)
    decoder = CudaBackend(device).load(checkpoint, options)
    wanted_of = other.load(checkpoint, options)
    ids = np.random.default_rng(6).integers(0, checkpoint.spec.vocab_size, text[0]).tolist()
    written = _greedy(decoder, ids, text[1])
    batch = prompt_batch(ids + written[:-1], OutputKind.LOGITS)
    wanted, found = wanted_of.forward(batch).logits, decoder.forward(batch).logits
    decoder.close()
    wanted_of.close()
    label = f"{name}, {kv_dtype} cache, against {against}"
    return [_check_logits(label, wanted, found), _check_tokens(label, wanted, found, written)]


def _check_logits(label: str, wanted: F32, found: F32) -> Check:
    squares = ((found - wanted) ** 2).sum(axis=1) / (wanted**2).sum(axis=1)
    median, largest = float(np.median(squares)), float(squares.max())
    detail = f"squared error, median {median:.1e}, largest {largest:.1e}"
    return Check(f"logits: {label}", median < _LARGEST_ERROR / 10, detail)


def _check_tokens(label: str, wanted: F32, found: F32, written: list[int]) -> Check:
    """Judge tokens that were written one by one by the logits of all of them read at once."""
    near, wrong = 0, 0
    rows = slice(len(wanted) - len(written), None)
    for row, other, token in zip(wanted[rows], found[rows], written, strict=True):
        if token != row.argmax():
            near_tie = row.max() - row[token] < 4 * np.abs(row - other).max()
            near, wrong = near + near_tie, wrong + (not near_tie)
    detail = f"{wrong} of {len(written)} differ, {near} more at near ties"
    return Check(f"greedy tokens: {label}", wrong == 0, detail)


def _greedy(decoder: Any, ids: list[int], count: int) -> list[int]:
    """Read a prompt in two pieces, then write tokens one by one."""
    cut = len(ids) // 2
    decoder.forward(prompt_batch(ids[:cut], OutputKind.SAMPLE, cut - 1))
    rest = prompt_batch(ids[cut:], OutputKind.SAMPLE, len(ids) - cut - 1, cut)
    written = decoder.forward(rest).sampled.tolist()
    while len(written) < count:
        position = len(ids) + len(written) - 1
        batch = decode_batch(np.array(written[-1:], np.int32), position, decoder.kv_capacity)
        written += decoder.forward(batch).sampled.tolist()
    return [int(token) for token in written]


def _normal(seed: int, shape: tuple[int, int]) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _codes(seed: int, shape: tuple[int, int]) -> npt.NDArray[np.int8]:
    return np.random.default_rng(seed).integers(-1, 2, shape, np.int8)


def _scales(out: int) -> F32:
    return np.random.default_rng(7).uniform(0.5, 1.5, out).astype(np.float32)
