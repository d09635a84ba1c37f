"""Measure the training step of a quantised layer beside that of `torch.nn.Linear`.

    python benchmarks/training.py [--tokens 1024] [--width 1024] [--out 2816] [--threads 1]

A step is forward and backward, gradients of inputs and weights. Both kinds take turns, so that what
else the machine does meets both; told are the median of each and of the ratio of neighbours, and
the bytes that the forward pass keeps for the backward pass. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
from torch import nn

from bitllm.train import BitLinear


def step_seconds(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> float:
    """Return the time of one forward and backward pass."""
    began = time.perf_counter()
    layer(x).backward(upstream)
    taken = time.perf_counter() - began
    layer.zero_grad(set_to_none=True)
    x.grad = None
    return taken


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes kept for the backward pass beside the parameters."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Training step against torch.nn.Linear.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--out", type=int, default=2816)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, options.dtype)
    sizes = options.width, options.out, False
    make: dict[str, Callable[[], nn.Module]] = {
        "nn.Linear": lambda: nn.Linear(*sizes, dtype=dtype),
        "BitLinear": lambda: BitLinear(*sizes, dtype=dtype),
        "BitLinear, strength 0.5": lambda: BitLinear(*sizes, strength=0.5, dtype=dtype),
    }
    layers = {name: build() for name, build in make.items()}
    x = torch.randn(options.tokens, options.width, dtype=dtype, requires_grad=True)
    upstream = torch.randn(options.tokens, options.out, dtype=dtype)
    taken: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(options.repeats + 2):
        for name, layer in layers.items():
            seconds = step_seconds(layer, x, upstream)
            if repeat >= 2:
                taken[name].append(seconds)
    plain = taken["nn.Linear"]
    rows, result = [], {}
    for name, times in taken.items():
        ratio = statistics.median(t / p for t, p in zip(times, plain, strict=True))
        kept = kept_bytes(layers[name], x) / x.numel()
        milliseconds = 1e3 * statistics.median(times)
        rows.append((name, f"{milliseconds:8.2f} ms  {ratio:5.3f} x  {kept:5.2f} bytes/activation"))
        result[name] = {"ms": milliseconds, "ratio": ratio, "kept_bytes": kept}
    shape = f"{options.tokens} x {options.width} -> {options.out}, {options.dtype}"
    machine.report([("shape", shape), *rows], {"shape": shape, "layers": result})


if __name__ == "__main__":
    main()
