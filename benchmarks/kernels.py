"""Speed of the ternary kernels of every set that this machine runs, beside the scalar one.

One thread, operands in cache. `mat-vec` is a whole quantised operation (quantise, multiply,
rescale) in a native loop; `products` multiplies 256 tokens through `bitllm.ops`, packing included.
The sets take turns, so that a machine that becomes slower slows all of them. Nothing is timed
before the products of each set equal those of the scalar kernels.

    python benchmarks/kernels.py [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np

from bitllm import ops
from bitllm.backends.cpu import quantized_operations
from bitllm.bench.timing import Spread

SIZES = (512, 1024, 2560)
TOKENS = 256
SECONDS = 0.2


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each figure")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    sets = ops.kernel_names()
    random = np.random.default_rng(0)
    size = SIZES[-1]
    packed = ops.pack(random.integers(-1, 2, (size, size), np.int8))
    q = random.integers(-128, 128, (TOKENS, size), np.int16).astype(np.int8)
    right = ops.ternary_matmul(packed, q, isa="scalar")
    for isa in sets:
        if (ops.ternary_matmul(packed, q, isa=isa) != right).any():
            print(f"{isa}: other products than the scalar kernels", file=sys.stderr)
            return 1

    def matvec(packing: str, columns: int) -> Callable[[str], float]:
        work = columns * columns
        return lambda isa: quantized_operations(isa, packing, 1, columns, columns, SECONDS) * work

    def products(isa: str) -> float:
        began = time.perf_counter()
        ops.ternary_matmul(packed, q, isa=isa)
        return right.size * size / (time.perf_counter() - began)

    works: dict[str, Callable[[str], float]] = {
        f"mat-vec {packing} {columns}": matvec(packing, columns)
        for packing in ("2bit", "base3")
        for columns in SIZES
    }
    works[f"products 2bit {size} x {TOKENS} tokens"] = products
    rows = []
    for name, work in works.items():
        runs = [{isa: work(isa) for isa in sets} for _ in range(arguments.repeats)]
        for isa in sets:
            speed = Spread.of([run[isa] for run in runs])
            ratio = Spread.of([run[isa] / run["scalar"] for run in runs])
            rows.append({"kernel": name, "set": isa, "gmac_per_s": speed.median / 1e9})
            rows[-1] |= {"spread": speed.spread, "times_scalar": ratio.median}
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'kernel':32}{'set':12}{'GMAC/s':>8}{'spread':>8}{'x scalar':>10}")
    for row in rows:
        print(
            f"{row['kernel']:32}{row['set']:12}{row['gmac_per_s']:8.1f}"
            f"{row['spread']:7.0%} {row['times_scalar']:9.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
