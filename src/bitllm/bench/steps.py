"""The work that is timed: prompts and decoded tokens as batches of a decoder, without an engine.

Sequence i owns the KV blocks i * blocks .. (i + 1) * blocks - 1. Positions are simply overwritten:
what stands in the cache has no influence on speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import KV_BLOCK_SIZE, Batch, Decoder, OutputKind, SamplePlan

__all__ = ["Sequences", "prompt_ids"]

I32 = npt.NDArray[np.int32]


def prompt_ids(count: int, vocab_size: int) -> list[int]:
    """Return some token ids, the same at each call."""
    return [(7919 * index + 3) % vocab_size for index in range(count)]


@dataclass(frozen=True, slots=True)
class Sequences:
    """Some sequences that a decoder computes side by side.

    Attributes:
        decoder: a loaded model.
        count: how many sequences.
        context: positions of each; the KV cache must hold `count` times as many, in whole blocks.
        chunk: most token rows of a step.
    """

    decoder: Decoder
    count: int
    context: int
    chunk: int

    @property
    def blocks(self) -> int:
        """KV blocks of a sequence."""
        return -(-self.context // KV_BLOCK_SIZE)

    def batch(
        self,
        runs: Sequence[tuple[int, int, Sequence[int]]],
        kind: int | None = OutputKind.SAMPLE,
    ) -> Batch:
        """Return a batch; each run is (sequence, first position, token ids).

        The last row of each run asks for an output of `kind`, or for none.
        """
        ids = [token for _, _, tokens in runs for token in tokens]
        offsets = np.cumsum([0, *(len(tokens) for _, _, tokens in runs)], dtype=np.int32)
        rows = offsets[1:] - 1 if kind is not None else offsets[:0]
        tables = [np.arange(self.blocks) + index * self.blocks for index, _, _ in runs]
        places = [np.arange(first, first + len(tokens)) for _, first, tokens in runs]
        return Batch(
            token_ids=np.array(ids, np.int32),
            positions=np.concatenate(places).astype(np.int32),
            run_offsets=offsets,
            block_tables=np.array(tables, np.int32),
            adapter_slots=np.full(len(runs), -1, np.int32),
            output_rows=rows.astype(np.int32),
            output_kinds=np.full(len(rows), kind or 0, np.uint8),
            plan=SamplePlan.greedy(len(rows) if kind == OutputKind.SAMPLE else 0),
        )

    def prefill(self, tokens: int, count: int | None = None) -> None:
        """Compute a prompt of so many tokens in each of the first `count` sequences.

        Steps are as full as `chunk` allows; the last row of each prompt draws a token.
        """
        ids = prompt_ids(tokens, self.decoder.spec.vocab_size)
        pieces = [
            (index, start, ids[start : start + self.chunk])
            for index in range(self.count if count is None else count)
            for start in range(0, tokens, self.chunk)
        ]
        for step in _filled(pieces, self.chunk):
            self.decoder.forward(self.batch(step))

    def decode(self, depth: int, tokens: int) -> None:
        """Draw so many tokens in each sequence, one after another, the first at `depth`."""
        ids = [3] * self.count
        for position in range(depth, depth + tokens):
            runs = [(index, position, [ids[index]]) for index in range(self.count)]
            ids = self.decoder.forward(self.batch(runs)).sampled.tolist()

    def share_prompt(self) -> None:
        """Copy the keys and values of the first sequence into all others."""
        pairs = [
            (block, index * self.blocks + block)
            for index in range(1, self.count)
            for block in range(self.blocks)
        ]
        self.decoder.copy_blocks(np.array(pairs, np.int32).reshape(-1, 2))


def _filled(
    pieces: list[tuple[int, int, list[int]]], chunk: int
) -> list[list[tuple[int, int, list[int]]]]:
    """Put pieces of prompts together into steps of at most `chunk` rows, in order."""
    steps: list[list[tuple[int, int, list[int]]]] = []
    room = 0
    for piece in pieces:
        # Two pieces of one sequence in a step would be two runs that write the same blocks.
        again = bool(steps) and any(piece[0] == other[0] for other in steps[-1])
        if len(piece[2]) > room or again:
            steps.append([])
            room = chunk
        steps[-1].append(piece)
        room -= len(piece[2])
    return steps
