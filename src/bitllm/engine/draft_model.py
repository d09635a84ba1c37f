"""A second, smaller model that guesses the tokens of the first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ordered
from dataclasses import replace

from bitllm.backends.base import KV_BLOCK_SIZE, Decoder
from bitllm.engine.batch import BatchBuilder
from bitllm.engine.scheduler import Run
from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import LEAST_CHANCE
from bitllm.errors import QuantizationError

__all__ = ["DraftModel"]

_FIRST_RATE = 0.8
_LEARNING = 1 / 8  # weight of the last guess
_FORGETTING = 1 / 256  # a step without guesses: what failed is tried again


class DraftModel:
    """Draws guesses from a decoder of its own, with the draws of the requests themselves.

    Because the noise of a draw depends on seed, choice, place and token id alone, a model that is
    nearly the same draws nearly the same tokens, also at high temperatures.

    Each sequence has keys and values of its own here. Those that were used longest ago are given up
    when there is no room, and computed again from the tokens when they are needed.

    Args:
        decoder: a model of the same vocabulary; closed with this object.
        max_batch_tokens: most token rows of a step, as it was loaded.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._decoder = decoder
        self._max_batch_tokens = max_batch_tokens
        self._clock = clock
        self._batches = BatchBuilder(decoder.spec.vocab_size)
        self._shadows: OrderedDict[Sequence, Shadow] = OrderedDict()  # longest unused first
        self._free: list[int] = []
        self._step_seconds = 0.0
        self._broken = False

    def chances(self, sequence: Sequence, most: int) -> Ordered[float]:
        """Return how likely guesses are right, by those that were; see `Drafter`."""
        if self._broken:
            return []
        shadow = self._shadow_of(sequence)
        shadow.learn(sequence.token_ids)
        room = min(self._decoder.spec.max_context, self._decoder.kv_capacity * KV_BLOCK_SIZE)
        count = min(most, room - len(sequence.token_ids) + 1)
        powers = (shadow.rate**ahead for ahead in range(1, count + 1))
        return [chance for chance in powers if chance >= LEAST_CHANCE]

    def seconds(self, depth: int) -> float:
        """Return how long so many steps of this model took lately; see `Drafter`."""
        return depth * self._step_seconds

    def draft(self, counts: Mapping[Sequence, int]) -> Mapping[Sequence, Ordered[int]]:
        """Draw guesses, one step for all sequences after another; see `Drafter`."""
        shadows = {sequence: self._shadow_of(sequence) for sequence in counts}
        for sequence, shadow in shadows.items():
            shadow.begin(sequence)
            self._shadows.move_to_end(sequence)
        try:
            for _ in range(max(counts.values())):
                wanted = [shadows[each] for each, n in counts.items() if shadows[each].guessed < n]
                if not self._draw(wanted):
                    break
        except QuantizationError:
            self._broken = True  # it guesses no more; the texts do not depend on it
            self.restart()
            return {}
        return {sequence: shadow.end() for sequence, shadow in shadows.items()}

    def forget(self, sequence: Sequence) -> None:
        """Free the keys and values of a sequence; see `Drafter`."""
        self._shadows.pop(sequence, None)

    def restart(self) -> None:
        """Free all keys and values; see `Drafter`."""
        self._shadows.clear()
        self._free = []

    def close(self) -> None:
        """Free the model."""
        self.restart()
        self._decoder.close()

    def _shadow_of(self, sequence: Sequence) -> Shadow:
        if sequence not in self._shadows:
            self._shadows[sequence] = Shadow(sequence)
        return self._shadows[sequence]

    def _draw(self, shadows: list[Shadow]) -> bool:
        """Draw one guess for each; return whether any was drawn. Long texts take several steps."""
        drawn = False
        waiting = [
            shadow
            for shadow in shadows
            if shadow.state.pending and self._make_room(shadow, shadows)
        ]
        while waiting:
            left, runs = self._max_batch_tokens, []
            for shadow in waiting:
                if length := min(shadow.state.pending, left):
                    runs.append(Run(shadow.state, length))
                    left -= length
            began = self._clock()
            tokens = iter(self._decoder.forward(self._batches.build(runs)).sampled.tolist())
            if all(run.length <= 2 for run in runs):  # the last guess and the token after it
                self._note_time(self._clock() - began)
            asked = {run.sequence: run for run in runs}
            for shadow in waiting:
                if (run := asked.get(shadow.state)) is not None:
                    samples, shadow.state.computed = run.samples, run.end
                    drawn |= samples and shadow.take(next(tokens))
            waiting = [each for each in waiting if each.state.pending > 0 and not each.answered]
        for shadow in shadows:
            shadow.answered = False
        return drawn

    def _note_time(self, seconds: float) -> None:
        before = self._step_seconds or seconds
        self._step_seconds = before + (min(seconds, 2 * before) - before) / 4

    def _make_room(self, shadow: Shadow, others: list[Shadow]) -> bool:
        """Give a shadow blocks for all its tokens; return whether there were enough."""
        state = shadow.state
        while len(state.block_ids) < state.blocks_for(len(state.token_ids)):
            if not self._free and not self._find_free(others):
                return False
            state.add_block(self._free.pop())
        return True

    def _find_free(self, needed: list[Shadow]) -> bool:
        """Look for blocks that nobody has, or take those of the sequence unused the longest."""
        keep = {id(shadow) for shadow in needed}
        while True:
            taken = {block for each in self._shadows.values() for block in each.state.block_ids}
            self._free = [
                block for block in reversed(range(self._decoder.kv_capacity)) if block not in taken
            ]
            if self._free:
                return True
            idle = [
                sequence
                for sequence, each in self._shadows.items()
                if id(each) not in keep and each.state.block_ids
            ]
            if not idle:
                return False
            self._shadows[idle[0]].state.drop_blocks()


class _NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Shadow:
    """A sequence as the draft model sees it: with guesses where the first one has no token yet.

    Attributes:
        state: the tokens, and what of them is computed in the draft model.
        rate: how often a guess was right lately.
        guessed: guesses made since `begin`.
        answered: whether the guess that is being waited for was drawn, or none could be.
    """

    def __init__(self, sequence: Sequence) -> None:
        request = replace(
            sequence.request,
            readout=None,
            grammar=None,
            stop_strings=(),
            top_logprobs=-1,
            adapter=None,
        )
        self.state = Sequence(request, _NoText, sequence.choice)
        self.rate = _FIRST_RATE
        self.guessed = 0
        self.answered = False
        self._known = sequence.prompt_length  # tokens that are not guesses
        self._judged = True

    def learn(self, token_ids: Ordered[int]) -> None:
        """Compare the last guesses with the tokens that have come."""
        if self._judged:
            self.rate += _FORGETTING * (_FIRST_RATE - self.rate)
        elif len(token_ids) > self._known:
            self._judged = True
            guesses = self.state.token_ids[self._known :]
            for guess, token in zip(guesses, token_ids[self._known :], strict=False):
                self.rate += _LEARNING * ((guess == token) - self.rate)

    def begin(self, sequence: Sequence) -> None:
        """Take over the tokens that have come; what is computed of right guesses stays."""
        state, tokens = self.state, sequence.token_ids
        same = self._known
        while same < min(len(tokens), len(state.token_ids)) and (
            state.token_ids[same] == tokens[same]
        ):
            same += 1
        state.token_ids[same:] = tokens[same:]
        # The last token is computed in any case: its row draws.
        state.computed = min(state.computed, same, len(tokens) - 1)
        state.seen = None if sequence.seen is None else sequence.seen.after()
        self._known = len(tokens)
        self.guessed = 0

    def take(self, token: int) -> bool:
        """Add a guess; return whether there is one."""
        self.answered = True
        if token < 0:
            return False
        self.state.token_ids.append(token)
        self.guessed += 1
        if self.state.seen is not None:
            self.state.seen.add(token)
        return True

    def end(self) -> list[int]:
        """Return the guesses."""
        self._judged = self.guessed == 0
        return self.state.token_ids[self._known :]
