"""In what two architectures differ, where numbers count as equal that float32 cannot tell apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from bitllm.checkpoint import ModelSpec

__all__ = ["spec_differences"]


def spec_differences(spec: ModelSpec, other: ModelSpec) -> list[str]:
    """Return the paths of the fields that differ, `layers[3].rope.theta` for example.

    The architecture's name is no part of the computation and is left out; GGUF files hold epsilons
    and factors in float32.
    """
    renamed = dataclasses.replace(other, architecture=spec.architecture)
    return list(_differences("", spec, renamed))


def _differences(path: str, one: Any, other: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        for field in dataclasses.fields(one):
            name = f"{path}.{field.name}".removeprefix(".")
            yield from _differences(name, getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for index, (mine, others) in enumerate(zip(one, other, strict=True)):
            yield from _differences(f"{path}[{index}]", mine, others)
    elif isinstance(one, float) and isinstance(other, float):
        if np.float32(one) != np.float32(other):
            yield path
    elif one != other:
        yield path
