"""Measure a model of transformers before and after `bitllm.integrations.transformers`.

    python benchmarks/make_checkpoint.py --shape 2b --layers 4 build/models/2b-4-layers
    python benchmarks/transformers_kernels.py build/models/2b-4-layers --threads 2

`model.generate` in one process, in bfloat16 as published: some repeats with transformers' own
linears, then as many with our kernels, each after a warm-up of the same lengths. First of all every
linear's output with our kernels is held against its own on the same input; where the two are
further apart than bfloat16 explains, nothing is timed. Figures are medians; the last line is JSON.
PyTorch's threads wait for work without sleeping, on the cores that ours compute on: set
OMP_WAIT_POLICY=PASSIVE for long prompts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import machine
import torch
import transformers

from bitllm.errors import BitllmError
from bitllm.integrations.transformers import use_cpu_kernels

LARGEST_ERROR = 1e-3
"""Squared error over squared size; eight bits of mantissa, in inputs, products and sums."""


def load(directory: Path, linear_class: str) -> Any:
    """Return the model in bfloat16, its linears of the wanted class."""
    config = transformers.AutoConfig.from_pretrained(directory)
    config.quantization_config["linear_class"] = linear_class
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.bfloat16
    )
    return model.eval()


def largest_error(model: Any) -> float:
    """Return the largest normalised squared error of a linear between its forward and ours."""
    seen: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    kinds = ("BitLinear", "AutoBitLinear")
    linears = [each for each in model.modules() if type(each).__name__ in kinds]
    hooks = [
        each.register_forward_hook(lambda me, x, y: seen.__setitem__(me, (x[0], y)))
        for each in linears
    ]
    model(prompt(model, 8))
    for hook in hooks:
        hook.remove()
    with use_cpu_kernels(model):
        return max(
            float((each(x).double() - y.double()).square().sum() / y.double().square().sum())
            for each, (x, y) in seen.items()
        )


def prompt(model: Any, length: int) -> torch.Tensor:
    """Return random token ids, int64 [1, length]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size - 1000, (1, length), generator=generator)


def seconds(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Return how long it takes to write exactly so many tokens."""
    began = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return time.perf_counter() - began


def speeds(model: Any, prefill: int, tokens: int, repeats: int) -> dict[str, float]:
    """Return tokens a second of a prompt and of decoding, the medians after a warm-up."""
    long, short = prompt(model, prefill), prompt(model, 8)
    seconds(model, long, 1)
    seconds(model, short, tokens)
    reading = [prefill / seconds(model, long, 1) for _ in range(repeats)]
    writing = [
        (tokens - 1) / (seconds(model, short, tokens) - seconds(model, short, 1))
        for _ in range(repeats)
    ]
    return {"prefill": statistics.median(reading), "decode": statistics.median(writing)}


def main() -> int:
    """Load, compare, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a packed checkpoint in the Hugging Face format")
    parser.add_argument(
        "--linear-class", choices=["autobitlinear", "bitlinear"], default="autobitlinear"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prefill", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a run")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    model = load(asked.model, asked.linear_class)
    error = largest_error(model)
    if error > LARGEST_ERROR:
        print(f"a linear is {error:.2g} away from its own output", file=sys.stderr)
        return 1
    work = (asked.prefill, asked.tokens, asked.repeats)
    before = speeds(model, *work)
    began = time.perf_counter()
    kernels = use_cpu_kernels(model)
    preparing = time.perf_counter() - began
    after = speeds(model, *work)
    rows = [
        (
            f"{what}, tok/s",
            f"{before[what]:8.2f} -> {after[what]:8.2f}, x {after[what] / before[what]:.2f}",
        )
        for what in before
    ]
    rows.append(("packing the weights", f"{preparing:.1f} s, {kernels.nbytes / 1e6:.0f} MB"))
    rows.append(("largest error of a linear", f"{error:.2g}"))
    machine.report(
        rows,
        {
            "model": str(asked.model),
            "layers": model.config.num_hidden_layers,
            "threads": asked.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "before": before,
            "after": after,
            "linears": kernels.modules,
            "packing_seconds": preparing,
            "packed_bytes": kernels.nbytes,
            "largest_error": error,
        },
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitllmError as error:
        sys.exit(str(error))
