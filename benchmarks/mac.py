"""For the owner of a Mac: tests, self-tests and speed of the mlx device, as text to paste.

    make mac-check                                      all of it, some minutes
    .venv/bin/python benchmarks/mac.py --no-tests       self-tests and figures only
    .venv/bin/python benchmarks/mac.py -m REF           with a model of your own too

Runs without Metal also, on the CPU of MLX; then kernels of ours have no figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from machine import report

from bitllm.backends.mlx.device import device_facts, read_bandwidth
from bitllm.backends.mlx.kernels import head_logits, quantize_packed, use_kernels
from bitllm.backends.mlx.kernels.product import TILES, VECTOR, multiply
from bitllm.backends.mlx.linear import PackedMatrix, quantize_activations
from bitllm.backends.mlx.selftest import check_products
from bitllm.bench import BenchSettings, run_bench
from bitllm.bench.random_model import SHAPES, write_checkpoint
from bitllm.bench.report import table
from bitllm.bench.timing import repeat
from bitllm.checkpoint import TernaryMatrix
from bitllm.config import EngineOptions
from bitllm.errors import BitllmError

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/test_{name}.py" for name in ("gpu_backends", "mlx_engine", "mlx_kernels")]
MATRICES = ((2560, 2560), (6912, 2560), (2560, 6912))
TOKENS = (1, 2, 4, 8, 32, 256)
HEAD_SHAPE = (128256, 2560)
COPIES = 8
"""Matrices that are multiplied in turn: one alone would stay in a cache."""
READ_BYTES = 1 << 29


def main() -> int:
    """Run what was asked for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", help="a model to measure beside the random one")
    parser.add_argument("--shape", default="10m", choices=SHAPES, help="of the random model")
    parser.add_argument("--no-tests", action="store_true", help="leave pytest out")
    parser.add_argument("--small", action="store_true", help="few and small products, for a test")
    arguments = parser.parse_args()
    facts = device_facts()
    rows = [("device", f"{facts.name}, Metal: {facts.metal}"), ("mlx", facts.version)]
    verdicts = dict(_verdicts(with_tests=not arguments.no_tests))
    rows += list(verdicts.items())
    nbytes = READ_BYTES >> 6 if arguments.small else READ_BYTES
    bandwidth = read_bandwidth(nbytes)
    rows.append(("read bandwidth", f"{bandwidth / 1e9:.1f} GB/s"))
    figures = list(_products(bandwidth, small=arguments.small))
    speeds = list(_speeds(arguments.shape, arguments.model, small=arguments.small))
    print("\n".join(table(("product", "tokens", "kernel", "us", "GB/s", "of read"), figures)))
    print()
    print("\n".join(table(("model", "device", "work", "batch", "depth", "tok/s"), speeds)))
    print()
    report(rows, {"device": dataclasses.asdict(facts), "products": figures, "speed": speeds})
    return int(any(verdict.startswith("FAIL") for verdict in verdicts.values()))


def _verdicts(*, with_tests: bool) -> Iterator[tuple[str, str]]:
    try:
        yield "self-test", f"PASS: {check_products()}"
    except BitllmError as error:
        yield "self-test", f"FAIL: {error.message}"
    if with_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(run.stdout)
        last = (run.stdout or run.stderr).strip().splitlines()[-1:]
        yield "tests", f"{'FAIL' if run.returncode else 'PASS'}: {' '.join(last)}"


def _products(bandwidth: float, *, small: bool) -> Iterator[tuple[str, ...]]:
    """Time each kernel on shapes of the 2B model: bytes are those of the packed matrix."""
    for rows, columns in MATRICES[:1] if small else MATRICES:
        matrices = [_matrix(rows, columns, seed) for seed in range(1 if small else COPIES)]
        for tokens in TOKENS[:2] if small else TOKENS:
            for kernel, run in _kernels(matrices, tokens, columns).items():
                spent = _seconds(run) / len(matrices)
                speed = matrices[0].nbytes / spent
                yield _row(f"{rows} x {columns}", tokens, kernel, spent, speed, bandwidth)
    vocab, hidden = (512, 64) if small else HEAD_SHAPE
    head = mx.zeros((vocab, hidden), mx.bfloat16)
    x = mx.ones((1, hidden))
    heads: dict[str, Callable[[], list[mx.array]]] = {
        "mlx": lambda: [x @ head.astype(mx.float32).T]
    }
    if use_kernels():
        heads["bitllm"] = lambda: [head_logits(head.view(mx.uint32), x)]
    for kernel, run in heads.items():
        spent = _seconds(run)
        yield _row("head", 1, kernel, spent, head.nbytes / spent, bandwidth)


def _kernels(
    matrices: list[PackedMatrix], tokens: int, columns: int
) -> dict[str, Callable[[], list[mx.array]]]:
    x = mx.array(np.random.default_rng(1).standard_normal((tokens, columns), np.float32))

    def portable() -> list[mx.array]:
        return [matrix(quantize_activations(x)[0]) for matrix in matrices]

    def ours(kernel: Any) -> Callable[[], list[mx.array]]:
        return lambda: [
            multiply(kernel, matrix.codes, quantize_packed(x, matrix.words)[0])
            for matrix in matrices
        ]

    found = {"mlx": portable}
    if use_kernels():
        found |= {"bitllm vector": ours(VECTOR), "bitllm tiles": ours(TILES)}
    return found


def _matrix(rows: int, columns: int, seed: int) -> PackedMatrix:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, columns), np.int8)
    return PackedMatrix(TernaryMatrix.from_codes(codes, np.ones((), np.float32)), "m")


def _seconds(run: Callable[[], list[mx.array]]) -> float:
    return repeat(lambda: mx.eval(run()), 5).median


def _row(
    what: str, tokens: int, kernel: str, spent: float, speed: float, bandwidth: float
) -> tuple[str, ...]:
    share = f"{speed / bandwidth:.0%}"
    return (what, str(tokens), kernel, f"{1e6 * spent:.1f}", f"{speed / 1e9:.1f}", share)


def _speeds(shape: str, model: str | None, *, small: bool) -> Iterator[tuple[str, ...]]:
    """Decode and prefill of a random model, and of one that was named, on mlx and on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), SHAPES[shape])
        for name, ref in ((f"{shape} random", folder), (model, model)):
            if ref is None:
                continue
            for device in ("mlx", "cpu"):
                settings = BenchSettings(
                    prompts=(8,) if small else None,
                    generate=4 if small else 32,
                    depths=(0,),
                    batches=(1,) if small else (1, 8),
                    small=False,
                    repeats=1 if small else 5,
                    engine=EngineOptions(device=device),
                )
                for row in run_bench(ref, settings).speed:
                    cells = (row.batch, row.depth, f"{row.tokens_per_s:.1f}")
                    work = f"{row.work} {row.tokens}"
                    yield (str(name), device, work, *map(str, cells))


if __name__ == "__main__":
    sys.exit(main())
