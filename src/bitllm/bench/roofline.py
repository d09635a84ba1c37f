"""What the machine can do at most, measured, and how near to it a figure is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bitllm.backends.cpu import available_memory, peak_multiplications, read_bandwidth
from bitllm.bench.needs import Need

__all__ = ["TOLERANCE", "Limits", "Rates"]

TOLERANCE = 0.03
"""A figure may be so much above a limit: clocks change between two measurements."""

LARGEST_BUFFER = 1 << 30
"""Bytes read to measure bandwidth are those of the model, and at most this many."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What some threads reach on this machine.

    Attributes:
        bandwidth: bytes a second, read from a buffer of `buffer` bytes.
        multiplications: 8-bit multiplications a second in the kernel set's densest loop; those of
            MLX's own matrix product on the device "mlx".
        buffer: bytes of the buffer: of the weights, so that a model that fits into a cache is
            compared with that cache.
        threads: how many.
    """

    bandwidth: float
    multiplications: float
    buffer: int
    threads: int

    @staticmethod
    def measure(isa: str, threads: int, nbytes: int) -> Limits:
        """Measure with a buffer of about `nbytes` bytes."""
        spare = available_memory() // 4 or LARGEST_BUFFER
        buffer = min(nbytes, LARGEST_BUFFER, spare)
        return Limits(
            read_bandwidth(threads, buffer), peak_multiplications(isa, threads), buffer, threads
        )

    @staticmethod
    def of_mlx(nbytes: int) -> Limits:
        """Measure what MLX reaches, with a buffer of about `nbytes` bytes."""
        from bitllm.backends.mlx import device

        buffer = min(nbytes, LARGEST_BUFFER)
        return Limits(device.read_bandwidth(buffer), device.peak_multiplications(), buffer, 1)

    def best(self, other: Limits) -> Limits:
        """Return the higher figures of two measurements of the same thing."""
        return Limits(
            max(self.bandwidth, other.bandwidth),
            max(self.multiplications, other.multiplications),
            self.buffer,
            self.threads,
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast something was, and which part of the limits that is.

    Attributes:
        bytes_per_s: bytes a second.
        bandwidth_fraction: of the read bandwidth.
        ternary_per_s: multiplications of int8 with ternary codes a second.
        peak_fraction: of the int8 peak.
    """

    bytes_per_s: float
    bandwidth_fraction: float
    ternary_per_s: float
    peak_fraction: float

    @staticmethod
    def of(need: Need, seconds: float, limits: Limits) -> Rates:
        """Return the rates of work that took so many seconds."""
        read, done = need.nbytes / seconds, need.ternary / seconds
        return Rates(read, read / limits.bandwidth, done, done / limits.multiplications)

    def impossible(self) -> Iterable[str]:
        """Say what is above its limit: then something was measured or counted wrongly."""
        for name, fraction in (
            ("read bandwidth", self.bandwidth_fraction),
            ("multiplication peak", self.peak_fraction),
        ):
            if fraction > 1 + TOLERANCE:
                yield f"{fraction:.0%} of the {name}"
