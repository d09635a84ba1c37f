"""Noticing that a run goes wrong: a loss that is no number, or one that jumps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

__all__ = ["AnomalyDetector"]

_REMEMBERED, _FEWEST = 50, 10


class AnomalyDetector:
    """Compares the loss of each step with the median of those before.

    Args:
        spike_factor: a loss so many times the median is a jump.
    """

    def __init__(self, spike_factor: float) -> None:
        self._factor = spike_factor
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)

    def check(self, loss: float, norm: float) -> str | None:
        """Take in the loss and gradient norm of a step; return what is wrong, or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        usual = statistics.median(self._losses) if len(self._losses) >= _FEWEST else math.inf
        if loss > self._factor * usual:
            return f"the loss jumped to {loss:.4f}, from {usual:.4f}"
        self._losses.append(loss)
        return None

    def state(self) -> list[float]:
        """Return what `load` takes."""
        return list(self._losses)

    def load(self, state: Sequence[float]) -> None:
        """Go on from a state."""
        self._losses = deque(state, maxlen=_REMEMBERED)
