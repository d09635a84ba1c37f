"""Guesses at coming tokens that are computed along with a known one, where that saves time.

A row of a step costs less than a step: the weights are read once for all rows. So tokens that are
likely to come are computed on trial, the model draws its own token at each of these rows, and as
long as guess and drawn token agree, the next row is one that would have been computed anyway.
Draws depend on the seed and the place alone and logits not on the chunking, so the text is the one
without guesses, to the bit, at any temperature. What is guessed, and how much, may therefore depend
on anything, such as how long steps have taken.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from typing import Protocol

from bitllm.engine.ngrams import NgramIndex, first_rates
from bitllm.engine.scheduler import Run, Scheduler
from bitllm.engine.sequence import Sequence

__all__ = ["Drafter", "NgramDrafter", "Speculation", "StepCosts"]

MOST_SEQUENCES = 16
"""With more of them that write, their rows use the decoder's time up, and none is left over."""

MOST_GUESSES = 64
"""Of a step."""

SHORTEST_STEP = 200e-6
"""Seconds of a step below which looking for guesses costs more than they bring."""

LEAST_CHANCE = 0.1
"""Guesses less likely than this cannot pay: a row costs more than that part of a step."""

_GAIN = 1.03  # tokens a second, against those without guesses, that are worth the trouble
_PATIENCE = 1.25  # a step may take this much longer for a sequence that gains nothing by it
_SHARED_LEARNING = 1 / 128  # weight of the last token in the rates that new texts begin with


class Drafter(Protocol):
    """Something that guesses tokens."""

    def chances(self, sequence: Sequence, most: int) -> Ordered[float]:
        """Return how likely the first 1, 2, ... guesses at the next tokens are all right."""

    def seconds(self, depth: int) -> float:
        """Return how long it takes to make `depth` guesses for each of some sequences."""

    def draft(self, counts: Mapping[Sequence, int]) -> Mapping[Sequence, Ordered[int]]:
        """Return guesses at the next tokens of some sequences, at most so many of each."""

    def forget(self, sequence: Sequence) -> None:
        """Free what is held for a sequence that will not be asked about again."""

    def restart(self) -> None:
        """Free what is held for all sequences: after a step that broke off."""

    def close(self) -> None:
        """Free everything."""


class NgramDrafter:
    """Guesses that a text goes on as it did where its last tokens stood before."""

    def __init__(self) -> None:
        self._rates = first_rates()

    def chances(self, sequence: Sequence, most: int) -> Ordered[float]:
        """Return how likely the text goes on as it did; see `Drafter`."""
        if sequence.ngrams is None:
            longest = sequence.prompt_length + sequence.request.max_tokens
            # The first drawn token is foretold by nobody: the index comes after it.
            sequence.ngrams = NgramIndex(
                sequence.token_ids, len(sequence.token_ids), longest, self._rates
            )
        for kind, right in sequence.ngrams.read():
            self._rates[kind] += _SHARED_LEARNING * (right - self._rates[kind])
        return sequence.ngrams.chances(most, LEAST_CHANCE)

    def seconds(self, depth: int) -> float:
        """Return 0: next to a step it takes no time."""
        return 0.0

    def draft(self, counts: Mapping[Sequence, int]) -> Mapping[Sequence, Ordered[int]]:
        """Return how these texts went on; see `Drafter`."""
        return {
            sequence: sequence.ngrams.foretell(count)
            for sequence, count in counts.items()
            if sequence.ngrams is not None
        }

    def forget(self, sequence: Sequence) -> None:
        """Do nothing: an index ends with its sequence."""

    def restart(self) -> None:
        """Do nothing: what was read of a text stays true."""

    def close(self) -> None:
        """Do nothing."""


class StepCosts:
    """How long a step takes by its rows, from those that were made.

    A figure that is old is dropped, so that what was slow once is tried again. Between the rows
    that are known time is taken to grow evenly; beyond them as little as may be hoped, so that more
    rows are tried where they could pay.
    """

    STALE = 512
    """Steps after which a figure is dropped."""

    FRESH = 16
    """Steps for which a curve is used again, unless a figure changes by a fifth."""

    HOPE = 0.4
    """What a further row costs at best, as a part of the mean row of the largest known step."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, int]] = {}  # rows: (seconds, number of the step)
        self._steps = 0
        self._curve: tuple[int, int, list[float]] = (0, 0, [])  # first, at which step, seconds

    def add(self, rows: int, seconds: float) -> None:
        """Take in a step; one that took twice as long as expected counts as no more than that."""
        self._steps += 1
        seconds = max(seconds, 1e-9)
        before = self._known[rows][0] if rows in self._known else 0.0
        if before:
            seconds = before + (min(seconds, 2 * before) - before) / 4
        if abs(seconds - before) > 0.2 * before:
            self._curve = (0, 0, [])
        self._known[rows] = (seconds, self._steps)

    def knows(self, rows: int) -> bool:
        """Whether there is a figure for just this many rows that is not old."""
        return rows in self._known and self._steps - self._known[rows][1] < self.STALE

    def seconds(self, rows: int) -> float:
        """Return the seconds of a step of just this many rows, which must be known."""
        return self._known[rows][0]

    def curve(self, first: int, last: int) -> list[float]:
        """Return the seconds of steps of `first` to `last` rows, or to more.

        Args:
            first: must be known.
            last: the most rows that are of interest.
        """
        begins, step, seconds = self._curve
        if begins != first or self._steps - step >= self.FRESH or len(seconds) <= last - first:
            seconds = self._points(first, last)
            self._curve = (first, self._steps, seconds)
        return seconds

    def _points(self, first: int, last: int) -> list[float]:
        rows = sorted(count for count in self._known if count >= first and self.knows(count))
        seconds = [self._known[count][0] for count in rows]
        if len(rows) == 1:
            slope = self.HOPE * seconds[0] / rows[0]
        else:
            slope = max(0.0, (seconds[-1] - seconds[0]) / (rows[-1] - rows[0]))
        rows.append(max(last, rows[-1] + 1))
        seconds.append(seconds[-1] + slope * (rows[-1] - rows[-2]))
        return [_between(rows, seconds, count) for count in range(first, last + 1)]


def _between(rows: list[int], seconds: list[float], wanted: int) -> float:
    right = min(max(1, bisect.bisect_left(rows, wanted)), len(rows) - 1)
    part = (wanted - rows[right - 1]) / (rows[right] - rows[right - 1])
    return seconds[right - 1] + part * (seconds[right] - seconds[right - 1])


class Speculation:
    """Decides which sequences get how many guesses in a step.

    Guesses are added, the likeliest first, as long as they raise the number of tokens a second
    that is to be expected of the step. They never keep a sequence that gains nothing waiting for
    long, and none are made in a step that reads a prompt.

    Args:
        drafters: who guesses; in each step the one whose guesses promise most.
        most: guesses at once for a sequence.
        max_batch_tokens: most rows of a step.
        shortest: seconds of a step below which nothing is guessed.
    """

    def __init__(
        self,
        drafters: Ordered[Drafter],
        most: int,
        max_batch_tokens: int,
        *,
        shortest: float = SHORTEST_STEP,
    ) -> None:
        self._shortest = shortest
        self._drafters = drafters
        self._most = most
        self._max_batch_tokens = max_batch_tokens
        self.costs = StepCosts()

    def lengthen(self, runs: list[Run], scheduler: Scheduler) -> list[Run]:
        """Return the runs of a step, all of which decode, with guesses where they pay."""
        rows = len(runs)
        room = min(MOST_GUESSES, self._most * rows, self._max_batch_tokens - rows)
        if rows > MOST_SEQUENCES or room < 1:
            return runs
        if not self.costs.knows(rows):
            return runs  # it is found out now
        if self.costs.seconds(rows) < self._shortest:
            return runs
        counts: dict[Sequence, int] = {}
        curve: list[float] = []
        best, chosen = 0.0, None
        for drafter in self._drafters:
            chances = [drafter.chances(run.sequence, self._may_guess(run.sequence)) for run in runs]
            if not any(chances):
                continue
            curve = curve or self.costs.curve(rows, rows + room)
            gain, shares = _divide(chances, curve[: room + 1], drafter)
            if gain > best:
                best, chosen = gain, drafter
                counts = {run.sequence: n for run, n in zip(runs, shares, strict=True) if n}
        return runs if chosen is None else _with_guesses(runs, chosen.draft(counts), scheduler)

    def observe(self, runs: Ordered[Run], seconds: float) -> None:
        """Take in how long a step took, all runs of which decode."""
        if self._most and len(runs) <= MOST_SEQUENCES:
            self.costs.add(len(runs) + sum(len(run.draft) for run in runs), seconds)

    def forget(self, sequence: Sequence) -> None:
        """Free what is held for a sequence that makes no more steps."""
        for drafter in self._drafters:
            drafter.forget(sequence)

    def restart(self) -> None:
        """Free what is held for all sequences: after a step that broke off."""
        for drafter in self._drafters:
            drafter.restart()

    def close(self) -> None:
        """Free everything."""
        for drafter in self._drafters:
            drafter.close()

    def _may_guess(self, sequence: Sequence) -> int:
        """Return the most guesses for a sequence: the token after the last one is drawn, too."""
        if sequence.form is not None:
            return 0  # the mask of a row follows from the token before it
        return min(self._most, sequence.request.max_tokens - sequence.generated - 1)


def _divide(
    chances: Ordered[Ordered[float]], curve: Ordered[float], drafter: Drafter
) -> tuple[float, list[int]]:
    """Return what guesses bring, and how many for each sequence.

    Args:
        chances: for each sequence, how likely its first 1, 2, ... guesses are right.
        curve: seconds of a step with 0, 1, ... guesses.
        drafter: who makes them.

    Returns:
        Tokens a second divided by those without guesses, 0 where none pay; and the counts.
    """
    order = sorted(((-p, i) for i, row in enumerate(chances) for p in row))[: len(curve) - 1]
    expected = [1.0] * len(chances)
    taken = [0] * len(chances)
    plain, best, best_count = len(chances) / curve[0], _GAIN, 0
    for count, (minus, index) in enumerate(order, 1):
        expected[index] -= minus
        taken[index] += 1
        seconds = curve[count] + drafter.seconds(max(taken))
        gain = sum(expected) / seconds / plain
        if gain > best and min(expected) * curve[0] * _PATIENCE >= seconds:
            best, best_count = gain, count
    shares = [0] * len(chances)
    for _, index in order[:best_count]:
        shares[index] += 1
    return (best if best_count else 0.0), shares


def _with_guesses(
    runs: list[Run], drafts: Mapping[Sequence, Ordered[int]], scheduler: Scheduler
) -> list[Run]:
    return [
        scheduler.lengthen(run, draft) if (draft := drafts.get(run.sequence)) else run
        for run in runs
    ]
