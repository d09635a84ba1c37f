"""Several runs of the same thing, and the two numbers that are told about them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Spread", "repeat", "seconds"]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some samples, durations or speeds, and (max - min) / median."""

    median: float
    spread: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Sum up at least one sample."""
        median = statistics.median(samples)
        return Spread(median, (max(samples) - min(samples)) / median if median > 0 else 0.0)


def seconds(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def repeat(action: Callable[[], object], times: int) -> Spread:
    """Time `action` so often, after one run that is not counted."""
    action()
    return Spread.of([seconds(action) for _ in range(times)])
