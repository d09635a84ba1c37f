"""How far rounded weights are from the dense ones: sums over weights, taken in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Distortion"]

F32 = npt.NDArray[np.float32]


@dataclass(slots=True)
class Distortion:
    """Sums over the weights added so far; w is a weight and v what it was rounded to.

    Attributes:
        count: weights.
        zeros: weights rounded to 0.
        signal: sum of w^2.
        power: sum of v^2.
        product: sum of w v.
        noise: sum of (w - v)^2.
    """

    count: int = 0
    zeros: int = 0
    signal: float = 0.0
    power: float = 0.0
    product: float = 0.0
    noise: float = 0.0

    def add(self, weights: F32, rounded: F32) -> None:
        """Add weights and what they were rounded to, float32 of one shape."""
        w, v = weights.astype(np.float64).ravel(), rounded.astype(np.float64).ravel()
        self.count += w.size
        self.zeros += int(np.count_nonzero(v == 0))
        self.signal += float(w @ w)
        self.power += float(v @ v)
        self.product += float(w @ v)
        self.noise += float((w - v) @ (w - v))

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self.noise / self.count

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, 10 log10(sum w^2 / sum (w - v)^2), in dB."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both, 1 for the same direction; 0 where one is zero."""
        lengths = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.product / lengths if lengths else 0.0

    @property
    def zero_fraction(self) -> float:
        """Part of the weights that were rounded to 0."""
        return self.zeros / self.count
