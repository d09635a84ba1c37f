"""A kernel in Metal's language, built by MLX when it is first run.

The texts are bodies of functions: MLX writes the signature, with what the text names. They keep to
what C++ knows too, beside Metal's own functions, so that tests compile the very same text for a CPU
(tests/metal_on_cpu.h). A small input comes in another address space than a large one: texts index
arrays and name no pointer to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

__all__ = ["MetalKernel"]

Shape = tuple[int, ...]

_HEADER = """
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;
"""


@dataclass(frozen=True)
class MetalKernel:
    """One kernel.

    Attributes:
        name: of the function.
        inputs, outputs: names of the arrays, in order.
        source: the body.
        threads: of a thread group.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    threads: int

    @cached_property
    def _built(self) -> Any:
        return mx.fast.metal_kernel(
            name=f"bitllm_{self.name}",
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.source,
            header=_HEADER,
        )

    def __call__(
        self,
        arrays: Sequence[mx.array],
        *,
        constants: dict[str, int],
        groups: tuple[int, int],
        results: Sequence[tuple[Shape, mx.Dtype]],
    ) -> list[mx.array]:
        """Run it.

        Args:
            arrays: the inputs.
            constants: whole numbers that the text is compiled with.
            groups: thread groups, (x, y).
            results: shape and dtype of each output.
        """
        found: list[mx.array] = self._built(
            inputs=list(arrays),
            template=list(constants.items()),
            grid=(groups[0] * self.threads, groups[1], 1),
            threadgroup=(self.threads, 1, 1),
            output_shapes=[shape for shape, _ in results],
            output_dtypes=[dtype for _, dtype in results],
        )
        return found
