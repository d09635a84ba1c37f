"""Measure the engine itself: what it adds to a step, how it fills one, and what its memory costs.

    python benchmarks/engine.py overhead                        # of the demo model
    python benchmarks/engine.py throughput build/models/2b
    python benchmarks/engine.py first-token build/models/2b
    python benchmarks/engine.py latency                         # of 1M and 10M parameters
    python benchmarks/engine.py memory --native-tests build/native/native/tests/bitllm_native_tests

`overhead`: a step of the engine without its call of the decoder, for 1 and 8 sequences, with and
without a repetition penalty. `throughput`: decoded tokens a second of `LLM.generate` against the
number of prompts. `first-token`: seconds until the first token of requests that arrive one after
another while 8 others write. `latency`: a token through `generate`, `stream` and `AsyncLLM`, beside
a call of the decoder without an engine, and its native part. `memory`: the block pool, and heap
allocations of a native step, as the native test counts them. A figure is the median, its spread
(max - min) / median. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import machine
import numpy as np
from peer_repeat import positive

import bitllm
from bitllm import AsyncLLM
from bitllm.backends.base import KV_BLOCK_SIZE, Batch, StepOutput
from bitllm.backends.cpu import CpuDecoder
from bitllm.bench.random_model import SHAPES, write_checkpoint
from bitllm.bench.steps import Sequences
from bitllm.bench.timing import Spread
from bitllm.config import SamplingParams
from bitllm.engine.blocks import BlockPool

WRITERS = 8
PENALTIES = (1.0, 1.1)

Rows = list[tuple[str, str]]


def prompt(index: int, tokens: int = 4) -> list[int]:
    """Return a prompt that begins unlike those of other indices, so that none is in the cache."""
    return [3 + (index * 31 + at * 7) % 200 for at in range(tokens)]


def options(tokens: int, penalty: float = 1.0) -> SamplingParams:
    """Return greedy parameters for so many tokens, whatever the model would do."""
    return SamplingParams(
        max_tokens=tokens, ignore_eos=True, temperature=0, repetition_penalty=penalty
    )


def load(arguments: argparse.Namespace, sequences: int, tokens: int) -> bitllm.LLM:
    """Load the model with room for so many sequences of so many tokens, to the next block."""
    kv_tokens = sequences * (-(-tokens // KV_BLOCK_SIZE) + 1) * KV_BLOCK_SIZE
    return bitllm.load(
        arguments.model,
        context=tokens,
        kv_tokens=kv_tokens,
        threads=arguments.threads,
        speculation=arguments.speculation,
    )


class Stopwatch:
    """A decoder's `forward` that adds up how long it took.

    Attributes:
        seconds: since somebody set it to 0.
    """

    def __init__(self, forward: Callable[[Batch], StepOutput]) -> None:
        self._forward = forward
        self.seconds = 0.0

    def __call__(self, batch: Batch) -> StepOutput:
        """Compute a step."""
        began = time.perf_counter()
        output = self._forward(batch)
        self.seconds += time.perf_counter() - began
        return output


def overhead(arguments: argparse.Namespace) -> tuple[Rows, list[dict[str, Any]]]:
    """Measure what a decode step takes beside the decoder's own `forward`."""
    tokens = arguments.steps + 16
    rows: Rows = []
    figures = []
    with load(arguments, WRITERS, tokens) as llm:
        decoder = llm.engine._decoder
        watch = Stopwatch(decoder.forward)
        decoder.forward = watch  # type: ignore[method-assign]
        for count in (1, WRITERS):
            for penalty in PENALTIES:
                figure = step_times(llm, watch, count, arguments.steps, penalty)
                figures.append({"sequences": count, "repetition_penalty": penalty, **figure})
                label = f"{count} sequences, repetition penalty {penalty}"
                text = (
                    f"{1e6 * figure['overhead_s']:.1f} us of a step of"
                    f" {1e3 * figure['step_s']:.3f} ms: {figure['part']:.2%}"
                )
                rows.append((f"overhead, {label}", text))
    return rows, figures


def step_times(
    llm: bitllm.LLM, watch: Stopwatch, count: int, steps: int, penalty: float
) -> dict[str, float]:
    """Return the medians of a decode step and of what is not the decoder, in seconds."""
    asked = [llm.prepare(prompt(index), options(steps + 8, penalty)) for index in range(count)]
    sequences = [llm.engine.add(request) for request in asked]
    whole, beside = [], []
    for step in range(steps + 4):
        watch.seconds = 0.0
        began = time.perf_counter()
        llm.engine.advance()
        seconds = time.perf_counter() - began
        if step >= 4:  # the first ones read the prompts, and warm up
            whole.append(seconds)
            beside.append(seconds - watch.seconds)
    for sequence in sequences:
        llm.engine.abort(sequence)
    step_s, overhead_s = statistics.median(whole), statistics.median(beside)
    return {"step_s": step_s, "overhead_s": overhead_s, "part": overhead_s / step_s}


def throughput(arguments: argparse.Namespace) -> tuple[Rows, list[dict[str, Any]]]:
    """Measure decoded tokens a second of `generate` against the number of prompts."""
    rows: Rows = []
    figures = []
    tokens = arguments.steps + 8
    with load(arguments, max(arguments.batch), tokens) as llm:
        for count in arguments.batch:
            speeds = [generate_speed(llm, count, arguments.steps) for _ in range(arguments.repeats)]
            speed = Spread.of(speeds)
            figures.append({"sequences": count, "tokens_per_s": asdict(speed)})
            rows.append((f"decode of {count}", f"{speed.median:.1f} tok/s ({speed.spread:.1%})"))
    return rows, figures


def generate_speed(llm: bitllm.LLM, count: int, steps: int) -> float:
    """Return tokens a second of all prompts, from the first token of the last one on."""
    done = llm.generate([prompt(index) for index in range(count)], params=options(steps + 1))
    return count * steps / max(each.usage.decode_seconds for each in done)


def first_token(arguments: argparse.Namespace) -> tuple[Rows, list[dict[str, Any]]]:
    """Measure the time to the first token of requests that arrive while others write."""
    tokens = arguments.prompt + 16
    with load(arguments, WRITERS + 1, max(tokens, 512)) as llm:
        seconds = asyncio.run(arrivals(llm, arguments))
    halves = statistics.quantiles(seconds, n=20)
    figure = {
        "writers": WRITERS,
        "prompt_tokens": arguments.prompt,
        "requests": len(seconds),
        "p50_s": statistics.median(seconds),
        "p95_s": halves[-1],
    }
    text = f"p50 {1e3 * figure['p50_s']:.1f} ms, p95 {1e3 * figure['p95_s']:.1f} ms"
    label = f"first token, prompt of {arguments.prompt}, {WRITERS} writing"
    return [(label, f"{text} ({len(seconds)} requests)")], [figure]


async def arrivals(llm: bitllm.LLM, arguments: argparse.Namespace) -> list[float]:
    """Return the seconds to the first token of each request, one at a time beside the writers."""
    async with AsyncLLM(llm) as served:
        writers = [asyncio.ensure_future(write(served, index)) for index in range(WRITERS)]
        seconds = []
        for index in range(arguments.requests + 1):
            began = time.perf_counter()
            # Text may come later than its first token: half of a character is held back.
            await served.generate(prompt(100 + index, arguments.prompt), params=options(1))
            seconds.append(time.perf_counter() - began)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
    return seconds[1:]


async def write(llm: AsyncLLM, index: int) -> None:
    """Write one text after another, until cancelled."""
    while True:
        async for _ in llm.stream(prompt(index), params=options(256)):
            pass


def latency(arguments: argparse.Namespace) -> tuple[Rows, list[dict[str, Any]]]:
    """Measure a token of small random models through each interface, beside a bare step."""
    rows: Rows = []
    figures = []
    for name in ("1m", "10m"):
        with tempfile.TemporaryDirectory(prefix="bitllm-engine-") as folder:
            write_checkpoint(Path(folder), SHAPES[name])
            of_model = argparse.Namespace(**{**vars(arguments), "model": folder})
            figure = token_times(of_model)
        figures.append({"model": name, **figure})
        rows += [
            (f"{name} parameters, {way}", f"{1e6 * each['median']:.1f} us ({each['spread']:.1%})")
            for way, each in figure.items()
        ]
    return rows, figures


def token_times(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the median seconds of a token and their spread, by interface."""
    steps, asked = arguments.steps, options(arguments.steps)
    llm = load(arguments, 1, steps + 64)
    decoder = cast("CpuDecoder", llm.engine._decoder)
    watch = decoder.forward = Stopwatch(decoder.forward)  # type: ignore[method-assign]
    bare = Sequences(decoder, 1, steps, 16)
    ways: dict[str, Callable[[], object]] = {
        "decoder step": lambda: bare.decode(0, steps),
        "generate": lambda: llm.generate(prompt(1, 1), params=asked),
        "stream": lambda: list(llm.stream(prompt(1, 1), params=asked)),
    }
    samples: dict[str, list[float]] = {way: [] for way in ["native step", *ways]}
    for repeat in range(arguments.repeats + 1):
        for way, run in ways.items():
            native, watch.seconds = decoder.step_seconds(), 0.0
            began = time.perf_counter()
            run()
            taken = time.perf_counter() - began
            if repeat == 0:
                continue
            if way == "decoder step":  # that batches are made in Python here is not of interest
                samples["native step"].append((decoder.step_seconds() - native) / steps)
                taken = watch.seconds
            samples[way].append(taken / steps)
    samples["AsyncLLM stream"] = asyncio.run(served_times(llm, asked, arguments.repeats, steps))
    return {way: asdict(Spread.of(seconds)) for way, seconds in samples.items()}


async def served_times(
    llm: bitllm.LLM, asked: SamplingParams, repeats: int, steps: int
) -> list[float]:
    """Return the seconds of a token of each repeat through `AsyncLLM.stream`."""
    seconds = []
    async with AsyncLLM(llm, max_unread=steps) as served:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            async for _ in served.stream(prompt(1, 1), params=asked):
                pass
            seconds.append((time.perf_counter() - began) / steps)
    return seconds[1:]


def memory(arguments: argparse.Namespace) -> tuple[Rows, list[dict[str, Any]]]:
    """Measure the block pool, and ask the native test how often a step asks for memory."""
    with load(arguments, WRITERS, 512) as llm:
        blocks, kv_bytes = llm.engine._decoder.kv_capacity, llm.info.kv_bytes
    count = 4096
    pool_bytes = pool_size(count) / count  # of Python's objects; keys of kept blocks included
    per_block = kv_bytes / blocks
    seconds = Spread.of([allocation_seconds(count) for _ in range(max(5, arguments.repeats))])
    figure: dict[str, Any] = {
        "allocate_and_release_s": asdict(seconds),
        "pool_bytes_per_block": pool_bytes,
        "kv_bytes_per_block": per_block,
        "overhead": pool_bytes / per_block,
    }
    rows = [
        ("allocate and release a block", f"{1e9 * seconds.median:.0f} ns ({seconds.spread:.1%})"),
        (
            "pool",
            f"{pool_bytes:.0f} bytes a block, all kept; a block of keys and values has"
            f" {per_block:.0f}: {pool_bytes / per_block:.3%}",
        ),
    ]
    if arguments.native_tests:
        figure["heap_allocations_per_step"] = native_allocations(arguments.native_tests)
        rows.append(("heap allocations of a native step", "0, by the native test"))
    return rows, [figure]


def allocation_seconds(count: int) -> float:
    """Return the seconds that a block costs to be had and to be given back."""
    pool = BlockPool(count)
    began = time.perf_counter()
    blocks = [pool.allocate() for _ in range(count)]
    pool.release(blocks)
    return (time.perf_counter() - began) / count


def pool_size(count: int) -> int:
    """Return the bytes of a pool of blocks that are all kept, its most expensive state."""
    import tracemalloc

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    pool = BlockPool(count)
    blocks = [pool.allocate() for _ in range(count)]
    for block in blocks:
        pool.keep(block, np.int64(block).tobytes() * 4)
    pool.release(blocks)
    del blocks
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used


def native_allocations(program: Path) -> int:
    """Return 0 if the native test that counts allocations finds none; else give up."""
    found = subprocess.run([program, "test_decoder"], capture_output=True, text=True)
    if not re.search(r"^ok +test_decoder a_step_allocates_nothing$", found.stdout, re.MULTILINE):
        sys.exit(f"{program}: a step allocates memory\n{found.stdout}{found.stderr}")
    return 0


MEASUREMENTS = {
    "overhead": overhead,
    "throughput": throughput,
    "first-token": first_token,
    "latency": latency,
    "memory": memory,
}


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("model", nargs="?", help="a model directory; default: the demo model")
    parser.add_argument("--steps", type=positive, default=128, help="tokens of one decode run")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--speculation", choices=["auto", "off"], default="auto")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--requests", type=positive, default=40, help="that arrive under load")
    parser.add_argument("--prompt", type=positive, default=64, help="tokens of each of them")
    parser.add_argument("--native-tests", type=Path, help="the native test program")
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    arguments = parser.parse_args()
    rows, figures = MEASUREMENTS[arguments.measurement](arguments)
    name = f"engine {arguments.measurement}"
    result = {"benchmark": name, "model": arguments.model or "demo", "figures": figures}
    if arguments.json:
        print(json.dumps({**machine.describe(), **result}))
    else:
        machine.report(rows, result)


if __name__ == "__main__":
    main()
