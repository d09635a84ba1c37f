"""Compile every Triton kernel for the GPUs named as arguments, and print facts about them as JSON.

A script for test_cuda_compiled.py: it needs Triton and its assembler, and no GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitllm.backends.cuda.kernels import attention, head, noise, product, quantize, rope

POINTERS = {
    "i8": ("code_rows", "x_codes"),
    "u8": ("weights",),
    "i32": ("sums", "x_sums", "tables", "runs", "positions", "slots"),
}
INTEGERS = ("columns", "padded", "tokens", "out", "vocab", "heads", "kv_heads", "head_dim", "half")
INTEGERS += ("window", "table_width", "groups")
DIVISIBLE = ("columns", "padded", "out", "vocab", "head_dim", "half")
FLOATS = ("eps", "scale")


@dataclass(frozen=True)
class Case:
    """A kernel with its compile-time constants; `cache` is the dtype of keys and values.

    `types` are those of arguments that have another one than their name says.
    """

    kernel: Any
    constants: dict[str, Any]
    warps: int
    fusion: bool = True
    cache: str = "bf16"
    types: dict[str, str] = field(default_factory=dict)


def _attention(cache: str, splits: int) -> Case:
    constants = {
        "SHARED": 4,
        "QUERY_ROWS": 16,
        "INT8": cache == "i8",
        "FLOAT32": cache == "fp32",
        "BLOCK": 128,
        "SPLITS": splits,
        "PLACES": 32,
    }
    return Case(attention._attend, constants, 4, cache=cache)


def _product(kernel: Any, rows: int, columns: int, warps: int, **constants: Any) -> Case:
    tile = {"HAS_BIAS": False, "ROWS": rows, "COLUMNS": columns}
    return Case(kernel, {**tile, **constants}, warps, fusion=False)


def _grouped(tokens: int) -> Case:
    tile = product._grouped_tile(tokens)
    return _product(product._grouped_product, *tile, GROUP_SLICES=2)


CASES: dict[str, Case | Callable[[int], Case]] = {
    "rounding": Case(quantize._norm_quantize, {"HAS_GAIN": True, "BLOCK": 4096}, 8, fusion=False),
    "product decode": _product(product._ternary_product, *product._tile(1, 8)),
    "product prefill": lambda target: _product(
        product._ternary_product, *product._tile(512, target // 10)
    ),
    "gated decode": _product(product._gated_product, *product._tile(1, 8), ACTIVATION="relu2"),
    "gated prefill": lambda target: _product(
        product._gated_product, *product._tile(512, target // 10), ACTIVATION="relu2"
    ),
    "grouped decode": _grouped(1),
    "grouped prefill": _grouped(512),
    "rope": Case(
        rope._rotate_and_store, {"HAS_NORM": False, "INT8": False, "BLOCK": 128}, 1, fusion=False
    ),
    "attention bf16": _attention("bf16", 1),
    "attention bf16 in parts": _attention("bf16", 8),
    "attention int8": _attention("i8", 8),
    "attention fp32": _attention("fp32", 1),
    "noise": Case(
        noise._perturb,
        {"BLOCK": 512},
        4,
        fusion=False,
        types={"keys": "*i64", "values": "*fp64"},
    ),
    "merging": Case(attention._merge, {"SPLITS": 8, "BLOCK": 128}, 4),
    "head decode": Case(head._logits, {"FLOAT32": False, **head._tile(1)[0]}, head._tile(1)[1]),
    "head prefill": Case(
        head._logits, {"FLOAT32": False, **head._tile(512)[0]}, head._tile(512)[1]
    ),
}


def type_of(name: str, cache: str) -> str:
    """The Triton type of a kernel's argument, by its name."""
    if name in FLOATS:
        return "fp32"
    if name in INTEGERS:
        return "i32"
    if name in ("keys", "values", "head"):
        return f"*{cache}"
    return next((f"*{kind}" for kind, names in POINTERS.items() if name in names), "*fp32")


def stack_bytes(cubin: bytes) -> int:
    """Return the bytes of a thread's stack, where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout))


def facts_of(case: Case | Callable[[int], Case], target: int) -> dict[str, Any]:
    """Compile a case and look at what came out."""
    if not isinstance(case, Case):
        case = case(target)
    names = case.kernel.arg_names
    signature = {name: type_of(name, case.cache) for name in names} | case.types
    signature |= dict.fromkeys(case.constants, "constexpr")
    # What a launch finds out about its arguments: of the sizes of the 2B model all are such.
    even = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in DIVISIBLE]
    attributes = {(index,): [["tt.divisibility", 16]] for index in even}
    built = triton.compile(
        ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes),
        target=GPUTarget("cuda", target, 32),
        options={
            "num_warps": case.warps,
            "enable_fp_fusion": case.fusion,
        },
    )
    ptx = built.asm["ptx"]
    products = re.findall(r"\n\s*(?:@\S+\s+)?(w?g?mma\S+)", ptx)
    return {
        "target": target,
        "shared_bytes": built.metadata.shared,
        "stack_bytes": stack_bytes(built.asm["cubin"]),
        "int8_products": sum(".s8.s8" in each for each in products),
        "int8_warpgroup_products": sum(
            ".s8.s8" in each and each.startswith("wgmma") for each in products
        ),
        "bf16_products": sum(".bf16.bf16" in each for each in products),
        "fused_multiply_adds": len(re.findall(r"\bfma\.rn\.f(?:32|64)", ptx)),
        "exact_divisions": len(re.findall(r"\bdiv\.rn\.f(?:32|64)", ptx)),
        "doubles": re.findall(r"0d([0-9A-F]{16})", ptx),
        "approximate_divisions": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
    }


if __name__ == "__main__":
    print(
        json.dumps(
            {
                f"{name} sm_{target}": facts_of(case, int(target))
                for name, case in CASES.items()
                for target in sys.argv[1:]
            }
        )
    )
