"""Check the cuda backend on this machine's GPU against the reference, then time it.

    PYTHONPATH=src python benchmarks/gpu.py --json gpu.json

From a source tree with NumPy, PyTorch and Triton, in some minutes. First every kernel and whole
models are held against the reference, and nothing is timed where one differs. Then, beside what the
GPU was measured to do at most: ternary products beside PyTorch's in bf16, tokens a second of a
model of the 2B-4T shape with random weights, and a training step of BitLinear.

`--interpret` does all of this with tiny sizes under Triton's interpreter, to test the script; its
times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitllm.config import KvDtype


@dataclass(frozen=True)
class Sizes:
    """What is checked and timed."""

    checked: list[tuple[int, int]]
    checked_tokens: list[int]
    text: tuple[int, int]  # tokens of the prompt that models are checked by, and tokens written
    models: list[tuple[str, KvDtype, str]]  # architecture, KV dtype, what it is compared with
    timed: list[tuple[int, int]]
    timed_tokens: list[int]
    model: str
    rows: list[int]
    depth: int
    steps: int
    prompts: list[int]
    training_tokens: int
    limit: int  # rows and columns of the products by which the limits are measured


FULL = Sizes(
    checked=[(1, 1), (33, 255), (70, 517), (3840, 2560), (2560, 6912)],
    checked_tokens=[1, 17, 70, 150],
    text=(70, 24),
    models=[
        ("10m", "bf16", "reference"),
        ("10m", "int8", "reference"),
        ("2b-4-layers", "bf16", "torch"),
        ("2b-4-layers", "int8", "torch"),
    ],
    timed=[(2560, 2560), (3840, 2560), (13824, 2560), (2560, 6912), (8192, 8192)],
    timed_tokens=[1, 8, 64, 512, 4096],
    model="2b",
    rows=[1, 8, 64, 256],
    depth=256,
    steps=32,
    prompts=[512, 4096],
    training_tokens=4096,
    limit=8192,
)

# The interpreter cuts where a GPU rounds to bfloat16, so the cache is float32.
TINY = Sizes(
    checked=[(5, 3), (33, 255)],
    checked_tokens=[1, 17],
    text=(34, 2),
    models=[("tiny", "fp32", "reference"), ("tiny", "fp32", "torch")],
    timed=[(16, 64)],
    timed_tokens=[1, 17],
    model="tiny",
    rows=[1, 3],
    depth=3,
    steps=1,
    prompts=[5],
    training_tokens=4,
    limit=32,
)


def describe(device: Any) -> dict[str, Any]:
    """Return what every figure depends on: device, driver's CUDA, and versions."""
    import numpy
    import torch
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: interpreted"
    return {
        "device": gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def check(sizes: Sizes, device: Any) -> list[Any]:
    """Compare kernels and models with the reference, printing each."""
    from gpu_checks import check_kernels, check_model

    checks = check_kernels(sizes.checked, sizes.checked_tokens, device)
    for name, kv_dtype, against in sizes.models:
        checks += check_model(name, device, kv_dtype, sizes.text, against=against)
    for each in checks:
        print(f"{'ok  ' if each.passed else 'FAIL'}  {each.name:52}{each.detail}")
    return checks


def time_kernels(sizes: Sizes, limit: dict[str, float], device: Any) -> list[dict[str, Any]]:
    """Time the ternary products, printing a table."""
    from gpu_timing import time_product

    print(
        f"\n{'product':16}{'tokens':>7}{'us':>10}{'rounding':>10}{'bf16':>10}{'x bf16':>8}", end=""
    )
    print(f"{'x bf16':>8}{'GB/s':>8}{'of peak':>8}{'TOP/s':>8}{'of peak':>8}")
    rows = []
    for shape in sizes.timed:
        for tokens in sizes.timed_tokens:
            row = time_product(shape, tokens, limit, device)
            rows.append(row)
            print(
                f"{f'{shape[0]} x {shape[1]}':16}{tokens:7}{row['seconds'] * 1e6:10.2f}"
                f"{row['rounding_seconds'] * 1e6:10.2f}{row['bf16_seconds'] * 1e6:10.2f}"
                f"{row['times_bf16']:8.2f}{row['bytes_per_second'] / 1e9:8.0f}"
                f"{row['of_bandwidth']:8.0%}{row['operations_per_second'] / 1e12:8.1f}"
                f"{row['of_int8_peak']:8.0%}"
            )
    return rows


def time_model(sizes: Sizes, device: Any) -> dict[str, Any]:
    """Time decoding and prompts of the model, printing each figure."""
    from gpu_model import random_model
    from gpu_timing import dense_linears, time_decoding, time_prefill

    from bitllm.backends.base import LoadOptions
    from bitllm.backends.cuda import CudaBackend

    checkpoint, interpreted = random_model(sizes.model), device.type != "cuda"
    result: dict[str, Any] = {"decode": [], "prefill": [], "bf16_linears": []}
    room = max(max(sizes.rows) * (sizes.depth + sizes.steps + 64), *sizes.prompts)
    print(f"\n{'step of ' + sizes.model:40}{'ms':>10}{'tok/s':>12}")
    kv_dtypes: tuple[KvDtype, ...] = ("fp32",) if interpreted else ("bf16", "int8")
    for kv_dtype in kv_dtypes:
        began = time.perf_counter()
        options = LoadOptions(
            kv_tokens=room, kv_dtype=kv_dtype, max_batch_tokens=max(*sizes.prompts, *sizes.rows)
        )
        decoder = CudaBackend(device).load(checkpoint, options)
        print(f"loaded, {kv_dtype} cache: {time.perf_counter() - began:.1f} s")
        for sampling in ({}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}):
            for rows in sizes.rows:
                found = time_decoding(decoder, rows, sizes.depth, sizes.steps, **sampling)
                result["decode"].append({"kv_dtype": kv_dtype, **found})
                how = " ".join(f"{key}={value}" for key, value in sampling.items()) or "greedy"
                _print_step(f"decode, {rows} rows, {kv_dtype}, {how}", found)
        for tokens in sizes.prompts:
            found = time_prefill(decoder, tokens)
            result["prefill"].append({"kv_dtype": kv_dtype, **found})
            _print_step(f"prompt of {tokens}, {kv_dtype}", found)
        decoder.close()
    for rows in sizes.rows:
        found = dense_linears(sizes.model, rows, device)
        result["bf16_linears"].append(found)
        _print_step(f"PyTorch bf16, linears alone, {rows} rows", found)
    return result


def _print_step(what: str, found: dict[str, Any]) -> None:
    print(f"{what:40}{found['seconds'] * 1e3:10.3f}{found['tokens_per_second']:12.0f}")


def time_trainings(sizes: Sizes, device: Any) -> list[dict[str, Any]]:
    """Time a training step of each shape, printing it."""
    from gpu_timing import time_training

    print(f"\n{'training step':28}{'BitLinear us':>14}{'Linear us':>12}{'ratio':>8}")
    rows = [time_training(shape, sizes.training_tokens, device) for shape in sizes.timed]
    for row in rows:
        what = f"{row['out']} x {row['columns']}, {row['tokens']} tokens"
        seconds = f"{row['bitlinear_seconds'] * 1e6:14.1f}{row['linear_seconds'] * 1e6:12.1f}"
        print(f"{what:28}{seconds}{row['times_linear']:8.2f}")
    return rows


def time_limits(sizes: Sizes, device: Any) -> dict[str, float]:
    """Measure what the device does at most, printing it."""
    from gpu_timing import limits

    limit = limits(device, sizes.limit)
    print(f"\nat most {limit['bytes_per_second'] / 1e9:.0f} GB/s, ", end="")
    print(f"int8 {limit['int8_per_second'] / 1e12:.1f} TOP/s, ", end="")
    print(f"bf16 {limit['bf16_per_second'] / 1e12:.1f} TFLOP/s")
    return limit


def time_all(sizes: Sizes, device: Any, result: dict[str, Any]) -> None:
    """Add all timings to `result`, and the stack of what fails: the rest is timed all the same."""
    parts: dict[str, Callable[[], Any]] = {
        "limits": lambda: time_limits(sizes, device),
        "model": lambda: time_model(sizes, device),
        "products": lambda: time_kernels(sizes, result["limits"], device),
        "training": lambda: time_trainings(sizes, device),
    }
    result["failures"] = {}
    for name, part in parts.items():
        try:
            result[name] = part()
        except Exception:  # whatever it is: a GPU is not at hand every day
            result["failures"][name] = traceback.format_exc()
            print(f"{name}: {result['failures'][name]}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Check, time, print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, without a GPU")
    asked = parser.parse_args(arguments)
    if asked.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    if not asked.interpret and not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no NVIDIA GPU; see --interpret", file=sys.stderr)
        return 1
    device, sizes = torch.device("cuda"), FULL
    if asked.interpret:
        device, sizes = torch.device("cpu"), TINY
    began, result = time.perf_counter(), describe(device)
    print(json.dumps(result))
    result["checks"] = [asdict(each) for each in check(sizes, device)]
    right = all(each["passed"] for each in result["checks"])
    if right:
        time_all(sizes, device, result)
    result["seconds"] = time.perf_counter() - began
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not right:
        print("wrong results: nothing was timed", file=sys.stderr)
        return 1
    print(f"\n{result['seconds']:.0f} s in all")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
