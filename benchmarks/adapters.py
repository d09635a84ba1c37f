"""What a low-rank adapter of all linears costs: decoding and prompts, with and without it in turn.

    python benchmarks/adapters.py build/models/2b --rank 16

The checkpoint may be any that bitllm runs; the adapter is of random numbers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.bench.machine import describe
from bitllm.bench.steps import Sequences
from bitllm.checkpoint import DenseDtype, DenseTensor, ModelSpec
from bitllm.formats import open_checkpoint

PROMPT, CHUNK = 256, 256


def random_adapter(spec: ModelSpec, rank: int, dtype: DenseDtype) -> Adapter:
    """An adapter of all linears, its numbers small enough to leave the activations as they are."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> DenseTensor:
        values = (1e-3 * random.standard_normal((rows, columns))).astype(np.float32)
        if dtype == "bf16":
            return DenseTensor((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16), dtype)
        return DenseTensor(values, dtype)

    updates = {
        name: LowRankUpdate(matrix(rank, each.in_features), matrix(each.out_features, rank), 1.0)
        for name, each in spec.linear_names()
    }
    return Adapter(f"random, rank {rank}, {dtype}", updates)


def seconds(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Parse the command line, measure in turn, and print medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    options = LoadOptions(kv_tokens=2 * PROMPT, threads=arguments.threads, max_batch_tokens=CHUNK)
    checkpoint = open_checkpoint(arguments.model)
    decoder = get_backend("cpu").load(checkpoint, options)
    slots = {"none": -1}
    sizes = {"none": 0}
    for dtype in ("bf16", "f32"):
        adapter = random_adapter(decoder.spec, arguments.rank, dtype)
        slots[dtype], sizes[dtype] = decoder.load_adapter(adapter), adapter.nbytes
    decode: dict[str, list[float]] = {name: [] for name in slots}
    prefill: dict[str, list[float]] = {name: [] for name in slots}
    for repeat in range(arguments.repeats + 1):  # the first is not counted
        for name, slot in slots.items():
            sequences = Sequences(decoder, 1, 2 * PROMPT, CHUNK, slot)
            prompt = seconds(partial(sequences.prefill, PROMPT))
            tokens = seconds(partial(sequences.decode, PROMPT, arguments.tokens))
            if repeat:
                prefill[name].append(PROMPT / prompt)
                decode[name].append(arguments.tokens / tokens)
    result = {
        name: {
            "bytes": sizes[name],
            "decode_tokens_per_s": statistics.median(decode[name]),
            "prefill_tokens_per_s": statistics.median(prefill[name]),
        }
        for name in slots
    }
    print(f"{decoder.info.kernel}, {decoder.info.threads} threads, rank {arguments.rank}")
    print(f"{'adapter':<8}{'MB':>8}{'decode tok/s':>14}{'prefill tok/s':>15}")
    for name, row in result.items():
        print(
            f"{name:<8}{row['bytes'] / 1e6:>8.1f}{row['decode_tokens_per_s']:>14.2f}"
            f"{row['prefill_tokens_per_s']:>15.1f}"
        )
    print(json.dumps({"rank": arguments.rank, "adapters": result, "machine": describe()}))


if __name__ == "__main__":
    main()
