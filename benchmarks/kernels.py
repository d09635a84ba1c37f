"""Speed of the ternary kernels of every set that this machine runs, beside the scalar one.

One thread. `operation` is a whole quantised operation (quantise, multiply, rescale) in a native
loop, `products` multiplies several tokens with a prepared matrix, both with operands in cache;
`from memory` multiplies one token with a matrix that no cache holds, and tells the bytes of packed
weights. The sets take turns, so that a machine that becomes slower slows all of them. Nothing is
timed before the products of each set equal those of the scalar kernels.

    python benchmarks/kernels.py [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from bitllm import ops
from bitllm.backends.cpu import quantized_operations
from bitllm.backends.sizes import Packing
from bitllm.bench.timing import Spread

SIZES = (512, 1024, 2560)
TOKENS = (8, 256)
SIZE = 2560
LARGE_ROWS = 400_000  # 0.2 GB and more
SECONDS = 0.2
PACKINGS: tuple[Packing, ...] = ("2bit", "base3")

Work = Callable[[str], float]
"""Multiplications, or bytes, a second of a kernel set."""


def per_second(action: Callable[[], object], amount: int) -> float:
    """Return what `action` does a second, `amount` each time."""
    action()
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < SECONDS:
        action()
        count += 1
    return count * amount / (time.perf_counter() - began)


def some_weights(rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Return random ternary weights in the canonical packing, rows repeating after some."""
    few = ops.pack(np.random.default_rng(0).integers(-1, 2, (min(rows, SIZE), columns), np.int8))
    return few[np.arange(rows) % len(few)]


def check(sets: list[str], packed: npt.NDArray[np.uint8], q: npt.NDArray[np.int8]) -> str | None:
    """Return the name of a set whose products differ from the scalar ones, None = all agree."""
    right = ops.prepare(packed, isa="scalar").matmul(q)
    for isa in sets:
        for packing in PACKINGS:
            if (ops.prepare(packed, packing=packing, isa=isa).matmul(q) != right).any():
                return isa
    return None


def works(packed: npt.NDArray[np.uint8], q: npt.NDArray[np.int8]) -> Iterator[tuple[str, Work]]:
    """Yield everything that is measured, by name."""
    for packing in PACKINGS:
        for columns in SIZES:
            yield f"operation {packing} {columns}, GMAC/s", operation(packing, columns)
    for packing in PACKINGS:
        for tokens in TOKENS:
            name = f"products {packing} {SIZE} x {tokens} tokens, GMAC/s"
            yield name, products(packed, q[:tokens], packing)
    large = some_weights(LARGE_ROWS, SIZE)
    for packing in PACKINGS:
        yield f"mat-vec {packing} from memory, GB/s", from_memory(large, q[0], packing)


def operation(packing: Packing, columns: int) -> Work:
    """Return the work of a native loop of quantised operations."""
    amount = columns * columns
    return lambda isa: quantized_operations(isa, packing, 1, columns, columns, SECONDS) * amount


def products(packed: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], packing: Packing) -> Work:
    """Return the work of multiplying some tokens with a matrix."""

    def work(isa: str) -> float:
        matrix = ops.prepare(packed, packing=packing, isa=isa)
        return per_second(lambda: matrix.matmul(q), len(packed) * q.size)

    return work


def from_memory(large: npt.NDArray[np.uint8], q: npt.NDArray[np.int8], packing: Packing) -> Work:
    """Return the work of multiplying one token with a matrix that no cache holds."""

    def work(isa: str) -> float:
        matrix = ops.prepare(large, packing=packing, isa=isa)
        return per_second(lambda: matrix.matmul(q), matrix.nbytes)

    return work


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each figure")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    sets = ops.kernel_names()
    packed = some_weights(SIZE, SIZE)
    random = np.random.default_rng(1)
    q = random.integers(-128, 128, (max(TOKENS), SIZE), np.int16).astype(np.int8)
    wrong = check(sets, packed, q)
    if wrong is not None:
        print(f"{wrong}: other products than the scalar kernels", file=sys.stderr)
        return 1
    rows = []
    for name, work in works(packed, q):
        runs = [{isa: work(isa) for isa in sets} for _ in range(arguments.repeats)]
        for isa in sets:
            speed = Spread.of([run[isa] for run in runs])
            ratio = Spread.of([run[isa] / run["scalar"] for run in runs])
            rows.append({"kernel": name, "set": isa, "speed": speed.median / 1e9})
            rows[-1] |= {"spread": speed.spread, "times_scalar": ratio.median}
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'kernel':46}{'set':12}{'speed':>8}{'spread':>8}{'x scalar':>10}")
    for row in rows:
        print(
            f"{row['kernel']:46}{row['set']:12}{row['speed']:8.1f}"
            f"{row['spread']:7.0%} {row['times_scalar']:9.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
