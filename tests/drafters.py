"""Drafters that guess what a test tells them to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ordered

from bitllm.engine.sequence import Sequence
from bitllm.engine.speculation import NgramDrafter

Guess = Callable[[Sequence, list[int]], int]
"""From a sequence and the tokens before, guesses included, to the next guess."""


class Guesses:
    """Guesses that claim to be certain.

    Args:
        guess: makes them, one after another.
        count: how many of the most there may be; None = all of them.
    """

    def __init__(self, guess: Guess, count: Callable[[int], int] | None = None) -> None:
        self._guess = guess
        self._count = count or (lambda most: most)
        self.forgotten: list[Sequence] = []
        self.restarts = 0
        self.closed = False

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        return [1.0] * self._count(most) if most > 0 else []

    def seconds(self, depth: int) -> float:
        return 0.0

    def draft(self, counts: Mapping[Sequence, int]) -> Mapping[Sequence, Ordered[int]]:
        drafts = {}
        for sequence, count in counts.items():
            tokens = list(sequence.token_ids)
            for _ in range(count):
                tokens.append(self._guess(sequence, tokens))
            drafts[sequence] = tokens[len(sequence.token_ids) :]
        return drafts

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence)

    def restart(self) -> None:
        self.restarts += 1

    def close(self) -> None:
        self.closed = True


class EagerNgrams(NgramDrafter):
    """N-grams that are believed however often they were wrong."""

    def chances(self, sequence: Sequence, most: int) -> list[float]:
        found = super().chances(sequence, 1)
        return [1.0] * most if found else []
