"""Measure one model on one machine: loading, memory, prefill, and decoding at several depths.

    python benchmarks/make_checkpoint.py --shape 2b build/models/2b
    python benchmarks/decode.py build/models/2b

Speeds are those of the decoder's own steps, greedy sampling included: no tokenizer, no engine. A
decode step reads every ternary weight, the head and the keys and values before it, so its speed is
also given in bytes a second and as a fraction of the read bandwidth measured in the same process.
Each figure is the median of `--repeats` runs; the spread is (max - min) / median. The weights are
read into the file cache first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np

from bitllm.backends import get_backend
from bitllm.backends.base import KV_BLOCK_SIZE, Batch, Decoder, LoadOptions, OutputKind, SamplePlan
from bitllm.backends.cpu import read_bandwidth
from bitllm.checkpoint import ModelSpec
from bitllm.formats import open_checkpoint
from bitllm.tokenizer import load_tokenizer

GB = 1e9
DENSE_BYTES = {"bf16": 2, "fp32": 4}


def run_of(token_ids: list[int], start: int) -> Batch:
    """Return a batch of one run at position `start` whose last row draws a token greedily."""
    count = len(token_ids)
    blocks = -(-(start + count) // KV_BLOCK_SIZE)
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.arange(start, start + count, dtype=np.int32),
        run_offsets=np.array([0, count], np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[np.newaxis],
        adapter_slots=np.array([-1], np.int32),
        output_rows=np.array([count - 1], np.int32),
        output_kinds=np.array([OutputKind.SAMPLE], np.uint8),
        plan=SamplePlan.greedy(1),
    )


def seconds(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def summary(samples: list[float]) -> dict[str, float]:
    """Return median and spread of some durations."""
    median = statistics.median(samples)
    return {"median": median, "spread": (max(samples) - min(samples)) / median}


def prefill(decoder: Decoder, tokens: int, chunk: int) -> None:
    """Fill positions 0 .. tokens - 1 in steps of at most `chunk` rows."""
    vocab = decoder.spec.vocab_size
    ids = [(7 * position + 3) % vocab for position in range(tokens)]
    for start in range(0, tokens, chunk):
        decoder.forward(run_of(ids[start : start + chunk], start))


def decode(decoder: Decoder, depth: int, steps: int) -> None:
    """Draw `steps` tokens one after another, the first at position `depth`."""
    token = 3
    for position in range(depth, depth + steps):
        token = int(decoder.forward(run_of([token], position)).sampled[0])


def kv_bytes(spec: ModelSpec, depth: int, kv_dtype: str) -> int:
    """Return the bytes of keys and values that a step at `depth` reads."""
    width = sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    return depth * width * DENSE_BYTES[kv_dtype]


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a model directory")
    parser.add_argument("--device", default="cpu", help="backend, as bitllm names it")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa", help="kernel set by name")
    parser.add_argument("--kv-dtype", choices=DENSE_BYTES, default="bf16")
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 256, 2048], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=32, help="tokens of one decode run")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result = measure(arguments)
    machine.report(card(result), result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model several times, then run it; return every figure."""
    weights = sorted(arguments.model.glob("*.safetensors"))
    warm_file_cache(weights)
    longest = max(arguments.prefill, *arguments.depths) + arguments.steps
    options = LoadOptions(
        kv_tokens=longest,
        kv_dtype=arguments.kv_dtype,
        threads=arguments.threads,
        isa=arguments.isa,
        max_batch_tokens=arguments.prefill,
    )
    base = machine.memory()
    decoder, loads, peak = load_repeatedly(arguments, options)
    tokenizer_s = seconds(lambda: load_tokenizer(arguments.model))
    prefills = [
        seconds(lambda: prefill(decoder, arguments.prefill, arguments.prefill))
        for _ in range(1 + arguments.repeats)
    ][1:]
    prefill(decoder, max(arguments.depths), arguments.prefill)
    decodes = [decode_row(decoder, depth, arguments) for depth in arguments.depths]
    peak.sample()
    # After the peak was taken: the buffer it reads is not the model's.
    bandwidth = read_bandwidth(decoder.info.threads, 2**30)
    for row in decodes:
        row["bandwidth_fraction"] = row["bytes_per_token"] * row["tokens_per_s"] / bandwidth
    prefill_s = summary(prefills)
    return {
        "benchmark": "decode",
        "model": arguments.model.name,
        "weight_file_bytes": sum(path.stat().st_size for path in weights),
        "backend": decoder.info.backend,
        "kernel": decoder.info.kernel,
        "threads": decoder.info.threads,
        "kv_dtype": arguments.kv_dtype,
        "kv_tokens": longest,
        "repeats": arguments.repeats,
        "load_s": statistics.median(loads),
        "load_first_s": loads[0],
        "tokenizer_s": tokenizer_s,
        "base_memory": base,
        "peak_memory": peak.bytes,
        "weight_bytes": decoder.info.weight_bytes,
        "kv_bytes": decoder.info.kv_bytes,
        "scratch_bytes": decoder.info.scratch_bytes,
        "bandwidth": bandwidth,
        "prefill_tokens": arguments.prefill,
        "prefill_tokens_per_s": arguments.prefill / prefill_s["median"],
        "prefill_spread": prefill_s["spread"],
        "decode": decodes,
    }


def warm_file_cache(paths: list[Path]) -> None:
    """Read files once, so that loading is measured and not the disk."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(machine.MIB):
                pass


def load_repeatedly(
    arguments: argparse.Namespace, options: LoadOptions
) -> tuple[Decoder, list[float], machine.PeakMemory]:
    """Return the decoder, the seconds of each load, and the peak memory of the first."""
    backend = get_backend(arguments.device)
    loads = []
    with machine.PeakMemory() as peak:
        began = time.perf_counter()
        decoder = backend.load(open_checkpoint(arguments.model), options)
        loads.append(time.perf_counter() - began)
    for _ in range(arguments.repeats - 1):
        decoder.close()
        began = time.perf_counter()
        decoder = backend.load(open_checkpoint(arguments.model), options)
        loads.append(time.perf_counter() - began)
    return decoder, loads, peak


def decode_row(decoder: Decoder, depth: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure decoding from `depth` on; the bytes are those of the middle of a run."""
    decode(decoder, depth, 2)
    runs = [
        seconds(lambda: decode(decoder, depth, arguments.steps)) / arguments.steps
        for _ in range(arguments.repeats)
    ]
    token_s = summary(runs)
    spec = decoder.spec
    embedding = 0 if spec.tied_head else 2 * spec.vocab_size * spec.hidden_size
    keys_and_values = kv_bytes(spec, depth + arguments.steps // 2, arguments.kv_dtype)
    read = decoder.info.weight_bytes - embedding + keys_and_values
    return {
        "depth": depth,
        "tokens_per_s": 1 / token_s["median"],
        "spread": token_s["spread"],
        "us_per_token": 1e6 * token_s["median"],
        "bytes_per_token": read,
    }


def size(count: float) -> str:
    """Return bytes as GB or MB."""
    return f"{count / GB:.3f} GB" if count > 0.1 * GB else f"{count / 1e6:.2f} MB"


def card(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the figures as labelled lines."""
    peak = {name: value / machine.MIB for name, value in result["peak_memory"].items()}
    rows = [
        ("model", f"{result['model']}, {size(result['weight_file_bytes'])} of weights"),
        ("ran on", f"{result['backend']}, kernels {result['kernel']}, {result['threads']} threads"),
        ("load", f"{result['load_s']:.2f} s (first {result['load_first_s']:.2f} s)"),
        ("tokenizer", f"{result['tokenizer_s']:.2f} s"),
        (
            "peak memory",
            f"{peak['resident']:.0f} MiB: anonymous {peak['anonymous']:.0f},"
            f" file-backed {peak['file']:.0f}; KV of {result['kv_tokens']} tokens"
            f" {result['kv_bytes'] / machine.MIB:.0f}",
        ),
        ("read bandwidth", f"{result['bandwidth'] / GB:.1f} GB/s"),
        (
            f"prefill {result['prefill_tokens']}",
            f"{result['prefill_tokens_per_s']:.1f} tok/s (spread {result['prefill_spread']:.1%})",
        ),
    ]
    rows += [
        (
            f"decode at {row['depth']}",
            f"{row['tokens_per_s']:.2f} tok/s, {row['us_per_token']:.0f} us"
            f" (spread {row['spread']:.1%}), {size(row['bytes_per_token'])} a token,"
            f" {row['bandwidth_fraction']:.0%} of the bandwidth",
        )
        for row in result["decode"]
    ]
    return rows


if __name__ == "__main__":
    main()
