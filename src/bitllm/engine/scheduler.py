"""Which tokens of which sequences the next step computes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bitllm.engine.blocks import BlockPool
from bitllm.engine.sequence import Sequence

__all__ = ["Run", "Scheduler"]


@dataclass(frozen=True, slots=True)
class Run:
    """The next `length` tokens of a sequence."""

    sequence: Sequence
    length: int

    @property
    def samples(self) -> bool:
        """Whether this run ends with the last known token, so that the next is drawn."""
        return self.sequence.draws and self.length == self.sequence.pending

    @property
    def read_rows(self) -> range:
        """Positions in this run whose rows the request wants to have read."""
        start, rows = self.sequence.computed, self.sequence.rows
        return range(0) if rows is None else rows.wanted(start, start + self.length)


class Scheduler:
    """First come, first served, in steps of at most `max_batch_tokens` token rows.

    A step holds the next token of every sequence that decodes, then the prompts still to be read,
    the last of them cut to the rows that are left. Blocks are taken when a run needs them; when
    there are none left, the youngest sequence gives all of its back and is computed again later.

    Args:
        pool: the KV blocks.
        max_batch_tokens: most rows of a step.
    """

    def __init__(self, pool: BlockPool, max_batch_tokens: int) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence and free its blocks; one that is not here is ignored."""
        if sequence in self._running:
            self._running.remove(sequence)
            self._pool.release(sequence.drop_blocks())
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def restart(self) -> None:
        """Take all blocks back, to compute every sequence again: after a step that broke off."""
        for sequence in reversed(self._running):
            sequence.drop_blocks()
            if not sequence.finished:
                self._waiting.appendleft(sequence)
        self._running.clear()
        self._pool.reset()

    def schedule(self) -> list[Run]:
        """Return the runs of the next step, with blocks for all of their tokens; empty if idle."""
        runs: list[Run] = []
        budget = self._max_batch_tokens
        while len(runs) < len(self._running) and budget > 0:
            sequence = self._running[len(runs)]
            length = sequence.next_length(budget)
            needed = sequence.blocks_for(sequence.computed + length) - len(sequence.block_ids)
            while needed > self._pool.available and self._running[-1] is not sequence:
                self._preempt_youngest()
            if needed > self._pool.available:
                return runs  # the youngest itself waits, and nobody overtakes it
            self._take(sequence, needed)
            runs.append(Run(sequence, length))
            budget -= length
        while self._waiting and budget > 0 and self._fits(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            length = sequence.next_length(budget)
            self._take(sequence, sequence.blocks_for(length))
            runs.append(Run(sequence, length))
            budget -= length
        return runs

    def _fits(self, sequence: Sequence) -> bool:
        # All of its tokens, not just the first piece: else it would soon be sent back again.
        return sequence.blocks_for(len(sequence.token_ids)) <= self._pool.available

    def _take(self, sequence: Sequence, blocks: int) -> None:
        for _ in range(blocks):
            sequence.add_block(self._pool.allocate())

    def _preempt_youngest(self) -> None:
        victim = self._running.pop()
        self._pool.release(victim.drop_blocks())
        self._waiting.appendleft(victim)
