"""What the engine holds and has done, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitllm.backends.base import KV_BLOCK_SIZE
from bitllm.engine.blocks import BlockPool
from bitllm.engine.scheduler import Run, Scheduler

__all__ = ["EngineStats", "StepCounts", "take_stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The state of an engine at one moment, and its counts since it was made.

    Attributes:
        blocks: KV blocks in all, of 32 positions each.
        used_blocks: those that sequences hold.
        cached_blocks: those that nobody holds, kept for prompts that begin alike; they are given
            out like free ones when there are no free ones.
        free_blocks: those with nothing in them that is of use.
        unfilled_positions: positions of used blocks that hold no key and value yet.
        running: sequences that take part in steps.
        waiting: requests that have not been let in yet, or had to give their blocks back.
        steps: steps of the decoder.
        prefilled_tokens: tokens computed that were known: of prompts, and of sequences that had to
            give their blocks back.
        decoded_tokens: tokens computed that the model had drawn in the step before.
        drafted_tokens: guesses at coming tokens that were computed along with a known one.
        accepted_tokens: those that were right, and so saved a step each.
        cached_tokens: tokens found in the cache instead of being computed.
        preemptions: how often a sequence had to give its blocks back.
    """

    blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    unfilled_positions: int
    running: int
    waiting: int
    steps: int
    prefilled_tokens: int
    decoded_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    cached_tokens: int
    preemptions: int

    @property
    def hit_rate(self) -> float:
        """The part of all known tokens that was found in the cache, 0 to 1."""
        known = self.cached_tokens + self.prefilled_tokens
        return self.cached_tokens / known if known else 0.0

    @property
    def acceptance_rate(self) -> float:
        """The part of the guesses that was right, 0 to 1."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else 0.0

    @property
    def fragmentation(self) -> float:
        """The part of the positions of used blocks that is not filled, 0 to 1."""
        positions = self.used_blocks * KV_BLOCK_SIZE
        return self.unfilled_positions / positions if positions else 0.0


@dataclass(slots=True)
class StepCounts:
    """Counts of steps and of the tokens computed in them."""

    steps: int = 0
    prefilled: int = 0
    decoded: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, runs: Sequence[Run]) -> None:
        """Add a step that has been computed, before its runs are noted anywhere else."""
        self.steps += 1
        for run in runs:
            self.drafted += len(run.draft)
            if run.length == 1 and run.samples and run.sequence.generated > 0:
                self.decoded += 1
            else:
                self.prefilled += run.length


def take_stats(pool: BlockPool, scheduler: Scheduler, counts: StepCounts) -> EngineStats:
    """Return the figures of this moment.

    No lock is taken: beside a step that is under way, each figure is of before or after it.
    """
    running = scheduler.running
    # Blocks are filled in order, so only the last one of a sequence can have room; choices of one
    # prompt may share it.
    unfilled: dict[int, int] = {}
    for sequence in running:
        blocks, computed = sequence.block_ids, sequence.computed
        if blocks:
            unfilled[blocks[-1]] = max(0, len(blocks) * KV_BLOCK_SIZE - computed)
    cached, available = pool.idle, pool.available
    return EngineStats(
        blocks=pool.capacity,
        used_blocks=max(0, pool.capacity - available),
        cached_blocks=cached,
        free_blocks=max(0, available - cached),
        unfilled_positions=sum(unfilled.values()),
        running=len(running),
        waiting=len(scheduler.waiting),
        steps=counts.steps,
        prefilled_tokens=counts.prefilled,
        decoded_tokens=counts.decoded,
        drafted_tokens=counts.drafted,
        accepted_tokens=counts.accepted,
        cached_tokens=scheduler.cached_tokens,
        preemptions=scheduler.preemptions,
    )
