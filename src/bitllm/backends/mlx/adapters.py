"""Low-rank adapters in MLX: what some rows of a step have added to the outputs of linears."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends.base import Batch
from bitllm.backends.mlx.tensors import to_mlx
from bitllm.checkpoint import ModelSpec
from bitllm.errors import ConfigError

__all__ = ["Adapted", "AdapterSlots"]


@dataclass(frozen=True)
class Update:
    """B (A x) * scale of one linear; A [rank, in] and B [out, rank] in the dtype of the file."""

    a: mx.array
    b: mx.array
    scale: float

    @classmethod
    def of(cls, update: LowRankUpdate) -> Update:
        """Copy the matrices."""
        a, b = to_mlx(update.a), to_mlx(update.b)
        mx.eval(a, b)
        return cls(a, b, update.scale)

    def __call__(self, x: mx.array) -> mx.array:
        """Return what is added for float32 [tokens, in], float32 [tokens, out]."""
        low = x @ self.a.astype(mx.float32).T
        return (low @ self.b.astype(mx.float32).T) * self.scale


@dataclass(frozen=True)
class Adapted:
    """Token rows of a step, int32 [n], and the updates of their adapter by the linear's name."""

    rows: mx.array
    updates: dict[str, Update]

    def add_to(self, y: mx.array, x: mx.array, name: str) -> mx.array:
        """Return the outputs `y` of the linear called `name` with what its inputs `x` add."""
        update = self.updates.get(name)
        return y if update is None else y.at[self.rows].add(update(x[self.rows]))


class AdapterSlots:
    """The adapters of a decoder, each in its slot."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[str, Update]] = {}

    @property
    def used(self) -> set[int]:
        """Slots that hold an adapter."""
        return set(self._slots)

    def load(self, adapter: Adapter, spec: ModelSpec) -> int:
        """Copy an adapter into the first free slot.

        Raises:
            TensorShapeError: it was made for another model.
        """
        adapter.check(spec)
        slot = next(slot for slot in itertools.count() if slot not in self._slots)
        self._slots[slot] = {name: Update.of(each) for name, each in adapter.updates.items()}
        return slot

    def unload(self, slot: int) -> None:
        """Free an adapter.

        Raises:
            ConfigError: there is none in this slot.
        """
        if self._slots.pop(slot, None) is None:
            raise ConfigError(f"adapter slot {slot} is empty")

    def of_step(self, batch: Batch) -> list[Adapted]:
        """Return the rows of each adapter that the step uses."""
        slots = np.repeat(batch.adapter_slots, np.diff(batch.run_offsets))
        return [
            Adapted(mx.array(np.flatnonzero(slots == slot).astype(np.int32)), self._slots[slot])
            for slot in np.unique(slots).tolist()
            if slot >= 0
        ]
