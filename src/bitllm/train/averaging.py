"""An exponential moving average of the weights, which is what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every step.

    Early on the decay is (1 + step) / (10 + step), so that the start is soon forgotten.

    Args:
        model: whose trained weights are averaged.
        decay: 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average = {n: p.detach().clone() for n, p in self._trained.items()}

    def update(self, step: int) -> None:
        """Take in the weights after the step of this number, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the model for a while."""
        kept = {name: p.detach().clone() for name, p in self._trained.items()}
        self.apply()
        try:
            yield
        finally:
            _copy(kept, self._trained)

    def apply(self) -> None:
        """Put the average into the model for good."""
        _copy(self._average, self._trained)

    def state(self) -> dict[str, Tensor]:
        """Return what `load` takes."""
        return dict(self._average)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        _copy(state, self._average)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
