"""The work that is timed: prompts and decoded tokens as batches of a decoder, without an engine.

Sequence i owns the KV blocks i * blocks .. (i + 1) * blocks - 1. Positions are simply overwritten:
what stands in the cache has no influence on speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitllm.backends.base import KV_BLOCK_SIZE, Batch, Decoder, OutputKind, SamplePlan

__all__ = ["Run", "Sequences", "prompt_ids"]

Run = tuple[int, int, Sequence[int]]
"""A sequence, the first position, and the token ids there."""


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
        adapter: slot of the adapter that all of them use, -1 = none.
    """

    decoder: Decoder
    count: int
    context: int
    chunk: int
    adapter: int = -1

    @property
    def blocks(self) -> int:
        """KV blocks of a sequence."""
        return -(-self.context // KV_BLOCK_SIZE)

    def batch(
        self, runs: Sequence[Run], kind: int = OutputKind.SAMPLE, *, end: int | None = None
    ) -> Batch:
        """Return a batch in which the last row of each run asks for an output of `kind`.

        Args:
            runs: (sequence, first position, token ids) of each.
            kind: what is asked for.
            end: ask only in runs that go on to this position; None = in all.
        """
        offsets = np.cumsum([0, *(len(run[2]) for run in runs)], dtype=np.int32)
        asks = [end in (None, first + len(ids)) for _, first, ids in runs]
        rows = offsets[1:][asks] - 1
        tables = [np.arange(self.blocks) + index * self.blocks for index, _, _ in runs]
        places = [np.arange(first, first + len(ids)) for _, first, ids in runs]
        return Batch(
            token_ids=np.array([token for run in runs for token in run[2]], np.int32),
            positions=np.concatenate(places).astype(np.int32),
            run_offsets=offsets,
            block_tables=np.array(tables, np.int32),
            adapter_slots=np.full(len(runs), self.adapter, np.int32),
            output_rows=rows,
            output_kinds=np.full(len(rows), kind, np.uint8),
            plan=SamplePlan.greedy(len(rows) if kind == OutputKind.SAMPLE else 0),
        )

    def prefill(self, tokens: int, count: int | None = None) -> None:
        """Compute a prompt of so many tokens in each of the first `count` sequences.

        Steps are as full as `chunk` allows; the last row of a prompt draws a token.
        """
        for step in self._steps(tokens, self.count if count is None else count):
            self.decoder.forward(self.batch(step, end=tokens))

    def prefill_steps(self, tokens: int) -> int:
        """Return in how many steps `prefill` computes its prompts."""
        return len(self._steps(tokens, self.count))

    def _steps(self, tokens: int, count: int) -> list[list[Run]]:
        """Return the runs of each step: pieces of prompts, together at most `chunk` rows."""
        ids = prompt_ids(tokens, self.decoder.spec.vocab_size)
        pieces = [
            (index, start, ids[start : start + self.chunk])
            for index in range(count)
            for start in range(0, tokens, self.chunk)
        ]
        steps: list[list[Run]] = []
        for piece in pieces:
            # Never two pieces of one sequence: all but its last fill a step.
            rows = sum(len(ids) for _, _, ids in steps[-1]) if steps else self.chunk
            if rows + len(piece[2]) > self.chunk:
                steps.append([])
            steps[-1].append(piece)
        return steps

    def decode(self, depth: int, tokens: int) -> None:
        """Draw so many tokens in each sequence, one after another, the first at `depth`."""
        ids = [3] * self.count
        for position in range(depth, depth + tokens):
            runs: list[Run] = [(index, position, [ids[index]]) for index in range(self.count)]
            ids = self.decoder.forward(self.batch(runs)).sampled.tolist()

    def share_prompt(self) -> None:
        """Copy the keys and values of the first sequence into all others."""
        pairs = [
            (block, index * self.blocks + block)
            for index in range(1, self.count)
            for block in range(self.blocks)
        ]
        self.decoder.copy_blocks(np.array(pairs, np.int32).reshape(-1, 2))
