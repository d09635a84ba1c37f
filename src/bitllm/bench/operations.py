"""Small work: single quantised operations, and the latency of a token of small models."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bitllm
from bitllm import ops, ternary
from bitllm.backends.base import LoadOptions
from bitllm.backends.cpu import CpuBackend, choose_packing, cpu_info, quantized_operations
from bitllm.backends.sizes import Packing
from bitllm.bench.gate import CONTEXT, SEQUENCES, evidence, reference_evidence, require_equal
from bitllm.bench.model import Workbench
from bitllm.bench.random_model import SHAPES, write_checkpoint
from bitllm.bench.timing import Spread, seconds
from bitllm.config import PackingName
from bitllm.errors import MeasurementError
from bitllm.formats import open_checkpoint

__all__ = ["LatencyRow", "OperationRow", "latencies", "operations"]

SIZES = (512, 1024)
SECONDS = 0.2
MODELS = {"1m": "1M", "10m": "10M"}
TOKENS = 128


@dataclass(frozen=True, slots=True)
class OperationRow:
    """Quantised operations a second: quantise a vector, multiply it with a matrix, rescale.

    Attributes:
        size: rows and columns of the matrix.
        packing: how it is held.
        threads: that do operations of their own at the same time.
        native: a second, in a loop of native code on all threads.
        native_spread: (max - min) / median of its runs.
        python: a second, through `bitllm.ops` on one thread, with a prepared matrix.
        python_spread: likewise.
    """

    size: int
    packing: str
    threads: int
    native: float
    native_spread: float
    python: float
    python_spread: float


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Seconds for a token of a small model, one sequence, greedy.

    Attributes:
        model: "1M" or "10M" parameters, random weights.
        parameters: exactly.
        native_s: of a native step.
        native_spread: (max - min) / median of its runs.
        public_s: of a token of `LLM.generate`: engine, sampling and text included.
        public_spread: likewise.
    """

    model: str
    parameters: int
    native_s: float
    native_spread: float
    public_s: float
    public_spread: float


def operations(
    isa: str, asked: PackingName, threads: int, repeats: int, sizes: Sequence[int] = SIZES
) -> Iterator[OperationRow]:
    """Measure quantised operations; "auto" is the packing for a matrix of that size alone."""
    for size in sizes:
        packing = choose_packing(
            asked,
            cpu=cpu_info()["name"],
            isa=isa,
            threads=threads,
            ternary_bytes=size * size // 4,
        ).name
        native = Spread.of(
            [
                quantized_operations(isa, packing, threads, size, size, SECONDS)
                for _ in range(repeats)
            ]
        )
        python = Spread.of([_through_ops(isa, packing, size) for _ in range(repeats)])
        yield OperationRow(
            size, packing, threads, native.median, native.spread, python.median, python.spread
        )


def _through_ops(isa: str, packing: Packing, size: int) -> float:
    random = np.random.default_rng(size)
    codes = random.integers(-1, 2, (size, size), np.int8)
    matrix = ops.prepare(ops.pack(codes), size, packing=packing, isa=isa)
    x = random.standard_normal(size, np.float32)
    scale = np.float32(0.5)
    q, _ = ops.quantize_activations(x, isa=isa)
    right = (q == ternary.quantize_activations(x)[0]).all()
    if not right or (matrix.matmul(q) != ternary.matmul_int32(codes, q)).any():
        raise MeasurementError(
            f"kernels {isa}: an operation of {size} x {size} gives other numbers than NumPy",
            hint="run bitllm doctor, and report its output",
        )
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < SECONDS:
        q, a = ops.quantize_activations(x, isa=isa)
        _ = matrix.matmul(q) / a * scale
        count += 1
    return count / (time.perf_counter() - began)


def latencies(
    threads: int | None,
    isa: str | None,
    repeats: int,
    say: Callable[[str], None],
    models: Sequence[str] = tuple(MODELS),
) -> Iterator[LatencyRow]:
    """Measure the latency of a token in small models, which are written to a temporary folder."""
    for name in models:
        with tempfile.TemporaryDirectory(prefix="bitllm-bench-") as folder:
            path = Path(folder)
            say(f"latency of a token, {MODELS[name]} parameters")
            write_checkpoint(path, SHAPES[name])
            yield _latency(name, path, threads, isa, repeats)


def _latency(
    name: str, path: Path, threads: int | None, isa: str | None, repeats: int
) -> LatencyRow:
    kv_tokens = max(2 * TOKENS, SEQUENCES * CONTEXT)
    options = LoadOptions(kv_tokens=kv_tokens, threads=threads, isa=isa)
    wanted = reference_evidence(CpuBackend(), open_checkpoint(path), options)
    with Workbench(path, options, repeats=repeats) as bench:
        bench.load()
        require_equal(evidence(bench.decoder), wanted, f"{MODELS[name]} parameters")
        native = bench.step_seconds(TOKENS)
        spec = bench.spec
    dense = sum(int(np.prod(shape)) for shape in spec.dense_shapes().values())
    ternary = sum(each.out_features * each.in_features for _, each in spec.linear_names())
    with bitllm.load(path, threads=threads, isa=isa, context=2 * TOKENS) as llm:

        def generate() -> None:
            llm.generate([3], max_tokens=TOKENS, ignore_eos=True, temperature=0)

        generate()
        public = Spread.of([seconds(generate) / TOKENS for _ in range(repeats)])
    return LatencyRow(
        MODELS[name],
        dense + ternary,
        native.median,
        native.spread,
        public.median,
        public.spread,
    )
