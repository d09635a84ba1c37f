"""Which tokens of which sequences the next step computes."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace
from operator import attrgetter

from bitllm.backends.base import KV_BLOCK_SIZE
from bitllm.engine.blocks import BlockPool
from bitllm.engine.sequence import Sequence

__all__ = ["PLACES_PER_PRIORITY", "Run", "Scheduler"]

PLACES_PER_PRIORITY = 100
"""How many places in the queue one step of priority is worth."""

LOOK_AHEAD = 32
"""How many of those that wait are looked at in a step."""

_by_rank = attrgetter("rank")


@dataclass(slots=True)  # not frozen: one is made for each token
class Run:
    """The next `length` tokens of a sequence, and guesses at those after them.

    Attributes:
        sequence: whose they are.
        length: how many.
        copy: (source, destination) of a KV block to copy before the step, for the first of them
            goes into a block that others read.
        draft: tokens that may come after the last known one; only where the run samples. The row
            of each draws the token after it, which counts if all guesses before it are right.
    """

    sequence: Sequence
    length: int
    copy: tuple[int, int] | None = None
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position after the last row."""
        return self.sequence.computed + self.length + len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        """The tokens of all rows."""
        start = self.sequence.computed
        return [*self.sequence.token_ids[start : start + self.length], *self.draft]

    @property
    def samples(self) -> bool:
        """Whether this run ends with the last known token, so that the next is drawn."""
        return self.sequence.draws and self.length == self.sequence.pending

    @property
    def decodes(self) -> bool:
        """Whether this is the drawn token of a sequence that writes on, for itself alone."""
        sequence = self.sequence
        known = len(sequence.token_ids)
        return (
            self.length == 1
            and known - sequence.computed == 1
            and known > len(sequence.request.prompt_ids)
            and not sequence.followers
            and (sequence.rows is None or sequence.rows.complete)
        )

    @property
    def read_rows(self) -> range:
        """Positions in this run whose rows the request wants to have read."""
        start, rows = self.sequence.computed, self.sequence.rows
        return range(0) if rows is None else rows.wanted(start, start + self.length)

    @property
    def drawers(self) -> list[Sequence]:
        """The sequences that draw their next token from the last row of this run."""
        return [self.sequence, *self.sequence.followers] if self.samples else []


class Scheduler:
    """By rank, in steps of at most `max_batch_tokens` token rows.

    The rank of a request is its number in order of arrival plus `PLACES_PER_PRIORITY` for each step
    of priority. It never changes, so a request is overtaken by finitely many later ones, and each
    of those ends: none starves.

    A step holds the next token of every sequence that writes, then prompts still to be read. A
    prompt too long for the step leaves up to half of the rows to shorter ones behind it that fit
    whole, so that a question does not wait for a book. Blocks are taken when a run needs them. Who
    finds none takes those of the sequence of the highest rank, which is computed again later; a
    request that waits does so too, but only to those behind it.

    Args:
        pool: the KV blocks.
        max_batch_tokens: most rows of a step.
        prefix_cache: keep full blocks for sequences that begin with the same tokens.

    Attributes:
        preemptions: how often a sequence had to give its blocks back.
        cached_tokens: tokens that were found in the cache instead of being computed.
    """

    def __init__(
        self, pool: BlockPool, max_batch_tokens: int, *, prefix_cache: bool = True
    ) -> None:
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._prefix_cache = prefix_cache
        self._arrivals = 0
        self._waiting: list[Sequence] = []  # both by rank
        self._running: list[Sequence] = []
        self.preemptions = 0
        self.cached_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def waiting(self) -> list[Sequence]:
        """The sequences that wait to be let in, by rank."""
        return list(self._waiting)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have been let in, by rank."""
        return list(self._running)

    def add(self, *choices: Sequence) -> None:
        """Queue a request: the first of its choices reads the prompt, for all of them."""
        leader, *followers = choices
        rank = self._arrivals + PLACES_PER_PRIORITY * leader.request.priority
        for sequence in choices:
            sequence.rank = (rank, self._arrivals, sequence.choice)
        self._arrivals += 1
        _lead(leader, followers)
        insort(self._waiting, leader, key=_by_rank)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence again that was removed, at the rank it had."""
        insort(self._waiting, sequence, key=_by_rank)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence and free its blocks; one that is not here is ignored."""
        if sequence.leader is not None:
            _leave(sequence)
            return
        for here in (self._running, self._waiting):
            if sequence in here:
                self._bequeath(sequence)
                here.remove(sequence)
                self._pool.release(sequence.drop_blocks())

    def _bequeath(self, sequence: Sequence) -> None:
        """Let the first of those who relied on this sequence read the prompt in its place."""
        if sequence.followers:
            heir, *others = sequence.followers
            insort(self._waiting, heir, key=_by_rank)
            _lead(heir, others)
            sequence.followers = []

    def restart(self) -> None:
        """Take all blocks back, to compute every sequence again: after a change that broke off.

        It may have broken off anywhere, here too: a sequence then stands in two places, for it
        enters one before it leaves the other.
        """
        for sequence in dict.fromkeys([*self._running, *self._waiting]):
            sequence.restore()
            sequence.drop_blocks()
            _leave(sequence)
            sequence.followers = [each for each in sequence.followers if each.leader is sequence]
            if sequence.finished:
                self._bequeath(sequence)
        unique = dict.fromkeys([*self._running, *self._waiting])
        self._waiting = sorted((each for each in unique if not each.finished), key=_by_rank)
        self._running = []
        self._pool.reset()

    def schedule(self) -> list[Run]:
        """Return the runs of the next step, with blocks for all of their tokens; empty if idle."""
        lengths = self._divide_rows()
        runs = []
        for sequence in self._running:  # grows shorter from its end when blocks run out
            length = lengths.get(sequence, 0)
            if length > 1:
                length = sequence.next_length(length)
            if not length:
                continue
            if self._may_write(sequence, length):
                runs.append(Run(sequence, length))
            elif self._make_room(sequence, length):
                runs.append(Run(sequence, length, self._take_blocks(sequence, length)))
        return runs

    def advance(self, run: Run) -> None:
        """Note that a run has been computed."""
        sequence = run.sequence
        start = sequence.computed
        sequence.computed = end = start + run.length
        if self._prefix_cache and end // KV_BLOCK_SIZE > start // KV_BLOCK_SIZE:
            for index in range(start // KV_BLOCK_SIZE, end // KV_BLOCK_SIZE):
                self._pool.keep(sequence.block_ids[index], sequence.block_key(index))

    def lengthen(self, run: Run, draft: Ordered[int]) -> Run:
        """Return the run with as many guesses as there are blocks for; nobody is preempted."""
        sequence, end = run.sequence, run.sequence.computed + run.length
        room = (len(sequence.block_ids) + self._pool.available) * KV_BLOCK_SIZE - end
        longer = replace(run, draft=tuple(draft[:room]))
        while len(sequence.block_ids) < sequence.blocks_for(longer.end):
            sequence.add_block(self._pool.allocate())
        return longer

    def shorten(self, sequence: Sequence) -> None:
        """Take the blocks back that only guesses went to, so that they lie idle with nobody."""
        while len(sequence.block_ids) > sequence.blocks_for(len(sequence.token_ids)):
            self._pool.release([sequence.drop_last_block()])

    def fork(self, leader: Sequence) -> None:
        """Let those who relied on this sequence go on by themselves, from the prompt it has read.

        Their blocks are the same until they write to them.
        """
        for follower in tuple(leader.followers):
            insort(self._running, follower, key=_by_rank)
            self._pool.share(leader.block_ids)
            follower.follow(leader)
            _leave(follower)

    # --- rows -----------------------------------------------------------------------------------

    def _divide_rows(self) -> dict[Sequence, int]:
        """Let waiting sequences in, and return how many tokens each of those that run may do."""
        writing = [each for each in self._running if len(each.token_ids) - each.computed == 1]
        del writing[self._max_batch_tokens :]
        lengths = dict.fromkeys(writing, 1)
        left = self._max_batch_tokens - len(writing)
        if left and (self._waiting or len(writing) < len(self._running)):
            self._divide_among_prompts(lengths, left)
        return lengths

    def _divide_among_prompts(self, lengths: dict[Sequence, int], left: int) -> None:
        too_long: Sequence | None = None
        kept = 0  # rows that are the long prompt's alone
        blocked = False  # one waits for blocks: nobody overtakes it
        reading = [each for each in self._running if each.pending > 1]
        for sequence in heapq.merge(reading, self._waiting[:LOOK_AHEAD], key=_by_rank):
            if left == kept:
                break
            let_in = sequence in self._running
            found = [] if let_in or blocked else self._find_prefix(sequence)
            pending = sequence.pending - min(len(found) * KV_BLOCK_SIZE, sequence.skippable)
            if too_long is not None and pending > left - kept:
                continue
            if not let_in and (blocked or not self._admit(sequence, found)):
                blocked = True
                continue
            if pending > left:
                too_long, kept = sequence, left - left // 2
            else:
                lengths[sequence] = pending
                left -= pending
        if too_long is not None:
            lengths[too_long] = left

    # --- blocks ---------------------------------------------------------------------------------

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the kept blocks that hold the beginning of a sequence, in order of position."""
        found: list[int] = []
        if self._prefix_cache and sequence.skippable:
            # With the token after those skipped, for it can be computed in a block that is found.
            for index in range((sequence.skippable + 1) // KV_BLOCK_SIZE):
                block = self._pool.find(sequence.block_key(index))
                if block is None:
                    break
                found.append(block)
        return found

    def _admit(self, sequence: Sequence, found: list[int]) -> bool:
        """Let a waiting sequence in if there are blocks for all of its tokens, now or in prospect.

        Not for the first piece alone: else it would soon have to give its blocks back.
        """
        behind = [each for each in self._running if each.rank > sequence.rank]
        most_gain = sum(each.blocks_for(len(each.token_ids)) for each in behind)
        if self._lacking(sequence, found) > most_gain:
            return False
        while self._lacking(sequence, found) > 0:
            if not self._running or self._running[-1].rank < sequence.rank:
                return False
            self._preempt_last()
        self._pool.share(found)
        for block in found:
            sequence.add_block(block)
        self._skip(sequence, min(len(found) * KV_BLOCK_SIZE, sequence.skippable))
        insort(self._running, sequence, key=_by_rank)
        self._waiting.remove(sequence)
        return True

    def _skip(self, sequence: Sequence, tokens: int) -> None:
        sequence.computed = tokens
        self.cached_tokens += tokens
        if sequence.generated == 0:
            sequence.cached_tokens = tokens

    def _lacking(self, sequence: Sequence, found: list[int]) -> int:
        """Return how many more blocks there would have to be to let a sequence in."""
        needed = sequence.blocks_for(len(sequence.token_ids))
        held = sum(map(self._pool.is_held, found))
        if len(found) * KV_BLOCK_SIZE > sequence.skippable and self._pool.is_held(found[-1]):
            held -= 1  # the last of its tokens is computed again, in a copy
        promised = sum(
            each.blocks_for(len(each.token_ids)) - len(each.block_ids) for each in self._running
        )
        return needed - held + promised - self._pool.available

    def _may_write(self, sequence: Sequence, length: int) -> bool:
        """Whether the next tokens go into a block that a sequence has; most decoded tokens do."""
        start, blocks = sequence.computed, sequence.block_ids
        room = len(blocks) * KV_BLOCK_SIZE - start
        return length <= room and self._pool.is_writable(blocks[start // KV_BLOCK_SIZE])

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Preempt those of higher ranks until there are blocks for the next tokens."""
        while self._blocks_needed(sequence, length) > self._pool.available:
            if self._running[-1] is sequence:
                return False  # it waits for those of lower ranks
            self._preempt_last()
        return True

    def _blocks_needed(self, sequence: Sequence, length: int) -> int:
        more = sequence.blocks_for(sequence.computed + length) - len(sequence.block_ids)
        return more + self._writes_to_shared(sequence)

    def _writes_to_shared(self, sequence: Sequence) -> bool:
        index = sequence.computed // KV_BLOCK_SIZE
        blocks = sequence.block_ids
        return index < len(blocks) and self._pool.is_shared(blocks[index])

    def _take_blocks(self, sequence: Sequence, length: int) -> tuple[int, int] | None:
        """Give a sequence blocks that it may write its next tokens to; return what to copy."""
        copy = None
        index = sequence.computed // KV_BLOCK_SIZE
        if self._writes_to_shared(sequence):
            copy = (sequence.block_ids[index], self._pool.allocate())
            sequence.replace_block(index, copy[1])
            self._pool.release(copy[:1])
        elif index < len(sequence.block_ids):
            self._pool.forget(sequence.block_ids[index])
        while len(sequence.block_ids) < sequence.blocks_for(sequence.computed + length):
            sequence.add_block(self._pool.allocate())
        return copy

    def _preempt_last(self) -> None:
        victim = self._running[-1]
        insort(self._waiting, victim, key=_by_rank)
        self._running.pop()
        self._pool.release(victim.drop_blocks())
        self.preemptions += 1


def _lead(leader: Sequence, followers: list[Sequence]) -> None:
    leader.leader = None
    leader.followers = followers
    for follower in followers:
        follower.leader = leader


def _leave(follower: Sequence) -> None:
    """Make a sequence read its prompt by itself from now on."""
    if follower.leader is not None:
        if follower in follower.leader.followers:
            follower.leader.followers.remove(follower)
        follower.leader = None
