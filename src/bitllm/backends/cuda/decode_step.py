"""Decode steps in shapes of a few sizes, each captured once in a CUDA graph and then replayed.

A step of single tokens is filled up to the next number of rows and of KV blocks that there is a
graph for. Rows that fill up read token 0 at position 0 and keep it in a KV block that belongs to no
sequence. All of a step's input goes to the device in one copy, into buffers that the graph knows.
Without a GPU the same function runs on the same buffers, uncaptured.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bitllm.backends.base import KV_BLOCK_SIZE, Batch
from bitllm.backends.cuda.attention import Angles, StepLayout
from bitllm.checkpoint import RopeSpec

__all__ = ["ROWS", "DecodeSteps", "StepRows"]

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Rows of the steps that are captured; larger ones take so long that launches do not count."""

_FEWEST_BLOCKS = 8


@dataclass(frozen=True)
class StepRows:
    """What a step computes for its rows; the next step of the same shape overwrites it.

    Attributes:
        hidden: float32 [rows, hidden], after the final norm.
        logits: float32 [rows, vocab].
        finite: bool [rows], whether the activations were numbers.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    finite: torch.Tensor

    def first(self, count: int) -> StepRows:
        """Return the rows that fill up nothing."""
        return StepRows(self.hidden[:count], self.logits[:count], self.finite[:count])


Compute = Callable[[torch.Tensor, StepLayout, dict[RopeSpec, Angles]], StepRows]


class _Shape:
    """The buffers of steps of one shape, and what computes on them."""

    def __init__(
        self,
        rows: int,
        width: int,
        compute: Compute,
        table: dict[RopeSpec, Angles],
        device: torch.device,
    ) -> None:
        self.rows, self.width = rows, width
        size = rows * (3 + width)
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._compute, self._table = compute, table
        ids, positions, slots = self._device[: 3 * rows].view(3, rows)
        self._ids, self._layout = (
            ids,
            StepLayout(
                slots=slots,
                runs=torch.arange(rows, dtype=torch.int32, device=device),
                positions=positions,
                tables=self._device[3 * rows :].view(rows, width),
                groups=[],
                masks={},
            ),
        )
        self.replay: Callable[[], StepRows] | None = None if on_gpu else self.compute

    def fill(self, batch: Batch, spare_block: int) -> None:
        """Copy a step to the device, the remaining rows in the block that nobody reads."""
        count, host = len(batch.token_ids), self._host.numpy()
        host[:] = 0
        ids, positions, slots = host[: 3 * self.rows].reshape(3, self.rows)
        tables = host[3 * self.rows :].reshape(self.rows, self.width)
        ids[:count], positions[:count] = batch.token_ids, batch.positions
        named = min(self.width, batch.block_tables.shape[1])
        tables[:count, :named] = batch.block_tables[:, :named]
        tables[count:, 0] = spare_block
        blocks = tables[np.arange(self.rows), positions // KV_BLOCK_SIZE]
        slots[:] = blocks * KV_BLOCK_SIZE + positions % KV_BLOCK_SIZE
        self._device.copy_(self._host, non_blocking=True)

    def compute(self) -> StepRows:
        """Compute the step that was filled in."""
        positions = self._layout.positions
        angles = {
            rope: Angles(each.cosine[positions], each.sine[positions])
            for rope, each in self._table.items()
        }
        return self._compute(self._ids, self._layout, angles)


class DecodeSteps:
    """Computes steps in which every run is one token, and every row wants logits.

    Args:
        compute: from token ids int32 [rows], their layout and their angles to the answer; called
            once for each shape where there is a GPU.
        ropes: of the model.
        spare_block: a KV block that belongs to no sequence.
        device: of the decoder.
    """

    def __init__(
        self, compute: Compute, ropes: Collection[RopeSpec], spare_block: int, device: torch.device
    ) -> None:
        self._compute, self._ropes = compute, ropes
        self._spare_block, self._device = spare_block, device
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._tables: dict[int, dict[RopeSpec, Angles]] = {}
        self._pool: Any = None

    def fits(self, batch: Batch) -> bool:
        """Whether a step is one of those."""
        rows = len(batch.token_ids)
        return (
            rows <= ROWS[-1]
            and len(batch.run_offsets) == rows + 1
            and np.array_equal(batch.output_rows, np.arange(rows))
            and bool((batch.output_kinds > 0).all())  # 0 = OutputKind.HIDDEN
        )

    def __call__(self, batch: Batch) -> StepRows:
        """Compute a step that fits."""
        rows = len(batch.token_ids)
        blocks = int(batch.positions.max()) // KV_BLOCK_SIZE + 1
        shape = self._shape(ROWS[bisect.bisect_left(ROWS, rows)], _width(blocks))
        shape.fill(batch, self._spare_block)
        if shape.replay is None:
            shape.replay = self._capture(shape.compute)
        return shape.replay().first(rows)

    def _shape(self, rows: int, width: int) -> _Shape:
        if (rows, width) not in self._shapes:
            if width not in self._tables:
                positions = np.arange(width * KV_BLOCK_SIZE, dtype=np.int32)
                self._tables[width] = {
                    rope: Angles.of(positions, rope, self._device) for rope in self._ropes
                }
            self._shapes[rows, width] = _Shape(
                rows, width, self._compute, self._tables[width], self._device
            )
        return self._shapes[rows, width]

    def _capture(self, compute: Callable[[], StepRows]) -> Callable[[], StepRows]:
        """Record a step whose input is in its buffers; the graphs share their memory."""
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            compute()  # compiles what is not compiled yet
        torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            rows = compute()

        def replay() -> StepRows:
            graph.replay()
            return rows

        return replay


def _width(blocks: int) -> int:
    """Return the table width that a step of so many KV blocks is filled up to: a power of two."""
    return max(_FEWEST_BLOCKS, 1 << (blocks - 1).bit_length())
