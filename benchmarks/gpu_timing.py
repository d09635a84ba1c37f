"""What `gpu.py` times: kernels, steps of a model and of training, beside bf16 in PyTorch.

On a GPU the calls of a figure are captured in one CUDA graph, so that launches cost nothing, and
matrices take turns so that the cache holds none of them. On a CPU they are just called.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_model import SPECS, decode_batch, prompt_batch

from bitllm.backends.base import OutputKind
from bitllm.backends.cuda import CudaDecoder
from bitllm.backends.cuda.kernels.product import ternary_product
from bitllm.backends.cuda.kernels.quantize import norm_quantize
from bitllm.train.bitlinear import BitLinear

__all__ = [
    "dense_linears",
    "limits",
    "seconds_of",
    "time_decoding",
    "time_prefill",
    "time_product",
    "time_training",
]

_MORE_THAN_CACHE = 256 << 20  # bytes of matrices that take turns; an H200 has a cache of 50 MB
_MOST_COPIES = 64
_REPEATS = 5

Call = Callable[[], object]


def seconds_of(calls: Sequence[Call], device: torch.device) -> float:
    """Return the median time of a call, in seconds; all are called once a repeat."""
    if device.type != "cuda":
        return statistics.median(_wall(calls) for _ in range(2)) / len(calls)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and takes the memory that is not taken in the graph
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_gpu_seconds(graph.replay) for _ in range(_REPEATS)) / len(calls)


def _wall(calls: Sequence[Call]) -> float:
    began = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - began


def _gpu_seconds(action: Call) -> float:
    events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    began, ended = events
    began.record()
    action()
    ended.record()
    torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def limits(device: torch.device, size: int) -> dict[str, float]:
    """Measure what the device does at most: bytes read and operations a second.

    Args:
        device: that is measured.
        size: rows and columns of the square matrices that are multiplied; the buffer that is read
            has as many bytes as 32 of them in int8.
    """
    buffer = torch.ones(32 * size * size // 4, device=device)
    low, high = (torch.randint(-5, 5, (size, size), device=device).to(torch.int8) for _ in range(2))
    a, b = low.bfloat16(), high.bfloat16()
    copy = torch.empty_like(buffer)
    operations = 2 * size**3
    read = buffer.nbytes / seconds_of([buffer.max], device)
    copied = 2 * buffer.nbytes / seconds_of([lambda: copy.copy_(buffer)], device)
    return {
        "bytes_per_second": max(read, copied),
        "int8_per_second": operations / seconds_of([lambda: torch._int_mm(low, high.t())], device),
        "bf16_per_second": operations / seconds_of([lambda: a @ b.t()], device),
    }


def time_product(
    shape: tuple[int, int], tokens: int, limit: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """Time a ternary product, the rounding before it, and the product of PyTorch in bf16."""
    out, columns = shape
    padded = -(-columns // 256) * 256
    ternary = _turns(out * padded // 4)
    # Any bytes without the code 3 cost what those of a model cost.
    weights = [
        torch.randint(0, 3, (out, padded // 4), device=device).to(torch.uint8) * 85
        for _ in range(ternary)
    ]
    scales = torch.ones(out, device=device)
    x = torch.randn((tokens, columns), device=device)
    rounded = norm_quantize(x)
    ours = seconds_of([partial(ternary_product, rounded, w, scales) for w in weights], device)
    rounding = seconds_of([lambda: norm_quantize(x)] * ternary, device)
    del weights
    dense = [
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for _ in range(_turns(2 * out * columns))
    ]
    narrow = x.bfloat16()
    theirs = seconds_of([partial(torch.matmul, narrow, w.t()) for w in dense], device)
    read, operations = out * padded // 4 + tokens * (padded + 4 * out), 2 * tokens * out * columns
    return {
        "out": out,
        "columns": columns,
        "tokens": tokens,
        "seconds": ours,
        "rounding_seconds": rounding,
        "bf16_seconds": theirs,
        "times_bf16": theirs / ours,
        "of_bandwidth": read / ours / limit["bytes_per_second"],
        "of_int8_peak": operations / ours / limit["int8_per_second"],
        "bytes_per_second": read / ours,
        "operations_per_second": operations / ours,
    }


def _turns(matrix_bytes: int) -> int:
    return max(2, min(_MOST_COPIES, _MORE_THAN_CACHE // matrix_bytes))


def time_decoding(
    decoder: CudaDecoder, rows: int, depth: int, steps: int, **sampling: float
) -> dict[str, Any]:
    """Time steps of `rows` sequences through `forward`, host included; the tokens are fed back."""
    width = decoder.kv_capacity // rows
    ids = np.arange(rows, dtype=np.int32) % decoder.spec.vocab_size
    durations = []
    for step in range(steps + 3):
        batch = decode_batch(ids, depth + step, width, **sampling)
        began = time.perf_counter()
        ids = decoder.forward(batch).sampled
        durations.append(time.perf_counter() - began)
    seconds = statistics.median(durations[3:])  # the first steps compile and capture
    return {
        "rows": rows,
        "depth": depth,
        "kv_bytes": decoder.info.kv_bytes,
        "sampling": sampling,
        "seconds": seconds,
        "tokens_per_second": rows / seconds,
    }


def time_prefill(decoder: CudaDecoder, tokens: int) -> dict[str, Any]:
    """Time a step that reads a prompt and draws one token."""
    ids = (np.arange(tokens) % decoder.spec.vocab_size).tolist()
    batch = prompt_batch(ids, OutputKind.SAMPLE, tokens - 1)
    decoder.forward(batch)
    seconds = statistics.median(_wall([lambda: decoder.forward(batch)]) for _ in range(_REPEATS))
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def dense_linears(name: str, rows: int, device: torch.device) -> dict[str, Any]:
    """Time the linears of a step alone, in bf16 by PyTorch: less than such a model would take."""
    spec = SPECS[name]
    shapes = [
        (linear.out_features, linear.in_features)
        for linear in map(spec.layers[0].linear, ("q", "k", "v", "o", "gate", "up", "down"))
    ]
    # Matrices of four layers are more than a cache holds, so that they stand for all layers.
    matrices = [
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        for _ in range(min(4, len(spec.layers)))
        for shape in shapes
    ]
    inputs = {
        columns: torch.randn((rows, columns), device=device, dtype=torch.bfloat16)
        for _, columns in shapes
    }
    calls = [partial(torch.matmul, inputs[w.shape[1]], w.t()) for w in matrices]
    layers = seconds_of(calls, device) * len(shapes) * len(spec.layers)
    head = torch.randn((spec.vocab_size, spec.hidden_size), device=device, dtype=torch.bfloat16)
    seconds = layers + seconds_of([lambda: inputs[spec.hidden_size] @ head.t()], device)
    return {"rows": rows, "seconds": seconds, "tokens_per_second": rows / seconds}


def _train(layer: torch.nn.Linear, x: torch.Tensor, grad: torch.Tensor) -> None:
    torch.autograd.grad(layer(x), (x, layer.weight), grad)


def time_training(shape: tuple[int, int], tokens: int, device: torch.device) -> dict[str, Any]:
    """Time forward and backward of a BitLinear, and of a linear layer, all in bf16."""
    out, columns = shape
    x = torch.randn((tokens, columns), device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn((tokens, out), device=device, dtype=torch.bfloat16)
    found = {}
    for name, kind in (("bitlinear", BitLinear), ("linear", torch.nn.Linear)):
        layer = kind(columns, out, bias=False, device=device, dtype=torch.bfloat16)
        step = [partial(_train, layer, x, grad)] * 3
        found[f"{name}_seconds"] = seconds_of(step, device)
    ratio = found["bitlinear_seconds"] / found["linear_seconds"]
    return {"out": out, "columns": columns, "tokens": tokens, **found, "times_linear": ratio}
