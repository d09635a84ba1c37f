"""What MLX says of the device it runs on: its name, its memory, and how fast it reads that."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import mlx.core as mx

__all__ = [
    "DeviceFacts",
    "available_memory",
    "device_facts",
    "peak_multiplications",
    "read_bandwidth",
]

READINGS = 5
PEAK_SIZE = 2048
"""Rows and columns of the product that tells the peak: enough for every core of a GPU."""


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The device that MLX computes on.

    Attributes:
        version: of MLX.
        name: of the GPU, or of the CPU where there is no Metal.
        metal: whether it is an Apple GPU.
        memory: bytes of the machine, which CPU and GPU share; None = MLX does not say.
        working_set: bytes that Metal recommends to stay within; None without Metal.
        active: bytes of MLX arrays at present.
    """

    version: str
    name: str
    metal: bool
    memory: int | None
    working_set: int | None
    active: int


def device_facts() -> DeviceFacts:
    """Ask MLX about its default device."""
    info = mx.device_info()
    size, limit = (info.get(key) for key in ("memory_size", "max_recommended_working_set_size"))
    return DeviceFacts(
        version=metadata.version("mlx"),
        name=str(info.get("device_name", "unknown")),
        metal=mx.metal.is_available(),
        memory=None if size is None else int(size),
        working_set=None if limit is None else int(limit),
        active=mx.get_active_memory(),
    )


def available_memory() -> int | None:
    """Return the bytes that Metal's recommended working set still holds; None without Metal.

    Beyond it, macOS takes memory away from the GPU and gives it back, at every step.
    """
    facts = device_facts()
    return None if facts.working_set is None else max(0, facts.working_set - facts.active)


def read_bandwidth(nbytes: int) -> float:
    """Return the bytes a second that MLX reads: looking through a buffer several times.

    Args:
        nbytes: of the buffer.
    """
    buffer = mx.zeros((max(1, nbytes // 4),), mx.int32)
    mx.eval(buffer)
    return float(buffer.nbytes / _fastest(lambda: mx.max(buffer)))


def peak_multiplications() -> float:
    """Return the multiplications a second of MLX's own matrix product.

    In float16 through Metal, whose matrix units know no int8, and in float32 on the CPU.
    """
    size = PEAK_SIZE if mx.metal.is_available() else PEAK_SIZE // 4
    one = mx.ones((size, size), mx.float16 if mx.metal.is_available() else mx.float32)
    mx.eval(one)
    return float(size**3 / _fastest(lambda: one @ one))


def _fastest(compute: Callable[[], mx.array]) -> float:
    """Return the seconds of the fastest of several runs; the first does not count."""
    mx.eval(compute())
    seconds = []
    for _ in range(READINGS):
        start = time.perf_counter()
        mx.eval(compute())
        seconds.append(time.perf_counter() - start)
    return min(seconds)
