"""Kernels written for Metal, compiled by g++ and run on a CPU: the same text, thread by thread."""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bitllm.backends.mlx.kernels.launch import MetalKernel

HEADER = Path(__file__).with_name("metal_on_cpu.h")
C_TYPES = {np.dtype(np.uint32): "uint", np.dtype(np.float32): "float"}
PROGRAM = """
#include "{header}"
{constants}
static void kernel({parameters}, uint3 threadgroup_position_in_grid,
                   uint3 thread_position_in_threadgroup) {{
    [[maybe_unused]] const uint thread_index_in_simdgroup = thread_position_in_threadgroup.x % 32;
    [[maybe_unused]] const uint simdgroup_index_in_threadgroup =
        thread_position_in_threadgroup.x / 32;
    {source}
}}
extern "C" void run(uint groups_x, uint groups_y, {parameters}) {{
    for (uint group_y = 0; group_y < groups_y; ++group_y)
        for (uint group_x = 0; group_x < groups_x; ++group_x)
            run_group({threads}, [&](uint thread) {{
                kernel({arguments}, uint3{{group_x, group_y, 0}}, uint3{{thread, 0, 0}});
            }});
}}
"""


class MetalOnCpu:
    """Stands in for `MetalKernel.__call__`; counts what was run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._built: dict[str, Any] = {}
        self.runs: list[str] = []

    def __call__(
        self,
        kernel: MetalKernel,
        arrays: Sequence[mx.array],
        *,
        constants: dict[str, int],
        groups: tuple[int, int],
        results: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        self.runs.append(kernel.name)
        inputs = [np.ascontiguousarray(np.array(array)) for array in arrays]
        # What a kernel leaves out shows: NaN, or a number that none of them gives.
        types = {mx.uint32: np.uint32, mx.float32: np.float32}
        outputs = [
            np.full(shape, 0xDEADBEEF if dtype == mx.uint32 else np.nan, types[dtype])
            for shape, dtype in results
        ]
        shapes = [np.array(array.shape, np.int32) for array in inputs]
        run = self._function(kernel, constants, [*inputs, *outputs])
        run(*groups, *(ctypes.c_void_p(a.ctypes.data) for a in (*inputs, *outputs, *shapes)))
        return [mx.array(output) for output in outputs]

    def _function(
        self, kernel: MetalKernel, constants: dict[str, int], arrays: list[np.ndarray]
    ) -> Any:
        names = [*kernel.inputs, *kernel.outputs]
        parameters = [
            f"{'const ' if name in kernel.inputs else ''}{C_TYPES[array.dtype]}* {name}"
            for name, array in zip(names, arrays, strict=True)
        ]
        parameters += [f"[[maybe_unused]] const int* {name}_shape" for name in kernel.inputs]
        text = PROGRAM.format(
            header=HEADER,
            constants="\n".join(f"constexpr int {name} = {n};" for name, n in constants.items()),
            parameters=", ".join(parameters),
            arguments=", ".join([*names, *(f"{name}_shape" for name in kernel.inputs)]),
            source=kernel.source,
            threads=kernel.threads,
        )
        if text not in self._built:
            self._built[text] = self._compile(text)
        return self._built[text]

    def _compile(self, text: str) -> Any:
        source = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
        source.write_text(text)
        library = source.with_suffix(".so")
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC"]
        flags += ["-shared", "-Wno-unknown-pragmas"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library)).run
